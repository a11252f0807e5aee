"""The rule for an app's server: FedAvg, or what is no more than that."""

from __future__ import annotations

import ast
import re

from fedsim.flowertune.reader import Found, Reader, shown
from fedsim.flowertune.tables import PASSED, WATCHED


class ServerRules(Reader):
    """The strategy that code chooses."""

    def is_a(self, rule: str, name: str) -> bool:
        """Whether a name is the library's rule, or a class that only watches it."""
        last = name.rpartition(".")[2]
        for tree in self.code.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and node.name == last:
                    body = node.body[bool(ast.get_docstring(node)) :]
                    base = ast.unparse(node.bases[0]) if len(node.bases) == 1 else last
                    return base != last and self.is_a(rule, self.library(tree, base)) and all(
                        map(passes_through, body)
                    )  # fmt: skip
        return bool(re.fullmatch(rf"(flwr|fl)\.server(app)?\.strategy\.(\w+\.)?{rule}", name))

    @staticmethod
    def library(tree: ast.Module, name: str) -> str:
        """A name with the module that it is imported from."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return f"{node.module}.{alias.name}"
        return name

    def strategy(self) -> None:
        """The template's FedAvg, or FedProx whose clients add no term: that is FedAvg, too."""
        rules = []
        for file, name, call, scope in self.calls:
            shares = [k for k in call.keywords if k.arg in ("fraction_fit", "fraction_train")]
            if shares and not name.endswith("__init__"):
                where = f"{file}: {name.rpartition('.')[2]}"
                rules.append((where, name, call))
                self.argument(f"strategy.{shares[0].arg}", shares[0].value, scope,
                              f"{where}({shares[0].arg})")  # fmt: skip
        if self.given.get("strategy.fraction_evaluate"):
            self.note("strategy.fraction-evaluate", "clients do not evaluate; no adapter changes")
        term = self.proximal([call for _, _, call in rules])
        for where, name, call in rules:
            own, given = self.own_arguments(name), {f"{k.arg}" for k in call.keywords}
            if not own & PASSED and self.is_a("FedAvg", name) and given - own <= PASSED:
                self.keep("server.strategy", Found("fedavg", where))
            elif not term and self.is_a("FedProx", name) and given <= PASSED | {"proximal_mu"}:
                self.keep("server.strategy", Found("fedavg", where))
                self.note(where, "FedProx, whose term is the client's to add; this app's client "
                          "adds none: computed as FedAvg, which it is")  # fmt: skip
            else:
                self.problem(where, "not FedAvg, nor a class that only watches it",
                             "server.strategy")  # fmt: skip
        if not rules:
            self.problem("ServerApp", "no call of a strategy with fraction_fit or fraction_train",
                         "server.strategy")  # fmt: skip
        if "server.strategy" in self.assigned and "strategy.proximal_mu" in self.given:
            self.note(f"strategy.proximal_mu = {shown(self.given['strategy.proximal_mu'])}",
                      "not used: a rule's own options are server.options")  # fmt: skip

    def own_arguments(self, name: str) -> set[str]:
        """What the constructor of an app's class takes for itself."""
        found = self.flow.functions.get(name.rpartition(".")[2], [])
        return {a.arg for node, _, _ in found for a in [*node.args.args, *node.args.kwonlyargs]}

    def proximal(self, strategies: list[ast.Call]) -> bool:
        """Whether code has a proximal term anywhere but in what the server's rule is given."""
        given = {id(n) for call in strategies for k in call.keywords for n in ast.walk(k)}
        for tree in self.code.values():
            alone = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
            for node in ast.walk(tree):
                text = getattr(node, "attr", None) or getattr(node, "id", None) or (
                    node.value if isinstance(node, ast.Constant) else "")  # fmt: skip
                if "proximal" in str(text) and id(node) not in given | alone:
                    return True
        return False


def passes_through(method: ast.stmt) -> bool:
    """Whether a method returns, untouched, what its one `super()` call of the same name does."""
    name = getattr(method, "name", "")
    lines = [line.strip() for line in ast.unparse(method).splitlines()]
    calls = [line for line in lines if "super()" in line]
    if name not in WATCHED or len(calls) != 1 or f"super().{name}(" not in calls[0]:
        return False
    if name == "__init__":
        return calls == ["super().__init__(**kwargs)"]
    result, _, call = calls[0].removeprefix("return ").rpartition(" = ")
    stored = [n.id for n in ast.walk(method)
              if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]  # fmt: skip
    once = all(stored.count(n) == 1 for n in re.findall(r"\w+", result))
    # Of a tuple, unparse writes the brackets in one place and not in the other.
    returned = {line[6:].strip(" ()") for line in lines if re.match(r"return\b", line)}
    return once and returned == {(result or call).strip(" ()")}
