"""From a completed program to one that runs its tests. Text only: nothing here is executed.

Strict is the harness's own reading: the prompt, and the output up to the first stop text. Lenient
also reads an output that does not go on where the prompt ends but answers it: a fenced code block,
or the whole function written again. An output that goes on is read alike by both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from fedsim.extraction import cut
from fedsim.tasks import MENDED, Item, Program

BUILD = 15.0  # the harness's limit for g++

_BLOCK = re.compile(r"^```[^\n]*\n(.*?)(^```|\Z)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(  # a first line that is Python, and no sentence about it
    r"(?:async )?def \w|class \w|from \S+ import|import \w|@\w|#|\"\"\"|'''"
    r"|[A-Za-z_]\w*(?:\(|(?:, ?\w+)*[ \t]*=)"
)


@dataclass(frozen=True)
class Dialect:
    """How the problems of one task are written.

    Attributes:
        stop: the harness's stop texts.
        seconds: the harness's limit for one program.
        inside: the prompt ends within the function, so that an indented line goes on with it; else
            it is a comment that any code may follow.
        define: pattern of a line that defines the function {name}.
        end: pattern whose match, after that line, ends where the definition does.
    """

    language: Literal["python", "javascript", "cpp"]
    stop: tuple[str, ...]
    seconds: float
    inside: bool
    define: str
    end: str


# Stop texts and limits of the official harness (flowertune.md 2.4); JavaScript has one of its own.
_DEF = r"^(?:async )?def {name}\("
_LEFT = r"^(?=[^\s@#)\]}])(?!(?:async )?def |class |import |from \S+ import)"
_BRACE = r"^\}[^\n]*"
_TYPED = r"^[A-Za-z_][\w:<>, &*]*[ &*>]{name}\("
_JS = r"^(?:(?:async )?function {name}\(|(?:const|let|var) {name} *=)"
HUMANEVAL = Dialect(
    "python",
    ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"),
    3.0, True, _DEF, _LEFT,
)  # fmt: skip
MBPP = Dialect(
    "python", ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"),
    3.0, False, _DEF, _LEFT,
)  # fmt: skip
JAVASCRIPT = Dialect(
    "javascript", ("\nfunction ", "\n/*", "\n//", "\nconsole.log", "<file_sep>"),
    5.0, True, _JS, _BRACE,
)  # fmt: skip
CPP = Dialect("cpp", ("\n}", "<file_sep>"), 15.0, True, _TYPED, _BRACE)


def strict(item: Item, output: str, dialect: Dialect, seconds: float) -> Program:
    """prompt + output up to a stop text + tests, as the harness assembles it."""
    source = item.prompt + cut(output, dialect.stop)
    return Program(dialect.language, f"{source}\n{item.facts['tests']}", seconds)


def official(item: Item, output: str, dialect: Dialect) -> dict[str, bool | Program]:
    """The harness's program under its limits. It runs Python within its own process, where an exit
    is a failure; of another language it sees the exit code alone, which `MENDED` does not take."""
    program = replace(strict(item, output, dialect, dialect.seconds), build=BUILD)
    return {"official": replace(program, early=dialect.language != "python"), MENDED: program}


def lenient(item: Item, output: str, dialect: Dialect, seconds: float) -> Program:
    """Like `strict` where the output goes on with the prompt; else the code that it gives."""
    code = None if _goes_on(output, dialect) else _given(output, dialect, item.facts["name"])
    if code is None:
        return strict(item, output, dialect, seconds)
    tests = item.facts["tests"]
    at = _definition(item.prompt, dialect, item.facts["name"])
    if _definition(code, dialect, item.facts["name"]) is None:
        source = f"{item.prompt}\n{code}"
    else:  # what stands above the function (imports, helpers), then the function anew
        source = item.prompt[: at or 0] + code.partition("\nint main")[0]
        tests = tests.removeprefix("}")  # with which C++ tests close the prompt's function
    return Program(dialect.language, f"{source}\n{tests}", seconds)


def decided(item: Item, output: str, dialect: Dialect) -> bool:
    """Neither reading can change: a stop text ends the strict one, and the output goes on with the
    prompt, or a closed block holds the function."""
    if not any(stop in output for stop in dialect.stop):
        return False
    name = item.facts["name"]
    return _goes_on(output, dialect) or any(
        block[2] and _definition(block[1], dialect, name) is not None
        for block in _BLOCK.finditer(output)
    )


def _goes_on(output: str, dialect: Dialect) -> bool:
    body = output.lstrip()
    if not dialect.inside:
        return _CODE.match(body) is not None
    lead = output[: len(output) - len(body)]
    return bool(body) and lead.endswith((" ", "\t"))


def _given(output: str, dialect: Dialect, name: str) -> str | None:
    """The first block that defines the function, else the first block, else its definition."""
    blocks = [block[1] for block in _BLOCK.finditer(output)]
    whole = [block for block in blocks if _definition(block, dialect, name) is not None]
    if whole or blocks:
        return (whole or blocks)[0]
    at = _definition(output, dialect, name)
    if at is None:
        return None
    below = output.find("\n", at) + 1 or len(output)
    end = re.compile(dialect.end, re.MULTILINE).search(output, below)
    return output[at : end.end() if end else len(output)]


def _definition(text: str, dialect: Dialect, name: str) -> int | None:
    """Where the last line that defines the function begins."""
    pattern = dialect.define.format(name=re.escape(name))
    starts = [found.start() for found in re.finditer(pattern, text, re.MULTILINE)]
    return starts[-1] if starts else None
