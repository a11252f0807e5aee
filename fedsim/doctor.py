"""What is installed and what will run."""

from __future__ import annotations

import os

import torch

from fedsim import record, weights
from fedsim.config import Config
from fedsim.core import pick_device
from fedsim.evaluate import sandbox
from fedsim.pretrained import compute_dtype


def findings() -> list[tuple[str, str]]:
    """(what, what was found), for people."""
    device = pick_device("auto")
    around = record.surroundings(device)
    rows = [
        ("python", around["python"]),
        ("system", around["system"]),
        ("device", f"{around['device']} ({around['cpu_capability']}, {around['threads']} threads)"),
        ("threads that wait", _waiting()),
        ("bf16 in hardware", _yes(compute_dtype(Config(), device) == torch.bfloat16)),
    ]
    installed = around["versions"]
    for package in record.PACKAGES:
        rows.append((package, installed.get(package, "not installed")))
    for operation in record.OPERATIONS:
        rows.append((f"operation {operation}", record.implementation(device)))
    for alias in weights.ALIASES:
        rows.append((f"model {alias}", weights.locate(alias)))
    return [*rows, *sandbox.isolation()]


def _waiting() -> str:
    """Behaviour of OpenMP's threads between operations, as it was told when torch was loaded."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower()
    if policy == "passive":
        return "sleep (OMP_WAIT_POLICY=passive): a busy neighbour costs a share"
    told = f"OMP_WAIT_POLICY={policy}" if policy else "torch was loaded before fedsim"
    return f"spin ({told}): a busy neighbour costs a factor; set OMP_WAIT_POLICY=passive"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
