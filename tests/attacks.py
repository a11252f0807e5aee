"""Programs that try to pass without doing the work, to do harm, or to stay behind.

Each ends with success only where the attack itself succeeded. `{canary}` is a file that anybody may
write, `{port}` a listening one on this machine, `{name}` an abstract socket, `{pid}` the process
that grades, `{secret}` a text in its environment; `filled` puts them in.
"""

from __future__ import annotations

# name -> (source, how it may end), with 256 MB, 16 processes and files of 1 MB.
PYTHON: dict[str, tuple[str, set[str]]] = {
    # Ending before the last line.
    "exit": ("import sys; sys.exit(0)", {"early"}),
    "system exit": ("raise SystemExit", {"early"}),
    "hard exit": ("import os; os._exit(0)", {"early"}),
    "another program": ("import os; os.execv('/bin/true', ['true'])", {"early"}),
    "child runs on": ("import os\nif os.fork(): os._exit(0)", {"early"}),
    "guessed token": (
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'0' * 32)\n except OSError: pass",
        {"early"},
    ),
    "closed descriptors": ("import os; os.closerange(0, 256)", {"early", "failed"}),
    "exit code": ("import sys; sys.exit(3)", {"failed"}),
    "late exit code": (
        "import atexit, os; atexit.register(os._exit, 3)", {"failed"}
    ),
    "killed": ("import os; os.kill(os.getpid(), 9)", {"killed"}),
    "crash": ("import ctypes; ctypes.string_at(0)", {"killed"}),
    # Never ending.
    "loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time; time.sleep(1000)", {"timeout"}),
    "deaf loop": (
        "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\n"
        "while True: pass",
        {"timeout"},
    ),
    "thread": ("import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()",
               {"timeout"}),
    "question": ("input()", {"failed"}),
    # Taking too much.
    "memory": ("x = []\nwhile True: x.append(b'1' * (1 << 24))", {"memory"}),
    "memory at once": ("x = bytearray(1 << 40)", {"memory"}),
    "memory of many": (
        "import os, time\nfor _ in range(2): os.fork()\nx = b'1' * (100 << 20)\ntime.sleep(9)",
        {"memory"},
    ),
    "memory of orphans": (
        "import os, time\nfor _ in range(3):\n if os.fork() == 0:\n  os.setsid()\n"
        "  if os.fork(): os._exit(0)\n  x = b'1' * (100 << 20)\n  break\ntime.sleep(9)",
        {"memory"},
    ),
    "output": ("while True: print('x' * 1000)", {"output"}),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    "fork bomb": ("import os\nwhile True: os.fork()", {"failed", "processes"}),
    "chain of forks": (
        "import os, sys\nwhile True:\n if os.fork(): os._exit(0)", {"early", "timeout"}
    ),
    "chain behind": (
        "import os, time\nif os.fork(): time.sleep(99)\nwhile True:\n if os.fork(): os._exit(0)",
        {"timeout", "processes"},
    ),
    "patient fork bomb": (
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass", {"processes", "timeout"}
    ),
    "large file": ("open('x', 'wb').write(bytes(2 << 20))", {"failed"}),
    "open files": ("import os\nfds = [os.open('/dev/null', 0) for _ in range(1000)]", {"failed"}),
    "higher limits": (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (9999, 9999))", {"failed"}
    ),
    "huge recursion": ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", {"timeout",
                       "memory", "failed"}),
    # Other processes.
    "kill the parent": (
        "import os, time; os.kill(os.getppid(), 9); time.sleep(0.1); assert os.getppid() == 0",
        {"failed"},
    ),
    "interrupt the parent": (
        "import os, time; os.kill(os.getppid(), 2); time.sleep(0.1); assert os.getppid() == 0",
        {"failed"},
    ),
    "kill the group": ("import os; os.kill(0, 9)", {"killed", "failed"}),
    # Signal 0 first: where even that is let through, nobody is hurt by this test.
    "kill everybody": (
        "import os\ntry: os.kill(-1, 0)\nexcept OSError: os.kill(-1, 9)", {"failed"}
    ),
    "kill the grader": ("import os\nos.kill({pid}, 0)", {"failed"}),
    "starve the grader": ("import resource as r; r.prlimit({pid}, r.RLIMIT_CPU)", {"failed"}),
    "kill by a pipe": (
        "import fcntl, os, time\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\n"
        "fcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')\n"
        "time.sleep(0.1)\nassert os.getppid() == 0",
        {"failed"},
    ),
    "trace the parent": (
        "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
        {"failed"},
    ),
    "stay behind": (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n"
        "  os.closerange(0, 3); time.sleep(1000)\nraise SystemExit(1)",
        {"failed"},
    ),
    # Files.
    "write outside": ("open('{canary}', 'w').write('x')", {"failed"}),
    "append outside": ("open('{canary}', 'a').write('x')", {"failed"}),
    "truncate outside": ("import os; os.truncate('{canary}', 0)", {"failed"}),
    "delete outside": ("import os; os.unlink('{canary}')", {"failed"}),
    "move outside": ("import os; os.rename('{canary}', 'x')", {"failed"}),
    "create outside": ("open('{canary}.new', 'w').write('x')", {"failed"}),
    "change mode outside": ("import os; os.chmod('{canary}', 0)", {"failed"}),
    "change times outside": ("import os; os.utime('{canary}', (0, 0))", {"failed"}),
    "through a link": (
        "import os; os.symlink('{canary}', 'x'); open('x', 'w').write('x')", {"failed"}
    ),
    "read outside": ("open('{canary}').read()", {"failed"}),
    "shared memory": ("open('/dev/shm/fedsim', 'w')", {"failed"}),
    "own folder": ("import os, shutil; shutil.rmtree(os.getcwd())", {"failed"}),
    "system files": ("open('/usr/bin/fedsim', 'w')", {"failed"}),
    "environment": ("import os; assert '{secret}' in str(os.environ)", {"failed"}),
    "environment of the grader": (
        "assert '{secret}' in open('/proc/{pid}/environ').read()", {"failed"}
    ),
    "environment of the parent": (
        "import os; open(f'/proc/{os.getppid()}/environ').read()", {"failed"}
    ),
    # Network and rights.
    "connect": ("import socket; socket.create_connection(('127.0.0.1', {port}))", {"failed"}),
    "datagram": (
        "import socket as s; s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
        {"failed"},
    ),
    "abstract socket": ("import socket as s; s.socket(s.AF_UNIX).connect('\\0{name}')", {"failed"}),
    "become root": ("import os; os.setuid(0); os.chroot('/')", {"failed"}),
    "own namespace": (
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", {"failed"}
    ),
}  # fmt: skip

