"""Compression: what a server gets is what a client's bytes can say, and what is lost is known.

Rounding is unbiased and off by less than a step; top-k is the sorted list's; what was sent and
what is left over make the updates of all rounds; bytes by hand, and in packed codes; runs on a tiny
model are killed and end at the same bits, with the formula's bytes in their record. About 12 s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import cost, seeds, simulate
from fedsim.channel import Channel, Wire
from fedsim.compress import compressed, quantised, through, top_k
from fedsim.config import Config, build
from fedsim.core import ClientUpdates, LocalRule
from fedsim.errors import ConfigError
from tests.rules import EPS, LAYOUT, Kept, blocks, plan_of, random_rows
from tests.test_every_rule_runs import killed_and_resumed, state

KEY = 77
ALL = [{"compression": "int8"}, {"compression": "int4", "block": 5},
       {"compression": "top_k", "keep": 0.2}]  # fmt: skip


def draw(seed: int, n: int, spread: float = 1.0) -> Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(0, spread, n)


def scales(x: Tensor, block: int) -> Tensor:
    """Of each number, the largest of its block: (n,) fp64."""
    parts = [part.abs().max().double().expand(len(part)) for part in x.split(block)]
    return torch.cat(parts)


def rounded(x: Tensor, bits: int, block: int, round: int = 1) -> Tensor:
    u = seeds.uniform(KEY, seeds.Purpose.CHANNEL, len(x), client=3, round=round)
    return quantised(x, bits, block, u)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_rounding_is_unbiased_and_close(bits: int, levels: int) -> None:
    """Every number is one of its two neighbours, and the mean of draws within 5 deviations."""
    x, draws = draw(1, 50), 1500
    step = scales(x, 16) / levels
    got = torch.stack([rounded(x, bits, 16, n).double() for n in range(draws)])
    assert ((got - x).abs() < step * (1 + 1e-6)).all()
    codes = got / step
    assert (codes - codes.round()).abs().max() < 1e-4 and codes.round().abs().max() == levels
    off = x.double() / step - (x.double() / step).floor()
    deviation = (off * (1 - off)).sqrt() * step / draws**0.5
    assert ((got.mean(0) - x).abs() <= 5 * deviation + 1e-6 * x.abs()).all()


def test_what_codes_can_say_is_exact() -> None:
    x = torch.tensor([127.0, -3, 0, 64, -127, 1, 5, 127]) / 1024
    assert all(torch.equal(rounded(x, 8, 5, n), x) for n in range(50))
    seven = torch.tensor([7.0, -3, 0, 1, -7]) / 8
    assert all(torch.equal(rounded(seven, 4, 3, n)[:3], seven[:3]) for n in range(50))
    assert torch.equal(rounded(torch.zeros(9), 8, 4), torch.zeros(9))
    small = torch.tensor([1e-45, 0, -1e-45])
    assert torch.equal(rounded(small, 8, 3), small)


def test_by_hand() -> None:
    """s = 7: 2.5 becomes 2 where u < 1/2 and else 3, -2.5 becomes -3 and else -2."""
    x = torch.tensor([7.0, 2.5, 2.5, -2.5, -2.5])
    u = torch.tensor([0.9, 0.49, 0.51, 0.49, 0.51], dtype=torch.float64)
    assert quantised(x, 4, 5, u).tolist() == [7, 2, 3, -3, -2]


@pytest.mark.parametrize("k", [1, 3, 6, 8, 12])
def test_top_k_is_the_sorted_lists(k: int) -> None:
    x = torch.tensor([1.0, -2, 0, 2, 0.5, -2, 1, 3, 0, -1, 2, 0])
    order = sorted(range(12), key=lambda i: (-abs(float(x[i])), i))[:k]
    want = [float(x[i]) if i in order else 0.0 for i in range(12)]
    assert top_k(x, k).tolist() == want


def test_all_is_the_identity() -> None:
    x = draw(2, 100)
    everything = Channel(compression="top_k", keep=1.0)
    assert torch.equal(compressed(x, everything, key=KEY, client=1, round=1), x)


@pytest.mark.parametrize(
    ("channel", "numbers", "want"),
    [({}, 10, 40), ({"compression": "int8", "block": 4}, 10, 10 + 3 * 4),
     ({"compression": "int8"}, 512, 512 + 2 * 4), ({"compression": "int8"}, 513, 513 + 3 * 4),
     ({"compression": "int4", "block": 4}, 10, 5 + 3 * 4),
     ({"compression": "int4", "block": 4}, 11, 6 + 3 * 4),
     ({"compression": "top_k", "keep": 0.25}, 10, 3 * 4 + 2),
     ({"compression": "top_k"}, 1000, 10 * 4 + 10 * 4),
     ({"compression": "top_k", "keep": 0.07}, 100, 7 * 4 + 13),
     ({"compression": "top_k", "keep": 1.0}, 16, 16 * 4 + 2),
     *[(c, 0, 0) for c in ALL]],
)  # fmt: skip
def test_bytes_by_hand(channel: dict[str, Any], numbers: int, want: int) -> None:
    """3 of 10 values and a bitmap of 2 bytes; 10 of 1,000 and 10 indices, a bitmap had 125."""
    assert Wire(Channel(**channel)).up(numbers, 3) == want


@pytest.mark.parametrize("n", [1, 6, 23])
def test_bytes_are_enough(n: int) -> None:
    """Codes and scales packed as bytes, and read back, are what the server gets."""
    x, block = draw(3, n), 5
    got = rounded(x, 4, block)
    each = torch.stack([part.abs().max() for part in x.split(block)])
    codes = (got.double() / scales(x, block) * 7).round().long().numpy() + 7
    codes = np.append(codes, np.zeros(n % 2, dtype=codes.dtype))
    packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8).tobytes()
    wire = packed + each.numpy().tobytes()
    assert len(wire) == Wire(Channel(compression="int4", block=block)).up(n, 3)
    read = np.frombuffer(wire[: len(packed)], np.uint8)
    q = np.stack([read >> 4, read & 15], 1).reshape(-1)[:n].astype(float) - 7
    s = np.repeat(np.frombuffer(wire[len(packed) :], np.float32), block)[:n].astype(float)
    assert np.array_equal((q * (s / 7)).astype(np.float32), got.numpy())


def passed(
    channel: Channel, start: Tensor, rows: Tensor, memory: Kept, round: int = 1,
    up: Sequence[str] = ("A", "B"), ok: Sequence[bool] | None = None, cuts: Sequence[int] = (),
) -> list[ClientUpdates]:  # fmt: skip
    plan = replace(plan_of([1.0] * len(rows), round), rank=np.array([3, 2, 3, 1])[: len(rows)])
    rule = LocalRule(start, up=tuple(up))
    out = list(through(channel, blocks(start, rows, ok, cuts), plan=plan, rule=rule,
                       layout=LAYOUT, memory=memory, key=KEY))  # fmt: skip
    memory.commit()
    return out


@pytest.mark.parametrize("channel", ALL)
def test_only_what_travels_changes(channel: dict[str, Any]) -> None:
    """Numbers of other kinds and beyond a client's rank stay to the bit; blocks change nothing."""
    start, rows, made = random_rows(1, 1)[0], random_rows(2, 4), Channel(**channel)
    (whole,) = passed(made, start, rows, Kept(), up=("B",))
    cut = torch.cat([b.row for b in passed(made, start, rows, Kept(), up=("B",), cuts=(1, 3))])
    assert torch.equal(whole.row, cut)
    own = torch.cat([b.row for b in passed(made, start, rows, Kept(), round=2, up=("B",))])
    assert made.keep is not None or not torch.equal(own, cut)
    for k, rank in enumerate((3, 2, 3, 1)):
        has = LAYOUT.mask(("B",), rank)
        assert torch.equal(whole.row[k][~has], rows[k][~has])
        sent = (whole.row[k] - start)[has]
        want = compressed((rows[k] - start)[has], made, key=KEY, client=k, round=1)
        assert not torch.equal(whole.row[k][has], rows[k][has])
        assert (sent - want).abs().max() <= 8 * EPS * whole.row[k].abs().max()


