"""fedsim run | eval | plan | list | doctor."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsim import config as configuration
from fedsim.config import Config
from fedsim.errors import ConfigError, FedSimError
from fedsim.flowertune import App

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


def configure(
    source: Path | None, preset: str | None, domain: str | None, data_dir: Path | None,
    assignments: list[str],
) -> tuple[Config, App | None]:  # fmt: skip
    """The configuration of a command line, and the app that it comes from."""
    from fedsim import domains, flowertune

    values: dict[str, Any] = configuration.preset(preset) if preset else {}
    imported: App | None = None
    origin = preset or "defaults"
    if source is not None:
        origin, source = str(source), source.resolve()
        if not source.exists():
            raise ConfigError("configuration", got=origin, expected="an existing file or folder")
        if source.is_file():
            read = configuration.read_toml(source)
        elif (source / "config.toml").is_file():
            read = configuration.read_toml(source / "config.toml")
            read = configuration.merge(
                read, {"run": {"out": str(source.parent), "name": source.name}}
            )
        elif flowertune.is_app(source):
            over = [] if domain is None else [f"data.domain={domain}"]
            read = (imported := flowertune.read_app(source, [*over, *assignments])).values
        else:
            raise ConfigError(
                "configuration", got=origin,
                expected="a TOML file, a FlowerTune app's folder or a run's folder",
            )  # fmt: skip
        values = configuration.merge(values, read)
    if domain is not None:
        values = configuration.merge(values, {"data": {"domain": domain}})
    if data_dir is not None:
        place = {"source": "directory", "dir": str(data_dir)}
        values = configuration.merge(values, {"data": place})
    values = configuration.override(values, assignments)
    name = configuration.build(values, origin).data.domain
    defaults = {
        "run": {"name": name.rpartition(".")[2]},
        "clients": {"number": domains.load(name).clients},
    }
    return configuration.build(configuration.merge(defaults, values), origin), imported


def finished(folder: Path, config: Config) -> None:
    """Write a run's report, and say what has changed and where everything lies."""
    from fedsim import display, report
    from fedsim.evaluate import explain

    changes = report.changes(folder)
    report.write(folder)
    if changes:
        out.print(display.table(changes))
        out.print(f"[dim]{explain(c.metric for c in changes)}[/dim]")
        if config.data.source == "embedded":
            out.print("[dim]embedded data: not a leaderboard score[/dim]")
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
    finished(folder, config)


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
    from fedsim.evaluate import comparison, explain
    from fedsim.evaluate.targets import resolve

    found = resolve(targets)
    given = {
        "data": {"domain": domain, "dir": None if data_dir is None else str(data_dir),
                 "source": None if data_dir is None else "directory"},
        "evaluate": {"tasks": None if tasks is None else tasks.split(","), "limit": limit},
        "run": {"protocol": protocol},
    }  # fmt: skip
    config = comparison.configure(found, given, assignments or [])
    if to is None:
        run_folder = next((Path(n) for n in targets if (Path(n) / "adapters").is_dir()), None)
        to = run_folder / "evaluation" if run_folder else Path("evaluations") / config.data.domain
    asked = comparison.Comparison(config, found, backend, vllm_python.absolute())
    scores = asked.run(to, fresh=fresh)
    out.print(display.scores(scores))
    out.print(f"[dim]{explain(s.metric for s in scores)}[/dim]")
    out.print(f"[dim]{display.trivial(to)}[/dim]")
    if note := comparison.comparable(config, scores):
        out.print(f"[yellow]{escape(note)}[/yellow]")
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
def doctor() -> None:
    """What is installed, which device will be used, and which implementation of each operation."""
    _quiet()
    from fedsim import doctor as check

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in check.findings():
        table.add_row(f"[dim]{name}[/dim]", escape(value))
    out.print(table)


def _quiet() -> None:
    """Keep libraries' progress bars and advice out of a display that is ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers

    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Entry point: a FedSimError is one paragraph on stderr and exit code 1."""
    try:
        app()
    except FedSimError as error:
        err.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
