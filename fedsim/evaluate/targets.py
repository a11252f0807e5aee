"""What `fedsim eval` is given: runs, adapters and models, as adapters over one base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsim import adapter_file, weights
from fedsim.config import Config, build, read_toml
from fedsim.errors import ConfigError
from fedsim.evaluate.generation import Adapter


@dataclass(frozen=True)
class Target:
    """One adapter to evaluate, or a bare base.

    Attributes:
        base: the model that it belongs to, by the name that it gives, unless another was given.
        config: of the run that made it, or None.
        place: the folder that it is told by, of a bare base None.
        revision: of the base at its hub, where the adapter names one.
        over: sha256 of the weights that it was trained over, where known.
    """

    adapter: Adapter
    base: str
    round: int
    config: Config | None = None
    place: Path | None = None
    revision: str | None = None
    over: str | None = None


def resolve(names: Sequence[str], base: str | None = None) -> list[Target]:
    """Targets by what lies there: a run's folder (its base and every exported round), a folder in
    PEFT's format, a model's folder, an alias or a hub id. What is given twice is taken once; what
    has the name of another is shown with as much of its path as tells them apart.

    Args:
        base: where the base of the adapters and runs lies, whatever they say.

    Raises:
        ConfigError: a folder is none of these, a run has exported nothing, or the targets have
            different bases.
    """
    base = str(Path(base).resolve()) if base and Path(base).is_dir() else base
    found = [target for name in names for target in _resolve(name, base)]
    once: dict[tuple[object, int], Target] = {}
    for target in found:
        once.setdefault((target.place or target.base, target.round), target)
    targets = list(once.values())
    bases = list(dict.fromkeys(target.base for target in targets))
    if len(bases) > 1:
        raise ConfigError(
            "targets of one evaluation", got=", ".join(bases), expected="one base model",
            remedy="Evaluate each base's adapters by itself"
            + (": a model is its own base." if base else ", or say with --base which it is."),
        )  # fmt: skip
    return _named(targets)


def _resolve(name: str, base: str | None) -> list[Target]:
    path = Path(name)
    if (path / adapter_file.CONFIG).is_file():
        return [_adapter(path, base)]
    if (path / "adapters").is_dir() and (path / "config.toml").is_file():
        return _run(path, base)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(
            "target", got=name,
            expected="a run's folder, an adapter's (adapter_config.json) or a model's "
            "(config.json)",
        )  # fmt: skip
    return [Target(Adapter("base"), _one(name), 0)]


def _one(name: str) -> str:
    """One name of a base that has several: a folder's absolute path; the alias of a hub's model,
    which an exported adapter names."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    return next((a for a, known in weights.ALIASES.items() if known.hub == name), name)


def _run(path: Path, base: str | None) -> list[Target]:
    config = build(read_toml(path / "config.toml"), str(path / "config.toml"))
    place, model = path.resolve(), base or _one(config.model.name)
    over = _trained_over(path)
    out = [Target(Adapter("base"), model, 0, config, over=over)]
    for folder in sorted((path / "adapters").glob("round_*")):
        number = folder.name.removeprefix("round_")
        if (folder / adapter_file.CONFIG).is_file() and number.isdecimal():
            adapter = Adapter(f", round {int(number)}", folder)
            out.append(Target(adapter, model, int(number), config, place, over=over))
    if len(out) == 1:
        raise ConfigError(
            f"{path}: exported adapters", got=0, expected="at least one",
            remedy="The run exports every server.export_every rounds and at its end.",
        )  # fmt: skip
    return out


def _trained_over(run: Path) -> str | None:
    """sha256 of the weights that a run began with, as it noted them."""
    try:
        return str(json.loads((run / "environment.json").read_text())["model"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _adapter(path: Path, base: str | None) -> Target:
    settings = adapter_file.settings(path)
    named = base or settings.base_model_name_or_path
    if not named:
        raise ConfigError(
            f"{path}/adapter_config.json: base_model_name_or_path", got=named,
            expected="the model that the adapter belongs to", remedy="Say it with --base MODEL.",
        )  # fmt: skip
    return Target(
        Adapter("", path), base or _one(str(named)), 0, place=path.resolve(),
        revision=None if base else settings.revision, over=adapter_file.base_digest(path),
    )  # fmt: skip


def _named(targets: Sequence[Target]) -> list[Target]:
    """Each under a name of its own: the shortest end of its path that no other has."""
    places = {t.place for t in targets if t.place is not None}

    def tail(place: Path) -> str:
        for parts in range(1, len(place.parts)):
            end = place.parts[-parts:]
            if sum(p.parts[-parts:] == end for p in places) == 1:
                return "/".join(end)
        return str(place)

    return [
        t if t.place is None
        else replace(t, adapter=replace(t.adapter, name=tail(t.place) + t.adapter.name))
        for t in targets
    ]  # fmt: skip
