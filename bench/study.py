"""Which federated rule is best? SmolLM2-135M-Instruct, real data, equal work, several seeds.

Every rule trains on every partition with every seed: the same clients, steps, rates and first
adapter, so that only the rule differs. Scores are means over the domain's tasks. What is finished
is kept in `--out`: the same command goes on where it was stopped, and writes docs/aggregation.md
and bench/results/study.json when all is there. More rules, domains or seeds are more hours:

    python bench/study.py --rules fedavg,scaffold,krum --domains medical --seeds 5
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import harness
import torch
from bench_clients import data_folder

from fedsim import simulate, strategies
from fedsim.config import Config, build, read_toml
from fedsim.core import pick_device
from fedsim.errors import FedSimError, RunError
from fedsim.folder import RunFolder

RULES = "fedavg,fedprox,fedadam,flexlora,ffa_lora,fedsa_lora"
PARTITIONS = {
    "iid": {"partition": "iid"},
    "dirichlet 0.1": {"partition": "dirichlet", "by": "output", "alpha": 0.1},
}
# Of 20 clients one has no example under Dirichlet 0.1, in two of three seeds after 11 draws.
NUMBER, ROUNDS, CLIENTS, STEPS, BATCH = 10, 5, 4, 2, 8  # an hour on two AVX2 cores
PAGE = Path(__file__).resolve().parent.parent / "docs" / "aggregation.md"


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    domain: str
    partition: str
    rule: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.partition}-{self.rule}-{self.seed}".replace(" ", "_")


def configure(
    cell: Cell, model: str, data: Path, out: Path, limit: int, zero_shot: bool
) -> Config:  # fmt: skip
    """The run: what differs between rules is the rule; the first one's says what zero-shot is."""
    return build({
        "run": {"name": cell.name, "seed": cell.seed, "out": str(out)},
        "model": {"name": model},
        "adapter": {"rank": 16, "alpha": 32.0, "targets": ["all-linear"]},
        "data": {"domain": cell.domain, "source": "directory", "dir": str(data)},
        "clients": {"number": NUMBER, **PARTITIONS[cell.partition]},
        "server": {"strategy": cell.rule, "rounds": ROUNDS, "fraction": CLIENTS / NUMBER,
                   "export_every": ROUNDS},
        "train": {"steps": STEPS, "batch": BATCH, "lr_max": 1e-3, "lr_min": 1e-4},
        "evaluate": {"limit": limit, "clients": 2, "first": zero_shot},
    }, "bench/study.py")  # fmt: skip


def run(cell: Cell, config: Config) -> dict[str, Any]:
    """The cell's figures: from disk where they are, else by running what is left of it."""
    folder = Path(config.run.out) / config.run.name
    done = folder / "study.json"
    if not done.is_file():
        harness.say(cell.name)
        began = time.perf_counter()
        simulate.run(config, resume=RunFolder(folder).has_checkpoint, fresh=True)
        figures = figures_of(folder) | {"seconds": time.perf_counter() - began}
        done.write_text(json.dumps(figures))
    elif alike(build(read_toml(folder / "config.toml"), str(folder))) != alike(config):
        raise RunError(
            f"{folder} is of another study", expected="the same rounds, steps and questions",
            remedy="Give another --out.",
        )  # fmt: skip
    return {**cell.__dict__, **json.loads(done.read_text())}


def alike(config: Config) -> Config:
    """But for who says what zero-shot is."""
    return config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"first": True})}
    )


def figures_of(folder: Path) -> dict[str, Any]:
    """Mean score over tasks and adapters before and after, by metric; traffic, loss and error E."""
    scores = json.loads((folder / "scores.json").read_text())
    last = max(s["round"] for s in scores)
    out: dict[str, Any] = {"before": {}, "after": {}, "n": {}}
    for when, round in (("before", 0), ("after", last)):
        mine = [s for s in scores if s["round"] == round]
        for metric in dict.fromkeys(s["metric"] for s in mine):
            out[when][metric] = statistics.fmean(s["value"] for s in mine if s["metric"] == metric)
        out["n"] = {s["task"]: s["n"] for s in mine}
    lines = RunFolder(folder).read("rounds.jsonl")
    errors = [line["aggregation_error"] for line in lines if line["aggregation_error"] is not None]
    return out | {
        "mib": lines[-1]["total_mib"], "loss": lines[-1]["loss_last"],
        "error": statistics.fmean(errors) if errors else None,
    }  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of Student's 95 % interval; infinite for one value."""
    n = len(values)
    if n < 2:
        return values[0], math.inf
    half = student.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return statistics.fmean(values), float(half)


