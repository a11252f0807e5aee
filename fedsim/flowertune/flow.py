"""Which statements of an app's code are reached, and with which values in their names.

Branches that the app's configuration decides are followed; of others both are. A parameter has the
value that all calls of its function agree on.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedsim.flowertune.settings import Unread
from fedsim.flowertune.syntax import Known, Later, Reading, Scope, Symbol

Function = ast.FunctionDef | ast.AsyncFunctionDef
_DEPTH = 12  # calls in calls


def _names(node: Function) -> list[str]:
    """A function's parameters."""
    return [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]


@dataclass(frozen=True)
class Reached:
    """An expression that is evaluated, and the names at that place."""

    node: ast.expr
    scope: Scope


@dataclass
class _Run:
    """What one pass through a body has met."""

    seen: list[Reached] | None
    returned: list[Known | None]


class Flow:
    """An app's code, followed.

    Attributes:
        reached: every call, name and f-string that is evaluated.
    """

    def __init__(self, code: Mapping[str, ast.Module], reading: Reading) -> None:
        self.reading = reading
        reading.called = self._called
        self.modules = {file: Scope(file) for file in code}
        self.functions: dict[str, list[tuple[Function, str, bool]]] = {}  # node, file, is a method
        self._sites: dict[str, list[tuple[ast.Call, Function | ast.Module]]] = {}
        self._homes: dict[int, tuple[str, str]] = {}  # file and name
        self._traces: dict[int, list[Reached]] = {}
        self._open: set[int] = set()
        self._asked: set[tuple[int, str]] = set()
        self._depth = 0
        for file, tree in code.items():
            self._homes[id(tree)] = file, ""
            self._index(tree, tree, file, None)
        self.reached = [r for tree in code.values() for r in self._trace(tree)]
        for found in self.functions.values():
            self.reached += [r for node, _, _ in found for r in self._trace(node)]

    def _index(
        self, node: ast.AST, owner: Function | ast.Module, file: str, within: str | None
    ) -> None:
        """Note every function, and every call with whose body it stands in."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                name = within if within and child.name == "__init__" else child.name
                self.functions.setdefault(name, []).append((child, file, within is not None))
                self._homes[id(child)] = file, name
                self._index(child, child, file, None)
                continue
            if isinstance(child, ast.Call):
                name = ast.unparse(child.func).rpartition(".")[2]
                self._sites.setdefault(name, []).append((child, owner))
            deeper = child.name if isinstance(child, ast.ClassDef) else within
            self._index(child, owner, file, deeper)

    # -- bodies ------------------------------------------------------------------------------------

    def _trace(self, owner: Function | ast.Module) -> list[Reached]:
        """What a module's or a function's body reaches. Raises Unread while that is being found."""
        key = id(owner)
        if key in self._open:
            raise Unread("a function that is being read")
        if key not in self._traces:
            self._open.add(key)
            seen: list[Reached] = []
            file = self._homes[key][0]
            scope = self.modules[file]
            if isinstance(owner, Function):
                scope = Scope(file, self._parameters(owner), scope)
            self._block(owner.body, scope, _Run(seen, []))
            self._open.discard(key)
            self._traces[key] = seen
        return self._traces[key]

    def _block(self, body: list[ast.stmt], scope: Scope, run: _Run) -> bool:
        """Whether the function ends here."""
        return any(self._statement(statement, scope, run) for statement in body)

    def _statement(self, node: ast.stmt, scope: Scope, run: _Run) -> bool:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                scope.names[node.name] = Known(Symbol(node.name))
                if isinstance(node, ast.ClassDef):
                    self._block(node.body, Scope(scope.file, {}, scope), run)
            case ast.Import() | ast.ImportFrom():
                module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    whole = alias.name if module or alias.asname else alias.name.split(".")[0]
                    name = Known(Symbol(f"{module}{whole}"))
                    scope.names[alias.asname or whole] = name
            case ast.Return():
                if node.value is not None:
                    self._see(node.value, scope, run)
                run.returned.append(self._known(node.value, scope) if node.value else Known(None))
                return True
            case ast.Raise() | ast.Continue() | ast.Break():
                return isinstance(node, ast.Raise)
            case ast.If():
                return self._if(node, scope, run)
            case ast.Global() | ast.Nonlocal():
                scope.names.update(dict.fromkeys(node.names))
            case ast.Assign(targets=[ast.Name(id=name)]):
                self._see(node.value, scope, run)
                scope.names[name] = self._known(node.value, scope)
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                self._see(value, scope, run)
                scope.names[name] = self._known(value, scope)
            case _:
                return self._other(node, scope, run)
        return False

    def _if(self, node: ast.If, scope: Scope, run: _Run) -> bool:
        self._see(node.test, scope, run)
        try:
            chosen = node.body if self.reading.value(node.test, scope) else node.orelse
            return self._block(chosen, scope, run)
        except Unread:
            pass
        yes, no = scope.copy(), scope.copy()
        ends = self._block(node.body, yes, run), self._block(node.orelse, no, run)
        left = [s.names for s, end in zip((yes, no), ends, strict=True) if not end]
        for names in left:
            for name in names.keys() | scope.names.keys():
                same = all(other.get(name) == names.get(name) for other in left)
                scope.names[name] = names.get(name) if same else None
        return not left

    def _other(self, node: ast.stmt, scope: Scope, run: _Run) -> bool:
        """Loops, with, try and the like: what they assign is unknown, before as behind them."""
        stored = {n.id: None for n in ast.walk(node)
                  if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}  # fmt: skip
        loops = isinstance(node, ast.For | ast.AsyncFor | ast.While)
        if loops:
            scope.names.update(stored)
        ended = False
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self._see(part, scope, run)
            elif isinstance(part, ast.withitem):
                self._see(part.context_expr, scope, run)
        if isinstance(node, ast.With | ast.AsyncWith | ast.Try):
            ended = self._block(node.body, scope, run)
            for handler in getattr(node, "handlers", []):
                branch = scope.copy()
                if not self._block(handler.body, branch, run):
                    scope.names.update(stored)
                    ended = False
            for more in (getattr(node, "orelse", []), getattr(node, "finalbody", [])):
                ended = self._block(more, scope, run) or ended
        else:
            for body in (getattr(node, "body", []), getattr(node, "orelse", [])):
                self._block(body, scope, run)
            scope.names.update(stored)
        return ended

    def _known(self, node: ast.expr, scope: Scope) -> Known | None:
        try:
            return Known(self.reading.value(node, scope))
        except Unread:
            return None

    def _see(self, node: ast.AST, scope: Scope, run: _Run) -> None:
        """Note the calls, names and f-strings of an expression that are evaluated."""
        if run.seen is None:
            return
        if isinstance(node, ast.Call | ast.Name | ast.JoinedStr):
            run.seen.append(Reached(node, scope.copy()))
        if isinstance(node, ast.IfExp):
            test = self._known(node.test, scope)
            chosen = [node.body, node.orelse]
            if test is not None:
                chosen = [node.body if test.value else node.orelse]
            parts: list[ast.AST] = [node.test, *chosen]
        else:
            parts = list(ast.iter_child_nodes(node))
        for part in parts:
            self._see(part, scope, run)

    # -- functions ---------------------------------------------------------------------------------

    def _parameters(self, node: Function) -> dict[str, Known | Later | None]:
        return {name: Later(partial(self._argument, node, name)) for name in _names(node)}

    def _argument(self, node: Function, name: str) -> Any:
        """What every call that is reached gives for a parameter. Raises Unread."""
        if (asked := (id(node), name)) in self._asked:
            raise Unread(name)
        found: list[Any] = []
        self._asked.add(asked)
        try:
            for call, owner in self._sites.get(self._homes[id(node)][1], []):
                for reached in self._trace(owner):
                    if reached.node is call:
                        value = self._given(node, call, reached.scope, name)
                        if value not in found:
                            found.append(value)
        finally:
            self._asked.discard(asked)
        if len(found) != 1:
            raise Unread(name)
        return found[0]

    def _given(self, node: Function, call: ast.Call, scope: Scope, name: str) -> Any:
        """What a call gives for a parameter. Raises Unread."""
        own = [a.arg for a in [*node.args.posonlyargs, *node.args.args]]
        if own[:1] in (["self"], ["cls"]):
            own = own[1:]
        if any(isinstance(a, ast.Starred) for a in call.args) or any(
            k.arg is None for k in call.keywords
        ):
            raise Unread(name)
        given = dict(zip(own, call.args, strict=False)) | {f"{k.arg}": k.value
                                                           for k in call.keywords}  # fmt: skip
        if name in given:
            return self.reading.value(given[name], scope)
        defaults = dict(zip(reversed([a.arg for a in node.args.args]), reversed(
            node.args.defaults), strict=False))  # fmt: skip
        defaults |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults,
                                              strict=True) if d is not None}  # fmt: skip
        if name not in defaults:
            raise Unread(name)
        return self.reading.value(defaults[name], self.modules[self._homes[id(node)][0]])

    def _called(self, name: str, call: ast.Call, scope: Scope) -> Any:
        """What a function of the app returns for this call. Raises Unread."""
        found = self.functions.get(name, [])
        if len(found) != 1 or found[0][2] or self._depth >= _DEPTH:
            raise Unread(ast.unparse(call))
        node, file, _ = found[0]
        names: dict[str, Known | Later | None] = {}
        for own in _names(node):
            try:
                names[own] = Known(self._given(node, call, scope, own))
            except Unread:
                names[own] = None
        run = _Run(None, [])
        self._depth += 1
        try:
            ended = self._block(node.body, Scope(file, names, self.modules[file]), run)
        finally:
            self._depth -= 1
        results = run.returned + ([] if ended else [Known(None)])
        if any(r is None or r != results[0] for r in results) or results[0] is None:
            raise Unread(ast.unparse(call))
        return results[0].value

    # -- what is asked of it -----------------------------------------------------------------------

    def calls(self) -> Iterator[tuple[str, ast.Call, Scope]]:
        """Every call that is reached: the callee's dotted name as far as it is known."""
        for reached in self.reached:
            if isinstance(reached.node, ast.Call):
                name = ast.unparse(reached.node.func)
                try:
                    value = self.reading.value(reached.node.func, reached.scope)
                except Unread:
                    value = None
                yield value.name if isinstance(value, Symbol) else name, reached.node, reached.scope
