"""The rules for an app's rows: which set, whose, as which text, and what of it is trained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import suppress

from fedsim import domains
from fedsim.domains import PROMPT
from fedsim.flowertune.reader import Found, Reader, shown
from fedsim.flowertune.settings import Unread
from fedsim.flowertune.syntax import Scope
from fedsim.flowertune.tables import BY_DOMAIN, BY_TASK, JOINING, OLDER

TEXT = PROMPT + " {response}"
# Methods that change rows or their order.
_OPERATIONS = {"rename_column", "rename_columns", "remove_columns", "map", "filter", "select",
               "shuffle", "train_test_split", "add_column", "cast_column"}  # fmt: skip


# Operations that give columns the template's names, Dolly's among them.
NAMES = {"rename_column('output', 'response')", "rename_column('context', 'input')"}
_ANSWERS = ("{response}", "{output}")


def code_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A function's body as text, without its docstring."""
    body = node.body[ast.get_docstring(node) is not None :]
    return "\n".join(ast.unparse(statement) for statement in body)


def changed(function: ast.AST, text: ast.JoinedStr) -> bool:
    """Whether a function adds to a text of its, or calls a method of it."""
    names = {target.id for n in ast.walk(function) if isinstance(n, ast.Assign) and n.value is text
             for target in n.targets if isinstance(target, ast.Name)}  # fmt: skip
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.Attribute):
            for part in ast.walk(node):
                if part is text or (isinstance(part, ast.Name) and part.id in names):
                    return True
    return False


