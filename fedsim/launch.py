"""The processes of one simulation: who they are, how they meet, how one machine starts them.

`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT` say it, as torchrun sets them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

_FOREVER = timedelta(days=30)  # a process that has died is noticed at once, by its connection


def rank() -> int:
    """Of this process: 0 leads."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes simulate together, as torchrun or `launch` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meet the other processes; each takes the GPU of its number on its machine."""
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("gloo", timeout=_FOREVER)


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `fedsim` with these arguments in so many processes; the leader's exit status.

    They share the cores of the machine, unless OMP_NUM_THREADS says how many each has.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // count)), **os.environ, "PYTHONSAFEPATH": "1",
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    command = [sys.executable, "-m", "fedsim", *arguments]
    leader, *followers = [
        subprocess.Popen(command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(count)
    ]
    lost = 0  # tenths of a second since a follower has died; the leader may notice by itself
    while leader.poll() is None:
        try:
            lost += any(f.poll() for f in followers)
            if lost == 20:
                leader.terminate()
            time.sleep(0.1)
        except KeyboardInterrupt:  # the leader was interrupted as well, and says so
            continue
    for follower in followers:
        try:
            follower.wait(timeout=10)
        except subprocess.TimeoutExpired:
            follower.kill()
    code = leader.returncode
    return code if code >= 0 else 128 - code  # as a shell reports a signal
