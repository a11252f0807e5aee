"""Randomness is counted: every word is a pure function of what it is for.

Proved here: Philox-4x32-10 by its published known answers, by plain Python integers and by Triton's
own implementation; that streams of different purposes, clients, rounds, steps, sequences, modules
and seeds differ; that counts which do not fit their field raise; that permutations, uniforms and
dropout masks are what they claim. About 5 seconds, most of it starting Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.errors import ConfigError
from fedsim.seeds import Purpose
from tests.conftest import require
from tests.masks import keep_mask

KEY = seeds.run_key(42)
# Random123's kat_vectors for philox4x32, 10 rounds: counters, key words, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def counters(count: int) -> list[Tensor]:
    """Four columns over the whole 32-bit range, edges included."""
    columns = np.random.default_rng(0).integers(0, 1 << 32, (4, count))
    columns[:, :3] = [[0, 0xFFFFFFFF, 0x80000000]] * 4
    return list(torch.as_tensor(columns))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    words = [torch.tensor([int(w, 16)]) for w in counter.split()]
    low, high = (int(w, 16) for w in key.split())
    got = seeds.philox(high << 32 | low, *words)
    assert " ".join(f"{int(w):08x}" for w in got) == answer


def test_equal_to_plain_integers() -> None:
    columns = counters(200)
    got = torch.stack(seeds.philox(KEY, *columns), 1).tolist()
    for c, words in zip(torch.stack(columns, 1).tolist(), got, strict=True):
        k0, k1 = KEY & 0xFFFFFFFF, KEY >> 32
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [p1 >> 32 ^ c[1] ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        assert c == words


TRITON = """
import json, sys
import torch, triton
import triton.language as tl