JAVASCRIPT: dict[str, tuple[str, set[str]]] = {
    "exit": ("process.exit(0)", {"early"}),
    "exit code": ("process.exitCode = 3", {"failed"}),
    "rejection": ("Promise.reject(new Error('late'))", {"failed"}),
    "loop": ("while (true) {}", {"timeout"}),
    "timer": ("setInterval(() => {}, 10)", {"timeout"}),
    "memory": ("let a = []; while (true) a.push(new Array(1000).fill(a.length))", {"memory"}),
    "buffers": ("let a = []; while (true) a.push(Buffer.alloc(1 << 24, 1))", {"memory"}),
    "output": ("while (true) require('fs').writeSync(1, 'x'.repeat(1000))", {"output"}),
    "kill the parent": (
        "process.kill(process.ppid, 'SIGKILL');"
        "setTimeout(() => { if (process.ppid) throw new Error('alive') }, 100)",
        {"failed"},
    ),
    "write outside": ("require('fs').writeFileSync('{canary}', 'x')", {"failed"}),
    "read outside": ("require('fs').readFileSync('{canary}')", {"failed"}),
    "connect": ("require('net').connect({port}, '127.0.0.1')", {"failed"}),
    "stay behind": (
        "require('child_process').spawn('sleep', ['1000'], {detached: true}).unref();"
        "process.exit(1)",
        {"failed"},
    ),
}

CPP: dict[str, tuple[str, set[str]]] = {
    "exit": ("#include <cstdlib>\nint main() { exit(0); }", {"early"}),
    "hard exit": ("#include <unistd.h>\nint main() { _exit(0); }", {"early"}),
    "quick exit": ("#include <cstdlib>\nint main() { std::quick_exit(0); }", {"early"}),
    "exit before main": (
        "#include <unistd.h>\nstruct S { S() { _exit(0); } } s;\nint main() {}", {"early"}
    ),
    "own ending": ('extern "C" int __wrap_main(int, char**, char**) { return 0; }\nint main() {}',
                   {"compile"}),
    "assertion": ("#include <cassert>\nint main() { assert(1 == 2); }", {"failed"}),
    "crash": ("int main() { *(volatile int*)0 = 1; }", {"killed"}),
    "loop": ("int main() { for (volatile int i = 0;; i++); }", {"timeout"}),
    "memory": ("#include <vector>\nint main() { std::vector<char> v(1L << 40, 1); }", {"memory"}),
    "syntax": ("int main( {", {"compile"}),
    "endless source": ('#include "/dev/zero"\nint main() {}', {"compile"}),
    "endless templates": (
        "template<int N> struct S : S<N + 1> {};\nS<0> s;\nint main() {}", {"compile"}
    ),
    "reads a source": ('#include "{canary}"\nint main() {}', {"compile"}),
    "chain of forks": (
        "#include <unistd.h>\nint main() { for (;;) if (fork()) _exit(0); }", {"early", "timeout"}
    ),
    "write outside": (
        '#include <cstdio>\nint main() { return !std::fopen("{canary}", "w"); }', {"failed"}
    ),
}  # fmt: skip


def filled(source: str, **places: object) -> str:
    """The source with its places filled; other braces stay, as they belong to the language."""
    for name, value in places.items():
        source = source.replace(f"{{{name}}}", str(value))
    return source
