"""Secure sums are the sums, to half a unit of fixed point a client, and nothing wraps unseen.

Real pairwise masks cancel to the bit, which is why none is drawn in a run; sums do not depend on
the order; too large numbers, too few clients and rules that look at single updates are refused with
what to do; bytes by hand; a run on a tiny model is FedAvg's to rounding, is killed and ends at the
same bits, with the protocol's bytes in its record. About 10 s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import cost, rehearsal, seeds, simulate, strategies
from fedsim.channel import Channel, Wire, kept, largest
from fedsim.checkpoint import load_checkpoint
from fedsim.config import Config, build
from fedsim.errors import ConfigError, RunError
from fedsim.reduce import Reduce, Sums, uniform
from fedsim.references import NAMES, reference
from fedsim.secure import Ring
from tests.rules import LAYOUT, SCALE, M, blocks, plan_of, random_rows
from tests.test_every_rule_runs import killed_and_resumed, state

RING = Ring(32, 4.0, 2 / 3)
WEIGHTS = [1.0, 20, 3, 7, 11, 5]


def reduce(ring: Ring = RING) -> Reduce:
    return Reduce(LAYOUT, SCALE, 1, ring)


def small(seed: int, count: int = M) -> Tensor:
    return random_rows(seed, count) / 8


def sums(rows: Tensor, ring: Ring = RING, ok: Sequence[bool] | None = None,
         order: Sequence[int] = range(M), cuts: Sequence[int] = ()) -> Sums:  # fmt: skip
    """Of updates from 0, of two ways of weighing; clients in some order."""
    at = list(order)
    plan = plan_of([WEIGHTS[i] for i in at], ids=at)
    ok = [ok[i] for i in at] if ok else None
    weights = plan.weights / 20
    return reduce(ring).sums(plan, blocks(torch.zeros(LAYOUT.size), rows[at], ok, cuts),
                             lambda block: weights[block.index], uniform)  # fmt: skip


@pytest.mark.parametrize("bits", [16, 24, 32, 48])
@pytest.mark.parametrize("ok", [None, [True, False, True, True, False, True]])
def test_a_sum_is_the_sum(bits: int, ok: list[bool] | None) -> None:
    """Of float64, off by at most half a unit a client; weights likewise."""
    rows, ring = small(1), Ring(bits, 2.5, 0.6)
    if ok:
        rows[1] = torch.nan
    got, here = sums(rows, ring, ok), np.array(ok or [True] * M)
    bound = here.sum() * ring.unit(M) / 2 * (1 + 1e-9) + 1e-15
    for of, w in enumerate((np.array(WEIGHTS) / 20, np.ones(M))):
        exact = (torch.from_numpy(w[here])[:, None] * rows[here].double()).sum(0)
        off = (got.totals[of] - exact).abs().max()
        assert off <= bound and (bits == 48 or off > bound / 100)
        assert abs(got.weights[of] - w[here].sum()) <= bound
    assert np.array_equal(got.ok, here)


def test_the_order_and_the_blocks_do_not_matter() -> None:
    rows = small(2)
    first = sums(rows)
    for order, cuts in (([5, 3, 0, 1, 4, 2], (2,)), ([1, 0, 5, 4, 3, 2], (1, 3, 4))):
        again = sums(rows, order=order, cuts=cuts)
        assert all(torch.equal(a, b) for a, b in zip(first.totals, again.totals, strict=True))
        assert first.weights == again.weights


def test_starts_of_their_own() -> None:
    """Each client's delta is from where it began, and `of` takes rows instead."""
    start, rows = small(3), small(4)
    (block,) = blocks(start, rows)
    plan = plan_of([1.0] * M)
    delta = reduce().sums(plan, iter([block]), uniform).totals[0]
    whole = reduce().sums(plan, iter([block]), uniform, of="row").totals[0]
    bound = M * RING.unit(M)
    assert (delta - (rows.double() - start.double()).sum(0)).abs().max() <= bound
    assert (whole - rows.double().sum(0)).abs().max() <= bound < (delta - whole).abs().max()


def test_the_mean_weighs_as_without() -> None:
    """Weights are at most 1 in the ring, whatever numbers of examples are."""
    plan = plan_of([9000.0 * w for w in WEIGHTS])
    start, rows = torch.zeros(LAYOUT.size), small(5)
    plain = Reduce(LAYOUT, SCALE, 1).mean(plan, blocks(start, rows))
    got = reduce().mean(plan, blocks(start, rows))
    least = sum(WEIGHTS) / max(WEIGHTS)
    assert 0 < (got - plain).abs().max() <= M * RING.unit(M) / least + 2e-7 * plain.abs().max()


