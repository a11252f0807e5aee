"""The benches' own arithmetic, and whole quick runs of bench_clients and bench_engine on a tiny
model."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedsim import strategies
from fedsim.config import Config
from fedsim.core import LocalRule
from fedsim.data.embedded import finance
from fedsim.errors import ModelError, RunError
from fedsim.record import Meter
from fedsim.seeds import run_key
from fedsim.world import World, load_world

BENCH = Path(__file__).parents[1] / "bench"
# peft 0.21 reads the old name of a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def script(name: str) -> ModuleType:
    """A bench by path: the folder is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


harness = script("harness")
script("stock")
bench = script("bench_clients")
ops = script("bench_ops")
steps = script("bench_step")
engine = script("bench_engine")
aggregation = script("bench_aggregation")
readme = script("readme")


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage before every timed run takes longer than the tiny runs themselves."""
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)


def test_ratio_pairs_the_repeats() -> None:
    """6/2, 8/4, 10/5 = 3, 2, 2. Of 9 against 3, 1 there is one pair, 9/3."""
    assert harness.ratio((6, 8, 10), (2, 4, 5)) == {"median": 2, "low": 2, "high": 3, "n": 3}
    assert harness.ratio((9,), (3, 1)) == {"median": 3, "low": 3, "high": 3, "n": 1}
    assert harness.spread(harness.ratio((6, 8, 10), (2, 4, 5))) == "2.00 (2.00-3.00)"
    assert harness.spread(None) == ""


def test_arms_are_warmed_up_then_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = iter(float(n * n) for n in range(100))  # 0 1 4 9 16: spans of 1, 5, 9, 13
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    arms = {
        name: harness.Arm(
            lambda name=name: log.append(name) or len(log),
            lambda name=name: log.append(f"warm {name}"),
            limit,
        )
        for name, limit in (("a", None), ("b", None), ("c", 1))
    }
    timed = harness.time_arms(arms, 2)
    assert log == ["warm a", "warm b", "warm c", "a", "b", "c", "b", "a"]
    assert timed["a"].seconds == (1, 17) and timed["b"].seconds == (5, 13)
    assert timed["c"].seconds == (9,) and timed["a"].value == 8 and timed["a"].median == 9


def test_finish_writes_when_asked_and_ends_in_one_json_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    for save in (False, True):
        harness.finish("x", {"seconds": (1.0, 2.0)}, {"vs": 2.5}, save)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"vs": 2.5}
        assert (tmp_path / "results" / "x.json").is_file() == save
    written = json.loads((tmp_path / "results" / "x.json").read_text())
    assert written == {"seconds": [1.0, 2.0], "summary": {"vs": 2.5}}


def test_machine_names_what_figures_depend_on() -> None:
    found = harness.machine(torch.device("cpu"))
    assert {"cpu", "cores", "flags", "threads", "versions", "commit", "dirty"} <= set(found)


def test_equality_check_passes_and_notices_another_scale(settings: Callable[..., Config]) -> None:
    config = settings(clients__number=2, server__fraction=1.0)
    work = bench.Work.build(config, load_world(config, run_key(42)))
    stock = bench.open_stock(work, attn_implementation="sdpa", dtype=torch.float32)
    assert bench.check_equal(work, stock) <= 1e-5
    adapter = config.adapter.model_copy(update={"alpha": 1.05 * config.adapter.alpha})
    other = bench.Work.build(config.model_copy(update={"adapter": adapter}), work.world)
    with pytest.raises(ModelError, match=r"losses: got 0\.\d+; expected <= 0\.0001"):
        bench.check_equal(other, stock)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with the two files that the bench reads, filled from the embedded set."""
    folder = tmp_path / "data" / "finance"
    folder.mkdir(parents=True)
    for name, rows in (("fingpt_sentiment.train", finance.train()), ("fpb.test", finance.test())):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows[:60])
    return folder.parent


