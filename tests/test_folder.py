"""A run's folder: lines come back as written, and nothing that was finished is ever lost.

A mistake is found before anything is touched, a run takes the place of another with its first
checkpoint, one process has a folder at a time, and a resumed run is over the rows, questions and
weights that it began with. About 25 s.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fedsim import simulate
from fedsim.config import Config
from fedsim.data.embedded import finance
from fedsim.errors import CheckpointError, ConfigError, FedSimError
from fedsim.folder import RunFolder, locked

# What str.splitlines takes for the end of a line.
ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_lines_survive_every_line_separator(tmp_path: Path) -> None:
    lines = [{"prompt": f"before{end}after{end}", "n": n} for n, end in enumerate(ENDS)]
    folder = RunFolder(tmp_path)
    folder.append("eval/task.jsonl", lines[:4])
    folder.append("eval/task.jsonl", lines[4:])
    assert folder.read("eval/task.jsonl") == lines
    assert folder.read("nothing.jsonl") == []


# ------------------------------------------------------------------------- nothing finished is lost

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
Settings = Callable[..., Config]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def small(settings: Settings) -> Settings:
    """A run of one round, scored with four questions."""
    return lambda **changes: settings(**{"server__rounds": 1, "evaluate__limit": 4} | changes)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model__name": "nope/nope"}, "cannot be fetched"),
        ({"evaluate__tasks": ["newswires"]}, "newswire"),
        ({"clients__number": 9999}, "training examples"),
        ({"adapter__targets": ["nothing"]}, "adapter.targets"),
        ({"data__source": "directory", "data__dir": "/nowhere"}, "data directory"),
        ({"server__strategy": "fedavgs"}, "fedavg"),
    ],
)  # fmt: skip
def test_fresh_with_a_mistake_keeps_the_run(small: Settings, change: Any, error: str) -> None:
    run = simulate.run(small())
    before = content(run)
    with pytest.raises(FedSimError, match=error):
        simulate.run(small(**change), fresh=True)
    assert content(run) == before and not list(run.parent.glob(".run.[pr]*"))


def test_a_mistake_leaves_no_folder(small: Settings, tmp_path: Path) -> None:
    with pytest.raises(FedSimError, match="cannot be fetched"):
        simulate.run(small(model__name="nope/nope"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("moment", ["score", "commit"])
def test_a_run_is_replaced_with_the_first_checkpoint(
    small: Settings, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = simulate.run(small())
    before = content(run)

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(simulate, moment, stopped)
        simulate.run(small(run__seed=7), fresh=True)
    assert content(run) == before
    folder = RunFolder(run)

    def after_the_first(*arguments: Any) -> Any:
        if folder.has_checkpoint and "seed = 7" in (run / "config.toml").read_text():
            raise KeyboardInterrupt
        return commit(*arguments)

    commit = simulate.commit
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(simulate, "commit", after_the_first)
        simulate.run(small(run__seed=7), fresh=True)
    assert sorted(p.name for p in run.parent.iterdir()) == [".run.lock", "run"]
    whole = content(simulate.run(small(run__seed=7, run__name="other")))
    got = content(simulate.run(small(run__seed=7), resume=True))
    assert got.keys() == whole.keys()
    adapter = "adapters/round_00001/adapter_model.safetensors"
    assert got[adapter] == whole[adapter] != before[adapter]


def test_a_swap_that_failed_leaves_nothing_to_go_on_from(
    small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beside, checkpoint and all, is of another study."""
    run = simulate.run(small())

    def stopped(_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "publish", stopped)
        simulate.run(small(adapter__alpha=16.0), fresh=True)
    assert simulate.run(small(adapter__alpha=32.0), fresh=True) == run
    assert "alpha = 32.0" in (run / "config.toml").read_text()
    assert not (run.parent / ".run.partial").exists()


def test_fresh_keeps_what_is_not_the_runs(small: Settings, tmp_path: Path) -> None:
    """Evaluations go along, files of somebody else are not replaced, a link stays one."""
    run = simulate.run(small())
    (run / "evaluation").mkdir()
    (run / "evaluation" / "scores.json").write_text("[]")
    simulate.run(small(run__seed=7), fresh=True)
    assert (run / "evaluation" / "scores.json").read_text() == "[]"
    (run / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"also holds notes\.txt"):
        simulate.run(small(), fresh=True)
    (run / "notes.txt").unlink()
    run.rename(tmp_path / "big")
    run.symlink_to(tmp_path / "big")
    simulate.run(small(), fresh=True)
    assert run.is_symlink() and "seed = 42" in (tmp_path / "big" / "config.toml").read_text()


def test_a_kill_between_the_two_renames(small: Settings) -> None:
    run = simulate.run(small())
    before = content(run)
    run.rename(run.with_name(".run.replaced"))
    with pytest.raises(ConfigError, match="already exists"):
        simulate.run(small())
    assert content(run) == before


def test_two_starts_of_one_name(small: Settings, tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(ConfigError, match="in use by another process"):
        simulate.run(small())
    assert [p.name for p in tmp_path.iterdir()] == [".run.lock"]
    simulate.run(small())


def test_a_run_never_replaces_an_evaluation(small: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in ("config.toml", "scores.json", "references.json", "environment.json"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="is not a run's folder"):
            simulate.run(small(), fresh=fresh)
    with pytest.raises(CheckpointError, match="is not a run's folder"):
        simulate.run(small(), resume=True)
    assert len(content(folder)) == 4


# --------------------------------------------------------------- a run hangs on what it began with


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory that holds the embedded set."""
    folder = tmp_path / "data" / "finance"
    folder.mkdir(parents=True)
    write(folder / "fingpt_sentiment.train.jsonl.gz", finance.train()[:60])
    write(folder / "fpb.test.jsonl.gz", finance.test()[:20])
    return folder


def write(path: Path, rows: Any) -> None:
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("what", ["rows", "questions", "weights", "nothing", "older"])
def test_a_resumed_run_is_over_the_same(
    small: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model = shutil.copytree(small().model.name, tmp_path / "model")
    config = small(data__source="directory", data__dir=str(data.parent), data__limit=None,
                   evaluate__tasks=["fpb"],
                   model__name=str(model), server__rounds=2)  # fmt: skip
    monkeypatch.setattr(simulate, "commit", dying := Dying(simulate.commit))
    with pytest.raises(KeyboardInterrupt):
        simulate.run(config)
    dying.at = 99
    folder = tmp_path / "run"
    before, error = content(folder), None
    if what == "rows":
        write(data / "fingpt_sentiment.train.jsonl.gz", finance.train()[60:120])
        error = "sha256 of the training rows: .*, with which the run in .* began"
    elif what == "questions":
        write(data / "fpb.test.jsonl.gz", finance.test()[20:40])
        error = "sha256 of the questions of fpb"
    elif what == "weights":
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"] += 0.5
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        error = "sha256 of the base's weights"
    elif what == "older":
        noted = json.loads((folder / "environment.json").read_text())
        del noted["content"]
        (folder / "environment.json").write_text(json.dumps(noted))
        error = "does not say which rows"
    if error is None:
        assert simulate.run(config, resume=True) == folder
        return
    with pytest.raises(CheckpointError, match=error):
        simulate.run(config, resume=True)
    after = content(folder)
    assert {k: v for k, v in after.items() if k != "environment.json"} == {
        k: v for k, v in before.items() if k != "environment.json"
    }


class Dying:
    """A commit that stands for a kill when it is called for the second time."""

    def __init__(self, commit: Any) -> None:
        self.commit, self.calls, self.at = commit, 0, 2

    def __call__(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.commit(*arguments)
