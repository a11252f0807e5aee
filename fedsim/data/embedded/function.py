"""Python functions made of parts, each of which has words, code and a meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Part(NamedTuple):
    """One part of a function. `{}` in words and code is what it is applied to."""

    name: str
    words: str
    code: str
    means: Callable[..., Any]
    after: str = ""  # gathering only: the code for a finished list, "" where a loop does not fit


@dataclass(frozen=True)
class Family:
    """Functions of one argument.

    Attributes:
        argument: its name.
        place: where the items are, in words.
        loop: the head of a loop over the items.
        items: argument -> items.
        choose: conditions on an item.
        shapes: (what is made of an item, how that is gathered).
        inputs: arguments to test with; the first is the example in the docstring.
    """

    argument: str
    place: str
    loop: str
    items: Callable[[Any], Any]
    choose: tuple[Part, ...]
    shapes: tuple[tuple[Part, Part], ...]
    inputs: tuple[Any, ...]


@dataclass(frozen=True)
class Function:
    """A family's function: its parts, its text and its value."""

    family: Family
    choose: Part
    make: Part
    gather: Part

    @property
    def name(self) -> str:
        """Unlike that of any other function of any family."""
        return "_".join(p.name for p in (self.gather, self.make, self.choose) if p.name)

    @property
    def words(self) -> str:
        """What the function returns."""
        chosen = f"the {self.choose.words} {self.family.place}"
        return self.gather.words.format(self.make.words.format(chosen))

    @property
    def head(self) -> str:
        """The signature."""
        return f"def {self.name}({self.family.argument}):\n"

    @property
    def prompt(self) -> str:
        """Signature and docstring with one example."""
        first = self.family.inputs[0]
        example = f"    >>> {self.name}({first!r})\n    {self.value(first)!r}\n"
        return f'{self.head}    """Return {self.words}.\n\n{example}    """\n'

    @property
    def short(self) -> str:
        """The body as one expression."""
        condition = f" if {self.choose.code}" if self.choose.code else ""
        loop = f"{self.make.code} for {self.family.loop}{condition}"
        return f"    return {self.gather.code.format(loop)}\n"

    @property
    def long(self) -> str:
        """The body as a loop, where that is possible."""
        if not self.gather.after:
            return self.short
        step = f"found.append({self.make.code})\n"
        if self.choose.code:
            step = f"if {self.choose.code}:\n            {step}"
        loop = f"    found = []\n    for {self.family.loop}:\n        {step}"
        return f"{loop}    return {self.gather.after}\n"

    def value(self, argument: Any) -> Any:
        """What the function returns, from the meaning of its parts."""
        items = self.family.items(argument)
        return self.gather.means([self.make.means(x) for x in items if self.choose.means(x)])
