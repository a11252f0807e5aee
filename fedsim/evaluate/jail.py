"""Runs one program behind walls and reports how it ended: a process of its own, made by sandbox.py.

    supervisor   outside the namespaces; counts time, memory and processes; ends everything
    └ init       process 1 of the PID namespace; starts the steps one after another
      └ step     a compiler or the program, in a session of its own, without rights

Standard library only. An order comes in on stdin, the report goes out by a pipe; both are
marshalled, as importing json would cost as much as starting the interpreter.
"""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterable

from fedsim.evaluate import walls

_LOOK = 0.05  # seconds between two looks at memory and processes
_SETUP = 60.0  # seconds until the first step must have begun


class Step:
    """One command. `token`: what it must hand back to prove that it got to its end."""

    def __init__(
        self,
        argv: list[str],
        env: dict[str, str],
        seconds: float,
        limits: dict[int, int],
        token: bytes,
    ) -> None:
        self.argv = argv
        self.env = env
        self.seconds = seconds
        self.limits = limits
        self.token = token


class Order:
    """What to run, and within which walls."""

    def __init__(
        self, steps: list[Step], files: dict[str, bytes], visible: list[str], box: str, user: int,
        namespaces: bool, memory: int, processes: int, folder: int,
    ) -> None:  # fmt: skip
        self.steps = steps
        self.files = files
        self.visible = visible
        self.box = box
        self.user = user
        self.namespaces = namespaces
        self.memory = memory
        self.processes = processes
        self.folder = folder

    def packed(self) -> bytes:
        return marshal.dumps({**vars(self), "steps": [vars(s) for s in self.steps]})


class Report:
    """How the last step that began ended.

    Attributes:
        stopped: why the supervisor ended it ("timeout", "memory", "processes", "stopped"), or "".
        step: its index, -1 before the first.
        status: its wait status.
        proved: it handed its token back.
        error: what went wrong in setting up; nothing has run then.
    """

    def __init__(
        self,
        stopped: str = "",
        step: int = -1,
        status: int = -1,
        proved: bool = False,
        error: str = "",
    ) -> None:
        self.stopped = stopped
        self.step = step
        self.status = status
        self.proved = proved
        self.error = error


def main(report: int) -> None:
    """The supervisor: an order from stdin, a report to the descriptor `report`."""
    os.set_inheritable(report, False)
    values = marshal.load(sys.stdin.buffer)
    values["steps"] = [Step(**s) for s in values["steps"]]
    try:
        result = _supervise(Order(**values))
    except OSError as error:
        result = Report(error=str(error))
    os.write(report, marshal.dumps(vars(result)))


def _supervise(order: Order) -> Report:
    os.stat(f"/proc/self/task/{os.getpid()}/children")  # without it nobody could be watched
    if order.namespaces:
        walls.enter_namespaces(order.user)
    else:
        walls.adopt_orphans()
    news, low = os.pipe()
    tell = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 64)  # steps put other things at 3 and 4
    os.close(low)
    init = os.fork()
    if init == 0:
        code = 1
        try:
            _init(order, tell)
            code = 0
        except Exception as error:  # a fault here must never look like a failed program
            os.write(tell, f"error {error}\n".encode()[:2048])
        finally:
            os._exit(code)
    os.close(tell)
    try:
        return _watch(order, init, news)
    finally:
        _clear(init, order.namespaces)


def _watch(order: Order, init: int, news: int) -> Report:
    """Follow the steps until the last one ends or a limit is passed."""
    report = Report()
    deadline = time.monotonic() + _SETUP
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([0, news], [], [], min(max(left, 0), _LOOK))
        if news in ready:
            lines = os.read(news, 4096).decode(errors="replace").splitlines()
            if not lines:  # the init has ended, and everything else with it
                return report
            for line in lines:
                what, _, rest = line.partition(" ")
                if what == "error":
                    report.error = rest
                elif what == "began":
                    report.step, report.status, report.proved = int(rest), -1, False
                    deadline = time.monotonic() + order.steps[report.step].seconds
                else:
                    status, proved = rest.split()
                    report.status, report.proved = int(status), bool(int(proved))
            continue
        below = {*_descendants(os.getpid())} - {init}  # orphans may be the init's, or this one's
        if 0 in ready:  # nobody waits for the report any more
            report.stopped = "stopped"
        elif left <= 0:
            report.stopped = "timeout"
        elif len(below) > order.processes:
            report.stopped = "processes"
        elif sum(map(_resident, below)) > order.memory:
            report.stopped = "memory"
        if report.stopped:
            return report


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children", encoding="ascii") as file:
                    found += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found[1:]


