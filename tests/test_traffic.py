"""Traffic is FlowerTune's arithmetic: fp32 adapters, both directions, every client of every round.

Mistral-7B-v0.3 with rank 32 on q_proj and v_proj sends 13,631,488 numbers, 52.0 MiB a transfer;
200 rounds of two clients are 41,600 MiB and of five 104,000 MiB, the published figures. The same
numbers come from the model's shape, from a run's record and from `fedsim plan`; the budget of
200,000 MiB is exceeded by more than it, not by it. No weights are needed. About 4 s.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from fedsim import cli, cost, record, seeds
from fedsim.config import Config, build
from fedsim.core import AdapterLayout, LocalRule, RoundPlan
from fedsim.display import over_budget
from fedsim.plan import sampled

NUMBERS = 13_631_488  # 32 layers x 32 x ((4096 + 4096) + (4096 + 1024))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of Mistral-7B-v0.3 and nothing else."""
    folder = tmp_path_factory.mktemp("mistral")
    MistralConfig(
        vocab_size=32768, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=14336, sliding_window=None,
    ).save_pretrained(folder)  # fmt: skip
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    return folder


def flowertune(folder: Path, clients: int, rounds: int = 200) -> Config:
    values: dict[str, Any] = {
        "run": {"protocol": "flowertune"}, "model": {"name": str(folder)},
        "adapter": {"rank": 32, "alpha": 64.0, "targets": ["q_proj", "v_proj"]},
        "clients": {"number": 10 * clients}, "server": {"rounds": rounds, "fraction": 0.1},
    }  # fmt: skip
    return build(values, "test")


def layout(rank: int = 32) -> AdapterLayout:
    shapes = {f"{n}.{name}": (4096, out) for n in range(32)
              for name, out in (("q_proj", 4096), ("v_proj", 1024))}  # fmt: skip
    return AdapterLayout.build(shapes, rank)


@pytest.mark.parametrize(("clients", "total"), [(2, 41_600), (5, 104_000)])
def test_the_published_figures(mistral: Path, clients: int, total: int) -> None:
    got = cost.estimate(flowertune(mistral, clients))
    assert got.adapter_numbers == NUMBERS == layout().numel()
    assert got.base_numbers == 7_248_023_552
    assert got.mib == total and got.over_budget == ""
    assert got.work is None
    lines = dict(got.lines())
    assert lines["one transfer"] == "52.0 MiB" and lines["all transfers"] == f"{total:,} MiB"
    assert lines["adapter"] == "13,631,488 parameters (0.19% of the base)"
    assert lines["clients"].endswith(f"{200 * clients} visits")
    assert lines["optimiser steps"] == f"{2000 * clients:,}"


