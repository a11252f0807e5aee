"""The configuration of a command line: preset, file, app or run, and what is set over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsim import config as configuration
from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.flowertune import App


def configure(
    source: Path | None, preset: str | None, domain: str | None, data_dir: Path | None,
    assignments: list[str],
) -> tuple[Config, App | None]:  # fmt: skip
    """The configuration of a command line, and the app that it comes from."""
    from fedsim import domains, flowertune, folder

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
    defaults = {"clients": {"number": domains.load(name).clients}}
    config = configuration.build(configuration.merge(defaults, values), origin)
    if "name" not in values.get("run", {}):
        run = config.run.model_copy(update={"name": folder.default_name(config)})
        config = config.model_copy(update={"run": run})
    return config, imported
