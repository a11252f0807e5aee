"""Does federated training help in each domain? Real data, protocol fedsim, SmolLM2-135M-Instruct.

For every domain and seed one run, then one evaluation of the bare base and all its seeds' adapters
at once; majority and chance are counted from the same questions. 400 examples a task, 40 problems a
coding set, unless --limit and --problems say otherwise. What is finished is kept in `--out`: the
same command goes on where it was stopped, and writes bench/results/domains.json at its end.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import harness
import torch
from bench_clients import data_folder

from fedsim import domains, seeds, simulate
from fedsim.config import Config, build
from fedsim.core import pick_device
from fedsim.errors import FedSimError
from fedsim.evaluate import paired_difference, suite
from fedsim.evaluate.comparison import Comparison
from fedsim.evaluate.targets import Target, resolve
from fedsim.folder import RunFolder
from fedsim.references import trivial

# rounds, clients a round, steps, batch: what each domain's answers, from one word to a page, allow
# in a few minutes of two cores; finance is about one epoch.
WORK = {"finance": (12, 8, 10, 16), "general": (3, 4, 5, 8), "medical": (3, 4, 4, 8),
        "coding": (3, 4, 5, 8)}  # fmt: skip
TRAIN = {"medical": "medical_meadow_wikidoc_patient_information"}  # the flashcards are not here


def configure(name: str, seed: int, model: str, data: Path, out: Path) -> Config:
    """The run of one domain and seed; it does not evaluate."""
    rounds, clients, steps, batch = WORK[name]
    number = domains.load(name).clients
    return build({
        "run": {"name": f"{name}-{seed}", "seed": seed, "out": str(out)},
        "model": {"name": model},
        "adapter": {"rank": 16, "alpha": 32.0, "targets": ["all-linear"]},
        "data": {"domain": name, "source": "directory", "dir": str(data), "train": TRAIN.get(name)},
        "clients": {"number": number},
        "server": {"rounds": rounds, "fraction": clients / number, "export_every": rounds},
        "train": {"steps": steps, "batch": batch, "lr_max": 1e-3, "lr_min": 1e-4},
        "evaluate": {"limit": 0},
    }, "bench/domains.py")  # fmt: skip


@contextmanager
def timed(file: Path) -> Iterator[None]:
    """Add the seconds inside to those in a file, also when they end in an interruption."""
    before = float(file.read_text()) if file.is_file() else 0.0
    began = time.perf_counter()
    try:
        yield
    finally:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{before + time.perf_counter() - began:.1f}")


def train(config: Config) -> Path:
    """The folder of the finished run: a new one, or what is left of a stopped one."""
    folder = Path(config.run.out) / config.run.name
    if (folder / "adapters" / f"round_{config.server.rounds:05d}").is_dir():
        return folder
    harness.say(f"training {config.run.name}")
    with timed(folder.with_suffix(".seconds")):
        return simulate.run(config, resume=RunFolder(folder).has_checkpoint, fresh=True)


def evaluate(config: Config, folders: Sequence[Path], limit: int, to: Path) -> None:
    """Base and final adapters, unless it is done already."""
    if (to / "done").is_file():
        return
    found = [resolve([str(folder)]) for folder in folders]
    targets = [found[0][0], *(seed[-1] for seed in found)]
    changed = config.evaluate.model_copy(update={"limit": limit})
    harness.say(f"evaluating {config.data.domain}: {len(targets)} adapters")
    with timed(to.with_suffix(".seconds")):
        asked = Comparison(config.model_copy(update={"evaluate": changed}), _named(targets))
        asked.run(to, fresh=True)
    (to / "done").touch()


def _named(targets: Sequence[Target]) -> list[Target]:
    names = ["zero-shot", *(f"seed {i}" for i in range(1, len(targets)))]
    return [replace(t, adapter=replace(t.adapter, name=name), round=min(i, 1))
            for i, (name, t) in enumerate(zip(names, targets, strict=True))]  # fmt: skip


def rows(config: Config, folder: Path, limit: int) -> list[dict[str, Any]]:
    """One row a task and metric: before, mean and spread after, the paired interval, references."""
    changed = config.evaluate.model_copy(update={"limit": limit})
    key = seeds.run_key(config.run.seed)
    tests = suite(config.model_copy(update={"evaluate": changed}),
                  domains.load(config.data.domain), key)  # fmt: skip
    scores = json.loads((folder / "scores.json").read_text())
    out = []
    for task, metric in dict.fromkeys((s["task"], s["metric"]) for s in scores):
        lines = RunFolder(folder).read(f"eval/{task}.jsonl")
        hits: dict[str, list[float]] = {}
        for line in lines:
            hits.setdefault(line["adapter"], []).append(float(line[metric]))
        golds = [line["gold"] for line in lines if line["adapter"] == "zero-shot"]
        before = hits.pop("zero-shot")
        after = [sum(column) / len(column) for column in zip(*hits.values(), strict=True)]
        change, low, high = paired_difference(before, after)
        means = [statistics.fmean(h) for h in hits.values()]
        known = trivial(tests).get(task, {"answer": None, "majority": None, "chance": None})
        always = [float(gold == known["answer"]) for gold in golds]
        above = paired_difference(always, after)
        out.append({
            "domain": config.data.domain, "task": task, "metric": metric, "n": len(before),
            "before": statistics.fmean(before), "after": statistics.fmean(after),
            "seeds": means, "change": change, "low": low, "high": high,
            "majority": known["majority"], "chance": known["chance"],
            **dict(zip(("above", "above_low", "above_high"), above, strict=True)),
        })  # fmt: skip
    if out and all(row["majority"] is not None for row in out):
        out += [mean_row(out, metric) for metric in dict.fromkeys(row["metric"] for row in out)]
    return out


def mean_row(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The mean over tasks; halves of intervals add in quadrature, tasks being independent."""
    mine = [row for row in rows if row["metric"] == metric]

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in mine)

    def half(low: str, high: str) -> float:
        return math.hypot(*((row[high] - row[low]) / 2 for row in mine)) / len(mine)

    change, above, spread = mean("change"), mean("above"), half("low", "high")
    wide = half("above_low", "above_high")
    return {
        "domain": mine[0]["domain"], "task": "mean", "metric": metric,
        "n": sum(row["n"] for row in mine),
        **{key: mean(key) for key in ("before", "after", "majority", "chance")},
        "seeds": [statistics.fmean(s) for s in zip(*(row["seeds"] for row in mine), strict=True)],
        "change": change, "low": change - spread, "high": change + spread,
        "above": above, "above_low": above - wide, "above_high": above + wide,
    }  # fmt: skip


