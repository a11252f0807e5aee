"""The loop: config -> data -> population -> plan -> train -> aggregate -> evaluate -> report."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsim import checkpoint as checkpoints
from fedsim import compress, launch, rehearsal, seeds, strategies, workers
from fedsim.accountant import Ledger
from fedsim.aggregation_error import Drift
from fedsim.channel import Wire
from fedsim.checkpoint import Checkpoint
from fedsim.client_memory import DiskMemory
from fedsim.config import Config
from fedsim.core import ClientMemory, ClientUpdates, LocalRule, RoundPlan, ServerState, Strategy
from fedsim.dp_sgd import hidden
from fedsim.flowertune import App
from fedsim.folder import RunFolder, locked, open_folder
from fedsim.plan import plan_round
from fedsim.record import Meter, client_lines, round_line
from fedsim.reduce import Reduce
from fedsim.release import Release
from fedsim.resumption import check_content, check_same
from fedsim.saving import commit, export, score
from fedsim.secure import Ring
from fedsim.train import Trainer
from fedsim.world import World, describe, load_world


def run(
    config: Config, *, resume: bool = False, fresh: bool = False, meter: Meter | None = None,
    app: App | None = None,
) -> Path:  # fmt: skip
    """Simulate one run, or what is left of it; returns its folder.

    Args:
        app: that the configuration comes from; what it says of itself is kept with the run.

    Raises:
        FedSimError: with value, expectation and remedy; finished rounds stay on disk.
    """
    launch.take_device(config.run.device)
    if launch.rank():
        return workers.follow(config)
    with workers.leading():
        return lead(config, resume, fresh, meter or Meter(), app)


def lead(config: Config, resume: bool, fresh: bool, meter: Meter, app: App | None = None) -> Path:
    """The loop, where others may help to train."""
    strategy = strategies.load(config.server.strategy, config.server.options)
    wire = rehearsal.wire(config, strategy)
    with locked((Path(config.run.out) / config.run.name).resolve()):
        folder = open_folder(config, resume=resume, fresh=fresh)
        if resume:
            check_same(config, folder.path)
        return simulated(config, strategy, wire, folder, meter, app.record() if app else {})


def simulated(
    config: Config, strategy: Strategy, wire: Wire, folder: RunFolder, meter: Meter,
    noted: Mapping[str, Any],
) -> Path:  # fmt: skip
    """The loop over a folder that is kept for this process; `noted` goes into environment.json."""
    key = seeds.run_key(config.run.seed)
    world = load_world(config, key)
    if said := world.data.said(config.data.max_length):
        meter.notes.append(said)
    base, layout = world.base, world.base.layout
    store, people = world.data.store, world.data.population
    # Over a sharded base finished rows may lie long: the leader's wait for those of others.
    rows = rehearsal.rows_kept(strategy, config.most_clients)
    trainer = workers.team(
        Trainer(base, store, people, config, key, host=bool(base.shards), rows=rows)
    )
    ledger = Ledger(config, world.data.population, key)
    saved = None if folder.replaces else checkpoints.load_checkpoint(folder.checkpoints)
    if saved:
        check_content(folder, describe(config, world))
    folder.cut(saved.bytes_done if saved else {})
    server, scores = begin(config, world, strategy, folder, meter, saved, noted)
    memory = DiskMemory(folder.path / "clients", layout.size, saved.clients if saved else {})
    sent = sum(line["down_mib"] + line["up_mib"] for line in folder.read("rounds.jsonl"))
    rounds, due = config.server.rounds, evaluated(config, server.round)
    meter.rounds, meter.device = rounds - server.round, base.device
    meter.evaluations_total = meter.evaluations + len(due) * bool(len(world.tests))
    for round in range(server.round + 1, rounds + 1):
        plan = plan_round(config, world.data.population, round, key, server.memory.get("ranks"))
        meter.begin(round, steps=int(plan.steps.sum()))
        with meter.timed("train"):
            rule = strategy.rule(server, plan)
            seen: list[ClientUpdates] = []
            drift = Drift(layout, config.adapter.scale(), plan)
            trained = trainer.train(plan, rule, meter, memory)
            updates = (keep(seen, drift.see(u), config.privacy.of_examples)
                       for u in received(config, world, trained, plan, rule, memory))  # fmt: skip
            reduce = combining(config, world, server, rule)
            try:
                server = reduce.after(strategy.aggregate(server, plan, updates, reduce, memory))
                deque(updates, 0)  # a rule may have stopped before the last
            finally:  # where all clients failed, their losses are what a person looks for now
                clients = client_lines(plan, seen)
                folder.append("clients.jsonl", clients)
            rounding = base.correction.apply(server.base)
        kept = memory.index()
        if round in due:
            who = world.subject(server, memory, rule.personal, config.evaluate.clients)
            scores += score(folder, who, world.tests, meter)
        if round % config.server.export_every == 0 or round == rounds:
            export(folder, world, config, server)
        line = round_line(plan, rule, clients, layout, meter, sent, wire)
        line |= lost(server, drift, rounding) | betrayed(config, ledger, reduce, round)
        folder.append("rounds.jsonl", [line])
        commit(folder, server, scores, kept)
        sent = line["total_mib"]
        meter.lines.append(line)
    return folder.path


def begin(
    config: Config, world: World, strategy: Strategy, folder: RunFolder, meter: Meter,
    saved: Checkpoint | None, noted: Mapping[str, Any],
) -> tuple[ServerState, list[dict[str, Any]]]:  # fmt: skip
    """The server and its scores to go on from: what was saved, or a fresh run's, on disk."""
    if saved:
        server = saved.server.to(world.base.device)
        world.base.correction.apply(server.base)
        return server, saved.scores
    folder.begin(config)
    folder.write_json("environment.json", describe(config, world) | dict(noted))
    memory = DiskMemory(folder.path / "clients", world.base.layout.size)  # empty yet
    server, scores = world.first(strategy, config.adapter), []
    if config.evaluate.first:
        scores += score(folder, world.subject(server, memory, (), 1), world.tests, meter)
    commit(folder, server, scores, memory.index())
    folder.publish()
    return server, scores