@pytest.mark.parametrize("channel", ALL)
def test_nothing_is_lost_with_feedback(channel: dict[str, Any]) -> None:
    """sum of sent + residual = sum of updates, in each number; a failed client keeps its own."""
    made, memory, start = Channel(**{"feedback": True, **channel}), Kept(), random_rows(1, 1)[0]
    sent, learnt, biggest = *torch.zeros(2, 4, LAYOUT.size).double(), 0.0
    for round in range(1, 7):
        rows = start + random_rows(10 + round, 4)
        ok, before = [True, round != 3, True, True], memory.read("residual", 1)
        up = ("A", "B") if round % 3 else ("B",)
        (block,) = passed(made, start, rows, memory, round, up, ok)
        has = torch.stack([LAYOUT.mask(up, r) for r in (3, 2, 3, 1)])
        has &= torch.tensor(ok)[:, None]
        sent += torch.where(has, block.row.double() - start.double(), 0)
        learnt = learnt + torch.where(has, rows.double() - start.double(), 0)
        if round == 3:
            assert torch.equal(block.row[1], rows[1]) and before is not None
            now = memory.read("residual", 1)
            assert now is not None and torch.equal(now, before)
        biggest = max(biggest, float(block.row.abs().max()), float(rows.abs().max()))
    residual = torch.stack([memory.now["residual", k] for k in range(4)])
    assert residual.abs().max() > 0.01
    assert (sent + residual - learnt).abs().max() <= 6 * 4 * EPS * 2 * biggest


