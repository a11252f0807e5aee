"""Verdicts of the load check, kept by what they depend on.

A verdict holds for weights, by digest, for versions of packages, for these sources, and for how and
where the base is computed. It lies in the cache, one small file each; what cannot be written there
is checked again the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fedsim
import fedsim_kernels
from fedsim import record
from fedsim.checkpoint import write_atomic
from fedsim.config import Config
from fedsim.data.tokens import cache_root
from fedsim.errors import RunError
from fedsim.weights import Weights

LEAST = 50_000_000  # weights of a base; a smaller one is as quickly checked as its files are read


def place(
    weights: Weights, config: Config, targets: tuple[str, ...], device: torch.device,
    **more: Any,
) -> Path | None:  # fmt: skip
    """The file of a base's verdict, or None where none is kept."""
    if weights.numbers < LEAST:
        return None
    where = torch.backends.cpu.get_cpu_capability(), torch.cpu._is_amx_tile_supported()
    parts = [
        weights.digest(), weights.values and _stat(weights.values), record.versions(), _sources(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else where,
        record.implementation(device), os.environ.get("FEDSIM_NATIVE"),
        config.model.quantisation, config.model.double_quantisation, config.adapter.dora,
        sorted(targets), sorted(more.items()),
    ]  # fmt: skip
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    return cache_root() / "checks" / f"{name}.json"


def known(file: Path | None) -> bool:
    """Test whether the base was accepted before."""
    return file is not None and file.is_file()


def keep(file: Path | None, largest: Mapping[str, float]) -> None:
    """Note that the base is accepted, with its largest differences as fractions of their limits."""
    if file is not None:
        with suppress(RunError, OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(largest, indent=1).encode())


def _stat(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file), stat.st_size, stat.st_mtime_ns


@cache
def _sources() -> str:
    """Digest of this package and its kernels."""
    h = hashlib.sha256()
    for package in (fedsim, fedsim_kernels):
        for folder in map(Path, package.__path__):
            for file in sorted(folder.rglob("*")):
                if file.suffix in (".py", ".so"):
                    h.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return h.hexdigest()