def _resident(pid: int) -> int:
    """Bytes of memory in use; shared pages count for each process."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _clear(init: int, namespaces: bool) -> None:
    """End every process below this one and wait until the last is gone."""
    if namespaces:  # the kernel ends a PID namespace with its process 1
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
        return
    # Stopped first and reaped last: what is stopped or dead still counts against the limit of
    # processes, so that whatever forks on, however fast, runs out of room.
    held: set[int] = set()
    while fresh := {*_descendants(os.getpid())} - held:
        _send(fresh, signal.SIGSTOP)
        held |= fresh
    with contextlib.suppress(ChildProcessError):
        while True:
            _send(_descendants(os.getpid()), signal.SIGKILL)
            os.waitpid(-1, 0)


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _init(order: Order, tell: int) -> None:
    """Build the walls, run the steps, and reap what they leave behind."""
    walls.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if order.namespaces:
        walls.own_root(order.visible, order.box, order.folder)
    os.chdir(order.box)
    for name, text in order.files.items():
        with open(name, "wb") as file:
            file.write(text)
    for index, step in enumerate(order.steps):
        token, give = os.pipe()
        take, proof = os.pipe()
        os.write(give, step.token)
        os.close(give)
        child = os.fork()
        if child == 0:
            try:
                _step(order, step, token, proof)
            except Exception as error:
                os.write(tell, f"error {step.argv[0]}: {error}\n".encode()[:2048])
            finally:
                os._exit(1)
        os.close(token)
        os.close(proof)
        os.write(tell, f"began {index}\n".encode())
        done = status = 0
        while done != child:
            done, status = os.waitpid(-1, 0)
        os.set_blocking(take, False)
        proved = select.select([take], [], [], 0)[0] and os.read(take, 4096) == step.token
        os.close(take)
        os.write(tell, f"ended {status} {int(bool(proved))}\n".encode())
        if status:
            return


def _step(order: Order, step: Step, token: int, proof: int) -> None:
    """Become the command: descriptors 3 and 4 are its token and where to hand it back."""
    os.setsid()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in (token, proof)]
    for fd, number in zip((os.open("/dev/null", os.O_RDONLY), *high), (0, 3, 4), strict=True):
        os.dup2(fd, number)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(order.user, order.user, order.user)
        os.setresuid(order.user, order.user, order.user)
    there = 0 if order.namespaces else _threads()
    for limit, most in step.limits.items():
        _, ceiling = resource.getrlimit(limit)
        most += there if limit == resource.RLIMIT_NPROC else 0
        most = most if ceiling == resource.RLIM_INFINITY else min(most, ceiling)
        # One second between SIGXCPU, which tells a timeout apart, and SIGKILL.
        resource.setrlimit(limit, (most, most + (limit == resource.RLIMIT_CPU)))
    walls.die_with_parent()
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores the last two
        signal.signal(number, signal.SIG_DFL)
    if not order.namespaces:
        walls.restrict_files(order.visible, order.box)
    own = None if order.namespaces else os.getpid()
    # A linker marks what it writes as executable.
    walls.filter_calls(own, metadata=order.namespaces or not step.token)
    os.execve(step.argv[0], step.argv, step.env)


def _threads() -> int:
    """Threads of this user, as the kernel counts them: the limit at which forking fails, by halves.

    /proc shows less: a container's user may share its number, and this count, with others.
    """
    _, ceiling = resource.getrlimit(resource.RLIMIT_NPROC)
    low, high = 0, 1 << 16 if ceiling == resource.RLIM_INFINITY else min(ceiling, 1 << 16)
    while high - low > 8:
        limit = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, ceiling))
        try:
            child = os.fork()
        except BlockingIOError:
            low = limit
            continue
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        high = limit
    return high
