"""Whether an app's code reads a key of its configuration."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from fedsim.flowertune.settings import CONFIG, plain, words

_WHOLE = {"items", "values", "keys"}  # methods that read a section without naming its keys
COPIES = {"dict", "list", "vars", "to_container", "asdict", "replace_keys", "unflatten_dict"}


def last(node: ast.expr) -> str:
    """The last part of a dotted name."""
    return ast.unparse(node).rpartition(".")[2]


class Reads:
    """Looks for keys in code.

    Args:
        code: the files that train, as syntax.
        others: the text of the app's other files.
        given: every key of the app's configuration.
    """

    def __init__(self, code: Mapping[str, ast.Module], others: str, given: set[str]) -> None:
        self._others, self._given = plain(others), given
        self._names: list[tuple[str, list[str]]] = []  # attribute, what it is taken from
        self._texts: set[str] = set()
        self._wholes: list[str] = []  # last names of what is read as a whole
        for tree in code.values():
            for node in ast.walk(tree):
                self._note(node)
            self._texts |= {plain(t) for t in _texts(tree)}

    def _note(self, node: ast.AST) -> None:
        match node:
            case ast.Attribute(attr=attr, value=base):
                self._names.append((attr, re.findall(r"\w+", ast.unparse(base))))
            case ast.keyword(arg=None, value=value):
                self._whole(value)
            case ast.Call(func=ast.Attribute(attr=attr, value=base)) if attr in _WHOLE:
                self._whole(base)
            case ast.Call(func=ast.Name(id="getattr"), args=[base, name, *_]):
                if not isinstance(name, ast.Constant):
                    self._whole(base)

    def _whole(self, node: ast.expr) -> None:
        """A variable, or a section of one, perhaps through `dict(x)`."""
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                self._wholes.append(name)
            case ast.Call(func=func, args=[first, *_]) if last(func) in COPIES:
                self._whole(first)

    def __call__(self, key: str) -> bool:
        """Whether code reads a key, as far as its names tell; True in doubt."""
        *sections, leaf = key.split(".")
        if any(t == leaf or f".{t}".endswith(f".{key}") for t in self._texts):
            return True
        if re.search(rf"\b{re.escape(leaf)}\b", self._others):
            return True
        if any(name == leaf and not self._another(base, key) for name, base in self._names):
            return True
        return any(self._covers(whole, sections) for whole in self._wholes)

    def _another(self, base: list[str], key: str) -> bool:
        """Whether what an attribute is taken from is the section of another key of this name."""
        *sections, leaf = key.split(".")
        there = set().union(*map(words, base))
        if sections and (sections[-1] in base or sections[-1] in there):
            return False
        rivals = [k.split(".")[-2] for k in self._given if k != key and k.endswith(f".{leaf}")]
        return any(rival in base or rival in there for rival in rivals)

    @staticmethod
    def _covers(whole: str, sections: list[str]) -> bool:
        """Whether a variable that is read as a whole holds a key of these sections."""
        of = words(whole)
        if whole in sections:
            return True
        return bool(of & CONFIG) and (of - CONFIG <= {"run", *sections})


def _texts(tree: ast.Module) -> Iterator[str]:
    """Strings in code that are no docstrings."""
    alone = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value
