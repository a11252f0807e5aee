"""Plans are pure: who trains, at which rank, and which passes their steps share.

Proved here, without a model: a schedule holds every unit of every step of every client exactly
once and in order, within its budget and slots; it fills its passes; packing a step in parts loses
no token and no label, whatever the mode; strict chunks depend on the configuration alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import seeds
from fedsim.batch import PackedBatch
from fedsim.config import Config, Train, build
from fedsim.core import Population
from fedsim.data.tokens import TokenStore
from fedsim.packing import Step, cut, pack
from fedsim.plan import Load, Part, Shift, plan_round, sampled, schedule
from tests.lab import stored

CPU = torch.device("cpu")
KEY = seeds.run_key(3)


# ------------------------------------------------------------------------------------ schedules


def prefixed(units: tuple[int, ...], prefix: int) -> Load:
    """Units that begin with the same rows."""
    whole = tuple(u + prefix for u in units)
    return Load(whole, lambda first, end: prefix + sum(units[first:end]))


def check(loads: Sequence[Sequence[Load]], slots: int, budget: int) -> list[Shift]:
    """A schedule's promises, each; returns it."""
    asked: list[tuple[int, int]] = []

    def load(client: int, step: int) -> Load:
        asked.append((client, step))
        return loads[client][step]

    shifts = list(schedule([len(c) for c in loads], load, slots, budget))
    want = [(c, s, u) for c, steps in enumerate(loads) for s, of in enumerate(steps)
            for u in range(len(of.units))]  # fmt: skip
    assert sorted(asked) == sorted({(c, s) for c, s, _ in want}) and len(set(asked)) == len(asked)
    resident: dict[int, int] = {}
    done: list[tuple[int, int, int]] = []
    finished: set[int] = set()
    for shift in shifts:
        for slot, client in shift.enter:
            assert slot not in resident and client not in resident.values()
            resident[slot] = client
        first = next(c for c in range(len(loads)) if c not in finished)
        waiting = set(range(first, min(first + 4 * slots, len(loads)))) - finished
        assert len(resident) == slots or waiting == set(resident.values())
        assert 0 < len(shift.parts) <= len(resident) <= slots
        assert [p.slot for p in shift.parts] == sorted({p.slot for p in shift.parts})
        rows = 0
        for part in shift.parts:
            assert resident[part.slot] == part.client
            of = loads[part.client][part.step]
            assert 0 <= part.first < part.end <= len(of.units)
            assert part.completes == (part.end == len(of.units))
            done += [(part.client, part.step, u) for u in range(part.first, part.end)]
            rows += of.rows(part.first, part.end)
        assert rows == shift.rows
        single = len(shift.parts) == 1 and shift.parts[0].end == shift.parts[0].first + 1
        assert rows <= budget or single
        last = [(p.slot, p.client) for p in shift.parts
                if p.completes and p.step == len(loads[p.client]) - 1]  # fmt: skip
        assert list(shift.leave) == last
        for slot, client in shift.leave:
            assert resident.pop(slot) == client
            finished.add(client)
        first = next((c for c in range(len(loads)) if c not in finished), len(loads))
        assert len([c for c in finished if c > first]) <= 4 * slots
    assert not resident
    for client in range(len(loads)):
        assert [d for d in done if d[0] == client] == [w for w in want if w[0] == client]
    return shifts


def utilisation(shifts: Sequence[Shift], budget: int) -> float:
    return sum(s.rows for s in shifts) / sum(max(s.rows, budget) for s in shifts)


step_loads = st.builds(
    prefixed, st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple), st.integers(0, 20)
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(step_loads, min_size=1, max_size=5), min_size=1, max_size=12),
    st.integers(1, 5), st.integers(1, 120),
)  # fmt: skip
def test_every_unit_once_in_order_within_the_budget(
    loads: list[list[Load]], slots: int, budget: int
) -> None:
    check(loads, slots, budget)


