"""The only place where generated code runs: each program in a jail of its own, in parallel.

A jail has no network, sees nothing but the system's programs and the interpreters, writes to one
folder that goes away with it, reaches no other process, and is limited in time, memory, processes,
open files, file size and output. It is built in one of two ways, the first that the machine
allows: namespaces, or Landlock with a filter of system calls. Where neither works nothing is run.

Not covered, and printed by `isolation()`: faults of the kernel, the interpreters and the compiler;
reading what lies in the system's folders and among the installed packages; load on the machine;
and a program written to deceive this check: it shares a process with the lines that watch over it
(`lastline.py`), and could as well hand the tests an object that is equal to everything.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import platform
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Literal

from fedsim.errors import RunError
from fedsim.evaluate import commands
from fedsim.evaluate.commands import Limits
from fedsim.evaluate.jail import Order, Report
from fedsim.tasks import Program

Walls = Literal["namespaces", "Landlock"]
End = Literal[
    "passed", "failed", "early", "compile", "timeout", "memory", "processes", "output", "killed"
]

LIMITS = Limits()
_WATCHED: tuple[End, ...] = ("timeout", "memory", "processes")
_USERS = range(61184, 65520)  # those that systemd sets aside for passing services
_SLACK = 120.0  # seconds beyond all limits after which the jail itself must hang
_TRIVIAL = {
    "python": Program("python", "", 20.0),
    "javascript": Program("javascript", "", 20.0),
    "cpp": Program("cpp", "int main() {}", 20.0),
}
_ERROR = re.compile(r"[\w.]*Error\b")  # node goes on after it
_OUT_OF_MEMORY = ("MemoryError", "std::bad_alloc", "heap out of memory")
# The packages around it stay as they are, unimported: fedsim.evaluate loads torch.
_BOOT = """\
import sys
for name, path in zip(("fedsim", "fedsim.evaluate"), sys.argv[2:]):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [path]
from fedsim.evaluate import jail
jail.main(int(sys.argv[1]))
"""


@dataclass(frozen=True)
class Verdict:
    """How a program ended.

    Attributes:
        end: "passed": by itself, with exit code 0, after its last line. "early": with exit code 0,
            before it. "failed": by an exception, an assertion or an exit code. "killed": by a
            signal. "compile": it does not compile. Else the limit that it passed.
        detail: the last line of stderr that names an error, else the last one (of a compiler: the
            first error), cut at 200 characters.
    """

    end: End
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.end == "passed"


def grade(
    programs: Sequence[Program], *, workers: int | None = None, limits: Limits = LIMITS
) -> list[Verdict]:
    """One verdict a program, in order; `workers` run at once, by default one a core.

    Raises RunError before anything runs if no jail can be built or an interpreter is missing.
    """
    if not programs:
        return []
    for language in sorted({p.language for p in programs}):
        _ready(language)
    run = partial(_verdict, limits=limits, walls=_walls())
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(run, programs))


def isolation() -> list[tuple[str, str]]:
    """(what, how it is contained) on this machine, gaps included, for people."""
    try:
        walls = _walls()
    except RunError as error:
        return [("generated code", f"is not run: {error}")]
    gaps = "faults of kernel and interpreters, reading system and packages, load on the machine"
    if walls == "namespaces":
        rows = [
            ("processes", "a PID namespace, which ends as a whole"),
            ("network", "a network namespace without a device; no sockets"),
            ("files", "sees system and packages only; writes one folder in memory"),
        ]
    else:
        gaps += ", total size of the folder"
        gaps += ", room to fork beside a neighbour's fork bomb" if os.geteuid() else ""
        rows = [
            ("processes", "signals to others are refused; descendants are hunted down at the end"),
            ("network", "sockets are refused"),
            ("files", "sees system and packages only; writes one temporary folder"),
        ]
    user = "a passing one, without rights" if os.geteuid() == 0 else "the caller, without rights"
    found = [(language, commands.tool(language) or "not installed") for language in _TRIVIAL]
    return [("generated code", f"runs behind {walls}"), *rows, ("user", user), *found,
            ("not covered", gaps)]  # fmt: skip


@cache
def _walls() -> Walls:
    """The first way that works here, found by running an empty program."""
    if platform.system() != "Linux":
        raise RunError("Generated code cannot be contained", got=platform.system(),
                       expected="Linux", remedy="Run these tasks in a container.")  # fmt: skip
    reasons = []
    kinds: tuple[Walls, ...] = ("namespaces", "Landlock")
    for walls in kinds:
        try:
            verdict = _verdict(_TRIVIAL["python"], LIMITS, walls)
            if verdict.passed:
                return walls
            reasons.append(f"{walls}: {verdict.end} {verdict.detail}")
        except RunError as error:
            reasons.append(f"{walls}: {error}")
    raise RunError(
        "Generated code cannot be contained", got=" | ".join(reasons),
        expected="user namespaces, or Landlock version 3 (Linux 6.2)",
        remedy="Allow unprivileged user namespaces or use a newer kernel; if this is root, put "
        "the interpreter where everybody can read it.",
    )  # fmt: skip


@cache
def _ready(language: str) -> None:
    name = commands.NAMES[language][0]
    if commands.tool(language) is None:
        raise RunError(f"Programs in {language} cannot be run", got=os.environ.get("PATH"),
                       expected=f"{name} on the PATH",
                       remedy=f"Install {name}, or leave these tasks out.")  # fmt: skip
    verdict = _verdict(_TRIVIAL[language], LIMITS, _walls())
    if not verdict.passed:
        raise RunError(f"An empty program in {language} does not pass",
                       got=f"{verdict.end} {verdict.detail}", expected="passed",
                       remedy=f"Check {commands.tool(language)}.")  # fmt: skip


def _verdict(program: Program, limits: Limits, walls: Walls) -> Verdict:
    """Run one program. Raises RunError if the jail fails, never for what the program does."""
    if walls == "namespaces":
        return _within("/box", program, limits, walls)
    box = tempfile.mkdtemp(prefix="fedsim-")
    try:
        if os.geteuid() == 0:
            os.chown(box, _user(), _user())
        return _within(os.path.realpath(box), program, limits, walls)
    finally:  # not in Python: folders may be closed, or nested beyond its recursion limit
        subprocess.run(["chmod", "-R", "u+rwx", box], check=True)
        subprocess.run(["rm", "-rf", box], check=True)


def _user() -> int:
    """Who this thread's programs are, where the caller is root.

    The kernel counts processes by user: as one and the same, a neighbour's fork bomb would take
    away another program's room to fork.
    """
    return _USERS[threading.get_native_id() % len(_USERS)]


def _within(box: str, program: Program, limits: Limits, walls: Walls) -> Verdict:
    namespaces = walls == "namespaces"
    order = Order(
        steps=commands.steps(program, box, limits), files=commands.files(program),
        visible=commands.visible(), box=box, user=_user(), namespaces=namespaces,
        memory=limits.memory, processes=limits.processes, folder=4 * limits.size,
    )  # fmt: skip
    report, stderr, overflow = _run(order, limits.output)
    if report.error or report.step < 0:
        raise RunError("The sandbox cannot be set up", got=report.error or report.stopped,
                       remedy="`fedsim doctor` says what this machine allows.")  # fmt: skip
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or [""]
    if report.step < len(order.steps) - 1:
        errors = [line for line in lines if "error" in line or "undefined reference" in line]
        return Verdict("compile", [*errors, report.stopped or lines[-1]][0][:200])
    end: End = "output" if overflow else _end(report, stderr)
    errors = [line for line in lines if _ERROR.match(line)]
    return Verdict(end, [lines[-1], *errors][-1][:200])


def _end(report: Report, stderr: str) -> End:
    for limit in _WATCHED:
        if report.stopped == limit:
            return limit
    code = os.waitstatus_to_exitcode(report.status) if report.status >= 0 else -signal.SIGKILL
    if code == 0:
        return "passed" if report.proved else "early"
    if any(text in stderr[-4000:] for text in _OUT_OF_MEMORY):
        return "memory"
    if code == -signal.SIGXCPU:
        return "timeout"
    if code == -signal.SIGXFSZ:
        return "output"
    return "failed" if code > 0 or code == -signal.SIGABRT else "killed"  # C++ asserts abort


def _run(order: Order, most: int) -> tuple[Report, str, bool]:
    """Start a jail and wait until it is gone: its report, stderr, and whether output overflowed."""
    taken, given = os.pipe()
    folder = Path(__file__).parent
    argv = [os.path.realpath(sys.executable), "-I", "-S", "-c", _BOOT, str(given),
            str(folder.parent), str(folder)]  # fmt: skip
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            bufsize=0, pass_fds=(given,), start_new_session=True, env={}, cwd="/",
        )  # fmt: skip
    finally:
        os.close(given)
    with os.fdopen(taken, "rb", buffering=0) as report, process:
        with contextlib.suppress(BrokenPipeError):  # it says why on stderr
            process.stdin.write(order.packed())  # type: ignore[union-attr]
        got, overflow = _collect(process, report, order, most)
    if not got["report"]:
        raise RunError("The sandbox ended without a report", got=got["stderr"][-500:],
                       remedy="`fedsim doctor` says what this machine allows.")  # fmt: skip
    return Report(**marshal.loads(got["report"])), got["stderr"].decode(errors="replace"), overflow


def _collect(
    process: subprocess.Popen[bytes], report: IO[bytes], order: Order, most: int
) -> tuple[dict[str, bytes], bool]:
    """Read until nobody writes any more; past `most` bytes the jail is told to stop."""
    got = {"report": b"", "stdout": b"", "stderr": b""}
    size = 0
    deadline = time.monotonic() + sum(s.seconds for s in order.steps) + _SLACK
    with selectors.DefaultSelector() as selector:
        for name, source in zip(got, (report, process.stdout, process.stderr), strict=True):
            selector.register(source, selectors.EVENT_READ, name)  # type: ignore[arg-type]
        while selector.get_map():
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.data == "report" or size <= most:
                    got[key.data] += chunk
                size += len(chunk) * (key.data != "report")
            if size > most:
                process.stdin.close()  # type: ignore[union-attr]
            if time.monotonic() > deadline:
                process.kill()
                raise RunError("The sandbox hangs", got=order.steps[-1].argv[0],
                               remedy="End the processes of this user that are left.")  # fmt: skip
    return got, size > most
