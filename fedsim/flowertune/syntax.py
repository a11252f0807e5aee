"""What an expression of an app's code is worth, read from its syntax: nothing is executed.

Constants, the app's own configuration (`cfg.model.lora.x`), names that were assigned, and a few
pure operations on these. Whatever else an expression needs makes it unreadable.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fedsim.flowertune.settings import Absent, Section, Settings, Unread


@dataclass(frozen=True)
class Symbol:
    """A class, a function or a module, by its dotted name."""

    name: str

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Known:
    """A value that a name has."""

    value: Any


@dataclass(frozen=True)
class Later:
    """A value that is looked for when it is asked for."""

    find: Callable[[], Any]


@dataclass
class Scope:
    """Names where an expression stands; None: it has a value that nobody knows."""

    file: str
    names: dict[str, Known | Later | None] = field(default_factory=dict)
    outer: Scope | None = None

    def copy(self) -> Scope:
        return Scope(self.file, dict(self.names), self.outer)


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "tuple": tuple,
          "dict": dict, "set": set}  # fmt: skip
_PURE: dict[str, Callable[..., Any]] = {**_TYPES, "len": len, "sorted": sorted, "min": min,
                                        "max": max, "round": round, "abs": abs}  # fmt: skip
_METHODS = {"lower", "upper", "strip", "lstrip", "rstrip", "split", "replace", "startswith",
            "endswith", "join", "title", "removeprefix", "removesuffix"}  # fmt: skip
# Calls that hand a configuration on as it is.
_WRAPPERS = {"DictConfig", "create", "replace_keys", "unflatten_dict", "dict", "to_container",
             "override_config_with_env_vars"}  # fmt: skip


class Reading:
    """Reads expressions.

    Attributes:
        called: what a function of the app returns for a call of it, if it has such a function.
        environment: names of environment variables that were taken as not set.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.called: Callable[[str, ast.Call, Scope], Any] | None = None
        self.environment: set[str] = set()

    def value(self, node: ast.expr, scope: Scope) -> Any:
        """What an expression is worth. Raises Unread."""
        read = getattr(self, f"_{type(node).__name__.lower()}", None)
        if read is None:
            raise Unread(ast.unparse(node))
        try:
            return read(node, scope)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError):
            raise Unread(ast.unparse(node)) from None

    def _constant(self, node: ast.Constant, _: Scope) -> Any:
        return node.value

    def _name(self, node: ast.Name, scope: Scope) -> Any:
        at: Scope | None = scope
        while at is not None and node.id not in at.names:
            at = at.outer
        found = at.names[node.id] if at is not None else None
        if isinstance(found, Known):
            return found.value
        if isinstance(found, Later):
            with suppress(Unread):
                return found.find()
        if at is None and node.id in _PURE:
            return Symbol(node.id)
        return self.settings.named(node.id)

    def _attribute(self, node: ast.Attribute, scope: Scope) -> Any:
        if node.attr == "run_config":
            return Section("")
        try:
            base = self.value(node.value, scope)
        except Absent:
            raise
        except Unread:
            return self.settings.named(node.attr)
        if isinstance(base, Section):
            return self.settings.get(base, node.attr)
        if isinstance(base, Symbol):
            return Symbol(f"{base.name}.{node.attr}")
        raise Unread(ast.unparse(node))

    def _subscript(self, node: ast.Subscript, scope: Scope) -> Any:
        base, index = self.value(node.value, scope), node.slice
        if isinstance(index, ast.Slice):
            parts = [None if p is None else self.value(p, scope)
                     for p in (index.lower, index.upper, index.step)]  # fmt: skip
            return base[slice(*parts)]
        key = self.value(index, scope)
        return self.settings.get(base, key) if isinstance(base, Section) else base[key]

    def _several(self, node: ast.List | ast.Tuple | ast.Set, scope: Scope) -> list[Any]:
        return [self.value(e, scope) for e in node.elts]

    _list = _tuple = _set = _several

    def _dict(self, node: ast.Dict, scope: Scope) -> dict[Any, Any]:
        if None in node.keys:
            raise Unread(ast.unparse(node))
        return {self.value(k, scope): self.value(v, scope)
                for k, v in zip(node.keys, node.values, strict=True) if k is not None}  # fmt: skip

    def _joinedstr(self, node: ast.JoinedStr, scope: Scope) -> str:
        return "".join(str(self.value(part, scope)) for part in node.values)

    def _formattedvalue(self, node: ast.FormattedValue, scope: Scope) -> str:
        if node.format_spec is not None or node.conversion != -1:
            raise Unread(ast.unparse(node))
        return str(_data(self.value(node.value, scope)))

    def _unaryop(self, node: ast.UnaryOp, scope: Scope) -> Any:
        return _UNARY[type(node.op)](_data(self.value(node.operand, scope)))

    def _binop(self, node: ast.BinOp, scope: Scope) -> Any:
        left, right = (_data(self.value(n, scope)) for n in (node.left, node.right))
        return _BINARY[type(node.op)](left, right)

    def _compare(self, node: ast.Compare, scope: Scope) -> bool:
        left = self.value(node.left, scope)
        for op, right in zip(node.ops, node.comparators, strict=True):
            other = self.value(right, scope)
            named = isinstance(op, ast.Is | ast.IsNot)  # a section is not None, whatever is in it
            if not _BINARY[type(op)](*((left, other) if named else map(_data, (left, other)))):
                return False
            left = other
        return True

    def _boolop(self, node: ast.BoolOp, scope: Scope) -> Any:
        """As Python has it; an unreadable part matters only where no other decides."""
        ends, unread, value = isinstance(node.op, ast.Or), None, None
        for part in node.values:
            try:
                value = self.value(part, scope)
            except Unread as why:
                unread = why
                continue
            if bool(value) == ends:
                if unread is not None and not isinstance(value, bool):
                    break
                return value
        if unread is not None:
            raise unread
        return value

    def _ifexp(self, node: ast.IfExp, scope: Scope) -> Any:
        return self.value(node.body if self.value(node.test, scope) else node.orelse, scope)

    def _listcomp(self, node: ast.ListComp, scope: Scope) -> list[Any]:
        one = node.generators[0]
        if len(node.generators) > 1 or not isinstance(one.target, ast.Name):
            raise Unread(ast.unparse(node))
        inner, out = scope.copy(), []
        for item in _data(self.value(one.iter, scope)):
            inner.names[one.target.id] = Known(item)
            if all(self.value(test, inner) for test in one.ifs):
                out.append(self.value(node.elt, inner))
        return out

    def _call(self, node: ast.Call, scope: Scope) -> Any:
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if any(isinstance(a, ast.Starred) for a in node.args):
            raise Unread(ast.unparse(node))
        if name in ("os.environ.get", "os.getenv"):
            value = self.value(node.args[1], scope) if len(node.args) > 1 else None
            self.environment.add(str(self.value(node.args[0], scope)))
            return value
        if name == "getattr" or last == "get":
            return self._get(node, scope)
        if last in _WRAPPERS and node.args:
            base = self.value(node.args[0], scope)
            if isinstance(base, Section):
                return base
        if name == "isinstance":
            kinds = self.value(node.args[1], scope)
            chosen = kinds if isinstance(kinds, list) else [kinds]
            value = self.value(node.args[0], scope)
            if isinstance(value, Section | Symbol):
                raise Unread(name)
            return isinstance(value, tuple(_TYPES[k.name] for k in chosen))
        if name in _PURE and not node.keywords:
            return _PURE[name](*(_data(self.value(a, scope)) for a in node.args))
        if isinstance(node.func, ast.Attribute) and last in _METHODS and not node.keywords:
            text = self.value(node.func.value, scope)
            if isinstance(text, str):
                return getattr(text, last)(*(_data(self.value(a, scope)) for a in node.args))
        if self.called is not None:
            return self.called(last, node, scope)
        raise Unread(ast.unparse(node))

    def _get(self, node: ast.Call, scope: Scope) -> Any:
        """`getattr(x, name, default)` and `x.get(name, default)` of the configuration."""
        args = list(node.args)
        if isinstance(node.func, ast.Attribute):
            args.insert(0, node.func.value)
        base = self.value(args[0], scope)
        name, rest = self.value(args[1], scope), args[2:]
        if isinstance(base, dict):
            return base[name] if name in base else self._default(rest, scope)
        if base is None and rest and not isinstance(node.func, ast.Attribute):
            return self.value(rest[0], scope)
        if not isinstance(base, Section) or not isinstance(name, str):
            raise Unread(ast.unparse(node))
        try:
            return self.settings.get(base, name)
        except Absent:
            if not rest and not isinstance(node.func, ast.Attribute):
                raise
            return self._default(rest, scope)

    def _default(self, rest: list[ast.expr], scope: Scope) -> Any:
        return self.value(rest[0], scope) if rest else None


def _data(value: Any) -> Any:
    """A value itself. Raises Unread for what is only the name of one."""
    if isinstance(value, Section | Symbol):
        raise Unread(str(value))
    return value
