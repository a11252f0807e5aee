"""`fedsim eval`: what it is given, over which base, and what it leaves behind.

Targets are told apart by what lies there; adapters of different rank and modules share one layout
and answer as they do by themselves; a run's rounds are evaluated at once and equal what the run
itself scored; tasks are asked over the base that their protocol wants; every refusal says what to
do. About 20 s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsim import peft_io, seeds, simulate, weights
from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.evaluate import comparable
from fedsim.evaluate.comparison import Comparison, by_precision, configure, fit
from fedsim.evaluate.generation import Adapter
from fedsim.evaluate.subjects import check
from fedsim.evaluate.suite import Questions, Suite
from fedsim.evaluate.targets import Target, resolve
from fedsim.tasks import Form, Generation, Item
from fedsim.world import load_world

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
NOTHING: dict[str, Any] = {"data": {"domain": None}}


@pytest.fixture(scope="module")
def ran() -> dict[str, Path]:
    return {}


@pytest.fixture
def run(settings: Callable[..., Config], ran: dict[str, Path]) -> Path:
    """A finished run of three rounds that exported after the second and the third."""
    if "run" not in ran:
        ran["run"] = simulate.run(settings())
    return ran["run"]


def adapter(
    config: Config, folder: Path, rank: int, targets: list[str]
) -> Path:  # fmt: skip
    """An exported adapter that changes what the model says."""
    config = config.model_copy(update={"adapter": config.adapter.model_copy(
        update={"rank": rank, "targets": tuple(targets)})})  # fmt: skip
    world = load_world(config, seeds.run_key(1))
    row = world.base.anchor.detach().new_zeros(1, world.base.layout.size)
    for number, piece in enumerate(world.base.layout.pieces):
        u = seeds.uniform(rank, seeds.Purpose.INIT, piece.size, module=number)
        world.base.layout.view(row, piece).copy_((u - 0.5).view(1, *piece.shape))
    peft_io.export(folder, row[0], world.base.layout, config.adapter, world.found.name)
    return folder


def test_targets_are_told_apart(run: Path, settings: Callable[..., Config]) -> None:
    model = settings().model.name
    found = resolve([str(run)])
    assert [(t.round, t.base) for t in found] == [(r, model) for r in (0, 2, 3)]
    assert [t.adapter.folder for t in found] == [
        None, run / "adapters/round_00002", run / "adapters/round_00003",
    ]  # fmt: skip
    (one,) = resolve([str(run / "adapters/round_00002")])
    assert (one.base, one.round, one.config) == (model, 0, None)
    (bare,) = resolve([model])
    assert bare == Target(Adapter("base"), model, 0)
    assert [t.adapter.name for t in found] == ["base", "run, round 2", "run, round 3"]


def test_an_adapter_of_an_aliass_model_finds_the_alias(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "target_modules": ["q_proj"],
                "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
            }
        )
    )  # fmt: skip
    (one,) = resolve([str(tmp_path)])
    assert one.base == "smollm2-135m-instruct"


def test_targets_that_do_not_go_together(
    run: Path, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match="expected one base model"):
        resolve([str(run), str(tiny("qwen3"))])
    with pytest.raises(ConfigError, match="a run's folder, an adapter's"):
        resolve([str(tmp_path)])
    (tmp_path / "adapters").mkdir()
    (tmp_path / "config.toml").write_text((run / "config.toml").read_text())
    with pytest.raises(ConfigError, match="exported adapters: got 0"):
        resolve([str(tmp_path)])


def test_a_runs_rounds_score_as_in_the_run(run: Path, tmp_path: Path) -> None:
    targets = resolve([str(run)])
    config = configure(targets, NOTHING, [])
    _, scores = Comparison(config, targets).run(tmp_path / "out")
    before = {(s["round"], s["metric"]): s["value"]
              for s in json.loads((run / "scores.json").read_text())}  # fmt: skip
    assert {(s.round, s.metric): s.value for s in scores if s.round in (0, 3)} == before
    assert {s.round for s in scores} == {0, 2, 3}
    written = json.loads((tmp_path / "out/scores.json").read_text())
    assert written == [s.record() for s in scores]
    lines = (tmp_path / "out/eval/newswire.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 12 and (tmp_path / "out/plots/scores.svg").stat().st_size > 1000
    assert json.loads((tmp_path / "out/environment.json").read_text())["backend"] == "engine"
    Comparison(config, targets[:1]).run(tmp_path / "out", fresh=True)
    assert len((tmp_path / "out/eval/newswire.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("backend", ["engine", "transformers"])
def test_adapters_of_different_shape_share_a_base(
    settings: Callable[..., Config], tmp_path: Path, backend: str
) -> None:
    """What each says beside others is what it says alone, in both backends."""
    made = [adapter(settings(), tmp_path / "a", 4, ["all-linear"]),
            adapter(settings(), tmp_path / "b", 2, ["q_proj", "v_proj"])]  # fmt: skip
    targets = [*resolve([settings().model.name]), *resolve([str(f) for f in made])]
    given = {
        "data": {"domain": "finance", "source": "embedded"}, "evaluate": {"limit": 4},
        "model": {"dtype": "float32"},
    }  # fmt: skip
    config = configure(targets, given, [])

    def say(some: list[Target], name: str) -> dict[str, list[str]]:
        Comparison(config, some, backend).run(tmp_path / name)
        lines = (tmp_path / name / "eval/newswire.jsonl").read_text().splitlines()
        out: dict[str, list[str]] = {}
        for line in map(json.loads, lines):
            out.setdefault(line["adapter"], []).append(line["output"])
        return out

    together = say(targets, "together")
    assert len({tuple(texts) for texts in together.values()}) == 3
    for target in targets:
        assert say([target], f"alone-{target.adapter.name}") == {
            target.adapter.name: together[target.adapter.name]
        }


def test_one_layout_holds_all(settings: Callable[..., Config], tmp_path: Path) -> None:
    made = [adapter(settings(), tmp_path / "a", 4, ["q_proj"]),
            adapter(settings(), tmp_path / "b", 2, ["v_proj"])]  # fmt: skip
    targets = resolve([str(f) for f in made])
    model = weights.find(settings().model.name)
    found = fit(settings(), check(model, targets)).adapter
    assert found.rank == 4 and {m.rpartition(".")[2] for m in found.targets} == {"q_proj", "v_proj"}
    mixed = [replace(c, dora=dora) for c, dora in zip(check(model, targets), (False, True))]
    with pytest.raises(ConfigError, match="with and without DoRA"):
        fit(settings(), mixed)


def test_tasks_by_the_base_that_they_want(settings: Callable[..., Config]) -> None:
    def questions(precision: Any) -> Questions:
        form = Form(lambda row: Item(""), lambda item, output: {}, ("official",), Generation(1),
                    precision=precision)  # fmt: skip
        return Questions(form, [Item("?")], "", "", True)

    tests = Suite("x", "flowertune", {"a": questions("base"), "b": questions("full")})
    config = settings(run__protocol="flowertune")
    found = [(c.model.quantisation, list(s.tasks)) for c, s in by_precision(config, tests)]
    assert found == [("fp4", ["a"]), ("none", ["b"])]
    found = [(c.model.quantisation, list(s.tasks)) for c, s in by_precision(settings(), tests)]
    assert found == [("none", ["a", "b"])]


def test_what_is_comparable_says_so(run: Path) -> None:
    targets = resolve([str(run)])
    path, scores = Comparison(configure(targets, NOTHING, []), targets[:1]).run(run.parent / "some")
    ours = [s.record() for s in scores]
    theirs = [s | {"protocol": "flowertune"} for s in ours]
    assert path == run.parent / "some" and comparable([]) == comparable(ours) == ""
    assert comparable(theirs).endswith(
        "embedded data instead of the hub's, a subset of the questions"
    )
    hub = [s | {"source": "hub:a/b@main", "whole": True} for s in theirs]
    assert comparable(hub) == ""
    assert "directory data" in comparable(hub, "directory:finance/x.train")
    assert comparable([*hub, hub[0] | {"whole": False}]).endswith(
        "scores: a subset of the questions"
    )


def test_refusals(run: Path, settings: Callable[..., Config]) -> None:
    targets = resolve([settings().model.name])
    with pytest.raises(ConfigError, match=r"--domain; expected .*finance"):
        configure(targets, NOTHING, [])
    config = configure(resolve([str(run)]), NOTHING, [])
    with pytest.raises(ConfigError, match="--backend: got 'vlm'; expected engine or"):
        Comparison(config, targets, "vlm").run(run.parent / "none")