def evaluated(config: Config, done: int) -> set[int]:
    """The rounds to come after which adapters are scored: every so many, and the last."""
    rounds, every = config.server.rounds, config.evaluate.every
    return {r for r in range(done + 1, rounds) if every and r % every == 0} | {rounds}


def lost(server: ServerState, drift: Drift, rounding: float) -> dict[str, float | None]:
    """Relative errors of a round: of averaging A and B apart, of the base's rounding, and of what
    a rule cut off a product."""
    cut = server.memory.get("truncation")
    return {
        "aggregation_error": drift.relative(), "base_rounding": rounding,
        "truncation": None if cut is None else float(cut),
    }  # fmt: skip


def combining(config: Config, world: World, server: ServerState, rule: LocalRule) -> Reduce:
    """How the server of a round may look at updates."""
    layout, key, release = world.base.layout, world.key, None
    if config.privacy.of_clients:
        travels = layout.mask(rule.up)
        release = Release.of(config.privacy, server, config.expected_clients, travels, key)
    return Reduce(layout, config.adapter.scale(), key, Ring.of(config.channel), release)


def betrayed(config: Config, ledger: Ledger, reduce: Reduce, rounds: int) -> dict[str, Any]:
    """Epsilon of all rounds so far and the clip of the last, under privacy."""
    if not config.privacy.on:
        return {}
    clip = reduce.release.clip if reduce.release else config.privacy.clip
    return {"epsilon": ledger.spent(rounds), "clip": clip}


def received(
    config: Config, world: World, trained: Iterator[ClientUpdates], plan: RoundPlan,
    rule: LocalRule, memory: ClientMemory,
) -> Iterator[ClientUpdates]:  # fmt: skip
    """What reaches the server: the updates, those of attackers replaced, then compressed."""
    return compress.through(
        config.channel, world.poisoned(trained, plan, rule), plan=plan, rule=rule,
        layout=world.base.layout, memory=memory, key=world.key,
    )  # fmt: skip


def keep(seen: list[ClientUpdates], update: ClientUpdates, hide: bool) -> ClientUpdates:
    """Remember an update's figures, not its rows, and pass it on, without them if they are to be
    hidden."""
    empty = update.row.new_empty(0)
    seen.append(ClientUpdates(**{**update.__dict__, "row": empty, "start": empty}))
    return hidden(update) if hide else update
