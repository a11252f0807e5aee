"""What `fedsim eval` is given: runs, adapters and models, as adapters over one base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import weights
from fedsim.config import Config, build, read_toml
from fedsim.errors import ConfigError
from fedsim.evaluate.generation import Adapter


@dataclass(frozen=True)
class Target:
    """One adapter to evaluate, or a bare base.

    Attributes:
        base: the model that it belongs to, by the name that it gives.
        config: of the run that made it, or None.
    """

    adapter: Adapter
    base: str
    round: int
    config: Config | None = None


def resolve(names: Sequence[str]) -> list[Target]:
    """Targets by what lies there: a run's folder (its base and every exported round), a folder in
    PEFT's format, a model's folder, an alias or a hub id.

    Raises:
        ConfigError: a folder is none of these, a run has exported nothing, or the targets have
            different bases.
    """
    targets = [target for name in names for target in _resolve(name)]
    bases = list(dict.fromkeys(target.base for target in targets))
    if len(bases) > 1:
        raise ConfigError(
            "targets of one evaluation", got=", ".join(bases), expected="one base model",
            remedy="Evaluate each base's adapters by itself.",
        )  # fmt: skip
    return targets


def _resolve(name: str) -> list[Target]:
    path = Path(name)
    if (path / "adapter_config.json").is_file():
        return [_adapter(path, path.name)]
    if (path / "adapters").is_dir() and (path / "config.toml").is_file():
        return _run(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(
            "target", got=name,
            expected="a run's folder, an adapter's (adapter_config.json) or a model's "
            "(config.json)",
        )  # fmt: skip
    return [Target(Adapter("base"), name, 0)]


def _run(path: Path) -> list[Target]:
    config = build(read_toml(path / "config.toml"), str(path / "config.toml"))
    out = [Target(Adapter(f"{path.name}, base"), config.model.name, 0, config)]
    for folder in sorted((path / "adapters").glob("round_*")):
        if (folder / "adapter_config.json").is_file():
            number = int(folder.name.removeprefix("round_"))
            adapter = Adapter(f"{path.name}, round {number}", folder)
            out.append(Target(adapter, config.model.name, number, config))
    if len(out) == 1:
        raise ConfigError(
            f"{path}: exported adapters", got=0, expected="at least one",
            remedy="The run exports every server.export_every rounds and at its end.",
        )  # fmt: skip
    return out


def _adapter(path: Path, name: str) -> Target:
    settings = read_adapter(path)
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            f"{path}/adapter_config.json: base_model_name_or_path", got=base,
            expected="the model that the adapter belongs to",
        )  # fmt: skip
    # An exported adapter of an alias names the hub's model, which the alias also stands for.
    alias = next((a for a, known in weights.ALIASES.items() if known.hub == base), None)
    return Target(Adapter(name, path), alias or str(base), 0)


def read_adapter(folder: Path) -> dict[str, Any]:
    """The settings of an adapter in PEFT's format. Raises ConfigError."""
    try:
        settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as failure:
        raise ConfigError(f"{folder}/adapter_config.json cannot be read ({failure})") from None
    return settings
