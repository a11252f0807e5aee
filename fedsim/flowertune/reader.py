"""Collects what an app says for fedsim's keys, and every reason why it cannot run as it is."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fedsim.flowertune.flow import Flow
from fedsim.flowertune.reads import Reads
from fedsim.flowertune.settings import Settings, Unread, plain
from fedsim.flowertune.syntax import Reading, Scope, Symbol
from fedsim.flowertune.tables import (
    ARGS,
    FOLLOWED,
    HARMLESS,
    ONLY,
    OPTIMISERS,
    RENAMED,
    ROUNDED,
    SCHEDULES,
)


@dataclass(frozen=True)
class Found:
    """A value for one of fedsim's keys, and what said so."""

    value: Any
    where: str  # "" for what the app does not say itself
    key: str = ""  # the app's, where it is one


def flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, value in table.items():
        below = flat(value) if isinstance(value, dict) else [("", value)]
        yield from ((f"{key}.{rest}" if rest else key, leaf) for rest, leaf in below)


def shown(value: Any) -> str:
    """A value as a line shows it."""
    return value.name if isinstance(value, Symbol) else json.dumps(value, default=str)


def listed(value: Any) -> tuple[str, ...]:
    """Names of modules, each of which may fit nothing, as with PEFT. Raises ValueError for a
    pattern."""
    if value == "all-linear":
        return (value,)
    if isinstance(value, str):
        raise ValueError('a pattern of names; list the names, or write "all-linear"')
    return tuple(sorted(f"{name}?".replace(" ", "") for name in value or ()))


