"""Random command lines over random folders: no traceback, and nothing finished is ever lost.

Hypothesis draws a state (a finished run, one that died, an evaluation, adapters, data, models; each
whole, cut short, emptied, overwritten, of an earlier version, or gone), a disk (good, read-only or
full from the n-th write on) and a command line that refers to them. Whatever comes of it:

* the exit status is 0, 1, 2 or 130, and a failure is one paragraph that fedsim foresaw;
* after a failure every file that was there is there as it was, but for the lines of an unfinished
  round; after a success no other folder than the one asked for has changed;
* a run or an evaluation that was asked to be replaced is whole, the old one or the new.

`FEDSIM_FUZZ=10000` draws as many (derandomised unless `FEDSIM_FUZZ_SEED` names a seed); here 120 in
this process, and 3 as processes of their own. About 40 s.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fedsim import cli, simulate, weights
from fedsim.config import KEYS, build, resolved
from fedsim.data.embedded import finance

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
]
COUNT = int(os.environ.get("FEDSIM_FUZZ", "120"))
SEED = int(os.environ.get("FEDSIM_FUZZ_SEED", "20261201"))
PROCESSES = max(3, COUNT // 50)

PLACES = ["runs/done", "runs/died", "evaluations/one", "adapter", "data", "model", "nowhere",
          "runs/done/adapters/round_00001", "notes", "study.toml", "app"]  # fmt: skip
VALUES = [
    "0",
    "1",
    "-1",
    "2",
    "1e-3",
    "nan",
    "inf",
    "true",
    '""',
    "[]",
    "['q_proj']",
    "q_proj",
    "x/y",
    "cuda",
    "cpu",
    "bfloat16",
    "nf4",
    "lenient",
    "flora",
    "newswire",
    "embedded",
    "directory",
    "hub",
    "runs",
    "notes",
    "1e400",
    "{}",
    "\u00e9",
    "99999999999999",
]
COMMON = ["run.seed", "run.name", "run.out", "run.protocol", "run.device", "model.name",
          "model.dtype", "model.quantisation", "adapter.rank", "adapter.targets", "adapter.dora",
          "data.domain", "data.source", "data.dir", "data.train", "data.max_length", "data.limit",
          "clients.number", "clients.partition", "server.strategy", "server.rounds",
          "server.fraction", "train.steps", "train.batch", "evaluate.tasks",
          "evaluate.limit"]  # fmt: skip
DAMAGE = ["whole"] * 6 + ["gone", "cut", "emptied", "garbage", "older", "nulls", "directory"]


@pytest.fixture(scope="module")
def template(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder with one of everything, made by fedsim itself, in relative paths."""
    home = tmp_path_factory.mktemp("template")
    before = Path.cwd()
    os.chdir(home)
    shutil.copytree(tiny("llama"), "model")
    values = {
        "run": {"name": "done", "out": "runs"},
        "model": {"name": "model", "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]},
        "data": {"source": "embedded", "max_length": 256, "limit": 16},
        "clients": {"number": 2},
        "server": {"rounds": 1, "fraction": 0.5, "export_every": 1},
        "train": {"steps": 1, "batch": 1, "lr_max": 1e-2, "slots": 2, "budget_tokens": 256},
        "evaluate": {"limit": 1},
    }
    config = build(values, "fuzz")
    Path("study.toml").write_text(tomli_w.dumps(resolved(config)))
    simulate.run(config)
    values["run"]["name"] = "died"
    values["server"]["rounds"] = 2  # type: ignore[index]
    calls = 0

    def dies(*arguments: Any) -> None:
        nonlocal calls
        if (calls := calls + 1) == 3:
            raise KeyboardInterrupt
        commit(*arguments)

    commit, simulate.commit = simulate.commit, dies  # type: ignore[assignment]
    try:
        simulate.run(build(values, "fuzz"))
    except KeyboardInterrupt:
        pass
    finally:
        simulate.commit = commit  # type: ignore[assignment]
    shutil.copytree("runs/done/adapters/round_00001", "adapter")
    command("eval", "adapter", "--domain", "finance", "--set", "data.source=embedded", "--limit",
            "1", "--out", "evaluations/one", "--set", "model.dtype=float32")  # fmt: skip
    (home / "data" / "finance").mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in finance.train()[:16])
    (home / "data" / "finance" / "fingpt_sentiment.train.jsonl").write_text(rows)
    (home / "app").mkdir()
    (home / "app" / "pyproject.toml").write_text("[tool.flwr.app.config]\nx = 1\n")
    (home / "notes").mkdir()
    (home / "notes" / "thesis.tex").write_text("years of work")
    for lock in home.rglob(".*.lock"):
        lock.unlink()
    yield home
    os.chdir(before)


