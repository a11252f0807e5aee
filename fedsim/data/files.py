"""JSON lines as people have them: plain or gzip-compressed, with blank lines, a BOM or CRLF."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from fedsim.errors import DataError

ENDINGS = (".jsonl.gz", ".jsonl")


def find(folder: Path, name: str) -> Path:
    """The one file <name>.jsonl or <name>.jsonl.gz. Raises DataError for none, and for both."""
    found = [path for ending in ENDINGS if (path := folder / f"{name}{ending}").is_file()]
    if len(found) > 1:
        raise DataError(
            f"data file {name}", got=[path.name for path in found], expected="one of them",
            remedy=f"Remove the other from {folder}.",
        )  # fmt: skip
    if not found:
        there = [p.name for ending in ENDINGS for p in folder.glob(f"*{ending}")]
        raise DataError(
            "data file", got=str(folder / f"{name}{ENDINGS[0]}"),
            expected=f"an existing file, that or {name}{ENDINGS[1]}",
            remedy=f"In {folder}: {', '.join(sorted(there)) or 'nothing'}.",
        )  # fmt: skip
    return found[0]


def read(path: Path) -> list[dict[str, Any]]:
    """One row a line; blank lines are none. Raises DataError that names the line."""
    rows, number = [], 0
    try:
        for line in _lines(path):
            number += 1
            if line.strip():
                rows.append(_row(line))
    except (EOFError, OSError, zlib.error) as failure:
        raise DataError(
            f"{path} cannot be read to its end: {failure}", expected="a whole file of JSON lines",
            remedy="Copy the file again.",
        ) from None  # fmt: skip
    except UnicodeDecodeError as failure:
        raise DataError(
            f"{path}, after line {number}: {failure}", expected="UTF-8",
            remedy="Store the file as UTF-8.",
        ) from None  # fmt: skip
    except (ValueError, RecursionError) as failure:
        raise DataError(
            f"{path}, line {number}: {failure}", expected="one JSON object on each line",
            remedy="Mend or remove the line.",
        ) from None  # fmt: skip
    return rows


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file; utf-8-sig leaves out a byte order mark."""
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as stream:
        yield from cast(IO[str], stream)


def _row(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, not {line.strip()[:40]!r}")
    return row