def report(result: dict[str, Any]) -> dict[str, float]:
    """Print the table; returns each task's change by its first metric."""
    table = []
    for row in result["rows"]:
        reference = "" if row["majority"] is None else f"{100 * row['majority']:.1f}"
        table.append([
            row["domain"], f"{row['task']}, {row['metric']}", str(row["n"]),
            f"{100 * row['before']:.1f}", f"{100 * row['after']:.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}", reference,
            reference and f"{100 * row['above_low']:+.1f} to {100 * row['above_high']:+.1f}",
        ])  # fmt: skip
    columns = ("domain", "task, metric", "n", "zero-shot", "federated", "change, 95 %", "majority",
               "above it, 95 %")  # fmt: skip
    harness.show("Domains", columns, table)
    return {
        f"{r['domain']}_{r['task']}_{r['metric']}": round(r["change"], 4) for r in result["rows"]
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.options(str(__doc__).partition("\n")[0])
    parser.add_argument("--domains", default=",".join(WORK), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each domain")
    parser.add_argument("--limit", type=int, default=400, help="examples of a task")
    parser.add_argument("--problems", type=int, default=40, help="problems of a coding set")
    parser.add_argument("--out", type=Path, default=Path("runs/domains"))
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    table: list[dict[str, Any]] = []
    try:
        for name in given.domains.split(","):
            limit = given.problems if name == "coding" else given.limit
            configs = [configure(name, seed, given.model, data_folder(given.data), given.out)
                       for seed in range(1, given.seeds + 1)]  # fmt: skip
            to = given.out / f"{name}-evaluation-{limit}"
            evaluate(configs[0], [train(config) for config in configs], limit, to)
            table += rows(configs[0], to, limit)
    except FedSimError as failure:
        sys.exit(f"error: {failure}")
    result = {
        "machine": harness.machine(pick_device("auto")),
        "seconds": sum(float(f.read_text()) for f in given.out.glob("*.seconds")),
        "work": WORK, "seeds": given.seeds, "rows": table,
    }  # fmt: skip
    harness.finish("domains", result, report(result), True)


if __name__ == "__main__":
    main()
