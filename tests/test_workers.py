"""Several processes give what one gives: bit for bit in strict mode, and a death loses no round.

Real processes, as a user starts them: `fedsim run --devices n`, and torchrun with two launchers, as
on two machines. Compared are every client's line and the exported adapters, with SCAFFOLD, whose
clients keep rows on disk, and with FLoRA at mixed ranks, which adds to the base. `slow` kills a
process ten times.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.torch import load_file

from fedsim.placement import placed

RULES: dict[str, dict[str, Any]] = {
    "scaffold": {},
    "flora": {"adapter__ranks": [2, 4]},
}
ENDED = 60  # seconds until everybody is gone, once one is


def configuration(tiny: Callable[[str], Path], folder: Path, rule: str, **changes: Any) -> Path:
    """A file to run: ten clients of different sizes, of which eight train."""
    values: dict[str, Any] = {
        "run": {"name": "run", "out": str(folder)},
        "model": {"name": str(tiny("llama")), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8.0, "targets": ["all-linear"]},
        "data": {"source": "embedded", "max_length": 256, "limit": 200},
        "clients": {"number": 10, "partition": "power"},
        "server": {"strategy": rule, "rounds": 3, "fraction": 0.8, "export_every": 1},
        "train": {"steps": 3, "batch": 3, "lr_max": 1e-2, "lr_min": 1e-3, "slots": 2,
                  "mode": "strict", "tile": 16, "chunk_tokens": 256},
        "evaluate": {"limit": 0},
    }  # fmt: skip
    for key, value in {**RULES[rule], **changes}.items():
        section, _, leaf = key.partition("__")
        values[section][leaf] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(tomli_w.dumps(values))
    return folder / "run.toml"


def start(command: list[str], **env: str) -> subprocess.Popen[str]:
    """One thread each, whatever their number: threads may change a product's last bit."""
    return subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **env},
    )  # fmt: skip


def run(file: Path, devices: int, *more: str) -> dict[str, Any]:
    """Run to the end, or on to it; what came out."""
    process = start(["fedsim", "run", str(file), "--devices", str(devices), *more])
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return outcome(file)


def outcome(file: Path) -> dict[str, Any]:
    """Every client's visits, and the exported numbers of every round, as bytes."""
    folder = file.parent / "run"
    found: dict[str, Any] = {"clients": (folder / "clients.jsonl").read_text()}
    for path in sorted(folder.glob("adapters/*/*.safetensors")):
        tensors = load_file(path)
        found[path.parent.name] = {k: v.numpy().tobytes() for k, v in sorted(tensors.items())}
    return found


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_the_longest_are_placed_first(processes: int) -> None:
    work = np.random.default_rng(processes).integers(1, 1000, 40).astype(float)
    owner = placed(work, processes)
    loads = np.array([work[owner == p].sum() for p in range(processes)])
    assert loads.sum() == work.sum() and set(owner) == set(range(processes))
    # Graham's bound for longest-first: 4/3 - 1/(3 n) of the best, which is no less than these.
    best = max(work.sum() / processes, work.max())
    assert loads.max() <= (4 / 3 - 1 / (3 * processes)) * best
    by_hand = placed(np.array([2.0, 7, 3, 5, 4]), 2)  # 7 | 5, 4 | 3, 2: 10 and 11
    assert by_hand.tolist() == [1, 0, 0, 1, 1]


@pytest.mark.parametrize(("rule", "counts"), [("scaffold", (2, 4)), ("flora", (2,))])
def test_the_same_bits_on_any_number_of_processes(
    tiny: Any, tmp_path: Path, rule: str, counts: tuple[int, ...]
) -> None:
    alone = run(configuration(tiny, tmp_path / "1", rule), 1)
    assert len(alone) == 1 + 3
    for n in counts:
        assert run(configuration(tiny, tmp_path / str(n), rule), n) == alone
        record = json.loads((tmp_path / str(n) / "run" / "environment.json").read_text())
        assert (record["processes"], record["threads"]) == (n, 1)


def test_torchrun_on_two_machines(tiny: Any, tmp_path: Path) -> None:
    alone = run(configuration(tiny, tmp_path / "1", "scaffold"), 1)
    file = configuration(tiny, tmp_path / "2", "scaffold")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = [
        start(["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank",
               str(node), "--master-addr", "127.0.0.1", "--master-port", str(port),
               "-m", "fedsim", "run", str(file)])
        for node in range(2)
    ]  # fmt: skip
    for launcher in launchers:
        _, error = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, error
    assert outcome(file) == alone


def members(launcher: int) -> dict[int, int]:
    """rank -> process id, of what a launcher has started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        env = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found.update({int(v[5:]): int(child) for v in env if v.startswith(b"RANK=")})
    return found


def killed(file: Path, devices: int, rank: int, after: float, *more: str) -> tuple[str, int]:
    """Kill a process some seconds behind the first new round: what the others said, and the rounds
    that were finished."""
    lines = file.parent / "run" / "rounds.jsonl"
    before = len(lines.read_text().splitlines()) if lines.exists() else 0
    process = start(["fedsim", "run", str(file), "--devices", str(devices), *more])
    began = time.monotonic()
    while not lines.exists() or len(lines.read_text().splitlines()) <= before:
        assert process.poll() is None and time.monotonic() - began < 120, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(after)
    os.kill(members(process.pid)[rank], signal.SIGKILL)
    _, error = process.communicate(timeout=ENDED)
    assert process.returncode == (1 if rank else 128 + signal.SIGKILL), error
    return error, len(lines.read_text().splitlines())


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_process_loses_no_round(tiny: Any, tmp_path: Path, kills: int) -> None:
    """Each time on another number of processes, another one is killed; the leader once."""
    rounds = {"server__rounds": 30 * kills, "server__export_every": 30 * kills}
    alone = run(configuration(tiny, tmp_path / "1", "scaffold", **rounds), 1)
    file, draw, done = (
        configuration(tiny, tmp_path / "2", "scaffold", **rounds),
        random.Random(3),
        0,
    )
    for kill in range(kills):
        devices = 2 + kill % 2
        rank = 0 if kill == 1 else draw.randrange(1, devices)
        more = ["--resume"] if kill else []
        error, finished = killed(file, devices, rank, draw.random(), *more)
        assert finished > done
        done = finished
        if rank:  # the leader says whose clients of which round are lost
            said = re.search(r"round (\d+): (a process was gone|process (\d+) is gone)", error)
            assert said and int(said[1]) == finished + 1 and said[3] in (None, str(rank)), error
        else:
            assert "the leading process is gone" in error
    assert run(file, 1, "--resume") == alone
