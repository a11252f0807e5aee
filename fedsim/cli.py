"""fedsim run | eval | plan | list | doctor."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsim import config as configuration
from fedsim.config import Config
from fedsim.errors import ConfigError, FedSimError
from fedsim.study import configure

# Libraries read these when they are imported: their bars and advice stay out of our display.
for _name, _value in {
    "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true", "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}.items():  # fmt: skip
    os.environ.setdefault(_name, _value)

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Federated fine-tuning of language models on one machine, many clients in one pass.",
)  # fmt: skip
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Source = Annotated[
    Path | None,
    typer.Argument(help="A TOML file, a FlowerTune app's folder, or a run's folder to resume."),
]
Preset = Annotated[str | None, typer.Option(help="Start from a preset: see `fedsim list`.")]
DomainName = Annotated[str | None, typer.Option("--domain", help="Same as data.domain.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Read data from this directory instead of the hub.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key; repeatable."),
]


def finished(folder: Path) -> None:
    """Write a run's report, and say what has changed and where everything lies."""
    from fedsim import display, report
    from fedsim.evaluate import explain

    changes = report.changes(folder)
    report.write(folder)
    if changes:
        out.print(display.table(changes))
        out.print(f"[dim]{explain(c.metric for c in changes)}[/dim]")
        for note in report.notes(folder):
            out.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    out.print(display.places(folder))


@app.command()
def run(
    source: Source = None,
    preset: Preset = None,
    domain: DomainName = None,
    data_dir: DataDir = None,
    assignments: Set = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was stopped.")] = False,
    fresh: Annotated[bool, typer.Option(help="Replace a run of the same name.")] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share out the clients, one for each GPU; on a CPU "
                     "they share its cores. Any number gives the same bits in strict mode, at the "
                     "same OMP_NUM_THREADS. Under torchrun leave it out."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="A run to compare with: central (one client has all data) or local "
                     "(clients are never averaged)."),
    ] = None,
) -> None:  # fmt: skip
    """Simulate federated fine-tuning, evaluating before and after."""
    from fedsim import launch

    if (code := launch.spread(devices)) is not None:
        raise typer.Exit(code)
    config, imported = configure(source, preset, domain, data_dir, assignments or [])
    if reference is not None:
        from fedsim import references

        config = references.reference(config, reference)
    _quiet()
    from fedsim import display, simulate

    if launch.rank():
        with suppress(KeyboardInterrupt):  # the leader was interrupted as well, and says so
            simulate.run(config)
        return
    from fedsim.core import pick_device
    from fedsim.record import Meter, implementation

    display.app(out, imported)
    c = config
    out.print(
        f"[bold]{c.run.name}[/bold]  {c.data.domain} ({c.data.source}) · {escape(c.model.name)} · "
        f"{c.server.strategy} · {c.server.rounds} rounds · "
        f"{'about ' if c.privacy.of_clients else ''}{c.per_round} of {c.clients.number} "
        "clients each",
        soft_wrap=True,
    )
    runs = implementation(pick_device(c.run.device))
    out.print(f"[dim]{c.train.mode} mode · operations in {runs}[/dim]")
    meter = Meter()
    try:
        with display.Display(out, meter):
            folder = simulate.run(config, resume=resume, fresh=fresh, meter=meter, app=imported)
    except KeyboardInterrupt:
        err.print("stopped; go on with --resume")
        raise typer.Exit(130) from None
    finished(folder)