def log_normal(seed: int, clients: int, batch: int, prefix: int = 0) -> list[list[Load]]:
    """Clients whose numbers of examples are log-normal, sigma 0.8, one epoch each; sequences of
    16 to 512 tokens, log-normal with sigma 0.5 around 90."""
    rng = np.random.default_rng(seed)
    out = []
    for size in np.exp(rng.normal(math.log(80), 0.8, clients)).astype(int).clip(1):
        lengths = np.exp(rng.normal(math.log(90), 0.5, size)).astype(int).clip(16, 512)
        steps = []
        for first in range(0, size, batch):
            own = lengths[first : first + batch]
            again = min(prefix, own.min() - 8) if len(own) > 1 else 0
            steps.append(prefixed(tuple((own - again).tolist()), int(again)))
        out.append(steps)
    return out


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("slots", "budget", "batch", "prefix"),
    [(16, 2048, 16, 0), (16, 2048, 4, 0), (16, 2048, 16, 40), (32, 4096, 16, 0), (8, 2048, 16, 0)],
)
def test_passes_are_full(seed: int, slots: int, budget: int, batch: int, prefix: int) -> None:
    """64 clients, sigma 0.8; at most 2 % of the rows are prefixes computed once more."""
    loads = log_normal(seed, 64, batch, prefix)
    shifts = check(loads, slots, budget)
    assert utilisation(shifts, budget) >= 0.97
    least = sum(load.rows(0, len(load.units)) for steps in loads for load in steps)
    assert sum(s.rows for s in shifts) <= 1.02 * least


def test_a_split_pays_its_prefix_again_only_where_that_is_worth_it() -> None:
    """Two clients, one step each of 10 x 10 rows and a prefix p, 150 rows a pass. With p = 5 the
    second fills the room of 45 with 40 fresh rows; with p = 10, 30 of 40 would be fresh, less than
    four prefixes, and it waits for a pass of its own."""
    for prefix, want in ((5, [(0, 0, 10), (1, 0, 4)]), (10, [(0, 0, 10)])):
        loads = [[prefixed((10,) * 10, prefix)]] * 2
        shifts = check(loads, 2, 150)
        assert [(p.client, p.first, p.end) for p in shifts[0].parts] == want
        assert len(shifts) == 2


def test_a_step_larger_than_the_budget_is_cut_and_others_fill_the_rest() -> None:
    """The client of two steps goes first, then as many whole steps as fit; 120 rows never do."""
    loads = [[Load((30, 30, 30, 30))], [Load((10,)), Load((10,))], [Load((70,))]]
    shifts = check(loads, 3, 100)
    assert [[(p.client, p.step, p.first, p.end) for p in s.parts] for s in shifts] == [
        [(1, 0, 0, 1), (2, 0, 0, 1)], [(1, 1, 0, 1), (0, 0, 0, 3)], [(0, 0, 3, 4)],
    ]  # fmt: skip


def test_a_sequence_longer_than_the_budget_is_a_pass_of_its_own() -> None:
    loads = [[Load((10, 300, 10))], [Load((20,))] * 4]
    shifts = check(loads, 2, 100)
    alone = [s.parts for s in shifts if s.rows == 300]
    assert len(alone) == 1 and [(p.client, p.first, p.end) for p in alone[0]] == [(0, 1, 2)]


def test_the_longest_client_is_not_last() -> None:
    """Seven clients of 2 steps and one of 14, in any place: as many passes as it has steps."""
    for place in range(8):
        steps = [14 if c == place else 2 for c in range(8)]
        loads = [[Load((50,))] * n for n in steps]
        assert len(check(loads, 4, 100)) == 14


def test_equal_clients_keep_the_lanes_order() -> None:
    shifts = check([[Load((10,))] * 3 for _ in range(7)], 3, 20)
    assert [c for s in shifts for _, c in s.enter] == list(range(7))


# ------------------------------------------------------------------------------------ packing


def store(seed: int = 0, examples: int = 40, prompt: int = 12) -> TokenStore:
    """Examples that begin alike, for up to `prompt` tokens; every seventh has no labels."""
    rng = np.random.default_rng(seed)
    head = rng.integers(1, 99, prompt)
    ids, starts = [], []
    for e in range(examples):
        answer = 0 if e % 7 == 3 else int(rng.integers(1, 9))
        row = np.concatenate([head, rng.integers(1, 99, int(rng.integers(2, 40)) + answer)])
        ids.append(row)
        starts.append(len(row) - answer)
    return stored(ids, starts)