def test_a_clients_rank_decides_what_it_sends(mistral: Path) -> None:
    """Half of 64 in each of 3 rounds: 13 MiB a transfer at rank 8, 26 at 16, 52 at 32; the same
    as the record of a run with these clients."""
    values = flowertune(mistral, 1, 3).model_dump()
    values["adapter"]["ranks"] = (8, 16, 32)
    values["clients"]["number"], values["server"]["fraction"] = 64, 0.5
    config = build(values, "test")
    sent = [sampled(config, 64, n, seeds.run_key(config.run.seed))[1] for n in (1, 2, 3)]
    got = cost.estimate(config)
    assert got.mib == 2 * sum(13 * int(r) // 8 for ranks in sent for r in ranks)
    assert got.mib < cost.estimate(flowertune(mistral, 32, 3)).mib == 2 * 3 * 32 * 52
    rule, before, lines = LocalRule(torch.zeros(0)), 0.0, []
    for n, ranks in enumerate(sent, 1):
        seen = visits(ranks.tolist())
        lines.append(record.round_line(plan(32, n), rule, seen, layout(), record.Meter(), before))
        before = lines[-1]["total_mib"]
    assert sum(2 * line["up_mib"] for line in lines) == got.mib
    assert dict(got.lines())["one transfer"] == "13.0 to 52.0 MiB"
    assert dict(got.lines())["ranks"] == "8, 16, 32, by client"


@pytest.mark.parametrize(
    ("clients", "rounds", "over"), [(10, 192, False), (10, 193, True), (1, 1, False)]
)
def test_the_budget(mistral: Path, clients: int, rounds: int, over: bool) -> None:
    """10 clients send 1,040 MiB a round: 192 rounds are 199,680 MiB, 193 are 200,720."""
    got = cost.estimate(flowertune(mistral, clients, rounds))
    assert got.mib == 104 * clients * rounds
    assert bool(got.over_budget) is over
    assert ("200,000 MiB" in got.over_budget) is over


def test_the_budget_itself_is_allowed() -> None:
    assert over_budget(200_000.0) == "" and over_budget(200_000.1)


def plan(clients: int, round: int) -> RoundPlan:
    def full(value: float, kind: type = float) -> np.ndarray:
        return np.full(clients, value, dtype=kind)

    return RoundPlan(round, np.arange(clients), full(1), full(32, int), full(2), full(10, int),
                     full(5e-5), full(round - 1, int), (np.arange(clients),), clients)  # fmt: skip


def visits(ranks: list[int]) -> list[dict[str, Any]]:
    return [{"rank": r, "ok": n > 0, "tokens": 7, "loss_first": 2.0, "loss_last": 1.0}
            for n, r in enumerate(ranks)]  # fmt: skip


@pytest.mark.parametrize(
    ("clients", "round", "total", "over"),
    [(2, 200, 41_600, False), (5, 200, 104_000, False), (10, 192, 199_680, False),
     (10, 193, 200_720, True)],
)  # fmt: skip
def test_a_line_of_the_record(clients: int, round: int, total: int, over: bool) -> None:
    """A client that failed was sent the adapter too."""
    line = record.round_line(
        plan(clients, round), LocalRule(torch.zeros(0)), visits([32] * clients), layout(),
        record.Meter(), 2.0 * 52 * clients * (round - 1),
    )  # fmt: skip
    assert line["down_mib"] == line["up_mib"] == 52 * clients
    assert line["total_mib"] == total and line["over_budget"] is over
    assert (line["clients"], line["failed"], line["tokens"]) == (clients, 1, 7 * clients)


def test_a_smaller_rank_sends_less() -> None:
    rule = LocalRule(torch.zeros(0))
    line = record.round_line(plan(3, 1), rule, visits([8, 16, 32]), layout(), record.Meter(), 0.0)
    assert line["up_mib"] == line["down_mib"] == 13 + 26 + 52


def test_a_rule_says_what_travels() -> None:
    """Up only A, 4 (R I) bytes a module; down B and 2^18 numbers more, by rank."""
    shape = layout()
    rule = LocalRule(torch.zeros(0), down=("B",), up=("A",), more_down=1 << 18)
    line = record.round_line(plan(2, 1), rule, visits([16, 32]), shape, record.Meter(), 7.0)
    of = {kind: shape.numel(32, (kind,)) * 4 / 2**20 for kind in "AB"}
    assert of["A"] + of["B"] == 52
    assert line["up_mib"] == 1.5 * of["A"] and line["down_mib"] == 1.5 * (of["B"] + 1)
    assert line["total_mib"] == 7 + line["up_mib"] + line["down_mib"]


def test_gaps_of_the_layout_are_not_sent() -> None:
    odd = AdapterLayout.build({"a": (5, 3)}, 3)
    assert odd.numel() == 3 * (5 + 3) == odd.numel(3) and odd.size == 16 + 16
    assert odd.numel(1) == 8


@pytest.mark.parametrize(("clients", "flag"), [(2, False), (10, True)])
def test_plan_needs_only_a_configuration(
    mistral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    clients: int, flag: bool,
) -> None:  # fmt: skip
    words = [f"model.name='{mistral}'", "adapter.rank=32", 'adapter.targets=["q_proj", "v_proj"]',
             f"clients.number={10 * clients}", "server.rounds=200"]  # fmt: skip
    sets = [part for word in words for part in ("--set", word)]
    monkeypatch.setattr(sys, "argv", ["fedsim", "plan", *sets])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    text = capsys.readouterr().out
    assert not stopped.value.code
    for figure in ("7,248,023,552", "13,631,488", "52.0 MiB", f"{20_800 * clients:,} MiB"):
        assert figure in text
    assert ("over FlowerTune's budget of 200,000 MiB" in text) is flag
