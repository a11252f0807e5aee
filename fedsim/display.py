"""What a person sees while a run goes on, and at its end."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from fedsim.core import Score
from fedsim.evaluate.statistics import interval
from fedsim.flowertune import App
from fedsim.record import FLOWERTUNE_BUDGET_MIB, Meter
from fedsim.report import Change

_REFRESH = 0.25  # seconds


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    whole = math.ceil(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


class _Figures(ProgressColumn):
    """Loss, speed and remaining time, read from the meter when the line is drawn."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def render(self, task: Task) -> Text:
        m = self._meter
        parts = []
        if m.clients:
            parts.append(f"{m.clients} client{'s' * (m.clients > 1)} in one pass")
        if m.utilisation is not None:
            parts.append(f"{m.utilisation:.0%} full")
        if m.loss is not None:
            parts.append(f"loss {m.loss:.3f}")
        if m.tokens:
            parts.append(f"{m.tokens_per_second:,.0f} tokens/s")
        if m.remaining is not None:
            parts.append(f"{clock(m.remaining)} left")
        return Text(" · ".join(parts), style="cyan")


class Display:
    """A live line on a terminal; elsewhere one line a round. Reads the meter, never the loop."""

    def __init__(self, console: Console, meter: Meter) -> None:
        self._console, self._meter = console, meter
        self._live = console.is_terminal
        self._stop = threading.Event()
        self._printed = self._noted = 0
        self._evaluations = 0
        self._progress = Progress(
            TextColumn("{task.description}", style="bold"), BarColumn(bar_width=20),
            _Figures(meter), console=console, refresh_per_second=4, transient=True,
            disable=not self._live,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Display:
        self._task = self._progress.add_task("loading", total=None)
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stop.set()
        self._thread.join()
        self._draw()
        self._progress.stop()

    def _watch(self) -> None:
        while not self._stop.wait(_REFRESH):
            self._draw()

    def _draw(self) -> None:
        m = self._meter
        what = {"train": f"round {m.round}, training", "evaluate": f"round {m.round}, evaluating"}
        total = m.steps_total or None
        self._progress.update(
            self._task, description=what.get(m.phase, m.phase),
            total=total if m.phase == "train" else None, completed=m.steps,
        )  # fmt: skip
        if m.evaluations and not self._evaluations:
            self._evaluations = 1
            self._progress.console.print(f"[dim]evaluated in {m.totals['evaluate']:.1f} s[/dim]")
        for note in m.notes[self._noted :]:
            self._noted += 1
            self._progress.console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
        for line in m.lines[self._printed :]:
            self._printed += 1
            seconds = line["seconds"]["train"]
            loss = ""
            if None not in (line["loss_first"], line["loss_last"]):
                loss = f"loss {line['loss_first']:.3f} → {line['loss_last']:.3f}  "
            text = (
                f"round {line['round']:>3}  {line['clients']} clients  {loss}"
                f"{line['tokens'] / seconds:,.0f} tokens/s  "
                f"{line['total_mib']:,.0f} MiB sent so far"
            )
            if "epsilon" in line:
                text += f"  epsilon {line['epsilon']:.2f}"
            failed = f"  [red]{line['failed']} failed[/red]" if line["failed"] else ""
            over = "  [red]over FlowerTune's budget[/red]" if line["over_budget"] else ""
            self._progress.console.print(text + failed + over, highlight=False, soft_wrap=True)


def table(changes: list[Change]) -> Table:
    """Before -> after with paired intervals."""
    out = Table(box=box.SIMPLE_HEAD, title="accuracy, %", title_style="bold", title_justify="left")
    for name in ("task", "metric"):
        out.add_column(name)
    for name in ("n", "before", "after", "change", "95 % interval"):
        out.add_column(name, justify="right")
    for c in changes:
        style = "green" if c.low > 0 else "red" if c.high < 0 else ""
        known = () if c.before is None else (
            Text(f"{100 * c.change:+.1f}", style=style),
            f"{100 * c.low:+.1f} … {100 * c.high:+.1f}",
        )  # fmt: skip
        before = "" if c.before is None else f"{100 * c.before:.1f}"
        out.add_row(c.task, c.metric, str(c.n), before, f"{100 * c.after:.1f}", *known)
    return out


def scores(found: Sequence[Score]) -> Table:
    """One row a task and metric, one column an adapter, or the other way round, whichever is
    narrower: percent and its 95 % interval."""
    out = Table(box=box.SIMPLE_HEAD, title="accuracy, %", title_style="bold", title_justify="left")
    adapters = list(dict.fromkeys(map(_shown, found)))
    cells = {(_shown(s), s.task, s.metric): s for s in found}
    lines = list(dict.fromkeys((s.task, s.metric, s.n) for s in found))

    def cell(adapter: str, task: str, metric: str) -> str:
        s = cells[adapter, task, metric]
        low, high = interval(s.value, s.n)
        return f"{100 * s.value:.1f} ({100 * low:.0f} to {100 * high:.0f})"

    if len(adapters) <= max(4, len(lines)):
        for name in ("task", "metric"):
            out.add_column(name)
        for name in ("n", *adapters):
            out.add_column(name, justify="right")
        for task, metric, n in lines:
            out.add_row(task, metric, str(n), *(cell(a, task, metric) for a in adapters))
    else:
        out.add_column("adapter")
        for task, metric, n in lines:
            out.add_column(f"{task}\n{metric}\nn = {n}", justify="right")
        for adapter in adapters:
            out.add_row(adapter, *(cell(adapter, task, metric) for task, metric, _ in lines))
    return out


def _shown(score: Score) -> str:
    return f"{score.adapter} (changes nothing)" if score.no_op else score.adapter


def trivial(folder: Path) -> str:
    """What a score has to beat, task by task."""
    found = json.loads((folder / "references.json").read_text())
    return "; ".join(
        f"{task}: always {r['answer']} {100 * r['majority']:.1f}, chance {100 * r['chance']:.1f}"
        for task, r in found.items()
    )


def places(folder: Path) -> Table:
    """Where everything lies."""
    out = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    adapters = sorted((folder / "adapters").glob("round_*"))
    rows = [
        ("report", folder / "report.html"),
        ("adapter", adapters[-1] if adapters else folder / "adapters"),
        ("scores", folder / "scores.json"),
        ("every answer", folder / "eval"),
        ("rounds, clients", folder / "rounds.jsonl"),
        ("configuration", folder / "config.toml"),
    ]
    for name, path in rows:
        out.add_row(Text(name, style="dim"), Text(str(path), overflow="fold"))
    return out


def app(console: Console, imported: App | None) -> None:
    """Print a line for each thing that is not as the app has it, and one for its code."""
    for note in imported.notes if imported else ():
        console.print(
            f"[yellow]Not the app's own:[/yellow] [dim]{escape(note)}[/dim]", soft_wrap=True
        )
    if imported:
        console.print(f"[yellow]Not executed:[/yellow] {escape(', '.join(imported.ignored))}")


def over_budget(mib: float) -> str:
    """The flag of a run that sends more than FlowerTune allows, or nothing."""
    if mib <= FLOWERTUNE_BUDGET_MIB:
        return ""
    return f"over FlowerTune's budget of {FLOWERTUNE_BUDGET_MIB:,} MiB"
