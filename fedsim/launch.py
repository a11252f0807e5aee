"""The processes of one simulation: who they are, how they meet, how one machine starts them.

`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT` say it, as torchrun sets them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from fedsim.core import pick_device
from fedsim.errors import ConfigError

LONGEST = timedelta(days=1)  # that one waits for another; one that dies breaks its connection
_NOTICE, _END = 20, 300  # tenths of a second that a leader may take to say who is gone, and to end


def rank() -> int:
    """Of this process: 0 leads."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes simulate together, as torchrun or `launch` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def meet(word: bool = False) -> bool:
    """Join the other processes; returns the leader's word."""
    if size() > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=LONGEST)
        words = [word]
        dist.broadcast_object_list(words, src=0)
        word = words[0]
    return word


def take_device(name: str) -> None:
    """Let `cuda` mean the GPU of this process's number on its machine.

    Args:
        name: `run.device`.

    Raises:
        ConfigError: there are fewer GPUs than processes, or all would be on one.
    """
    device, local = pick_device(name), int(os.environ.get("LOCAL_RANK", "0"))
    if size() == 1 or device.type != "cuda":
        return
    if device.index is not None or local >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device, with process {local} of this machine", got=name,
            expected=f"cuda, and at most {torch.cuda.device_count()} processes, one for each GPU",
            remedy="Set run.device to cuda or cpu, or lower --devices.",
        )  # fmt: skip
    torch.cuda.set_device(local)


def spread(devices: int | None) -> int | None:
    """Start the processes that share a run out; their exit status, or None where this is one.

    Raises:
        ConfigError: torchrun has started another number.
    """
    if devices and size() not in (1, devices):
        raise ConfigError(
            "--devices", got=devices, expected=f"{size()}, as torchrun has started",
            remedy="Leave it out.",
        )  # fmt: skip
    return launch(devices, sys.argv[1:]) if devices and devices > size() else None


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
    processes = [subprocess.Popen(command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
                 for r in range(count)]  # fmt: skip
    leader, *followers = processes
    signal.signal(signal.SIGTERM, lambda *_: leader.terminate())
    lost = 0  # tenths of a second since a follower has ended badly
    while leader.poll() is None:
        try:
            bad = [r for r, p in enumerate(processes) if p.poll()]
            if bad and not lost:
                print(f"process {bad[0]} ended: {processes[bad[0]].returncode}", file=sys.stderr)
            lost += bool(bad)
            if lost == _NOTICE:
                leader.terminate()
            elif lost == _END:
                leader.kill()
            time.sleep(0.1)
        except KeyboardInterrupt:  # the leader was interrupted as well, and says so
            continue
    until = time.monotonic() + _END / 10
    for follower in followers:
        if leader.returncode:
            follower.terminate()
        try:
            follower.wait(timeout=max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            follower.kill()
    code = leader.returncode
    return code if code >= 0 else 128 - code  # as a shell reports a signal