def unpacked(batch: PackedBatch) -> list[tuple[int, int, list[int], list[tuple[int, int, float]]]]:
    """(slot, sequence, tokens, labels as (position, target, weight)) of each whole sequence."""
    ids, positions = batch.input_ids.numpy(), batch.position_ids.numpy()
    rows = [range(s, s + n) for s, n in zip(batch.starts, batch.lengths, strict=True)]
    labels: dict[int, list[tuple[int, float]]] = {}
    for row, target, weight in zip(
        batch.label_rows.tolist(), batch.targets.tolist(), batch.label_weight.tolist(), strict=True
    ):
        if weight:
            labels.setdefault(row, []).append((target, weight))
    out = []
    for b, parent in enumerate(batch.parent):
        if b in batch.parent:
            continue
        mine = [*(rows[parent] if parent >= 0 else ()), *rows[b]]
        assert positions[mine].tolist() == list(range(len(mine)))
        tokens = ids[mine].tolist()
        found = []
        for at, row in enumerate(mine):
            for target, weight in labels.get(row, []):
                # A prefix's last row predicts the first token of every sequence after it.
                if row in rows[b] or target == tokens[at + 1 : at + 2][0]:
                    found.append((at, target, weight))
        out.append((int(batch.slot[b]), int(batch.sequence[b]), tokens, found))
    return out


def parts_of(step: Step, slot: int, ends: Sequence[int]) -> list[Part]:
    """One step in parts that end at these units."""
    firsts = [0, *ends[:-1]]
    return [Part(slot, slot, 0, a, b, b == len(step.units)) for a, b in zip(firsts, ends)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["fast", "strict"]), st.booleans(), st.integers(0, 3),
    st.integers(1, 200), st.sampled_from([16, 32, 64]), st.integers(1, 12), st.data(),
)  # fmt: skip
def test_packing_loses_nothing(
    mode: str, share: bool, seed: int, chunk: int, tile: int, n: int, data: Any
) -> None:
    """Two clients' steps, cut anywhere: every token and label is in one part, once."""
    from_store = store(seed)
    train = Train(mode=mode, chunk_tokens=chunk, tile=tile)
    steps = [cut(from_store, np.arange(n) + 20 * c, train, share=share) for c in range(2)]
    ends = data.draw(st.sets(st.integers(1, len(steps[0].units))))
    ends = sorted(ends | {len(steps[0].units)})
    got: list[Any] = []
    for i, part in enumerate(parts_of(steps[0], 0, ends)):
        work = [(part, steps[0])]
        if i == 0:
            work += [(parts_of(steps[1], 1, [len(steps[1].units)])[0], steps[1])]
        batch = pack(from_store, work, train.rows_per_product)
        loads = sum(s.load.rows(p.first, p.end) for p, s in work)
        assert len(batch) == loads
        check_layout(batch, train.rows_per_product)
        got += unpacked(batch)
    for c, step in enumerate(steps):
        mine = sorted((g for g in got if g[0] == c), key=lambda g: g[1])
        assert [g[1] for g in mine] == list(range(n))
        labels = sum(len(from_store.of(e)) - from_store.first[e] for e in step.examples)
        weight = np.float32(1 / max(1, labels))
        for (_, _, tokens, found), e in zip(mine, step.examples, strict=True):
            start = int(from_store.first[e])
            assert tokens == from_store.of(e).tolist()
            assert found == [(i - 1, tokens[i], weight) for i in range(start, len(tokens))]