@triton.jit
def kernel(c, out, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    w = [tl.load(c + k * N + i).to(tl.uint32) for k in tl.static_range(4)]
    a, b, d, e = tl.philox(seed, w[0], w[1], w[2], w[3])
    tl.store(out + i, a.to(tl.int64))
    tl.store(out + N + i, b.to(tl.int64))
    tl.store(out + 2 * N + i, d.to(tl.int64))
    tl.store(out + 3 * N + i, e.to(tl.int64))

seed, columns = json.load(sys.stdin)
c = torch.tensor(columns)
out = torch.empty_like(c)
kernel[(1,)](c, out, seed, c.shape[1])
print(json.dumps(out.tolist()))
"""


def test_equal_to_triton(tmp_path: Path) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    require("triton", importlib.util.find_spec("triton") is not None, "Triton is not installed")
    script = tmp_path / "philox.py"
    script.write_text(TRITON)
    columns = counters(64)
    done = subprocess.run(
        [sys.executable, script], input=json.dumps([KEY, [c.tolist() for c in columns]]),
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    want = torch.stack(seeds.philox(KEY, *columns)).tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == want


def test_run_key() -> None:
    keys = [seeds.run_key(seed) for seed in range(100)]
    assert keys == [seeds.run_key(seed) for seed in range(100)]
    assert len({k & 0xFFFFFFFF for k in keys}) == len({k >> 32 for k in keys}) == 100
    assert all(0 <= k < 1 << 64 for k in keys)


# Streams

WHERE = [
    {}, {"client": 1}, {"client": (1 << 28) - 1}, {"round": 1}, {"round": (1 << 16) - 1},
    {"step": 1}, {"step": (1 << 16) - 1}, {"sequence": 1}, {"sequence": (1 << 16) - 1},
    {"module": 1}, {"module": (1 << 16) - 1},
]  # fmt: skip


def test_no_two_streams_share_words() -> None:
    streams = [
        tuple(seeds.words(key, purpose, 8, **where).tolist())
        for key in (KEY, seeds.run_key(43)) for purpose in Purpose for where in WHERE
    ]  # fmt: skip
    assert len(set(streams)) == len(streams) == 2 * len(Purpose) * len(WHERE)


def test_counter_layout() -> None:
    """The words of a stream, from the layout in the header of `seeds`."""
    want = seeds.philox(
        KEY, torch.arange(2), torch.tensor(5 << 16 | 6), torch.tensor(3 << 16 | 4),
        torch.tensor(2 << 28 | 7),
    )  # fmt: skip
    got = seeds.words(KEY, Purpose.DROPOUT, 8, client=7, round=3, step=4, sequence=5, module=6)
    assert torch.equal(got.view(2, 4), torch.stack(want, 1))


def test_a_longer_stream_begins_with_the_shorter() -> None:
    long = seeds.words(KEY, Purpose.INIT, 11, client=3)
    assert ((long >= 0) & (long < 1 << 32)).all()
    for count in (1, 4, 5, 10):
        assert torch.equal(seeds.words(KEY, Purpose.INIT, count, client=3), long[:count])


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("client", 1 << 28), ("round", 1 << 16), ("step", 1 << 16), ("sequence", 1 << 16),
        ("module", 1 << 16),
    ],
)  # fmt: skip
def test_counts_beyond_their_field_raise(name: str, limit: int) -> None:
    seeds.words(KEY, Purpose.ORDER, 1, **{name: limit - 1})
    for value in (limit, -1):
        with pytest.raises(ConfigError, match=f"{name} index: got {value}; expected less"):
            seeds.words(KEY, Purpose.ORDER, 1, **{name: value})


def test_purposes_fit_their_four_bits() -> None:
    assert sorted(Purpose) == list(range(len(Purpose))) and len(Purpose) <= 16


@pytest.mark.parametrize("count", [0, 1, 2, 3, 257])
def test_permutation(count: int) -> None:
    order = seeds.permutation(KEY, Purpose.ORDER, count, client=2)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, seeds.permutation(KEY, Purpose.ORDER, count, client=2))
    if count == 257:
        assert not np.array_equal(order, seeds.permutation(KEY, Purpose.ORDER, count, client=3))


def test_recorded_runs_stay_reproducible() -> None:
    """A change of these numbers changes every run that was ever recorded."""
    assert seeds.run_key(42) == 8820412187630416983
    assert seeds.permutation(0, Purpose.SAMPLING, 6, round=1).tolist() == [5, 4, 0, 2, 3, 1]


def test_permutations_are_even() -> None:
    """All 24 orders of four, over 2400 clients: chi-square with 23 degrees below its 1e-6 point."""
    orders = [tuple(seeds.permutation(KEY, Purpose.ORDER, 4, client=c)) for c in range(2400)]
    _, seen = np.unique(orders, axis=0, return_counts=True)
    assert len(seen) == 24 and ((seen - 100) ** 2 / 100).sum() < 70.5


def test_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    u = seeds.uniform(KEY, Purpose.INIT, 100_000)
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    five = 5 / (12 * len(u)) ** 0.5  # standard errors of the mean
    assert abs(u.mean() - 0.5) < five
    edges = torch.tensor([0, (1 << 32) - 1])
    monkeypatch.setattr(seeds, "words", lambda *_, **__: edges)
    assert seeds.uniform(KEY, Purpose.INIT, 2).tolist() == [2.0**-33, 1 - 2.0**-33]


# Dropout masks


def mask(
    p: float = 0.3, features: int = 10, module: int = 0, round: int = 0, **rows: Any
) -> Tensor:
    """The mask of four rows at positions 0..3, unless told otherwise."""
    where = {"client": 0, "step": 0, "sequence": 0, "position": torch.arange(4)} | rows
    columns = {k: torch.as_tensor(v).expand(4) for k, v in where.items()}
    return keep_mask(KEY, p, features, round=round, module=module, **columns)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_masks_keep_the_right_share(p: float) -> None:
    n = 4 * 20_000
    share = mask(p, 20_000).double().mean()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5  # standard errors


def test_masks_compare_words_with_integers() -> None:
    """By the definition: word (position, feature) of the stream >= floor(p 2^32)."""
    for features in (8, 10):  # a row of blocks starts anew at each position
        blocks = -(-features // 4)
        words = seeds.words(KEY, Purpose.DROPOUT, 16 * blocks, client=7, round=3, step=5,
                            sequence=2, module=9).view(4, -1)[:, :features]  # fmt: skip
        got = mask(0.3, features, module=9, round=3, client=7, step=5, sequence=2)
        assert torch.equal(got, words >= 1288490188)
    assert mask(0.0).all()
    edge = int(words[2, 5])  # position 2, feature 5
    for threshold, kept in ((edge, True), (edge + 1, False)):
        again = mask(threshold / 2**32, module=9, round=3, client=7, step=5, sequence=2)
        assert bool(again[2, 5]) == kept


@pytest.mark.parametrize(
    "change",
    [{"module": 1}, {"round": 1}, {"client": 1}, {"step": 1}, {"sequence": 1},
     {"position": torch.arange(4) + 1}],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_masks_differ(change: dict[str, Any]) -> None:
    assert torch.equal(mask(features=64), mask(features=64))
    assert not torch.equal(mask(features=64), mask(features=64, **change))


def test_masks_do_not_depend_on_the_packed_row() -> None:
    order = torch.tensor([2, 0, 3, 1])
    client, position = torch.tensor([0, 0, 5, 5]), torch.tensor([0, 1, 0, 1])
    whole = mask(client=client, position=position)
    assert torch.equal(mask(client=client[order], position=position[order]), whole[order])
