"""A run that is killed anywhere and resumed ends bitwise like one that was never disturbed.

A child process counts what a run does: every training step, evaluation, file operation, and every
write twice, the second time with half of its bytes in the file. It kills itself with SIGKILL at a
chosen one of them: 20 seeded points spread over the whole run, a chain of kills in which resumed
runs die too, and the end of a round. What is compared is every file of the run's folder, bit for
bit, but for seconds and memory. Damaged, shortened and foreign checkpoints, and a full disk, must
end in an error with a remedy that works. About 45 s; this file is also the child's program.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch

from fedsim import checkpoint as checkpoints
from fedsim.checkpoint import FILE, PREVIOUS, Checkpoint
from fedsim.core import ServerState
from fedsim.errors import RunError

ROUNDS, ASKED = 4, 16  # questions of an evaluation
HALVES = ("half clients.jsonl", "half newswire.jsonl", "half adapter", "half state")
KINDS = (*HALVES, "write", "fsync", "replace", "link", "step", "answer")
TIMED = ("seconds", "peak_memory_mib")  # of a line in rounds.jsonl

# ---------------------------------------------------------------------------------- the child


class Bomb:
    """Counts events; at one of them the process kills itself, without any clean-up."""

    def __init__(self, at: int | None) -> None:
        self.at, self.names = at, []

    def event(self, name: str, prepare: Callable[[], object] = lambda: None) -> None:
        self.names.append(name)
        if len(self.names) == self.at:
            prepare()
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str, label: str) -> None:
        """Count every call of `owner.name`, before it acts."""
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.event(label)
            return real(*args, **kwargs)

        setattr(owner, name, counted)

    def arm(self) -> None:
        from fedsim.adapters import AdapterBank
        from fedsim.evaluate import scores

        for name in ("fsync", "replace", "link", "mkdir", "unlink", "rmdir"):
            self.before(os, name, name)
        self.before(AdapterBank, "step", "step")
        self.before(scores, "answer", "answer")
        open_path = Path.open

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            stream = open_path(path, mode, *args, **kwargs)
            return stream if mode in ("r", "rb") else Stream(stream, self, path.name)

        Path.open = opened  # type: ignore[method-assign]


class Stream:
    """A file that can be killed before and in the middle of a write, and before a cut."""

    def __init__(self, stream: Any, bomb: Bomb, name: str) -> None:
        self.stream, self.bomb, self.name = stream, bomb, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()

    def write(self, content: Any) -> int:
        self.bomb.event(f"write {self.name}")
        self.stream.write(content[: len(content) // 2])
        self.bomb.event(f"half {self.name}", self.stream.flush)
        self.stream.write(content[len(content) // 2 :])
        return len(content)

    def truncate(self, size: int) -> None:
        self.bomb.event(f"cut {self.name}")
        self.stream.truncate(size)


def _child(job: dict[str, Any]) -> int:
    from fedsim import cli, simulate
    from fedsim.config import build, read_toml

    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["FEDSIM_CACHE"] = job["cache"]
    bomb = Bomb(job["kill"])
    bomb.arm()
    if job["limit"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
        sys.argv = ["fedsim", "run", job["config"], *(["--resume"] if job["resume"] else [])]
        cli.main()
    else:
        simulate.run(build(read_toml(Path(job["config"])), "job"), resume=job["resume"])
        print(json.dumps(bomb.names))
    return 0


def _serve() -> None:
    """Import once, then fork a child for each line of standard input."""
    import transformers
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from fedsim import simulate  # noqa: F401
    from fedsim.data.embedded import finance

    transformers.utils.logging.disable_progress_bar()
    for name in ("train", "test"):  # the same rows in every run, written once
        setattr(finance, name, partial(list, getattr(finance, name)()))
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = _child(json.loads(line))
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException as failure:
                print(f"{type(failure).__name__}: {failure}", flush=True)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


# ---------------------------------------------------------------------------------- the tests


class Runs:
    """Starts runs in children. Every run has its own folder below `root`, and its own cache."""

    def __init__(self, root: Path, values: dict[str, Any]) -> None:
        self.root, self.values = root, values
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
            text=True,
        )  # fmt: skip

    def folder(self, name: str) -> Path:
        return self.root / name / "run"

    def copy(self, source: str, name: str) -> Path:
        """A second copy of a run's folder."""
        shutil.copytree(self.root / source, self.root / name)
        return self.folder(name)

    def run(
        self, name: str, *, resume: bool = False, kill: int | None = None,
        limit: int | None = None, **changes: Any,
    ) -> SimpleNamespace:  # fmt: skip
        """Exit code (negative: the signal), output, and events when it came to its end."""
        home = self.root / name
        home.mkdir(exist_ok=True)
        values = {k: dict(v) for k, v in self.values.items()}
        values["run"]["out"] = str(home)
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            values[section][leaf] = value
        (home / "job.toml").write_text(tomli_w.dumps(values))
        job = {"config": str(home / "job.toml"), "log": str(home / "log"), "resume": resume,
               "kill": kill, "limit": limit, "cache": str(home / "cache")}  # fmt: skip
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        text = (home / "log").read_text()
        done = code == 0 and limit is None
        events = json.loads(text.splitlines()[-1]) if done else []
        return SimpleNamespace(code=code, text=text, events=events)

    def killed(self, name: str, at: int) -> Path:
        """A run that died at its n-th event."""
        assert self.run(name, kill=at).code == -signal.SIGKILL
        return self.folder(name)

    def finished(self, name: str, **changes: Any) -> Path:
        """Resume to the end; what died before there was anything starts."""
        done = self.run(name, resume=self.folder(name).exists(), **changes)
        assert done.code == 0, done.text
        return self.folder(name)


