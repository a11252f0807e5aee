"""The loop: config -> data -> population -> plan -> train -> aggregate -> evaluate -> report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsim import checkpoint as checkpoints
from fedsim import evaluate, peft_io, seeds, strategies
from fedsim.adapters import initial_row
from fedsim.checkpoint import Checkpoint
from fedsim.config import Config
from fedsim.core import ClientUpdates, ServerState
from fedsim.errors import RunError
from fedsim.folder import RunFolder, open_folder
from fedsim.plan import plan_round
from fedsim.record import Meter, client_lines, round_line
from fedsim.reduce import Reduce
from fedsim.train import Trainer
from fedsim.world import World, describe, load_world


def run(
    config: Config, *, resume: bool = False, fresh: bool = False, meter: Meter | None = None
) -> Path:
    """Simulate one run, or what is left of it; returns its folder.

    Raises:
        FedSimError: with value, expectation and remedy; finished rounds stay on disk.
    """
    meter = meter or Meter()
    folder = open_folder(config, resume=resume, fresh=fresh)
    key = seeds.run_key(config.run.seed)
    world = load_world(config, key)
    strategy, reduce = strategies.load(config.server.strategy), Reduce()
    trainer = Trainer(world.base, world.store, world.population, config, key)
    saved = checkpoints.load_checkpoint(folder.checkpoints)
    folder.cut(saved.bytes_done if saved else {})
    if saved:
        server, scores = saved.server.to(world.base.device), saved.scores
    else:
        folder.write_json("environment.json", describe(config, world))
        start = initial_row(world.base.layout, key).to(world.base.device)
        start = world.base.magnitudes(start)
        server, scores = strategy.start(start, world.base.layout), []
        scores += score(folder, world, server, meter)
        commit(folder, server, scores)

    rounds, every = config.server.rounds, config.evaluate.every
    meter.rounds, meter.device = rounds - server.round, world.base.device
    due = {r for r in range(server.round + 1, rounds) if every and r % every == 0} | {rounds}
    meter.evaluations_total = meter.evaluations + len(due) * bool(len(world.tests))
    for round in range(server.round + 1, rounds + 1):
        plan = plan_round(config, world.population, round, key)
        meter.begin(round, steps=int(plan.steps.sum()))
        with meter.timed("train"):
            rule = strategy.rule(server, plan)
            seen: list[ClientUpdates] = []
            updates = (keep(seen, u) for u in trainer.train(plan, rule, meter))
            try:
                server = strategy.aggregate(server, plan, updates, reduce)
            except RunError:  # the failed clients' losses are what a person looks for now
                folder.append("clients.jsonl", client_lines(plan, seen))
                raise
        if round in due:
            scores += score(folder, world, server, meter)
        if round % config.server.export_every == 0 or round == rounds:
            export(folder, world, config, server)
        clients = client_lines(plan, seen)
        folder.append("clients.jsonl", clients)
        line = round_line(plan, clients, world.base.layout, meter)
        folder.append("rounds.jsonl", [line])
        commit(folder, server, scores)
        meter.lines.append(line)
    return folder.path


def keep(seen: list[ClientUpdates], update: ClientUpdates) -> ClientUpdates:
    """Remember an update's figures, not its rows, and pass it on."""
    empty = update.row.new_empty(0)
    seen.append(ClientUpdates(**{**update.__dict__, "row": empty, "start": empty}))
    return update


def score(
    folder: RunFolder, world: World, server: ServerState, meter: Meter
) -> list[dict[str, Any]]:
    """Evaluate the server's adapters and append every example's record."""
    if not len(world.tests):
        return []
    with meter.timed("evaluate"):
        scores, records = evaluate.evaluate(world.subject(server), world.tests)
    meter.evaluations += 1
    for task, lines in records.items():
        folder.append(f"eval/{task}.jsonl", lines)
    return [s.record() for s in scores]


def export(folder: RunFolder, world: World, config: Config, server: ServerState) -> None:
    """Write the global adapter in PEFT's format."""
    path = folder.path / "adapters" / f"round_{server.round:05d}"
    peft_io.export(path, server.row, world.base.layout, config.adapter, world.found.name)


def commit(folder: RunFolder, server: ServerState, scores: list[dict[str, Any]]) -> None:
    """Make everything up to here count: scores, then the checkpoint."""
    folder.write_json("scores.json", scores)
    state = Checkpoint(server, scores, folder.sizes())
    checkpoints.save_checkpoint(folder.checkpoints, state)
