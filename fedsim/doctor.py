"""What is installed and what will run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from fedsim import domains, record, weights
from fedsim.config import Config, Data
from fedsim.core import pick_device
from fedsim.data import sources
from fedsim.domains import Domain, Task
from fedsim.errors import FedSimError
from fedsim.evaluate import sandbox
from fedsim.evaluate.suite import items
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


def hub() -> Iterator[tuple[str, str, bool]]:
    """(set, rows or the reason, whether it loads) of every set that a domain has on the hub."""
    for domain in map(domains.load, domains.known()):
        sets = [(dataset, None) for dataset in domain.train if dataset.hub]
        for dataset, task in [*sets, *((task.data, task) for task in domain.tasks.values())]:
            where = f"{dataset.hub}@{dataset.revision or 'main'}"
            try:
                n = _tried(domain, dataset, task)
                yield f"{domain.name} {dataset.name}", f"{n:,} rows of {where}", True
            except FedSimError as failure:
                yield f"{domain.name} {dataset.name}", str(failure), False
            except Exception as failure:  # a person asks for the list, not for the first fault
                what = f"{where}: {type(failure).__name__}: {failure}"
                yield f"{domain.name} {dataset.name}", what, False


def _tried(domain: Domain, dataset: domains.DataSet, task: Task | None) -> int:
    """The rows of a set that loads and is read under every protocol."""
    data = Data(source="hub")
    if task is None:
        rows = sources.load(data, domain, dataset, domain.columns, domain.optional)
        for pair in domain.pairs.values():
            for row in rows.rows:
                pair(row)
    else:
        rows = sources.load(data, domain, dataset, task.columns)
        for form in task.forms.values():
            items(form, rows.rows, rows.origin)
    return len(rows)


def _waiting() -> str:
    """Behaviour of OpenMP's threads between operations, as it was told when torch was loaded."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower()
    if policy == "passive":
        return "sleep (OMP_WAIT_POLICY=passive): a busy neighbour costs a share"
    told = f"OMP_WAIT_POLICY={policy}" if policy else "torch was loaded before fedsim"
    return f"spin ({told}): a busy neighbour costs a factor; set OMP_WAIT_POLICY=passive"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
