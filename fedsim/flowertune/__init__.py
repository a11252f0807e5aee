"""A FlowerTune app's folder -> fedsim's configuration.

Nothing of the app is executed. Its settings come from `[tool.flwr.app.config]`; what apps write in
code instead (LoRA and 4-bit arguments, prompt, partitioner, strategy) is read from its syntax.
What cannot be honoured ends in one error that lists all of it; what is computed otherwise, or is
not the app's own, is noted (docs/flowertune.md).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.config import override, read_toml
from fedsim.errors import ConfigError
from fedsim.flowertune.reader import flat
from fedsim.flowertune.rules import Rules


@dataclass(frozen=True)
class App:
    """What an app's folder asks for."""

    name: str
    values: dict[str, Any]  # for fedsim.config.build
    ignored: tuple[str, ...]  # its Python files, none of which is executed
    notes: tuple[str, ...]  # what is computed otherwise, or is not the app's own

    def record(self) -> dict[str, Any]:
        """For a run's environment.json."""
        own = {"name": self.name, "not_executed": self.ignored, "notes": self.notes}
        return {"app": own}


def is_app(path: Path) -> bool:
    """Whether a folder is a Flower app with a configuration."""
    file = path / "pyproject.toml"
    tool = read_toml(file).get("tool", {}) if file.is_file() else {}
    return "config" in tool.get("flwr", {}).get("app", {})


def read_app(path: Path, assignments: Iterable[str] = ()) -> App:
    """Read an app. Raises ConfigError that lists all that cannot be honoured.

    Args:
        assignments: `section.key=value`, which stand over the app's own and answer its lines.
    """
    if not is_app(path):
        raise ConfigError("app", got=str(path), expected="a folder with [tool.flwr.app.config]")
    document = read_toml(path / "pyproject.toml")
    flwr, project = document["tool"]["flwr"], document.get("project", {})
    files = {f.relative_to(path).as_posix(): f for f in sorted(path.rglob("*.py"))}
    files = {n: f for n, f in files.items() if not re.search(r"(^|/)(\.|site-packages/)", n)}
    code, others = _code(path, files)
    written = {
        key.strip(): value.strip() for key, _, value in (a.partition("=") for a in assignments)
    }
    rules = Rules(flwr["app"]["config"], code, others, written)
    federations = dict(flat(flwr.get("federations", {})))
    rules.check(
        federations.get(f"{federations.get('default')}.options.num-supernodes"),
        _pinned(project.get("dependencies", [])),
    )
    if rules.problems:
        lines = "".join(f"\n  - {line}" for line in rules.problems)
        raise ConfigError(
            f"{path} asks for what fedsim cannot honour:{lines}\nEach line says how to correct it"
        )
    name = re.sub(r"[^\w.-]+", "-", project.get("name", "app")).strip(".-")
    values: dict[str, dict[str, Any]] = {
        "run": {"seed": 42, "name": name, "protocol": "flowertune"}, "data": {"source": "hub"},
        "server": {"strategy": "fedavg", "min_clients": 2},
    }  # fmt: skip
    for target, found in rules.found.items():
        section, _, leaf = target.partition(".")
        values.setdefault(section, {})[leaf] = found.value
    return App(name, values, tuple(files), (*rules.notes, *_replaced(rules, written)))


def _code(path: Path, files: Mapping[str, Path]) -> tuple[dict[str, ast.Module], str]:
    """The files that train, as syntax; the text of scripts outside the app's package."""
    homes = {f.parent for f in files.values() if f.name == "server_app.py"} or {path}
    inside = {n: f for n, f in files.items() if homes & {*f.parents}}
    try:
        code = {n: ast.parse(f.read_bytes(), n) for n, f in inside.items()}
    except (SyntaxError, ValueError) as failure:
        raise ConfigError(f"{path}: the app's code is not Python: {failure}") from None
    others = [f.read_text(errors="replace") for n, f in files.items() if n not in inside]
    return code, "\n".join(others)


def _pinned(dependencies: Iterable[str]) -> tuple[int, ...] | None:
    """The version of transformers that an app pins; None where it leaves it open."""
    for text in dependencies:
        if found := re.match(r"transformers\s*==\s*(\d+(?:\.\d+)*)", text):
            return tuple(map(int, found[1].split(".")))
    return None


def _replaced(rules: Rules, written: Mapping[str, str]) -> list[str]:
    """A line for every value of the app's that an assignment stands over."""
    given = dict(flat(override({}, [f"{key}={value}" for key, value in written.items()])))
    return [f"{found.where}: replaced by --set {key}={written[key]}"
            for key, found in rules.found.items()
            if found.where and key in given and given[key] != found.value]  # fmt: skip