def test_without_feedback_nothing_is_kept() -> None:
    memory, start = Kept(), random_rows(1, 1)[0]
    passed(Channel(compression="int8"), start, random_rows(2, 4), memory)
    assert not memory.now and Channel(compression="top_k").feedback


def test_a_sum_that_overflows_fails_its_client() -> None:
    start, rows, memory = torch.zeros(LAYOUT.size), random_rows(2, 2), Kept()
    memory.now["residual", 0] = LAYOUT.mask(("A",)).float() * 3e38
    rows[0] = memory.now["residual", 0]
    (block,) = passed(Channel(compression="int8", feedback=True), start, rows, memory)
    assert block.ok.tolist() == [False, True]
    assert torch.equal(memory.now["residual", 0], rows[0]) and ("residual", 1) in memory.now


@pytest.mark.parametrize(
    ("channel", "said"),
    [({"block": 64}, "channel.block"), ({"compression": "top_k", "block": 64}, "channel.block"),
     ({"compression": "int8", "keep": 0.1}, "channel.keep"), ({"feedback": True}, "feedback")],
)  # fmt: skip
def test_what_is_not_used_is_refused(channel: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{said}: got .*; expected only, and then, with"):
        build({"channel": channel}, "here")


KINDS = [("fedavg", {"channel__compression": "int8", "channel__feedback": True}),
         ("rolora", {"channel__compression": "int4", "channel__block": 32}),
         ("fedsa_lora", {"channel__compression": "top_k", "channel__keep": 0.05})]  # fmt: skip


@pytest.mark.parametrize(("rule", "channel"), KINDS)
def test_a_killed_run_goes_on(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, rule: str,
    channel: dict[str, Any],
) -> None:  # fmt: skip
    """Also the same in the plan, in the record and by hand: 4 clients in each of 3 rounds."""

    def configure(name: str, **more: Any) -> Config:
        return settings(run__name=name, server__strategy=rule, evaluate__limit=0, **more)

    config = configure("whole", **channel)
    folder = simulate.run(config)
    whole = state(folder)
    resumed = state(killed_and_resumed(configure("killed", **channel), monkeypatch))
    plain = state(simulate.run(configure("plain")))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert any("residual" in key for key in whole) == (rule != "rolora")
    assert not torch.equal(whole["row"], plain["row"])
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    a, b = (cost.estimate(config).layout.numel(4, (kind,)) for kind in "AB")
    up = {
        "fedavg": [a + b + 4 * -(-(a + b) // 256)] * 3,
        "rolora": [-(-n // 2) + 4 * -(-n // 32) for n in (b, a, b)],
        "fedsa_lora": [(k := -(-a * 5 // 100)) * 4 + min(4 * k, -(-a // 8))] * 3,
    }[rule]
    assert [line["up_mib"] for line in lines] == [4 * n / 2**20 for n in up]
    assert cost.estimate(config).mib == lines[-1]["total_mib"]