@pytest.mark.parametrize("quick", [True, False])
def test_bench_clients(
    quick: bool, data: Path, tiny: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    small = {n: (2, 2, dropout) for n, (_, _, dropout) in bench.SETTINGS.items()}
    monkeypatch.setattr(bench, "SETTINGS", small)
    monkeypatch.setattr(bench, "FULL", (3, 2))
    assert bench.dtypes()[-1] == torch.float32
    monkeypatch.setattr(bench, "dtypes", lambda: (torch.bfloat16, torch.float32))  # on any machine
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    threads = str(torch.get_num_threads())
    options = ["--model", str(tiny("llama")), "--data", str(data), "--threads", threads]
    bench.main([*options, *(["--quick", "--save"] if quick else [])])

    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads((tmp_path / "results" / "clients.json").read_text())
    three, plain = {"vs_b0", "vs_b0_default", "vs_b1"}, {"flowertune", "small_batch"}
    rows = plain | {f"{name}_shared_prefix" for name in plain}
    assert {name: set(row) for name, row in last.items()} == dict.fromkeys(rows, three) | (
        {} if quick else {"flowertune_dropout": {"vs_b0", "vs_b1"}}
    )
    assert result["summary"] == last and result["quick"] == quick
    settings = product(("sdpa", "eager"), ("bfloat16", "float32"))
    assert set(result["probe_seconds"]) == {f"{a}, {d}" for a, d in settings}
    assert result["equality"]["relative_difference"] <= 1e-4
    assert {"cpu", "commit", "model", "data"} <= set(result["machine"])
    for setting in result["settings"].values():
        check_setting(setting, steps=2 if quick else 3)


def check_setting(setting: dict[str, Any], steps: int) -> None:
    """Every arm's figures are there and agree with each other."""
    assert (setting["clients"], setting["batch"], setting["steps"]) == (2, 2, steps)
    assert setting["tokens"] < setting["padded_tokens"]
    assert {"engine", "b1", "b0"} <= set(setting["arms"])
    for name, arm in setting["arms"].items():
        repeats = len(arm["seconds"])
        assert repeats == 2 or (name == "b0_default" and repeats == 1)
        median = sum(arm["seconds"]) / repeats
        assert arm["tokens_per_second"] == pytest.approx(setting["tokens"] / median)
        for end in ("loss_first", "loss_last"):  # arms run in bf16 or fp32, some with dropout
            assert arm[end] == pytest.approx(setting["arms"]["b0"][end], rel=0.05)


def test_bench_clients_says_where_data_should_be(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"fingpt_sentiment.*--data DIR or set FEDSIM_DATA"):
        bench.main(["--quick", "--data", str(tmp_path)])


def test_a_figure_is_a_median_of_pairs_times_its_factor() -> None:
    """2 x (4/2, 9/3, 4/4) = 4, 6, 2."""
    found = harness.figure(harness.ratio((4, 9, 4), (2, 3, 4), 2), unit=7)
    assert found == {"value": 4, "low": 2, "high": 6, "n": 3, "unit": 7}


@pytest.fixture
def world(tiny: Callable[[str], Path]) -> World:
    config = steps.configure(str(tiny("llama")), 4, 4)
    fp32 = config.model.model_copy(update={"dtype": "float32"})
    return load_world(config.model_copy(update={"model": fp32}), steps.KEY)


def test_a_step_is_the_engines_own(world: World) -> None:
    """Its losses, weights after AdamW and number of rows are those of a trained round; and a mean
    over all labels does not depend on whose they are."""
    step = steps.Step(world, 4, 3)
    before = step.trainer.bank.rows.clone()
    step.run()
    seen = list(step.trainer.train(step.plan, LocalRule(before[0]), Meter()))
    assert sum(int(u.tokens[0]) for u in seen) == step.tokens
    again = steps.Step(world, 4, 3)
    losses, mean = again.gradients(), float(again.loss())
    assert steps.Step(world, 1, 12).loss() == pytest.approx(mean, rel=1e-5)
    for k, update in enumerate(seen):
        assert losses[k] == pytest.approx(update.loss_first[0], rel=1e-6)
        assert (before[k] != update.row[0]).any()
    again.run()
    assert torch.equal(again.trainer.bank.rows, step.trainer.bank.rows)
    assert torch.allclose(torch.cat([u.row for u in seen]), again.trainer.bank.rows, atol=1e-6)


def test_base_products_are_those_with_frozen_weights(world: World) -> None:
    """By hand, per row: 2 FLOPs x the weights of every linear, forward and dX. Of the first layer
    q, k, v have no dX. The last MLP and the head see label rows only, the head in one product
    forward and one back."""
    found = steps.base_products(world, 1)
    step = steps.Step(world, 8, 4)
    per_layer = {name: site.weight.numel() for site in world.base.sites
                 for name in (site.members[0].name.partition("layers.")[2],)}  # fmt: skip
    labels = int(step.labels.sum())
    rows = {n: labels if n.startswith("1.mlp") else step.tokens for n in per_layer}
    passes = {n: 1 if n.startswith("0.self_attn.q") else 2 for n in per_layer}
    flops = sum(2 * rows[n] * passes[n] * per_layer[n] for n in per_layer)
    flops += 2 * 2 * labels * world.base.head.numel()
    assert found["base_share"]["gflop"] == pytest.approx(flops / 1e9)
    assert 0 < found["base_share"]["value"] < 1 and found["base_rate"]["value"] > 0


def test_operations_must_agree_before_they_are_timed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each baseline computes the same; with another scale, beta or weight it would be refused."""
    assert ops.lora_vs_loop(world.base, 1)["widths"] == [[32, 16, 16], [48, 48]]
    assert ops.adamw_vs_foreach(world.base, 1)["tensors"] == 28
    assert ops.reduce_over_copy(world.base, 1)["value"] > 0

    looped, summed = ops.looped, torch.ops.fedsim.weighted_rows
    monkeypatch.setattr(ops, "looped", lambda w: looped(w._replace(scale=1.01 * w.scale)))
    with pytest.raises(ModelError, match="the loop"):
        ops.lora_vs_loop(world.base, 1)
    adam = torch.optim.AdamW
    monkeypatch.setattr(ops.torch.optim, "AdamW", lambda p, lr, **rest: adam(p, 1.01 * lr, **rest))
    with pytest.raises(ModelError, match="AdamW"):
        ops.adamw_vs_foreach(world.base, 1)
    monkeypatch.setattr(
        torch.ops.fedsim,
        "weighted_rows",
        lambda total, rows, start, w: summed(total, rows, start, 1.01 * w),
    )
    with pytest.raises(ModelError, match="weighted sum"):
        ops.reduce_over_copy(world.base, 1)


def test_passes_for_ragged_clients_are_full() -> None:
    """Rows and budgets by hand for one slot: 3 + 4 of 5 and 5, 7 of 7: 14 / 17."""
    shifts = ops.schedule([2, 1], lambda c, s: ops.Load(((3, 4), (7,))[c][s : s + 1]), 1, 5)
    rows = [shift.rows for shift in shifts]
    assert sum(rows) / sum(max(r, 5) for r in rows) == 14 / 17
    found = ops.utilisation(1, clients=20, slots=4, budgets=(512, 1024))
    assert 0.9 < found["value"] <= 1 and found["value"] == min(found["by_budget"].values())


def test_bench_engine(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every figure of the table is there, with its targets, and the README renders them."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(engine, "SMALL", 10**6)
    monkeypatch.setattr(engine, "QUICK", (2, 1))
    threads = str(torch.get_num_threads())
    engine.main(["--quick", "--save", "--model", str(tiny("llama")), "--threads", threads])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads((tmp_path / "engine.json").read_text())
    assert list(last) == list(result["figures"]) == list(engine.FIGURES)
    assert result["dtype"] in ("float32", "bfloat16") and result["summary"] == last
    for name, figure in result["figures"].items():
        assert figure["low"] <= figure["value"] <= figure["high"], name
    assert min(result["figures"]["vs_b1_large"]["tokens_per_step"]) >= 2000
    text = readme.render("<!-- engine:begin --><!-- engine:end -->")
    assert all(f"| {title} |" in text for title, *_ in engine.FIGURES.values())
    assert f"every arm in {result['dtype']}" in text


def test_steps_of_another_size_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SMALL", 5)
    with pytest.raises(RunError, match=r"vs_b1_small: got steps of \d+ to \d+ tokens"):
        engine.vs_b1(world, "vs_b1_small", 2, 1, 1)


def test_bench_aggregation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every rule is there; FlexLoRA by QR is the dense one's best; the README renders it."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    threads = str(torch.get_num_threads())
    sizes = ["--counts", "9,11", "--wide", "384", "--layers", "1"]
    aggregation.main(["--quick", "--save", "--threads", threads, *sizes])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["flexlora_max_rel_error"] <= 1e-5 and last["flexlora_qr_speedup"] > 0
    assert last["streaming_extra_mb_11_clients"] >= 0
    result = json.loads((tmp_path / "aggregation.json").read_text())
    assert set(result["rules"]) == set(strategies.known()) - {"local"}
    for name, found in result["rules"].items():
        assert all(found[count]["seconds"] > 0 for count in ("9", "11")), name
    text = readme.render("<!-- aggregation:begin --><!-- aggregation:end -->")
    assert text.count(" s, ") >= 2 * len(readme.RULES_SHOWN)
    assert set(readme.RULES_SHOWN) <= set(result["rules"])


def test_rules_that_hold_all_updates_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """`WHOLE` is what asks `reduce.rows`, `PRODUCTS` what asks `reduce.products`."""
    asked: dict[str, set[str]] = {"rows": set(), "products": set()}
    layout = aggregation.AdapterLayout.build({"q": (8, 8)}, 2)
    for name in set(strategies.known()) - {"local"}:
        reduce = aggregation.Reduce(layout, 2.0, 1)
        for method in asked:
            plain = getattr(reduce, method)

            def noted(*given: Any, _m: str = method, _n: str = name, _f: Any = plain) -> Any:
                asked[_m].add(_n)
                return _f(*given)

            monkeypatch.setattr(reduce, method, noted)
        work, rule = aggregation.Round.build(layout, 9), strategies.load(name)
        server = rule.start(work.start, layout)
        rule.aggregate(server, work.plan, work.updates(), reduce, aggregation.Forgetful())
    assert asked == {"rows": set(aggregation.WHOLE), "products": set(aggregation.PRODUCTS)}
