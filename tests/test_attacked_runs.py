"""Attacks as a configuration asks for them: who attacks, what reaches the server, what is kept.

Real runs on a tiny model: an attacker's update arrives changed and an honest client's to the bit as
without attackers; a robust rule stays where FedAvg is carried off; flipped labels change the
answers of attackers alone. About 8 s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import seeds, simulate
from fedsim.adapters import initial_row
from fedsim.checkpoint import load_checkpoint
from fedsim.config import Config, build
from fedsim.errors import ConfigError
from fedsim.world import load_world

LOUD = {"attack__kind": "scale", "attack__fraction": 0.25, "attack__options": {"factor": 1e3}}


def moved(settings: Callable[..., Config], name: str, **changes: Any) -> float:
    """How far the server's row is from its start, after a round of everybody."""
    config = settings(run__name=name, server__rounds=1, server__fraction=1.0, evaluate__limit=0,
                      **changes)  # fmt: skip
    key = seeds.run_key(config.run.seed)
    start = initial_row(load_world(config, key).base.layout, key)
    saved = load_checkpoint(simulate.run(config) / "checkpoint")
    assert saved is not None
    return float((saved.server.row - start).norm())


def test_a_robust_rule_holds(settings: Callable[..., Config]) -> None:
    """Two of eight clients send a thousand times what they learnt."""
    clean, robust = (moved(settings, f"median{n}", server__strategy="median", **attack)
                     for n, attack in enumerate(({}, LOUD)))  # fmt: skip
    carried = moved(settings, "fedavg", **LOUD)
    assert robust <= 1.5 * clean and carried > 10 * clean


@pytest.mark.parametrize("kind", ["sign_flip", "gaussian", "a_little"])
def test_honest_clients_train_as_before(settings: Callable[..., Config], kind: str) -> None:
    """Losses are of training, before anything is sent: in the first round nobody's differ."""
    lines = []
    for attack in ({}, {"attack__kind": kind, "attack__fraction": 0.25}):
        config = settings(run__name=f"run{len(lines)}", server__rounds=2, evaluate__limit=0,
                          **attack)  # fmt: skip
        folder = simulate.run(config)
        lines.append((folder / "clients.jsonl").read_text().splitlines())
        noted = json.loads((folder / "environment.json").read_text())["data"]["attackers"]
        assert noted == (2 if attack else 0)
    half = len(lines[0]) // 2
    assert lines[0][:half] == lines[1][:half] and lines[0][half:] != lines[1][half:]


def test_flipped_labels(settings: Callable[..., Config]) -> None:
    """Of an attacker every answer changes, of the others none; prompts stay."""
    plain, flipped = (
        load_world(settings(**a), 1).data
        for a in ({}, {"attack__kind": "label_flip", "attack__fraction": 0.5})
    )
    assert not plain.bad.any() and flipped.bad.sum() == 4
    assert np.array_equal(plain.population.examples, flipped.population.examples)
    for client in range(8):
        for e in plain.population.of(client):
            at = plain.store.first[e]
            assert at == flipped.store.first[e]
            a, b = (s.ids[s.offsets[e] : s.offsets[e + 1]] for s in (plain.store, flipped.store))
            assert np.array_equal(a[:at], b[:at])
            assert np.array_equal(a[at:], b[at:]) is not bool(flipped.bad[client])


@pytest.mark.parametrize(
    ("attack", "said"),
    [({"kind": "scale"}, "attack.fraction"), ({"fraction": 0.5}, "attack.kind")],
)
def test_a_kind_and_a_fraction_go_together(attack: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build({"attack": attack}, "here")


def test_an_option_that_is_none(settings: Callable[..., Config], tmp_path: Path) -> None:
    config = settings(attack__kind="scale", attack__fraction=0.5, attack__options={"by": 2.0})
    with pytest.raises(ConfigError, match=r"attack.options: unknown key 'by' of scale"):
        simulate.run(config)