def command(*words: str) -> tuple[int, str]:
    """One command line in this process: its status and what it wrote to stderr."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["fedsim", *words]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
        code: Any = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.argv = argv
    return int(code), err.getvalue()


@st.composite
def lines(draw: Any) -> list[str]:
    """A command line as somebody may type it."""
    name = draw(st.sampled_from(["run"] * 4 + ["eval"] * 4 + ["plan", "list", "doctor", "nope"]))
    words = [name]
    place = st.sampled_from(PLACES)
    if name in ("run", "plan"):
        words += draw(st.lists(place, max_size=1)) or draw(
            st.sampled_from([["study.toml"], ["study.toml"], ["runs/died"]])
        )
    elif name == "eval":
        words += draw(st.lists(place, min_size=1, max_size=3))
    flags = {
        "run": ["--resume", "--fresh", "--domain finance", "--domain medical",
                "--data-dir data", "--data-dir nowhere", "--reference central", "--reference x"],
        "plan": ["--domain finance", "--data-dir data"],
        "eval": ["--fresh", "--domain finance", "--domain coding", "--tasks newswire",
                 "--tasks fpb", "--limit 1", "--limit 0", "--limit x", "--protocol flowertune",
                 "--protocol other", "--backend transformers", "--backend hf", "--base model",
                 "--base nowhere", "--data-dir data", "--out runs/done", "--out notes",
                 "--out evaluations/one", "--out evaluations/two", "--out study.toml"],
        "list": ["--keys", "--options"], "doctor": [], "nope": [],
    }[name]  # fmt: skip
    if flags:
        for flag in draw(st.lists(st.sampled_from(flags), max_size=3, unique=True)):
            words += flag.split()
    if name in ("run", "plan", "eval"):
        keys = st.sampled_from(COMMON * 4 + list(KEYS))
        for key in draw(st.lists(keys, max_size=2)):
            words += ["--set", f"{key}={draw(st.sampled_from(VALUES))}"]
        if name == "eval" and draw(st.booleans()):
            words += ["--set", "data.source=embedded", "--limit", "1"]
    return words


@st.composite
def states(draw: Any) -> list[tuple[str, str, int]]:
    """What is wrong with which file: (damage, kind of file, number to choose by)."""
    return draw(st.lists(
        st.tuples(st.sampled_from(DAMAGE), st.sampled_from(PLACES), st.integers(0, 1 << 20)),
        max_size=2,
    ))  # fmt: skip


DISKS = st.one_of(
    st.none(), st.none(), st.none(),
    st.tuples(st.sampled_from([errno.ENOSPC, errno.EROFS, errno.EACCES]), st.integers(0, 25)),
)  # fmt: skip


def damage(home: Path, found: list[tuple[str, str, int]]) -> None:
    for how, place, number in found:
        path = home / place
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if how == "whole" or not files or not files[0].exists():
            continue
        file = files[number % len(files)]
        if how == "gone":
            file.unlink()
        elif how == "cut":
            content = file.read_bytes()
            file.write_bytes(content[: number % (len(content) + 1)])
        elif how == "emptied":
            file.write_bytes(b"")
        elif how == "garbage":
            file.write_bytes(random.Random(number).randbytes(number % 300))
        elif how == "nulls":
            file.write_text("null")
        elif how == "directory":
            file.unlink()
            file.mkdir()
        elif how == "older" and file.suffix == ".json":
            try:
                value = json.loads(file.read_text())
            except ValueError:
                continue
            if isinstance(value, dict) and value:
                value.pop(sorted(value)[number % len(value)])
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                for row in value:
                    row.pop(sorted(row)[number % len(row)], None)
            file.write_text(json.dumps(value))


@contextmanager
def disk(home: Path, how: tuple[int, int] | None, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the n-th call on that changes something below `home`, the disk refuses."""
    if how is None:
        yield
        return
    code, after = how
    calls = 0

    def refuses(real: Callable[..., Any], changes: Callable[..., bool]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            if changes(*arguments, **named):
                calls += 1
                if calls > after:
                    raise OSError(code, os.strerror(code), str(arguments[0]))
            return real(*arguments, **named)

        return called

    def below(path: Any, *_: Any, **__: Any) -> bool:
        return str(path).startswith((str(home), "runs", "evaluations", "adapter", "notes"))

    def writes(path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return below(path) and any(c in mode for c in "wax+")

    with patch.context() as patched:
        patched.setattr(Path, "open", refuses(Path.open, writes))
        for name in ("mkdir", "rename", "replace", "unlink"):
            patched.setattr(Path, name, refuses(getattr(Path, name), below))
        yield


def content(home: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*")
        if p.is_file() and not p.name.endswith((".lock", ".partial")) and ".partial" not in p.parts
        and not any(part.endswith(".partial") for part in p.relative_to(home).parts)
    }  # fmt: skip


def lost(
    words: list[str], code: int, before: dict[str, bytes], after: dict[str, bytes]
) -> list[str]:
    """Files that were there and are not as they were, without leave."""
    changed = [name for name in before if after.get(name) != before[name]]
    if words[0] not in ("run", "eval"):
        return changed
    unfinished = tuple(
        f"runs/{run}/{log}" for run in ("died", "done")
        for log in ("clients.jsonl", "rounds.jsonl", "eval/")
    )  # fmt: skip
    if words[0] == "run" and "--resume" in words:
        # Lines behind the checkpoint are cut; a run that goes on appends to what it has.
        if code == 0:
            return [n for n in changed if not n.startswith("runs/")]
        return [n for n in changed if not n.startswith((*unfinished, "runs/died/", "runs/done/"))
                or n.endswith(("config.toml", "environment.json"))]  # fmt: skip
    if words[0] == "run" and code == 0:
        return [n for n in changed if not n.startswith("runs/") or ("--fresh" not in words
                and not n.endswith(("report.html", ".svg")))]  # fmt: skip
    if words[0] == "run":
        whole = {n.split("/")[1] for n in changed if n.startswith("runs/")}
        # A run that had been asked to replace another may have failed after its first checkpoint.
        replaced = {r for r in whole if "--fresh" in words
                    and f"runs/{r}/checkpoint/state.safetensors" in after}  # fmt: skip
        return [n for n in changed if not (n.startswith("runs/") and n.split("/")[1] in replaced)]
    return [n for n in changed if not n.startswith(("evaluations/", "runs/done/evaluation/",
                                                    "runs/died/evaluation/"))]  # fmt: skip


def judged(words: list[str], code: int, err: str, before: Any, after: Any) -> None:
    assert code in (0, 1, 2, 130), (words, code, err)
    assert "Traceback" not in err and "unforeseen" not in err, (words, err)
    if code == 1:
        assert "error:" in err, (words, err)
    assert lost(words, code, before, after) == [], (words, code, err)
    assert after.get("notes/thesis.tex", b"") == before.get("notes/thesis.tex", b"")


def test_anything_in_this_process(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setattr(weights, "_package_file", lambda alias: None)  # no model but the tiny one
    seen: dict[int, int] = {}
    number = 0

    @seed(SEED)
    @settings(max_examples=COUNT, deadline=None, database=None, print_blob=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(words=lines(), state=states(), how=DISKS)
    def one(words: list[str], state: Any, how: Any) -> None:
        nonlocal number
        number += 1
        home = tmp_path / f"{number}"
        shutil.copytree(template, home)
        os.chdir(home)
        try:
            damage(home, state)
            before = content(home)
            with disk(home, how, monkeypatch):
                code, err = command(*words)
            judged(words, code, err, before, content(home))
            seen[code] = seen.get(code, 0) + 1
        finally:
            os.chdir(template)
            shutil.rmtree(home, ignore_errors=True)

    one()
    print("exit statuses:", seen)
    assert seen[0] > COUNT // 20 and seen[1] > COUNT // 4


def test_anything_as_a_process(template: Path, tmp_path: Path) -> None:
    cases: list[Any] = []

    @seed(SEED + 1)
    @settings(max_examples=PROCESSES, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(words=lines(), state=states())
    def collect(words: list[str], state: Any) -> None:
        cases.append((words, state))

    collect()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    for number, (words, state) in enumerate(cases[:PROCESSES]):
        home = tmp_path / f"{number}"
        shutil.copytree(template, home)
        damage(home, state)
        before = content(home)
        done = subprocess.run(
            [sys.executable, "-m", "fedsim", *words], cwd=home, env=environment, text=True,
            capture_output=True, timeout=300,
        )  # fmt: skip
        judged(words, done.returncode, done.stderr, before, content(home))
        shutil.rmtree(home)
