"""Results belong to subjects by content, and nothing finished is lost.

Two adapters of one folder name, two runs of one name, a base that has moved or is another, an
adapter that changes nothing; evaluations that fail leave nothing, later ones add, the same again
replaces its own, `fresh` swaps when there is something to swap in. About 25 s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fedsim import peft_io, seeds, simulate, weights
from fedsim.config import Config
from fedsim.core import Score
from fedsim.errors import ConfigError, FedSimError, ModelError
from fedsim.evaluate import comparison
from fedsim.evaluate.comparison import Comparison, configure
from fedsim.evaluate.targets import Target, resolve
from fedsim.folder import locked
from fedsim.world import load_world

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
GIVEN: dict[str, Any] = {
    "data": {"domain": "finance", "source": "embedded"}, "evaluate": {"limit": 6},
    "model": {"dtype": "float32"},
}  # fmt: skip
Settings = Callable[..., Config]


def adapter(config: Config, folder: Path, seed: int = 1, over: bool = False) -> Path:
    """An exported adapter that changes what the model says; seed 0: one that changes nothing."""
    world = load_world(config, seeds.run_key(1))
    layout = world.base.layout
    row = world.base.magnitudes(world.base.anchor.detach().new_zeros(layout.size))
    for number, piece in enumerate(layout.pieces):
        if seed and piece.kind != "mag":
            u = seeds.uniform(seed, seeds.Purpose.INIT, piece.size, module=number)
            layout.view(row[None], piece).copy_((u - 0.5).view(1, *piece.shape))
    sha = world.found.digest() if over else None
    peft_io.export(folder, row, layout, config.adapter, world.found.name, over=sha)
    return folder


def evaluated(
    targets: list[Target], out: Path | None = None, backend: str = "engine", **asked: Any
) -> list[Score]:
    based = asked.pop("based", False)
    fresh = asked.pop("fresh", False)
    config = configure(targets, GIVEN | asked, [])
    return Comparison(config, targets, backend, based=based).run(out, fresh=fresh)[1]


def answers(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "eval/newswire.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_adapters_of_one_name(settings: Settings, tmp_path: Path) -> None:
    """Each has its own column, n and score, as alone."""
    for name, seed in (("x", 1), ("y", 2)):
        adapter(settings(), tmp_path / name / "peft_3", seed)
    both = [str(tmp_path / name / "peft_3") for name in ("x", "y")]
    together = evaluated(resolve(both), tmp_path / "both")
    assert {s.adapter for s in together} == {"x/peft_3", "y/peft_3"} and {
        s.n for s in together
    } == {6}
    for name, path in zip(("x", "y"), both, strict=True):
        alone = evaluated(resolve([path]), tmp_path / f"alone-{name}")
        mine = [s for s in together if s.adapter == f"{name}/peft_3"]
        assert [(s.metric, s.value, s.subject) for s in mine] == [
            (s.metric, s.value, s.subject) for s in alone
        ]
        assert {line["subject"] for line in answers(tmp_path / f"alone-{name}")} == {
            mine[0].subject
        }
    assert len({s.subject for s in together}) == 2
    (one,) = resolve([both[0], both[0]])  # the same twice is one
    assert one.adapter.name == "peft_3"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "x" / "peft_3")
    assert len(resolve([both[0], str(link)])) == 1


def test_two_runs_of_one_name(settings: Settings, tmp_path: Path) -> None:
    runs = []
    for place, seed in (("one", 1), ("two", 2)):
        config = settings(run__name="study", run__out=str(tmp_path / place), run__seed=seed,
                          server__rounds=1, evaluate__limit=4)  # fmt: skip
        runs.append(str(simulate.run(config)))
    found = resolve(runs)
    assert [t.adapter.name for t in found] == ["base", "one/study, round 1", "two/study, round 1"]
    scores = evaluated(found, tmp_path / "out")
    assert {(s.adapter, s.n) for s in scores} == {(t.adapter.name, 6) for t in found}
    assert not list(tmp_path.glob("evaluations"))


def test_a_base_that_has_moved(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    home = shutil.copytree(config.model.name, tmp_path / "home")
    moved = config.model_copy(update={"model": config.model.model_copy(update={"name": str(home)})})
    made = adapter(moved, tmp_path / "a", over=True)
    want = evaluated(resolve([str(made)]), tmp_path / "before")
    home.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"home.*give --base MODEL"):
        evaluated(resolve([str(made)]), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    there = str(tmp_path / "elsewhere")
    got = evaluated(resolve([str(made)], there), tmp_path / "after", based=True)
    assert [(s.value, s.subject) for s in got] == [(s.value, s.subject) for s in want]
    written = json.loads((tmp_path / "after/environment.json").read_text())
    assert written["model"]["name"] == there
    assert f'name = "{there}"' in (tmp_path / "after/config.toml").read_text()
    settings_file = made / "adapter_config.json"
    settings_file.write_text(settings_file.read_text().replace(str(home), ""))
    with pytest.raises(ConfigError, match=r"base_model_name_or_path.*Say it with --base"):
        resolve([str(made)])


def test_another_base_is_refused_or_said(
    settings: Settings, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    made = adapter(settings(), tmp_path / "a", over=True)
    with pytest.raises(ModelError, match="another base"):  # other shapes
        evaluated(resolve([str(made)], str(tiny("phi3"))), tmp_path / "out", based=True)
    other = shutil.copytree(settings().model.name, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({k: t * 1.5 for k, t in tensors.items()}, other / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    targets = resolve([str(made)], str(other))
    with pytest.raises(ModelError, match=r"sha256 of its base's weights.*--base"):
        evaluated(targets, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    asked = Comparison(configure(targets, GIVEN, []), targets, based=True)
    _, theirs = asked.run(tmp_path / "out")
    assert asked.notes == ["a was trained over other weights than these"]
    (subject,) = json.loads((tmp_path / "out/environment.json").read_text())["subjects"]
    assert subject["trained_over_other_weights"] and subject["norm"] > 0
    ours = evaluated(resolve([str(made)]), tmp_path / "ours")
    assert {s.subject for s in ours}.isdisjoint({s.subject for s in theirs})


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_changes_nothing_is_said(
    settings: Settings, tmp_path: Path, dora: bool
) -> None:
    config = settings(adapter__dora=dora)
    idle, works = adapter(config, tmp_path / "idle", 0), adapter(config, tmp_path / "works", 1)
    targets = resolve([str(idle), str(works)])
    asked = Comparison(configure(targets, GIVEN, []), targets)
    _, scores = asked.run(tmp_path / "out")
    assert asked.notes == ["idle changes nothing: B A is zero in every module"]
    written = json.loads((tmp_path / "out/scores.json").read_text())
    assert {(s["adapter"], s["no_op"]) for s in written} == {("idle", True), ("works", False)}
    assert {(s.adapter, s.no_op) for s in scores} == {("idle", True), ("works", False)}
    if dora:  # of another length than the weights', magnitudes do change something
        tensors = load_file(idle / "adapter_model.safetensors")
        grown = {k: t * (1.01 if "magnitude" in k else 1) for k, t in tensors.items()}
        save_file(grown, idle / "adapter_model.safetensors", metadata={"format": "pt"})
        assert not any(s.no_op for s in evaluated(targets[:1], tmp_path / "grown"))


@pytest.mark.parametrize(
    ("changes", "backend", "error"),
    [
        ({"evaluate": {"tasks": ["newswires"]}}, "engine", "Did you mean 'newswire'"),
        ({}, "hf", "expected engine or transformers"),
        ({"model": {"name": "nope/x"}}, "engine", "cannot be fetched"),
        ({"run": {"device": "cuda:9"}}, "engine", "run.device"),
        ({"evaluate": {"limit": 0}}, "engine", "at least 1"),
    ],
)  # fmt: skip
def test_a_failed_evaluation_leaves_nothing(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], backend: str, error: str
) -> None:
    made = adapter(settings(), tmp_path / "a")
    name = changes.get("model", {}).get("name")
    with pytest.raises(FedSimError, match=error):
        evaluated(resolve([str(made)], name), tmp_path / "out", backend, **changes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    evaluated(resolve([str(made)]), tmp_path / "out")  # and the correct one needs no flag


def test_a_later_one_adds_and_the_same_replaces(settings: Settings, tmp_path: Path) -> None:
    a, b = (adapter(settings(), tmp_path / n, s) for n, s in (("a", 1), ("b", 2)))
    out = tmp_path / "out"
    first = evaluated(resolve([str(a)]), out)
    second = evaluated(resolve([str(b)]), out, evaluate={"limit": 3})
    written = json.loads((out / "scores.json").read_text())
    assert written == [s.record() for s in [*first, *second]]
    assert len(answers(out)) == 6 + 3
    told = json.loads((out / "environment.json").read_text())["subjects"]
    assert [s["name"] for s in told] == ["a", "b"]
    again = evaluated(resolve([str(b)]), out, evaluate={"limit": 3})
    assert [(s.metric, s.value) for s in again] == [(s.metric, s.value) for s in second]
    assert json.loads((out / "scores.json").read_text()) == written and len(answers(out)) == 6 + 3
    evaluated(resolve([str(b)]), out, "transformers", evaluate={"limit": 3})
    assert len(answers(out)) == 6 + 3 + 3  # another backend is another question
    third = evaluated(resolve([str(b)]), out, fresh=True)
    assert json.loads((out / "scores.json").read_text()) == [s.record() for s in third]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "a", "b", "out"]


@pytest.mark.parametrize("name", ["scores.json", "environment.json", "eval/newswire.jsonl"])
def test_what_cannot_be_read_is_said_first(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before anything is computed, which would have no place to go."""
    made = adapter(settings(), tmp_path / "a")
    evaluated(resolve([str(made)]), tmp_path / "out")
    (tmp_path / "out" / name).write_text('{"half')
    monkeypatch.setattr(comparison, "evaluate", lambda *_: pytest.fail("computed"))
    with pytest.raises(FedSimError, match=f"{name} cannot be read"):
        evaluated(resolve([str(made)]), tmp_path / "out")