def check_layout(batch: PackedBatch, tile: int) -> None:
    """Where chunks, their labels and their padding lie, as the engine reads it."""
    segments, labels = batch.segments, batch.label_segments
    assert segments.rows == len(batch) and labels.rows == len(batch.label_rows)
    assert segments.tokens == batch.rows
    spans = segments.spans
    assert [s for s, *_ in spans] == [s for s, *_ in labels.spans]
    for (slot, first, end), (_, l_first, l_end) in zip(spans, labels.spans, strict=True):
        stop = -(-end // tile) * tile if tile else end
        l_stop = -(-l_end // tile) * tile if tile else l_end
        assert not tile or first % tile == l_first % tile == 0
        assert not batch.input_ids[end:stop].any() and not batch.position_ids[end:stop].any()
        rows = batch.label_rows[l_first:l_stop]
        assert ((first <= rows) & (rows < end)).all()
        assert (batch.label_slot[l_first:l_stop] == slot).all()
        weights = batch.label_weight[l_first:l_end]
        assert (weights > 0).all() or (len(weights) == 1 and rows[0] == first)
        assert not batch.label_weight[l_end:l_stop].any()
        assert not batch.targets[l_end:l_stop].any()
        assert (rows[l_end - l_first :] == rows[0]).all()
    assert l_stop == len(batch.label_rows) and stop == len(batch)
    padding = batch.per_row(np.zeros_like(batch.lengths), -1)
    assert (padding == 0).sum() == batch.rows
    sequence = batch.per_row(np.arange(len(batch.lengths)), -1)
    assert sequence[batch.starts].tolist() == list(range(len(batch.lengths)))


def test_chunks_by_hand() -> None:
    """Lengths 30, 30, 50, 20 with 70 tokens a chunk: 30 + 30, 50 + 20. With 8 tokens in common,
    30 + 22, 50 + 12 (they count in both). Without tiles, a sequence is a unit."""
    rng = np.random.default_rng(0)
    rows = [np.concatenate([np.arange(1, 9), 50 + rng.permutation(99)[: n - 8]])
            for n in (30, 30, 50, 20)]  # fmt: skip
    made = stored(rows, [20, 20, 20, 15])
    strict = Train(mode="strict", chunk_tokens=70, tile=16)
    alone, shared = (cut(made, np.arange(4), strict, share=on) for on in (False, True))
    assert alone.units == shared.units == ((0, 2), (2, 4))
    assert alone.load == Load((64, 80)) and shared.load == Load((64, 64))
    fast = cut(made, np.arange(4), Train(), share=True)
    assert fast.load.units == (30, 30, 50, 20)
    assert fast.weights.tolist() == [1 / 55] * 4
    assert [fast.load.rows(a, b) for a, b in ((0, 4), (1, 3), (2, 3))] == [106, 72, 50]
    for train in (strict, Train()):  # each with a loss of its own: 10, 10, 30 and 5 labels
        single = cut(made, np.arange(4), train, share=False, alone=True)
        assert single.units == ((0, 1), (1, 2), (2, 3), (3, 4))
        assert single.weights.tolist() == [1 / 10, 1 / 10, 1 / 30, 1 / 5]
    small = cut(made, np.arange(4), Train(mode="strict", chunk_tokens=51, tile=16), share=True)
    assert small.units == ((0, 1), (1, 2), (2, 3), (3, 4))
    assert small.load == Load((32, 32, 64, 32))


# ------------------------------------------------------------------------------------ rounds


def configured(**changes: Any) -> Config:
    values: dict[str, Any] = {"clients": {"number": 40}, "server": {"fraction": 0.5}}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        values.setdefault(section, {})[leaf] = value
    return build(values, "test")


def test_ranks_are_drawn_once_a_client() -> None:
    config = configured(adapter__ranks=[4, 16, 32, 32], adapter__rank=32, server__fraction=1.0)
    ids, rank = sampled(config, 40, 1, KEY)
    again = dict(zip(*sampled(config, 40, 7, KEY), strict=True))
    assert all(again[c] == r for c, r in zip(ids, rank, strict=True))
    many = build({"clients": {"number": 4000}, "server": {"fraction": 1.0},
                  "adapter": {"rank": 32, "ranks": [4, 16, 32, 32]}}, "test")  # fmt: skip
    counts = Counter(sampled(many, 4000, 1, KEY)[1].tolist())
    for r, share in ((4, 0.25), (16, 0.25), (32, 0.5)):  # 5 standard deviations of a binomial
        assert abs(counts[r] - 4000 * share) <= 5 * (4000 * share * (1 - share)) ** 0.5
    other = dict(zip(*sampled(config, 40, 1, seeds.run_key(4)), strict=True))
    assert any(other[c] != r for c, r in zip(ids, rank, strict=True))


def test_lanes_are_buckets_of_like_rank() -> None:
    """3 and 4 share passes, 5 to 8 do; the plan's order is that of its lanes."""
    config = configured(adapter__ranks=[3, 4, 5, 8, 16], adapter__rank=16, server__fraction=1.0)
    plan = plan_round(config, Population(np.arange(41), np.arange(40)), 1, KEY)
    assert np.concatenate(plan.lanes).tolist() == list(range(40))
    assert [set(plan.rank[lane].tolist()) for lane in plan.lanes] == [{3, 4}, {5, 8}, {16}]
    for lane in plan.lanes:
        assert (np.diff(plan.client_ids[lane]) > 0).all()
    assert sorted(plan.client_ids) == list(range(40))
    assert (plan.scale == 64.0 / plan.rank).all()
    one = plan_round(configured(), Population(np.arange(41), np.arange(40)), 1, KEY)
    assert len(one.lanes) == 1 and (one.rank == 32).all() and (np.diff(one.client_ids) > 0).all()


def test_rslora_divides_by_the_root() -> None:
    config = configured(adapter__ranks=[4, 16], adapter__rank=16, adapter__rslora=True)
    plan = plan_round(config, Population(np.arange(41), np.arange(40)), 1, KEY)
    assert (plan.scale == 64.0 / np.sqrt(plan.rank)).all()
    assert config.adapter.scale() == 16.0 and config.adapter.scale(4) == 32.0
