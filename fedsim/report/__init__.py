"""What a finished run says: the table before -> after, the curves, one HTML page."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.checkpoint import write_atomic
from fedsim.config import read_toml
from fedsim.evaluate import comparable, explain, paired_difference
from fedsim.folder import RunFolder


@dataclass(frozen=True)
class Change:
    """One score before training and after it, over the same examples.

    `before` is None, and the change nan, where only one round was scored.
    """

    task: str
    metric: str
    n: int
    before: float | None
    after: float
    change: float
    low: float  # of the 95 % interval of the paired change
    high: float

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0


def changes(folder: Path) -> list[Change]:
    """Every task and metric, the first evaluated round against the last."""
    run = RunFolder(folder)
    scores: list[dict[str, Any]] = json.loads((folder / "scores.json").read_text())
    out = []
    for task in dict.fromkeys(s["task"] for s in scores):
        lines = run.read(f"eval/{task}.jsonl")
        rounds = sorted({line["round"] for line in lines})
        for metric in dict.fromkeys(s["metric"] for s in scores if s["task"] == task):
            first, last = (_hits(lines, round, metric) for round in (rounds[0], rounds[-1]))
            both = [q for q in last if q in first]  # the same questions, by content
            before, after = [first[q] for q in both], [last[q] for q in both]
            start, change = None, (math.nan,) * 3
            if len(rounds) > 1 and both:
                start, change = sum(before) / len(both), paired_difference(before, after)
            else:
                after = list(last.values())
            out.append(Change(task, metric, len(after), start, sum(after) / len(after), *change))
    return out


def _hits(lines: list[dict[str, Any]], round: int, metric: str) -> dict[tuple[Any, ...], float]:
    """Of each example, by what is asked, the share of the round's adapters that are right."""
    hits: dict[tuple[Any, ...], list[bool]] = {}
    for line in lines:
        if line["round"] == round:
            asked = (line["index"], line["prompt"], line["gold"])
            hits.setdefault(asked, []).append(line[metric])
    return {asked: sum(h) / len(h) for asked, h in sorted(hits.items(), key=lambda h: h[0][0])}


def curve(x: list[float], series: dict[str, list[float]], label: str) -> str:
    """A small line plot as SVG text."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    with plt.rc_context({"svg.hashsalt": "fedsim", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
        for name, y in series.items():
            axes.plot(x, y, marker="o", markersize=3, linewidth=1.5, label=name)
        axes.set(xlabel="round", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()


def plots(folder: Path) -> dict[str, str]:
    """name -> SVG: loss by round, and scores by round."""
    rounds = RunFolder(folder).read("rounds.jsonl")
    scores: list[dict[str, Any]] = json.loads((folder / "scores.json").read_text())
    out = {}
    if trained := [r for r in rounds if None not in (r["loss_first"], r["loss_last"])]:
        out["loss"] = curve(
            [r["round"] for r in trained],
            {"first step": [r["loss_first"] for r in trained],
             "last step": [r["loss_last"] for r in trained]},
            "clients' mean loss",
        )  # fmt: skip
    if scores:
        out["scores"] = score_curve(scores)
    return out


def score_curve(scores: list[dict[str, Any]]) -> str:
    """Each task and metric over the rounds, the mean where a round has several adapters."""
    rounds = sorted({s["round"] for s in scores})
    values: dict[str, dict[int, list[float]]] = {}
    for s in scores:
        line = values.setdefault(f"{s['task']}, {s['metric']}", {})
        line.setdefault(s["round"], []).append(s["value"])
    series = {name: [sum(line[r]) / len(line[r]) for r in rounds] for name, line in values.items()}
    return curve([float(r) for r in rounds], series, "accuracy")


def notes(folder: Path) -> list[str]:
    """What a reader of a run's scores has to know."""
    scores = json.loads((folder / "scores.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    found = [comparable(scores, environment["data"]["train"])]
    if any(s["source"].startswith("embedded:") for s in scores):
        found.append("embedded data: not a leaderboard score")
    return [note for note in found if note]


def write(folder: Path) -> Path:
    """Write plots/*.svg and report.html; returns the page."""
    import jinja2

    drawn = plots(folder)
    (folder / "plots").mkdir(exist_ok=True)
    for name, svg in drawn.items():
        write_atomic(folder / "plots" / f"{name}.svg", svg.encode())
    rounds = RunFolder(folder).read("rounds.jsonl")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        name=folder.name,
        config=read_toml(folder / "config.toml"),
        environment=json.loads((folder / "environment.json").read_text()),
        rounds=rounds,
        changes=(found := changes(folder)),
        notes=notes(folder),
        metrics=explain(c.metric for c in found),
        plots={name: svg[svg.index("<svg") :] for name, svg in drawn.items()},
        train_seconds=sum(r["seconds"].get("train", 0.0) for r in rounds),
        tokens=sum(r["tokens"] for r in rounds),
    )
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"