def test_default_folders_tell_targets_apart(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("x", 1), ("y", 2)):
        adapter(settings(), tmp_path / name / "peft_3", seed)
        evaluated(resolve([str(tmp_path / name / "peft_3")]))
    evaluated(resolve([str(tmp_path / "x" / "peft_3")]), evaluate={"limit": 2})
    names = sorted(p.name for p in Path("evaluations").iterdir() if not p.name.startswith("."))
    assert len(names) == 2 and all(n.startswith("peft_3-finance-") for n in names)


def test_only_evaluations_are_replaced(settings: Settings, tmp_path: Path) -> None:
    """`--fresh` over a training run, or over somebody's folder, touches nothing."""
    run = simulate.run(settings(server__rounds=1, evaluate__limit=4))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="is no folder of evaluations: it holds adapters"):
        evaluated(resolve([str(run)]), run, fresh=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"it holds thesis\.tex.*Give another --out"):
        evaluated(resolve([str(run)]), mine, fresh=True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_fresh_one_that_fails_keeps_the_old(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(settings(), tmp_path / "a")
    evaluated(resolve([str(made)]), tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}

    def fails(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "evaluate", fails)
    with pytest.raises(KeyboardInterrupt):
        evaluated(resolve([str(made)]), tmp_path / "out", fresh=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_one_base_under_several_names(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(settings().model.name, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    made = adapter(settings(model__name="model"), tmp_path / "a")
    assert len(resolve(["model", "./model", str(made), str(tmp_path / "model")])) == 2
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert [t.base for t in resolve([str(made)], hub)] == [hub]  # --base means what it says


def test_double_quantisation_is_another_base(settings: Settings) -> None:
    def named(**model: Any) -> str:
        return weights.precision("float32", settings(**model))

    assert named(model__quantisation="nf4") == "nf4, float32"
    assert named(model__quantisation="nf4", model__double_quantisation=True) == (
        "nf4 double, float32"
    )


def test_half_written_files_do_not_block(settings: Settings, tmp_path: Path) -> None:
    made = adapter(settings(), tmp_path / "a")
    evaluated(resolve([str(made)]), tmp_path / "out")
    (tmp_path / "out" / "scores.json.partial").write_text("[")
    evaluated(resolve([str(made)]), tmp_path / "out", fresh=True)


def test_one_process_at_a_time(settings: Settings, tmp_path: Path) -> None:
    made = adapter(settings(), tmp_path / "a")
    with locked(tmp_path / "out"), pytest.raises(ConfigError, match="in use by another process"):
        evaluated(resolve([str(made)]), tmp_path / "out")
    evaluated(resolve([str(made)]), tmp_path / "out")


def test_keys_without_effect_are_refused(settings: Settings, tmp_path: Path) -> None:
    targets = resolve([settings().model.name])
    for key in ("adapter.rank=3", "train.steps=2", "server.rounds=1", "data.max_length=64"):
        with pytest.raises(ConfigError, match="change nothing in an evaluation"):
            configure(targets, GIVEN, [key])
    with pytest.raises(ConfigError, match="A model is its own base"):
        configure(targets, GIVEN, ["model.name=other"])
    with pytest.raises(ConfigError, match=r"unknown key.*Did you mean"):
        configure(targets, GIVEN, ["evaluate.limits=3"])


def test_runs_that_differ_in_what_must_be_one(settings: Settings, tmp_path: Path) -> None:
    runs = []
    for dtype in ("float32", "bfloat16"):
        config = settings(run__name=dtype, model__dtype=dtype, server__rounds=1, evaluate__limit=0)
        runs.append(str(simulate.run(config)))
    given: dict[str, Any] = {"data": {"domain": None}}
    with pytest.raises(ConfigError, match=r"model\.dtype of these runs: got 'float32, bfloat16'"):
        configure(resolve(runs), given, [])
    chosen = configure(resolve(runs), given, ["model.dtype=float32"])
    assert chosen.model.dtype == "float32"