def test_the_unit_by_hand() -> None:
    """32767 // 4 = 8191 steps each, so 2^-12 to cover 1, and 0.3 is 1228.8 of them."""
    ring = Ring(16, 1.0, 1.0)
    assert largest(16, 4) == 8191 and ring.unit(4) == 2.0**-12
    x = torch.tensor([0.3, -0.3, 0.0, -1.0], dtype=torch.float64)
    code = ring.encode(x, ring.unit(4))
    assert code.tolist() == [1229, 65536 - 1229, 0, 65536 - 4096]
    assert ring.decode(code, ring.unit(4)).tolist() == [1229 / 4096, -1229 / 4096, 0, -1]
    assert Ring(16, 8191 / 4096, 1.0).unit(4) == 2.0**-12  # as far as it goes
    assert Ring(16, 8191.5 / 4096, 1.0).unit(4) == 2.0**-11


@pytest.mark.parametrize("bits", [16, 31, 32, 48])
@pytest.mark.parametrize("edge", [1.0, 8191 / 4096, 3.7, 1e-3, 1e6])
@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_everybody_at_the_edge_does_not_wrap(bits: int, edge: float, m: int) -> None:
    ring = Ring(bits, edge, 1.0)
    for sign in (1, -1):
        codes = ring.encode(torch.full((m,), sign * edge, dtype=torch.float64), ring.unit(m))
        total = ring.decode(codes.sum() & ((1 << bits) - 1), ring.unit(m))
        assert abs(float(total) - sign * m * edge) <= m * ring.unit(m) / 2 + 1e-12 * m * edge


@pytest.mark.parametrize("number", [4.01, -4.01, 1e30])
def test_a_number_beyond_the_range_is_refused(number: float) -> None:
    rows = small(6)
    rows[3, 2] = number  # the fourth client weighs 7 / 20
    with pytest.raises(RunError, match=r"round 1: client 3 .* got .*; .*range = 4.0\. Raise"):
        sums(rows)
    rows[3, 2] = 4.0
    assert float(sums(rows).totals[0][2]) > 1


def test_a_weight_beyond_the_range_is_refused() -> None:
    plan = plan_of(WEIGHTS)
    with pytest.raises(RunError, match=r"client 1 .* got 20\.0"):
        reduce().sums(plan, blocks(torch.zeros(LAYOUT.size), small(7) / 100),
                      lambda block: plan.weights[block.index])  # fmt: skip


@pytest.mark.parametrize(
    ("threshold", "failed", "opens"),
    [(2 / 3, 2, True), (2 / 3, 3, False), (0.51, 2, True), (0.51, 3, False), (1.0, 0, True),
     (1.0, 1, False), (2 / 3, 6, False)],
)  # fmt: skip
def test_the_threshold(threshold: float, failed: int, opens: bool) -> None:
    """Of 6, 2/3 are 4 and 0.51 are 3.06, so 4."""
    ok, ring = [n >= failed for n in range(M)], Ring(32, 4.0, threshold)
    if opens:
        assert sums(small(8), ring, ok).weights[1] == M - failed
        return
    least = 6 if threshold == 1.0 else 4
    with pytest.raises(RunError, match=rf"round 1: {M - failed} of 6 clients .*at least {least},"):
        sums(small(8), ring, ok)


def test_masks_cancel_and_hide() -> None:
    """Pairwise masks from seeds, +m_ij of i < j and -m_ij of j: sums are the same to the bit, and a
    masked vector's leading nibbles are evenly spread (chi^2 of 15 degrees, 0.999 at 37.7)."""
    n, ring = 20_000, RING
    mask = (1 << ring.bits) - 1
    x = torch.stack([0.01 * seeds.normal(1, seeds.Purpose.CHANNEL, n, client=k) for k in range(M)])
    plain = ring.encode(x, ring.unit(M))
    masked = plain.clone()
    for i, j in combinations(range(M), 2):
        shared = seeds.words(2, seeds.Purpose.CHANNEL, n, client=i, round=j)
        masked[i] += shared
        masked[j] -= shared
    masked &= mask
    assert torch.equal(masked.sum(0) & mask, plain.sum(0) & mask)
    assert not torch.equal(masked[:-1].sum(0) & mask, plain[:-1].sum(0) & mask)

    def spread(row: Tensor) -> float:
        counts = torch.bincount(row >> (ring.bits - 4), minlength=16).double()
        return float(((counts - n / 16) ** 2 / (n / 16)).sum())

    assert max(map(spread, masked)) < 37.7 < min(map(spread, plain))


def secure(**more: Any) -> Config:
    return build({"channel": {"secure": True}, "server": {"min_clients": 3, **more}}, "here")


