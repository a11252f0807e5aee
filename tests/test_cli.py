"""The command line: what each command prints, what `run` leaves behind, and how it fails.

Commands run in this process through `main`, on a tiny model and the embedded set; one runs as a
process of its own, for its exit code. An error is one paragraph on stderr with its remedy and exit
code 1, never a traceback; Ctrl-C ends with 130 and the way to go on. About 15 s.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from fedsim import checkpoint, cli, record, simulate
from fedsim.config import KEYS, Config, build, read_toml, resolved
from fedsim.errors import ConfigError
from tests.conftest import ARCHITECTURES


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def fedsim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run one command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fedsim", *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        text = capsys.readouterr()
        return Result(code, text.out, text.err)

    return command


@pytest.fixture
def file(settings: Callable[..., Config], tmp_path: Path) -> Path:
    """A configuration file for a run of two rounds in `tmp_path`/run."""
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(resolved(settings(server__rounds=2))))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def failed(result: Result, *parts: str) -> None:
    """Exit code 1, and one paragraph on stderr that says all of this."""
    assert result.code == 1
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert [part for part in parts if part not in result.err] == []
    assert "Traceback" not in result.err + result.out


# ----------------------------------------------------------------------------- list, doctor, plan


def test_list(fedsim: Command) -> None:
    result = fedsim("list")
    assert result.code == 0
    for name in ("demo", "coding, finance, general, medical", "fedavg", "smollm2-135m-instruct"):
        assert name in result.out


def test_list_every_key_with_its_default(fedsim: Command) -> None:
    text = fedsim("list", "--keys").out
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert [row[0] for row in rows] == list(KEYS)
    defaults = {row[0]: row[1] for row in rows}
    assert (defaults["train.lr_max"], defaults["data.domain"]) == ("5e-05", "'finance'")
    assert (defaults["adapter.targets"], defaults["data.limit"]) == ("()", "None")


def test_doctor(fedsim: Command) -> None:
    result = fedsim("doctor")
    assert result.code == 0
    for name in (*record.PACKAGES, *record.OPERATIONS, "python", "device", "threads",
                 "smollm2-135m-instruct"):  # fmt: skip
        assert name in result.out
    assert record.implementation(torch.device("cpu")) in result.out


@pytest.mark.parametrize(
    ("given", "first", "policy", "said"),
    [(None, "", "passive", "sleep"), ("active", "", "active", "spin (OMP_WAIT_POLICY=active)"),
     (None, "import torch; ", "None", "spin (torch was loaded before fedsim)")],
)  # fmt: skip
def test_threads_sleep_while_they_wait(
    given: str | None, first: str, policy: str, said: str
) -> None:
    """OpenMP is told before torch is loaded, unless the user has said otherwise; doctor knows."""
    code = (
        f"import os; {first}import fedsim; told = os.environ.get('OMP_WAIT_POLICY');"
        "from fedsim import doctor; print(told, dict(doctor.findings())['threads that wait'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert ran.stdout.startswith(f"{policy} {said}")


def test_no_command_is_help(fedsim: Command) -> None:
    assert "run" in fedsim("--help").out and "doctor" in fedsim("--help").out
    assert fedsim("nothing").code == 2


def test_plan_counts_what_run_trains(fedsim: Command, file: Path, tmp_path: Path) -> None:
    planned = fedsim("plan", file)
    assert planned.code == 0 and not (tmp_path / "run").exists()
    tokens = int(re.search(r"tokens trained\s+([\d,]+)", planned.out)[1].replace(",", ""))  # type: ignore[index]
    assert "4 of 8 a round, 2 rounds, 8 visits" in planned.out
    assert fedsim("run", file).code == 0
    rounds = lines(tmp_path / "run" / "rounds.jsonl")
    assert sum(line["tokens"] for line in rounds) == tokens
    mib = re.search(r"all transfers\s+(\S+) MiB", planned.out)[1]  # type: ignore[index]
    assert f"{rounds[-1]['total_mib']:,.0f}" == mib


# -------------------------------------------------------------------------------------------- run


def test_a_run_that_is_scored_at_its_end_only(fedsim: Command, file: Path, tmp_path: Path) -> None:
    result = fedsim("run", file, "--set", "evaluate.first=false", "--set", "server.rounds=1")
    assert result.code == 0 and "newswire" in result.out and not re.search(r"\bnan\b", result.out)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "newswire" in page and not re.search(r"\bnan\b", page)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert {s["round"] for s in scores} == {1}


def test_a_run_and_what_it_leaves(fedsim: Command, file: Path, tmp_path: Path) -> None:
    result = fedsim("run", file)
    assert result.code == 0 and result.err == ""
    folder = tmp_path / "run"
    for part in ("run  finance", "2 rounds · 4 of 8 clients each", "round   1", "round   2",
                 "accuracy, %", "newswire", "likelihood", "before", "after", "95 % interval",
                 "embedded data: not a leaderboard score", str(folder / "report.html"),
                 str(folder / "adapters" / "round_00002")):  # fmt: skip
        assert part in result.out, part
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2 and "newswire" in page and "not a leaderboard score" in page
    assert page.count("</table>") >= 2 and "{{" not in page
    assert {p.name for p in (folder / "plots").iterdir()} == {"loss.svg", "scores.svg"}
    assert build(read_toml(folder / "config.toml"), "x") == build(read_toml(file), "x")
    around = json.loads((folder / "environment.json").read_text())
    assert around["data"]["train"] == "embedded:finance/finance.train"
    assert around["operations"].keys() == set(record.OPERATIONS)
    scores = json.loads((folder / "scores.json").read_text())
    assert {(s["round"], s["metric"]) for s in scores} == {
        (round, metric) for round in (0, 2) for metric in ("likelihood", "strict", "lenient")
    }
    answers = lines(folder / "eval" / "newswire.jsonl")
    assert len(answers) == 24
    for score in scores:
        hits = [line[score["metric"]] for line in answers if line["round"] == score["round"]]
        assert score["value"] == sum(hits) / len(hits) and score["n"] == 12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_runs(settings: Callable[..., Config], architecture: str) -> None:
    folder = simulate.run(settings(architecture, server__rounds=1))
    visits = lines(folder / "clients.jsonl")
    assert len(visits) == 4 and all(v["ok"] for v in visits)
    factors = load_file(folder / "adapters" / "round_00001" / "adapter_model.safetensors")
    assert factors and all(value.any() for value in factors.values())  # B began as zero


def test_a_run_of_the_same_name(fedsim: Command, file: Path, tmp_path: Path) -> None:
    assert fedsim("run", file).code == 0
    before = (tmp_path / "run" / "clients.jsonl").read_bytes()
    failed(fedsim("run", file), "run already exists", "--resume", "--fresh", "run.name=")
    assert (tmp_path / "run" / "clients.jsonl").read_bytes() == before
    assert fedsim("run", file, "--fresh", "--set", "run.seed=7").code == 0
    assert (tmp_path / "run" / "clients.jsonl").read_bytes() != before
    failed(fedsim("run", file, "--resume"), "run.seed differs", "got 42", "expected 7")
    assert fedsim("run", file, "--set", "run.name=other").code == 0
    assert (tmp_path / "other" / "clients.jsonl").read_bytes() == before


def test_a_folder_of_someone_else_is_never_replaced(
    fedsim: Command, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for flags in ((), ("--fresh",)):
        failed(fedsim("run", file, *flags), str(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("target", ["folder", "here", "file"])
def test_stopped_moved_and_resumed(
    fedsim: Command, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    assert fedsim("run", file, "--set", "run.name=whole").code == 0
    commit = simulate.commit

    def stop(folder: Any, server: Any, *rest: Any) -> None:
        commit(folder, server, *rest)
        if server.round == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(simulate, "commit", stop)
        stopped = fedsim("run", file)
    assert stopped.code == 130 and "--resume" in stopped.err
    folder = tmp_path / "run"
    if target != "file":
        folder = Path(shutil.move(folder, tmp_path / "moved"))
        monkeypatch.chdir(folder)
        resumed = fedsim("run", "." if target == "here" else folder, "--resume")
    else:
        resumed = fedsim("run", file, "--resume")
    assert resumed.code == 0 and "round   1" not in resumed.out and "round   2" in resumed.out
    for name in ("scores.json", "clients.jsonl", "eval/newswire.jsonl",
                 "adapters/round_00002/adapter_model.safetensors"):  # fmt: skip
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    state = checkpoint.load_checkpoint(folder / "checkpoint")
    assert state is not None and state.server.round == 2


def test_nothing_to_resume(fedsim: Command, file: Path, tmp_path: Path) -> None:
    failed(fedsim("run", file, "--resume"), f"there is no run in {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_every_client_failing_is_an_error(fedsim: Command, file: Path, tmp_path: Path) -> None:
    """A learning rate of 1e30 overflows in the first step; the second sees it."""
    result = fedsim("run", file, "--set", "train.lr_max=1e30", "--set", "train.clip_norm=1e30")
    failed(result, "round 1: none of the 4 clients", "Lower train.lr_max")
    visits = lines(tmp_path / "run" / "clients.jsonl")
    assert len(visits) == 4 and not any(v["ok"] for v in visits)


def test_without_tasks_there_is_no_table(
    fedsim: Command, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own domain, by dotted path."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "plain.py").write_text(
        "from dataclasses import replace\n"
        "from fedsim.domains.finance import DOMAIN as FINANCE\n"
        "DOMAIN = replace(FINANCE, name='plain', tasks={}, embedded_tasks={})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = fedsim("run", file, "--domain", "own.plain", "--set", "server.rounds=1")
    assert result.code == 0 and "accuracy" not in result.out and "round   1" in result.out
    assert "No evaluation task" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == []


# ------------------------------------------------------------------------------------------ eval


def test_eval_of_a_run_and_of_a_model(
    fedsim: Command, file: Path, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    assert fedsim("run", file).code == 0
    result = fedsim("eval", tmp_path / "run", "--limit", "3")
    assert result.code == 0, result.err
    for word in ("newswire", "strict", "lenient", "base", "run, round 2", " to "):
        assert word in result.out
    scores = json.loads((tmp_path / "run/evaluation/scores.json").read_text())
    assert {s["round"] for s in scores} == {0, 2} and {s["n"] for s in scores} == {3}
    again = fedsim("eval", tmp_path / "run", "--limit", "3")  # adds, and finds its own
    assert again.code == 0
    assert json.loads((tmp_path / "run/evaluation/scores.json").read_text()) == scores
    result = fedsim(
        "eval",
        tiny("llama"),
        "--domain",
        "finance",
        "--set",
        "data.source=embedded",
        "--limit",
        "2",
        "--out",
        tmp_path / "bare",
        "--protocol",
        "flowertune",
    )
    assert result.code == 0 and "official" in result.out
    assert "not comparable with published scores: embedded data" in result.out
    failed(fedsim("eval", tiny("llama")), "--domain", "Only a run's folder knows its domain")


# ------------------------------------------------------------------------------------- configure


def test_where_values_come_from(tmp_path: Path) -> None:
    """A preset, then the file, then options, then --set."""
    path = tmp_path / "x.toml"
    path.write_text("[train]\nsteps = 9\nbatch = 9\n")
    config, imported = cli.configure(path, "demo", None, None, ["train.batch=3"])
    assert (config.train.steps, config.train.batch, config.train.slots) == (9, 3, 8)
    assert (config.adapter.rank, config.clients.number, imported) == (16, 16, None)
    config, _ = cli.configure(None, None, "medical", Path("/data"), [])
    assert (config.data.source, config.data.dir) == ("directory", "/data")
    assert config.run.name.startswith("medical-fedavg-42-") and config.clients.number == 20
    config, _ = cli.configure(None, None, "medical", None, ["data.domain=coding"])
    assert (config.data.domain, config.clients.number) == ("coding", 10)


def test_no_two_studies_share_a_default_name() -> None:
    """The same study has its name again, also packed otherwise; any other has another."""

    def name(*assignments: str) -> str:
        return cli.configure(None, None, "medical", None, list(assignments))[0].run.name

    names = [name(), name("run.seed=1"), name("adapter.rank=8"), name("server.strategy=flora"),
             name("model.name=a/b"), name("data.limit=10")]  # fmt: skip
    assert len(set(names)) == len(names) and names[3].startswith("medical-flora-42-")
    assert name("train.slots=2", "run.device=cpu", "run.out=elsewhere") == names[0]
    assert name("run.name=mine") == "mine"


def test_a_path_with_a_quote(tmp_path: Path) -> None:
    config, _ = cli.configure(None, None, None, tmp_path / "it's [here]", [])
    assert config.data.dir == str(tmp_path / "it's [here]")


BROKEN = {
    "no file": (None, ["gone.toml"], ("gone.toml", "existing file or folder")),
    "folder": (None, ["."], ("a TOML file, a FlowerTune app's folder or a run's folder",)),
    "toml": ("[run\n", [], ("is not valid TOML", "line 1")),
    "unknown key": ("[train]\nstep = 1\n", [], ("'train.step'", "Did you mean 'train.steps'?")),
    "unknown section": ("[tarin]\nsteps = 1\n", [], ("'tarin'", "Did you mean 'train'?")),
    "type": ("[train]\nsteps = '1'\n", [], ("train.steps: got '1'",)),
    "value": ("", ["--set", "train.steps=0"], ("train.steps: got 0",)),
    "section": ("train = 5\n", [], ("train: got 5",)),
    "run": ("run = 5\n", [], ("run: got 5",)),
    "data": ("data = 5\n", [], ("data: got 5",)),
    "clients": ("clients = []\n", [], ("clients: got []",)),
    "set": ("train = 5\n", ["--set", "train.steps=3"], ("train: got 5",)),
    "domain type": ("[data]\ndomain = 5\n", [], ("data.domain: got 5",)),
    "domain": ("", ["--domain", "finanse"], ("'finanse'", "Did you mean 'finance'?")),
    "preset": ("", ["--preset", "dmo"], ("'dmo'", "Did you mean 'demo'?")),
    "form": ("", ["--set", "train.steps"], ("section.key=value",)),
    "strategy": ("", ["--set", "server.strategy=fedavgg"], ("Did you mean 'fedavg'?",)),
    "model": ("", ["--set", "model.name=nowhere"], ("model.name: got 'nowhere'", "Aliases")),
    "strategy path": ("", ["--set", "server.strategy=my.own"], ("server.strategy: got 'my.own'",)),
    "data dir": ("", ["--data-dir", "/nowhere/[/at]/[all]"], ("'/nowhere/[/at]/[all]'",)),
    "task": ("", ["--set", 'evaluate.tasks=["newswir"]'], ("Did you mean 'newswire'?",)),
    "clients number": ("", ["--set", "clients.number=201"], ("at most 200",)),
    "targets": ("", ["--set", 'adapter.targets=["q_prj"]'], ("Did you mean 'q_proj'?",)),
}


@pytest.mark.parametrize(  # a plan reads no tasks
    ("command", "name"),
    [*(("run", n) for n in BROKEN), *(("plan", n) for n in BROKEN if n != "task")],
)
def test_errors_have_a_remedy(
    fedsim: Command, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    command: str, name: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    text, words, parts = BROKEN[name]
    if text:
        file.write_text(text)
    failed(fedsim(command, *([] if text is None else [file]), *words), *parts)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_corrected_mistake_needs_no_flag(fedsim: Command, file: Path) -> None:
    """A run that never began is no run of the same name."""
    failed(fedsim("run", file, "--set", 'adapter.targets=["q_prj"]'), "Did you mean 'q_proj'?")
    assert fedsim("run", file, "--set", 'adapter.targets=["q_proj"]').code == 0


def test_exit_codes_of_a_process(file: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fedsim.cli", "run", tmp_path / "gone.toml"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_script_can_call_it(settings: Callable[..., Config], tmp_path: Path) -> None:
    import fedsim as package

    config = settings(server__rounds=1, evaluate__limit=3)
    assert package.run(config) == tmp_path / "run"
    with pytest.raises(ConfigError, match="already exists"):
        package.run(config)
    assert package.run(config, resume=True) == package.run(config, fresh=True)