@pytest.fixture(scope="module")
def runs(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:  # fmt: skip
    values = {
        "run": {"name": "run"},
        "model": {"name": str(tiny("llama")), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["all-linear"]},
        "data": {"source": "embedded", "max_length": 256, "limit": 120},
        "clients": {"number": 8},
        "server": {"rounds": ROUNDS, "fraction": 0.5, "export_every": 2},
        "train": {"steps": 2, "batch": 2, "lr_max": 1e-2, "lr_min": 1e-3, "slots": 4},
        "evaluate": {"limit": ASKED, "every": 1},
    }
    started = Runs(tmp_path_factory.mktemp("runs"), values)
    with started.server:
        yield started
    assert started.server.returncode == 0


@pytest.fixture(scope="module")
def whole(runs: Runs) -> SimpleNamespace:
    """The run that nothing disturbs: its outcome and its events."""
    done = runs.run("whole")
    assert done.code == 0, done.text
    return SimpleNamespace(outcome=outcome(runs.folder("whole")), events=done.events)


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSONL file, which must be whole."""
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def outcome(folder: Path) -> dict[str, Any]:
    """Every file of a run: its content, but for what a clock or the folder's place decides."""
    found: dict[str, Any] = {}
    for path in (p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == "rounds.jsonl":
            table = lines(path)
            found[name] = [{k: v for k, v in row.items() if k not in TIMED} for row in table]
        elif name == "config.toml":
            found[name] = tomllib.loads(path.read_text())
            del found[name]["run"]["out"]
        elif name == f"checkpoint/{FILE}":
            state = checkpoints.load_checkpoint(path.parent)
            assert state is not None
            found[name] = state.server.round, state.server.row.numpy().tobytes(), state.scores
        elif name == f"checkpoint/{PREVIOUS}":
            found[name] = "there"  # which earlier round it holds depends on where a run died
        else:
            found[name] = path.read_bytes()
    return found


def same(folder: Path, whole: SimpleNamespace) -> None:
    """A run's folder holds what the undisturbed run's does, and no file more."""
    got = outcome(folder)
    assert got.keys() == whole.outcome.keys()
    assert [name for name in got if got[name] != whole.outcome[name]] == []


def points(events: list[str], count: int = 20) -> list[int]:
    """Seeded events to die at: one of every kind, the rest drawn evenly along the run."""
    draw = random.Random(7)
    chosen = {
        draw.choice([n for n, name in enumerate(events, 1) if name.startswith(kind)])
        for kind in KINDS
    }
    while len(chosen) < count:
        part = len(chosen) - len(KINDS)
        span = len(events) / (count - len(KINDS))
        chosen.add(draw.randint(int(part * span) + 1, int((part + 1) * span)))
    return sorted(chosen)


def test_the_undisturbed_run_is_complete(runs: Runs, whole: SimpleNamespace) -> None:
    folder = runs.folder("whole")
    rounds, visits = lines(folder / "rounds.jsonl"), lines(folder / "clients.jsonl")
    assert [row["round"] for row in rounds] == [1, 2, 3, 4]
    assert len({(v["round"], v["client"]) for v in visits}) == len(visits) == 4 * ROUNDS
    answers = lines(folder / "eval" / "newswire.jsonl")
    assert len({(a["round"], a["index"]) for a in answers}) == len(answers) == ASKED * (ROUNDS + 1)
    exported = sorted(p.name for p in (folder / "adapters").iterdir())
    assert exported == ["round_00002", "round_00004"]
    halves = {name for name in whole.events if name.startswith("half")}
    assert {f"half {n}.jsonl" for n in ("rounds", "clients", "newswire")} < halves
    assert f"half {FILE}.partial" in halves and "half adapter_model.safetensors.partial" in halves


def test_the_moments_are_spread_over_the_run(whole: SimpleNamespace) -> None:
    chosen = points(whole.events)
    names = [whole.events[n - 1] for n in chosen]
    assert len(chosen) == 20
    assert [k for k in KINDS if not any(name.startswith(k) for name in names)] == []
    gaps = [b - a for a, b in zip([0, *chosen], [*chosen, len(whole.events)])]
    assert max(gaps) < len(whole.events) / 5


@pytest.mark.parametrize("number", range(20))
def test_killed_once(runs: Runs, whole: SimpleNamespace, number: int) -> None:
    at = points(whole.events)[number]
    runs.killed(f"once{number}", at)
    same(runs.finished(f"once{number}"), whole)


@pytest.mark.parametrize("name", ["rounds.jsonl", f"{FILE}.partial"])
def test_killed_inside_a_write_of_the_last_round(
    runs: Runs, whole: SimpleNamespace, name: str
) -> None:
    at = len(whole.events) - whole.events[::-1].index(f"half {name}")
    runs.killed(f"last-{name}", at)
    same(runs.finished(f"last-{name}"), whole)


def test_killed_again_and_again(runs: Runs, whole: SimpleNamespace) -> None:
    """A round takes fewer events than the larger of the two gaps, so every second try gains."""
    draw = random.Random(11)
    longest = len(whole.events) // 3
    deaths, code = 0, runs.run("chain", kill=9).code
    while code:
        assert code == -signal.SIGKILL and deaths < 40
        deaths += 1
        low, high = ((1, 20), (longest // 2, longest))[deaths % 2]
        there = runs.folder("chain").exists()
        code = runs.run("chain", resume=there, kill=draw.randint(low, high)).code
    assert deaths >= 6
    same(runs.folder("chain"), whole)


@pytest.fixture(scope="module")
def half(runs: Runs, whole: SimpleNamespace) -> str:
    """The name of a run that died in the first step of its third round."""
    ends = [n for n, event in enumerate(whole.events) if event == "half rounds.jsonl"]
    folder = runs.killed("half", whole.events.index("step", ends[1]) + 1)
    assert [row["round"] for row in lines(folder / "rounds.jsonl")] == [1, 2]
    return "half"


def test_k_rounds_and_k_more_are_2k(runs: Runs, whole: SimpleNamespace, half: str) -> None:
    """Also in another place and on a device that is named: both are free."""
    runs.copy(half, "elsewhere")
    assert runs.run("elsewhere", resume=True, run__device="cpu").code == 0
    same(runs.folder("elsewhere"), whole)


def test_a_finished_run_stays_as_it_is(runs: Runs, whole: SimpleNamespace) -> None:
    folder = runs.copy("whole", "again")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    runs.finished("again")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("key", "value"), [("train__lr_max", 2e-2), ("run__seed", 1), ("server__rounds", 5)]
)
def test_another_configuration_is_refused(
    runs: Runs, whole: SimpleNamespace, key: str, value: Any
) -> None:
    folder = runs.copy("whole", f"other-{key}")
    failed = runs.run(f"other-{key}", resume=True, **{key: value})
    assert failed.code == 70 and failed.text.startswith("CheckpointError")
    assert key.replace("__", ".") in failed.text and str(value) in failed.text
    same(folder, whole)


def test_a_key_that_was_unset_counts_too(runs: Runs, whole: SimpleNamespace) -> None:
    runs.copy("whole", "unset")
    failed = runs.run("unset", resume=True, data__train="fingpt")
    assert failed.code == 70 and "data.train" in failed.text


def test_nothing_to_resume(runs: Runs) -> None:
    failed = runs.run("never", resume=True)
    assert failed.code == 70 and failed.text.startswith("CheckpointError")
    assert "without --resume" in failed.text and not runs.folder("never").exists()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def next_round(path: Path) -> None:
    """One digit of the header: the checkpoint of round 2 says 3."""
    content = path.read_bytes()
    assert content.count(b'\\"round\\": 2, \\"scores') == 1
    path.write_bytes(content.replace(b'\\"round\\": 2, \\"scores', b'\\"round\\": 3, \\"scores'))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flip(path, -1),
    "header": next_round,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "garbage": lambda path: path.write_bytes(random.Random(3).randbytes(4096)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_and_its_remedy(
    runs: Runs, whole: SimpleNamespace, half: str, damage: str
) -> None:
    folder = runs.copy(half, f"bad-{damage}")
    state = folder / "checkpoint" / FILE
    DAMAGE[damage](state)
    failed = runs.run(f"bad-{damage}", resume=True)
    assert failed.code == 70 and failed.text.startswith("CheckpointError"), failed.text
    assert f"Move {PREVIOUS} over {FILE}" in failed.text and str(state) in failed.text
    (folder / "checkpoint" / PREVIOUS).replace(state)
    same(runs.finished(f"bad-{damage}"), whole)


def test_damage_without_an_earlier_checkpoint(runs: Runs, whole: SimpleNamespace) -> None:
    folder = runs.killed("first", whole.events.index("step") + 1)
    assert not (folder / "checkpoint" / PREVIOUS).exists()
    flip(folder / "checkpoint" / FILE, -1)
    failed = runs.run("first", resume=True)
    assert failed.code == 70 and "--fresh" in failed.text and PREVIOUS not in failed.text


@pytest.mark.parametrize("name", ["clients.jsonl", "eval/newswire.jsonl"])
@pytest.mark.parametrize("gone", [1, None])
def test_lost_lines_are_noticed(
    runs: Runs, whole: SimpleNamespace, name: str, gone: int | None
) -> None:
    home = f"lost-{gone}-{name.replace('/', '-')}"
    path = runs.copy("whole", home) / name
    path.unlink() if gone is None else os.truncate(path, path.stat().st_size - gone)
    failed = runs.run(home, resume=True)
    assert failed.code == 70 and failed.text.startswith("CheckpointError")
    assert str(path) in failed.text and "--fresh" in failed.text


def full(runs: Runs, name: str, limit: int, **changes: Any) -> int | None:
    """A run on a full disk: it must say so; returns the round of the checkpoint it leaves.

    A limit on the size of a file stands for the disk's end, in the middle of a write.
    """
    shutil.copytree(runs.root / "whole" / "cache", runs.root / name / "cache")
    failed = runs.run(name, limit=limit, **changes)
    assert failed.code == 1, failed.text
    assert "Traceback" not in failed.text
    error = failed.text[failed.text.index("error:") :]
    assert "cannot be written" in error and "Make room" in error and "--resume" in error
    saved = checkpoints.load_checkpoint(runs.folder(name) / "checkpoint")
    return saved and saved.server.round


def test_a_disk_full_of_answers(runs: Runs, whole: SimpleNamespace) -> None:
    answers = whole.outcome["eval/newswire.jsonl"].splitlines(keepends=True)
    assert full(runs, "full", len(b"".join(answers[: 3 * ASKED + 1])) - 9) == 2
    same(runs.finished("full"), whole)


def test_a_disk_too_full_for_a_checkpoint(runs: Runs, whole: SimpleNamespace) -> None:
    size = (runs.folder("whole") / "checkpoint" / FILE).stat().st_size
    assert full(runs, "tight", size // 2) is None
    same(runs.finished("tight"), whole)


def test_a_disk_too_full_for_an_adapter(runs: Runs, whole: SimpleNamespace) -> None:
    name = f"adapters/round_{ROUNDS:05d}/adapter_model.safetensors"
    quiet = {"evaluate__every": 0, "evaluate__limit": 2}
    assert full(runs, "near", len(whole.outcome[name]) - 9, **quiet) == 1
    folder = runs.finished("near", **quiet)
    assert (folder / name).read_bytes() == whole.outcome[name]


@pytest.mark.parametrize("call", ["mkdir", "link", "replace", "fsync"])
def test_no_step_of_a_checkpoint_fails_raw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    state = Checkpoint(ServerState(1, torch.arange(8.0)), [], {})
    folder = tmp_path / "checkpoint"
    if call != "mkdir":
        checkpoints.save_checkpoint(folder, state)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(RunError, match=r"No space left on device.*Make room"):
            checkpoints.save_checkpoint(folder, state)
    if call != "mkdir":
        again = checkpoints.load_checkpoint(folder)
        assert again is not None and torch.equal(again.server.row, state.server.row)


def test_memory_of_a_strategy_is_kept(tmp_path: Path) -> None:
    memory = {"m": torch.randn(3, 4), "n": torch.tensor(5)}
    saved = Checkpoint(ServerState(7, torch.randn(6), memory), [{"value": 0.5}], {"a.jsonl": 3})
    checkpoints.save_checkpoint(tmp_path, saved)
    got = checkpoints.load_checkpoint(tmp_path)
    assert (
        got is not None and got.server.round == 7 and torch.equal(got.server.row, saved.server.row)
    )
    assert got.server.memory.keys() == memory.keys()
    assert all(torch.equal(got.server.memory[name], memory[name]) for name in memory)
    assert (got.scores, got.bytes_done) == (saved.scores, saved.bytes_done)
    assert checkpoints.load_checkpoint(tmp_path / "nowhere") is None


if __name__ == "__main__":
    _serve()