class RowRules(Reader):
    """The rules, one method each."""

    def data(self, nodes: int | None) -> None:
        """Domain, training set and clients; rows and parts as the domain has them."""
        for file, name, _, _ in self.calls:
            if name.endswith("Partitioner") and not name.endswith("IidPartitioner"):
                self.problem(f"{file}: {name}", "the clients are IID; use IidPartitioner",
                             "clients.partition=iid")  # fmt: skip
        asked = self.found.pop("data.train", Found("", ""))
        sets = {s.hub: (d, s) for d in map(domains.load, domains.known()) for s in d.train if s.hub}
        hub = OLDER.get(str(asked.value), str(asked.value))
        if hub in sets:
            domain, chosen = sets[hub]
            self.found["data.domain"] = Found(domain.name, asked.where)
            self.found["clients.number"] = Found(domain.clients if nodes is None else nodes, "")
            if chosen is not domain.train[0]:
                self.found["data.train"] = Found(chosen.name, asked.where)
            self.rows(BY_DOMAIN[domain.name], domain.name)
        elif asked.where:
            known = ", ".join(sorted([*sets, *OLDER]))
            self.problem(asked.where, f"in no domain; known: {known}", "data.domain")

    def rows(self, own: str, domain: str) -> None:
        """What of a row the instruction is, against what the domain takes."""
        where, kind = self.kind()
        if kind == "joined" != own:
            self.found["data.rows"] = Found("joined", where)
            self.note(where, "instruction, a space and input, as the app joins them; the "
                      f"leaderboard's app of domain {domain!r} does not")  # fmt: skip
        elif kind != own:
            self.problem(
                where, f"formats rows unlike domain {domain!r}; correct it", "data.rows=domain"
            )

    def kind(self) -> tuple[str, str]:
        """Where rows become instructions, and of what."""
        if "reformat" in self.flow.functions or not any(n == "reformat" for n in self.callees()):
            return self.operations()
        for file, name, call, scope in self.calls:
            for k in call.keywords if name.rpartition(".")[2] == "reformat" else []:
                if k.arg == "llm_task":
                    where = f"{file}: reformat(llm_task) = "
                    with suppress(Unread):
                        task = self.reading.value(k.value, scope)
                        return where + shown(task), BY_TASK.get(str(task).replace("-", ""), "")
                    return where + ast.unparse(k.value), ""
        return "reformat", ""

    def callees(self) -> Iterator[str]:
        """The last names of what is called."""
        return (name.rpartition(".")[2] for _, name, _, _ in self.calls)

    def operations(self) -> tuple[str, str]:
        """What the calls that are reached make of the columns."""
        done = [
            (f"{file}: {ast.unparse(call)}", self.operation(call, scope))
            for file, _, call, scope in self.calls
            if isinstance(call.func, ast.Attribute) and call.func.attr in _OPERATIONS
        ]
        texts = {text for _, text in done} - NAMES
        kinds = {
            "instruction": set(),
            "joined": {"map(joining, ['input'])"},
            "input": {"remove_columns(['instruction'])", "rename_column('input', 'instruction')"},
        }  # fmt: skip
        for kind, wanted in kinds.items():
            if texts == wanted:
                return (done[-1][0] if done else "the app's prompt"), kind
        other = texts - set().union(*kinds.values())
        return next((w for w, t in done if t in other), done[-1][0]), ""

    def operation(self, call: ast.Call, scope: Scope) -> str:
        """A call that changes rows, with what its arguments are."""
        parts = []
        for node in [*call.args, *(k.value for k in call.keywords)]:
            name = ast.unparse(node)
            found = self.flow.functions.get(name, [])
            if len(found) == 1:
                first = found[0][0].args.args[0].arg if found[0][0].args.args else ""
                text = re.sub(rf"\b{first}\b", "dataset", code_of(found[0][0]))
                parts.append("joining" if text == JOINING else name)
                continue
            try:
                parts.append(repr(self.reading.value(node, scope)))
            except Unread:
                parts.append(name)
        return f"{ast.unparse(call.func).rpartition('.')[2]}({', '.join(parts)})"

    def prompt(self) -> None:
        """The text that is trained is the template's."""
        used = {r.node.id for r in self.flow.reached if isinstance(r.node, ast.Name)}
        seen = False
        for name, found in self.flow.functions.items():
            for node, file, _ in found if name in used else ():
                texts = self.texts(node)
                if not any(column in text for text in texts for column in _ANSWERS):
                    texts = [""] if name.startswith("format") and "prompt" in name else []
                if texts and texts != [TEXT]:
                    self.problem(f"{file}: {name}", f"trains another text than {TEXT!r}; use that",
                                 "data.rows=domain")  # fmt: skip
                seen = seen or bool(texts)
        if seen:
            return
        if "SFTTrainer" in self.callees():
            self.problem("the app's prompt", f"no function makes {TEXT!r} of a row; write one",
                         "data.rows=domain")  # fmt: skip
        else:
            self.note("the app's prompt", "not found in its code; the template's is computed")

    def texts(self, node: ast.AST) -> list[str]:
        """The f-strings that a function makes of a row, its columns in braces, and `{?}` behind
        those that it changes afterwards."""
        parts = {id(part) for part in ast.walk(node)}
        texts = []
        for reached in self.flow.reached:
            if isinstance(reached.node, ast.JoinedStr) and id(reached.node) in parts:
                text = "".join(self.part(p, reached.scope) for p in reached.node.values)
                texts.append(text + "{?}" * changed(node, reached.node))
        return [text for text in texts if "{" in text]

    def part(self, node: ast.expr, scope: Scope) -> str:
        """A part of an f-string: text, or a column in braces."""
        if isinstance(node, ast.FormattedValue):
            column = re.fullmatch(r"\w+\['(\w+)'\](\[\w+\])?", ast.unparse(node.value))
            if column:
                return f"{{{column[1]}}}"
        try:
            return str(self.reading.value(node, scope))
        except Unread:
            return "{?}"

    def trainer(self) -> None:
        """transformers' own loss, of the answer's tokens alone."""
        own = {n.name for tree in self.code.values() for n in ast.walk(tree)
               if isinstance(n, ast.ClassDef)}  # fmt: skip
        for file, name, call, _ in self.calls:
            last = name.rpartition(".")[2]
            if last.endswith("Trainer") and (last in own or last != "SFTTrainer"):
                self.problem(f"{file}: {last}", "a trainer of its own; use trl's SFTTrainer")
            if last == "SFTTrainer" and "data_collator" not in {k.arg for k in call.keywords}:
                self.problem(f"{file}: SFTTrainer", "every token is trained, not the answer's "
                             "alone; pass DataCollatorForCompletionOnlyLM")  # fmt: skip
            if last == "DataCollatorForLanguageModeling":
                self.problem(f"{file}: {last}", "every token is trained, not the answer's alone; "
                             "use DataCollatorForCompletionOnlyLM")  # fmt: skip
        self.arguments("SFTTrainer", "SFTTrainer.", {})