@pytest.mark.parametrize(
    ("rule", "vectors"),
    [("fedavg", 1), ("fedyogi", 1), ("fednova", 1), ("scaffold", 1), ("feddyn", 1),
     ("fedsa_lora", 1), ("rolora", 1), ("hetlora", 1), ("qfedavg", 2)],
)  # fmt: skip
def test_rules_of_sums(rule: str, vectors: int) -> None:
    config = secure(strategy=rule)
    assert rehearsal.wire(config, strategies.load(rule, {})) == Wire(config.channel, vectors)


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [("krum", {"f": 2}, "reads updates"), ("median", {}, "reads updates"),
     ("bulyan", {}, "reads updates"),
     ("geometric_median", {}, "reads updates"), ("flora", {}, "reads products B A"),
     ("flexlora", {}, "reads products B A"), ("local", {}, "sums no updates")],
)  # fmt: skip
def test_others_are_refused_before_anything(
    settings: Callable[..., Config], tmp_path: Path, rule: str, options: dict[str, Any], said: str
) -> None:
    config = settings(channel__secure=True, server__strategy=rule, server__options=options)
    for ask in (simulate.run, cost.estimate):
        with pytest.raises(ConfigError, match=rf"channel.secure: .*{said}"):
            ask(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("channel", "server", "said"),
    [({"bits": 24}, {}, "channel.bits: got 24; expected only, and then, with channel.secure"),
     ({"threshold": 0.7}, {}, "channel.threshold"), ({"range": 2.0}, {}, "channel.range"),
     ({"secure": True, "compression": "int8"}, {}, "channel.compression: got int8; .* none"),
     ({"secure": True}, {"fraction": 0.05}, "channel.secure: got true with 1 client"),
     ({"secure": True, "bits": 16}, {"min_clients": 300}, "channel.bits: got 16; .* 300")],
)  # fmt: skip
def test_what_does_not_fit(channel: dict[str, Any], server: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build({"channel": channel, "server": server, "clients": {"number": 400 if "min_clients" in
              server else 20}}, "here")  # fmt: skip


def test_references_have_no_channel() -> None:
    for channel in ({"secure": True, "range": 3.0}, {"compression": "top_k", "keep": 0.5}):
        config = build({"channel": channel}, "here")
        assert all(reference(config, name).channel == Channel() for name in NAMES)


def test_bytes_by_hand() -> None:
    """Among 3: 11 numbers of 4 bytes, 2 keys, 4 encrypted shares and 3 in the open; 4 keys and 4
    shares come. Both ways together the paper's 2 m K + (5 m - 4) S."""
    wire = Wire(Channel(secure=True))
    assert wire.up(10, 3) == 44 + 64 + 128 + 96 and wire.down(3) == 128 + 128
    assert wire.up(10, 3) + wire.down(3) == 44 + 2 * 3 * 32 + (5 * 3 - 4) * 32
    assert replace(wire, vectors=2).up(10, 3) == wire.up(10, 3) + 44
    odd = Wire(Channel(secure=True, bits=17))
    assert odd.up(10, 3) == -(-11 * 17 // 8) + 288 and kept(1.0, 10) == 10


def test_a_run_is_fedavgs_and_goes_on(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round within rounding of the plain one; three are killed and resumed; traffic of 4
    clients a round in the plan, in the record and by hand."""
    how = {"channel__secure": True, "evaluate__limit": 0}
    rows = []
    for name, more in (("plain", {}), ("one", how)):
        config = settings(run__name=name, server__rounds=1, **{"evaluate__limit": 0, **more})
        saved = load_checkpoint(simulate.run(config) / "checkpoint")
        assert saved is not None
        rows.append(saved.server.row)
    unit = Ring(32, 1.0, 2 / 3).unit(4)
    assert 0 < (rows[0] - rows[1]).abs().max() <= 4 * unit / 2 + 4e-7 * rows[0].abs().max()

    config = settings(run__name="whole", **how)
    folder = simulate.run(config)
    whole = state(folder)
    resumed = state(killed_and_resumed(settings(run__name="killed", **how), monkeypatch))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    got = cost.estimate(config)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    n = got.adapter_numbers
    for line in lines:
        assert line["up_mib"] * 2**20 == 4 * (4 * (n + 1) + 32 * (2 + 6 + 4))
        assert line["down_mib"] * 2**20 == 4 * (4 * n + 32 * (6 + 6))
    assert got.mib == lines[-1]["total_mib"]
    assert any(name == "one upload" for name, _ in got.lines())


def test_a_run_in_which_too_many_fail(settings: Callable[..., Config]) -> None:
    """Updates that are not finite are not returned; attackers that are too loud stop the run."""
    loud = {"attack__kind": "scale", "attack__fraction": 1.0}
    for factor, said in ((1e39, "0 of 4 clients returned"), (1e6, r"client \d+ has a number")):
        config = settings(channel__secure=True, run__name=f"at{factor:.0e}".replace("+", ""),
                          attack__options={"factor": factor}, **loud)  # fmt: skip
        with pytest.raises(RunError, match=said):
            simulate.run(config)
        lines = (Path(config.run.out) / config.run.name / "clients.jsonl").read_text()
        assert lines