def groups(cells: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(domain, partition, its cells) in the order in which they came."""
    for domain, partition in dict.fromkeys((c["domain"], c["partition"]) for c in cells):
        mine = [c for c in cells if (c["domain"], c["partition"]) == (domain, partition)]
        yield domain, partition, mine


def table(cells: Sequence[dict[str, Any]], metric: str) -> list[list[str]]:
    """A row for each rule of one group: score, difference to the first rule, traffic, E."""
    by_rule: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        by_rule.setdefault(cell["rule"], {})[cell["seed"]] = cell
    first = next(iter(by_rule.values()))
    rows = []
    for rule, seeds in by_rule.items():
        mean, half = interval([100 * c["after"][metric] for c in seeds.values()])
        both = sorted(seeds.keys() & first.keys())
        less, spread = interval(
            [100 * (seeds[s]["after"][metric] - first[s]["after"][metric]) for s in both]
        )
        errors = [c["error"] for c in seeds.values() if c["error"] is not None]
        rows.append([
            rule, f"{mean:.1f} ± {half:.1f}",
            "" if seeds is first else f"{less - spread:+.1f} to {less + spread:+.1f}",
            f"{statistics.fmean(c['mib'] for c in seeds.values()):,.0f}",
            f"{statistics.fmean(errors):.3f}" if errors else "",
        ])  # fmt: skip
    return rows


def apart(cells: Sequence[dict[str, Any]], metric: str) -> str:
    """Rules of one group whose interval of differences does not hold 0."""
    found = []
    for rule, _, against, *_ in table(cells, metric):
        low, _, high = against.partition(" to ")
        if against and (float(low) > 0 or float(high) < 0):
            found.append(rule)
    return ", ".join(found)


def page(result: dict[str, Any]) -> str:
    """docs/aggregation.md."""
    cells, machine = result["cells"], result["machine"]
    lines = [
        "# Which rule?", "",
        "Written by `bench/study.py`, never by hand.", "",
        f"SmolLM2-135M-Instruct, rank 16 on every linear, {ROUNDS} rounds of {CLIENTS} of {NUMBER} "
        f"clients, {STEPS} steps of {BATCH}, the real data, protocol fedsim. A rule's seeds share "
        "clients, order of examples and first adapter with every other rule's. Scores are means "
        "over the domain's tasks, in percent, with Student's 95 % interval over seeds; differences "
        "are to the first rule, paired by seed: an interval that holds 0 shows no difference. E is "
        "the mean relative error of averaging A and B apart (`fedsim/aggregation_error.py`). Rules "
        "have their default options.",
    ]  # fmt: skip
    for domain, partition, mine in groups(cells):
        before = [100 * c["before"]["lenient"] for c in mine if c["before"]]
        zero_shot = f"Zero-shot, lenient: {statistics.fmean(before):.1f}. " if before else ""
        asked = ", ".join(f"{task} {n}" for task, n in mine[0]["n"].items())
        lines += [
            "", f"## {domain}, {partition}", "",
            f"{zero_shot}Questions: {asked}. "
            f"{len({c['seed'] for c in mine})} seeds.", "",
            "| rule | lenient | against the first | MiB sent | E |", "|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in table(mine, "lenient")), "",
            f"Away from the first beyond its interval: {apart(mine, 'lenient') or 'none'}.",
        ]  # fmt: skip
    hours = sum(c["seconds"] for c in cells) / 60
    lines += ["", f"{hours:.0f} minutes on {machine['cpu']}, {machine['threads']} threads.", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.options(str(__doc__).partition("\n")[0])
    parser.add_argument("--rules", default=RULES, help="comma-separated; the first is compared to")
    parser.add_argument("--domains", default="finance", help="comma-separated")
    parser.add_argument("--partitions", default=",".join(PARTITIONS), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=60, help="questions of a task")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    cells = [Cell(domain, partition, rule, seed) for seed in range(1, given.seeds + 1)
             for domain in given.domains.split(",") for partition in given.partitions.split(",")
             for rule in given.rules.split(",")]  # fmt: skip
    try:
        for rule in given.rules.split(","):
            strategies.load(rule)  # a name that is none is known now, not after hours
        data = data_folder(given.data)
        first = given.rules.split(",")[0]
        found = [
            run(c, configure(c, given.model, data, given.out, given.limit, c.rule == first))
            for c in cells
        ]
    except FedSimError as failure:
        sys.exit(f"error: {failure}")
    result = {"machine": harness.machine(pick_device("auto")), "cells": found}
    for domain, partition, mine in groups(found):
        harness.show(f"{domain}, {partition}", ("rule", "lenient", "against", "MiB", "E"),
                     table(mine, "lenient"))  # fmt: skip
    PAGE.write_text(page(result), encoding="utf-8")
    figures = {c.name: round(f["after"]["lenient"], 4) for c, f in zip(cells, found, strict=True)}
    harness.finish("study", result, figures, True)


if __name__ == "__main__":
    main()