@app.command("eval")
def eval_(
    targets: Annotated[
        list[str], typer.Argument(help="Runs (every exported round), adapters, or a model.")
    ],
    domain: DomainName = None,
    data_dir: DataDir = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated; default: all.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task.")] = None,
    protocol: Annotated[str | None, typer.Option(help="fedsim or flowertune.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that the adapters belong to, where it has moved.")
    ] = None,
    backend: Annotated[str, typer.Option(help="engine, transformers or vllm.")] = "engine",
    vllm_python: Annotated[
        Path, typer.Option(help="Interpreter of vLLM's environment, see `make install-vllm`.")
    ] = Path(".venv-vllm/bin/python"),
    to: Annotated[Path | None, typer.Option("--out", help="Folder for scores and answers.")] = None,
    fresh: Annotated[bool, typer.Option(help="Replace an evaluation of the same name.")] = False,
    assignments: Set = None,
) -> None:
    """Evaluate many adapters over one base at once; keep every example."""
    _quiet()
    from fedsim import display
    from fedsim.evaluate import comparable, comparison, explain
    from fedsim.evaluate.targets import resolve

    named = configuration.override({}, assignments or []).get("model", {}).get("name", base)
    if base is not None and named != base:
        raise ConfigError("--set model.name", got=named, expected=f"{base}, as --base says")
    base = None if named is None else str(named)
    found = resolve(targets, base)
    assignments = [a for a in assignments or [] if a.partition("=")[0].strip() != "model.name"]
    given = {
        "data": {"domain": domain, "dir": None if data_dir is None else str(data_dir),
                 "source": None if data_dir is None else "directory"},
        "evaluate": {"tasks": None if tasks is None else tasks.split(","), "limit": limit},
        "run": {"protocol": protocol},
    }  # fmt: skip
    config = comparison.configure(found, given, assignments or [])
    asked = comparison.Comparison(
        config, found, backend, vllm_python.absolute(), based=base is not None
    )
    to, scores = asked.run(to, fresh=fresh)
    out.print(display.scores(scores))
    out.print(f"[dim]{explain(s.metric for s in scores)}[/dim]")
    out.print(f"[dim]{display.trivial(to)}[/dim]")
    for note in (comparable(s.record() for s in scores), *asked.notes):
        if note:
            out.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    out.print(f"[dim]scores and every answer[/dim]  {escape(str(to))}", soft_wrap=True)


@app.command()
def plan(
    source: Source = None,
    preset: Preset = None,
    domain: DomainName = None,
    data_dir: DataDir = None,
    assignments: Set = None,
) -> None:
    """Say what a run will cost before it runs; no weights are loaded."""
    config, imported = configure(source, preset, domain, data_dir, assignments or [])
    _quiet()
    from fedsim import cost, display

    display.app(out, imported)
    estimate = cost.estimate(config)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in estimate.lines():
        table.add_row(f"[dim]{name}[/dim]", escape(value))
    out.print(table)
    if estimate.over_budget:
        out.print(f"[red]{estimate.over_budget}[/red]")


@app.command("list")
def list_(
    keys: Annotated[bool, typer.Option(help="Every configuration key with its default.")] = False,
    options: Annotated[bool, typer.Option(help="Every strategy with its options.")] = False,
) -> None:
    """Presets, domains, strategies and model aliases; or every configuration key."""
    from fedsim import domains, strategies, weights

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    if keys:
        defaults = Config().model_dump()
        for key in configuration.KEYS:
            section, _, leaf = key.partition(".")
            model = Config.model_fields[section].annotation
            about = getattr(model, "model_fields", {})[leaf].description or ""
            table.add_row(key, repr(defaults[section][leaf]), f"[dim]{about}[/dim]")
    elif options:
        for name in strategies.known():
            about, own = strategies.describe(name)
            shown = ", ".join(f"{key} = {value!r}" for key, value in own.items())
            table.add_row(name, f"[dim]{escape(about)}[/dim]")
            if shown:
                table.add_row("", escape(shown))
    else:
        presets = sorted(p.stem for p in configuration.PRESETS.glob("*.toml"))
        rows = {"presets": presets, "domains": domains.known(), "strategies": strategies.known(),
                "model aliases": list(weights.ALIASES)}  # fmt: skip
        for name, values in rows.items():
            table.add_row(f"[dim]{name}[/dim]", ", ".join(values))
    out.print(table)


@app.command()
def doctor(
    hub: Annotated[
        bool, typer.Option(help="Load every set from the hub instead, and say which ones do.")
    ] = False,
) -> None:
    """What is installed, which device will be used, and which implementation of each operation."""
    _quiet()
    from fedsim import doctor as check

    if hub:
        failed = 0
        for name, value, loads in check.hub():  # each as it comes: a set may take minutes
            failed += not loads
            style = "green" if loads else "red"
            out.print(f"[{style}]{escape(name)}[/{style}]  {escape(value)}", soft_wrap=True)
        raise typer.Exit(1 if failed else 0)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in check.findings():
        table.add_row(f"[dim]{name}[/dim]", escape(value))
    out.print(table)


def _quiet() -> None:
    """Keep libraries' progress bars and advice out of a display that is ours."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("bitsandbytes", "DeepSpeed", "datasets", "huggingface_hub", "peft"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.addFilter(lambda record: record.levelno >= logging.ERROR)  # DeepSpeed resets levels
    import transformers

    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Entry point: every failure is one paragraph on stderr and exit code 1."""
    try:
        app()
    except Exception as failure:
        from fedsim import unforeseen

        said = failure if isinstance(failure, FedSimError) else unforeseen.told(failure)
        err.print(f"[bold red]error:[/bold red] {escape(str(said))}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