class Reader:
    """What was found, what was noted, and what cannot be honoured.

    Args:
        config: the app's `[tool.flwr.app.config]`.
        code: the files that train; others: the text of the rest.
        assigned: fedsim's keys that the user has set -> as written. They answer every line of
            theirs.
    """

    def __init__(
        self, config: Mapping[str, Any], code: Mapping[str, ast.Module], others: str,
        assigned: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.keys = [(plain(w).removeprefix("static."), w, v) for w, v in flat(config)]
        self.given = {key: value for key, _, value in self.keys}
        self.assigned = assigned
        self.reading = Reading(Settings(self.given))
        self.code = code
        self.flow = Flow(code, self.reading)
        self.calls = [(scope.file, name, node, scope) for name, node, scope in self.flow.calls()]
        self.reads = Reads(code, others, {*self.given})
        self.found: dict[str, Found] = {}
        self.notes: list[str] = []
        self.problems: list[str] = []

    # -- what is kept ------------------------------------------------------------------------------

    def note(self, where: str, what: str) -> None:
        """Something that is computed otherwise, or is not the app's own."""
        if (line := f"{where}: {what}") not in self.notes:
            self.notes.append(line)

    def problem(self, where: str, why: object, *targets: str) -> None:
        """A reason why the app cannot run, unless the user has set the key of fedsim's.

        Args:
            targets: such keys, with `=value` where only one value can be meant.
        """
        for target in (t.partition("=")[0] for t in targets):
            if target in self.assigned:
                return self.note(where, f"answered by --set {target}={self.assigned[target]}")
        ways = " or ".join(f"--set {t}" if "=" in t else f"--set {t}=..." for t in targets if t)
        line = f"{where}: {why}" + (f"; or choose with {ways}" if ways else "")
        if line not in self.problems:
            self.problems.append(line)
        return None

    def keep(self, target: str, found: Found) -> None:
        """A value for one of fedsim's keys; code stands over a key that it never reads."""
        old = self.found.setdefault(target, found)
        if old.value == found.value:
            return
        for one, other in ((old, found), (found, old)):
            if one.key and not self.reads(one.key):
                self.found[target] = other
                return self.note(one.where, f"not read by the app's own code, but {other.where}")
        self.problem(found.where, f"but {old.where}; make them agree", target)

    # -- keys --------------------------------------------------------------------------------------

    def all_keys(self) -> None:
        """Every key of the app's configuration."""
        for key, written, value in self.keys:
            if key.startswith(FOLLOWED):
                if not self.reads(key):
                    self.note(f"{written} = {shown(value)}", "not read by the app's own code")
            else:
                self.take(key, value, written, key)

    def take(self, key: str, value: Any, where: str, own: str = "") -> None:
        """One of the app's keys (`own`), or an argument in its code."""
        where = f"{where} = {shown(value)}"
        if key in ROUNDED:
            if value:
                self.note(where, ROUNDED[key])
        elif key in ONLY:
            values, target, why = ONLY[key]
            if value not in values:
                self.problem(where, why, *([target] if target else []))
        elif key in RENAMED:
            try:
                self.keep(RENAMED[key], Found(self.convert(RENAMED[key], value, where), where, own))
            except (TypeError, ValueError) as why:
                self.problem(where, why, RENAMED[key])
        elif rule := getattr(self, f"_{key.removeprefix(ARGS)}", None) if ARGS in key else None:
            rule(value, where)
        elif not {key, key.partition(".")[0]} & HARMLESS.keys():
            self.unknown(key, where, own)

    def unknown(self, key: str, where: str, own: str) -> None:
        """A key or an argument of no table."""
        close = difflib.get_close_matches(key, [*RENAMED, *ONLY, *HARMLESS], 1)
        hint = f"did you mean {close[0]}?" if close else "delete it"
        if own and not self.reads(own):
            self.note(where, "not read by the app's own code" + (f"; {hint}" if close else ""))
        else:
            self.problem(where, f"unknown, and the app's code reads it; {hint}" if own
                         else f"unknown; {hint}")  # fmt: skip

    def convert(self, target: str, value: Any, where: str) -> Any:
        """A value as fedsim's key has it. Raises ValueError or TypeError."""
        if target == "train.steps" and value <= 0:  # -1 steps are epochs
            raise ValueError("a visit of whole epochs hangs on a client's rows; write the steps")
        if target in ("server.fraction", "train.clip_norm") and value <= 0:  # 0 switches off
            raise ValueError("expected a number above 0")
        if target == "adapter.targets":
            return listed(value)
        if target == "train.schedule":
            if value not in SCHEDULES:
                raise ValueError(f"not computed; known: {', '.join(SCHEDULES)}")
            if SCHEDULES[value] != value:
                self.note(where, f"computed as {SCHEDULES[value]}, which it is in one cycle")
            return SCHEDULES[value]
        return value

    def _optim(self, value: Any, where: str) -> None:
        if value not in OPTIMISERS:
            self.problem(where, f"AdamW is computed; set it to one of {', '.join(OPTIMISERS)}")
        elif OPTIMISERS[value]:
            self.note(where, OPTIMISERS[value])

    # -- arguments in code -------------------------------------------------------------------------

    def arguments(self, callee: str, prefix: str, defaults: Mapping[str, Any]) -> bool:
        """Take the arguments of every call of `callee` that is reached. False: there is none."""
        # A call for 8 bits is a branch for another value of model.quantization.
        calls = [c for c in self.calls if f".{c[1]}".endswith(f".{callee}")
                 and "load_in_8bit" not in ast.unparse(c[2])]  # fmt: skip
        for file, _, call, scope in calls:
            written = {f"{k.arg}": k.value for k in call.keywords}
            for name in sorted({*defaults, *written}):
                key, where = f"{prefix}{name}", f"{file}: {callee}({name})"
                if name not in written:
                    self.take(key, defaults[name], where)
                elif key not in HARMLESS and not (name == "None" and prefix == ARGS):
                    self.argument(key, written[name], scope, where)
        return bool(calls)

    def argument(self, key: str, node: ast.expr, scope: Scope, where: str) -> None:
        """An argument's value, as far as it can be read."""
        try:
            value = self.reading.value(node, scope)
        except Unread as why:
            what = "only running the code would tell" if str(why) == ast.unparse(node) else why
            target = RENAMED.get(key, "")
            self.problem(f"{where} = {ast.unparse(node)}", f"{what}; write the value",
                         *([target] if target else []))  # fmt: skip
            return
        if key not in self.given or self.given[key] != value:  # else it has been taken
            self.take(key, value, where)

    def number(self, key: str, default: float) -> float:
        """One of the app's keys that is a number. Notes a problem where it is none."""
        value = self.given.get(key, default)
        with suppress(TypeError, ValueError):
            if not isinstance(value, str | bool):
                return float(value)
        self.problem(f"{key} = {shown(value)}", "expected a number")
        return default
