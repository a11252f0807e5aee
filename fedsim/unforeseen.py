"""A failure that nobody foresaw, as one paragraph: the cause, a remedy, where its traceback is."""

from __future__ import annotations

import errno
import os
import tempfile
import traceback

from fedsim.data.tokens import cache_root
from fedsim.errors import FedSimError, RunError

# errno -> what helps against it.
_FILES = {
    errno.ENOSPC: "The disk is full: make room, or move run.out or FEDSIM_CACHE to another one.",
    errno.EDQUOT: "The disk quota is used up: make room, or move run.out or FEDSIM_CACHE.",
    errno.EROFS: "The disk is read-only: set run.out, --out or FEDSIM_CACHE to another place.",
    errno.EACCES: "Set run.out, --out or FEDSIM_CACHE to a place that you may read and write.",
    errno.EPERM: "Set run.out, --out or FEDSIM_CACHE to a place that you may read and write.",
    errno.ENOENT: "If the path is one that you gave, correct it.",
    errno.ENOTDIR: "A file stands where a folder is needed: move it, or choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n.",
}


def told(failure: Exception) -> FedSimError:
    """One paragraph for a foreign exception; where its cause is not known, its traceback is kept
    in a file. FEDSIM_TRACEBACK=1 raises it instead."""
    if os.environ.get("FEDSIM_TRACEBACK"):
        raise failure
    first = (str(failure).strip().splitlines() or ["no message"])[0][:300]
    what = f"{type(failure).__name__}: {first}"
    if isinstance(failure, OSError) and str(failure.filename or "").startswith(str(cache_root())):
        return RunError(
            f"the cache {cache_root()} cannot be used ({failure.strerror or first})",
            remedy="Set FEDSIM_CACHE to a folder that you may write, with room for models.",
        )
    if isinstance(failure, OSError) and failure.errno in _FILES:
        return RunError(what, remedy=_FILES[failure.errno])
    if isinstance(failure, MemoryError) or "out of memory" in first.lower():
        return RunError(
            what,
            remedy="Memory is short: lower train.slots, train.budget_tokens or "
            "evaluate.limit, or set model.quantisation.",
        )
    kept = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="fedsim-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write("".join(traceback.format_exception(failure)))
            kept = f" The traceback is in {file.name}."
    except OSError:
        pass
    return RunError(
        f"unforeseen: {what}",
        remedy=f"This is a fault of fedsim or of a library under it; please report it.{kept}",
    )
