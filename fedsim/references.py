"""Runs that a federated score is read against: everything in one place, and everyone alone.

Zero-shot is `fedsim eval MODEL`; chance and majority are counted from the questions
(`trivial`).
"""

from __future__ import annotations

import math
from typing import Any

from fedsim.channel import Channel
from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.evaluate.suite import Suite
from fedsim.privacy import Privacy
from fedsim.tasks import chance, majority

NAMES = ("central", "local")
PLAIN = {"channel": Channel().model_dump(), "privacy": Privacy().model_dump()}  # nothing is sent


def reference(config: Config, name: str) -> Config:
    """The configuration of a reference run. Raises ConfigError for an unknown name."""
    if name not in NAMES:
        raise ConfigError("--reference", got=name, expected=" or ".join(NAMES))
    made = centralised(config) if name == "central" else local(config)
    run = config.run.model_copy(update={"name": f"{config.run.name}-{name}"})
    return made.model_copy(update={"run": run})


def trivial(tests: Suite) -> dict[str, dict[str, Any]]:
    """Task -> what always giving the most frequent answer scores, and guessing; no programs."""
    out = {}
    for name, task in tests.tasks.items():
        if all(item.choices for item in task.items):
            gold, share = majority(task.items)
            out[name] = {"answer": gold, "majority": share, "chance": chance(task.items)}
    return out


def centralised(config: Config) -> Config:
    """One client holds all data, and takes in a round all steps that the cohort takes."""
    return _with(
        config,
        clients={"number": 1, "partition": "iid"},
        server={"fraction": 1.0, "min_clients": 1, "strategy": "fedavg"},
        **PLAIN,
        train={"steps": config.train.steps * config.per_round},
    )


def local(config: Config) -> Config:
    """A cohort whose clients train alone, each as many steps as the run gives a client on average.

    In one round the cosine of the learning rate has no length, so its mean over the run's rounds
    is used: (max + min) / 2 - (max - min) / (2 rounds).
    """
    c, t = config, config.train
    steps = t.steps * c.server.rounds * c.per_round / c.clients.number
    lr = (t.lr_max + t.lr_min) / 2 - (t.lr_max - t.lr_min) / (2 * c.server.rounds)
    return _with(
        config,
        server={"rounds": 1, "strategy": "local"},
        **PLAIN,
        train={"steps": max(1, math.ceil(steps)), "lr_max": lr, "lr_min": lr},
    )


def _with(config: Config, **sections: dict[str, object]) -> Config:
    """The configuration with some keys changed, validated anew."""
    values = config.model_dump()
    for section, keys in sections.items():
        values[section] |= keys
    return Config.model_validate(values)
