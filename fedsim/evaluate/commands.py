"""What is started for a program, what it may use, and what it needs to see."""

from __future__ import annotations

import math
import os
import resource
import secrets
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedsim.evaluate import lastline
from fedsim.evaluate.jail import Step
from fedsim.tasks import Program

NAMES = {"python": ("python3",), "javascript": ("node", "nodejs"), "cpp": ("g++",)}
_SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store",
    "/etc/alternatives", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random",
    "/dev/urandom",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one program may use; its wall time, and its compiler's, is its own (`Program`)."""

    memory: int = 2 << 30  # bytes, of one process and of all together
    processes: int = 64  # threads included
    files: int = 128  # open at once, by one process
    size: int = 64 << 20  # bytes of one file; the folder holds four times as much
    output: int = 1 << 20  # bytes of stdout and stderr together


@cache
def tool(language: str) -> str | None:
    """Path of the interpreter or compiler, or None; links inside the system stay as they are."""
    if language == "python":
        return os.path.realpath(sys.executable)
    found = next(filter(None, map(shutil.which, NAMES[language])), None)
    return found if found is None or _in_system(found) else os.path.realpath(found)


def _in_system(path: str) -> bool:
    return any(path == s or path.startswith(f"{s}/") for s in _SYSTEM)


def _packages() -> list[str]:
    return sorted({os.path.realpath(sysconfig.get_path(k)) for k in ("purelib", "platlib")})


@cache
def visible() -> list[str]:
    """The system, and where interpreters and Python packages are installed."""
    places = {os.path.realpath(sys.base_prefix), *_packages()}
    for path in filter(None, map(tool, NAMES)):
        folder = Path(path).parent
        prefix = folder.parent if folder.name == "bin" else folder
        places.add(path if prefix == Path("/") else str(prefix))
    own = [p for p in sorted(places) if not _in_system(p)]
    return [p for p in (*_SYSTEM, *own) if os.path.exists(p)]


def files(program: Program) -> dict[str, bytes]:
    """What lies in the program's folder when it starts."""
    source = program.source.encode(errors="replace")
    if program.language == "python":
        return {"main.py": source, "run.py": lastline.PYTHON.encode()}
    if program.language == "javascript":
        return {"main.js": source, "run.js": lastline.JAVASCRIPT.encode()}
    return {"main.cpp": source, "run.cpp": lastline.CPP.encode()}


def steps(program: Program, box: str, limits: Limits) -> list[Step]:
    """The commands to run one after another, the program last."""
    path = tool(program.language) or ""
    env = {"PATH": f"{Path(path).parent}:/usr/bin:/bin", "HOME": box, "TMPDIR": box,
           "LANG": "C.UTF-8"}  # fmt: skip
    token = secrets.token_hex(16).encode()

    def step(argv: list[str], seconds: float, token: bytes = b"") -> Step:
        return Step(argv, env, seconds, _limits(argv[0], seconds, limits), token)

    if program.language == "python":
        # -S: no site module, 12 ms instead of 40; packages are appended to the path instead.
        argv = [path, "-I", "-S", "-B", "run.py", "main.py", *_packages()]
        return [step(argv, program.seconds, token)]
    if program.language == "javascript":
        # Half the memory, in MB, so that it stops by itself; its configuration is out of sight.
        options = [f"--max-old-space-size={limits.memory >> 21}", "--openssl-config=/dev/null"]
        return [step([path, *options, "run.js", f"{box}/main.js"], program.seconds, token)]
    build = [path, "-std=c++17", "-Wl,--wrap=main", "-o", "main", "main.cpp", "run.cpp"]
    return [step(build, program.build), step([f"{box}/main"], program.seconds, token)]


def _limits(command: str, seconds: float, limits: Limits) -> dict[int, int]:
    out = {
        resource.RLIMIT_CPU: 2 * math.ceil(seconds) + 1,  # the clock stops one thread earlier
        resource.RLIMIT_NOFILE: limits.files,
        resource.RLIMIT_FSIZE: limits.size,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: limits.processes,
    }
    if command != tool("javascript"):  # node reserves far more than it uses
        out[resource.RLIMIT_AS] = limits.memory
    return out
