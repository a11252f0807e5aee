"""The sandbox: right programs pass, wrong ones do not, and none does harm or stays behind.

Proves, behind both kinds of walls: every program of `tests/attacks.py` ends as it should within
seconds, and afterwards there is no process, no folder, no connection, no changed file. The same as
an ordinary user, where the suite runs as root. Every number in the tables of system calls is the
kernel's, and refused. A grader that is killed takes its programs along. HumanEval's reference
solutions pass and emptied ones fail; hand-written ones in JavaScript and C++ pass, wrong ones fail.
50 seconds; MBPP, slow, one minute.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsim.errors import RunError
from fedsim.evaluate import commands, sandbox, walls
from fedsim.evaluate.commands import Limits
from fedsim.evaluate.sandbox import Verdict, grade
from fedsim.tasks import Program
from tests import attacks, solutions
from tests.conftest import require

REAL = Path(os.environ.get("FEDSIM_DATA") or Path(__file__).parents[2] / "shared" / "data")
SMALL = Limits(memory=256 << 20, processes=16, size=1 << 20, output=1 << 16)
TABLES = {"python": attacks.PYTHON, "javascript": attacks.JAVASCRIPT, "cpp": attacks.CPP}


def readable_python() -> str | None:
    """An interpreter that every user of this machine may run."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"):
        test = [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        who: dict[str, Any] = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
        try:
            if subprocess.run(test, check=False, cwd="/", **who).returncode == 0:
                return path
        except OSError:
            continue
    return None


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary folders are made here, where every user may; afterwards all are gone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        assert os.listdir(folder) == []


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A text in the command line of every Python program, by which it is found."""
    text = f"/nowhere/{secrets.token_hex(8)}"
    packages = commands._packages()
    monkeypatch.setattr(commands, "_packages", lambda: [*packages, text])
    return text


def marked(text: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if text in process.cmdline():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.fixture(params=["namespaces", "Landlock"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The test runs twice, behind each kind of walls, where this machine allows it."""
    if request.param == "Landlock" and os.geteuid() == 0:
        path, known = readable_python(), commands.tool
        require("sandbox", path is not None, "nobody may run the interpreter")
        monkeypatch.setattr(commands, "tool", lambda x: path if x == "python" else known(x))
    visible = commands.visible
    visible.cache_clear()
    monkeypatch.setattr(sandbox, "_walls", lambda: request.param)
    try:
        sandbox._verdict(sandbox._TRIVIAL["python"], sandbox.LIMITS, request.param)
    except RunError as error:
        require("sandbox", False, f"no {request.param} here: {error}")
    yield request.param
    visible.cache_clear()


@pytest.fixture
def places(room: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What attacks aim at; afterwards it is as it was."""
    secret, name = secrets.token_hex(8), f"fedsim-{secrets.token_hex(8)}"
    monkeypatch.setenv("FEDSIM_SECRET", secret)
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as stream,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        os.chmod(folder, 0o777)
        canary = Path(folder) / "canary"
        canary.write_text("alive")
        canary.chmod(0o666)
        port = stream.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        abstract.bind(f"\0{name}")
        abstract.listen()
        before = canary.stat()
        yield {"canary": canary, "port": port, "name": name, "pid": os.getpid(), "secret": secret}
        assert canary.read_text() == "alive"
        after = canary.stat()
        assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
        assert os.listdir(folder) == ["canary"]
        for listening, receive in (
            (stream, stream.accept), (abstract, abstract.accept),
            (datagrams, partial(datagrams.recv, 9)),
        ):  # fmt: skip
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                receive()


def attack(language: Any, name: str, places: dict[str, Any]) -> tuple[Program, set[str]]:
    """The program and how it may end; whatever ends by itself has all the time it needs."""
    source, ends = TABLES[language][name]
    seconds = 0.5 if "timeout" in ends else 20.0
    return Program(language, attacks.filled(source, **places), seconds, build=4.0), ends


def installed(language: str) -> None:
    require(language, commands.tool(language) is not None, f"nothing runs {language} here")


@pytest.mark.parametrize("language", TABLES)
def test_attacks_fail_and_leave_nothing(
    language: Any, kind: str, mark: str, places: dict[str, Any]
) -> None:
    """All of a language, two at once: neighbours are not disturbed either."""
    installed(language)
    programs, ends = zip(*(attack(language, name, places) for name in TABLES[language]))
    start = time.monotonic()
    verdicts = grade(programs, limits=SMALL, workers=2)
    assert time.monotonic() - start < len(programs)
    wrong = {n: v for n, v, e in zip(TABLES[language], verdicts, ends) if v.end not in e}
    assert wrong == {}
    assert not any(v.passed for v in verdicts)
    assert marked(mark) == [] and psutil.Process().children(recursive=True) == []


def test_a_neighbour_keeps_its_room_to_fork(kind: str, places: dict[str, Any]) -> None:
    """Both stay within their 16 processes, but have more together."""
    if kind == "Landlock" and os.geteuid() != 0:
        pytest.skip("only root can run programs as different users")
    source = "import os, time\ntime.sleep({})\nfor _ in range(14):\n if not os.fork(): " \
        "time.sleep({}); os._exit(0)\nfor _ in range(14): os.wait()"  # fmt: skip
    programs = [Program("python", source.format(*times), 20.0) for times in ((1, 3), (2, 0))]
    assert [v.end for v in grade(programs, limits=SMALL, workers=2)] == ["passed", "passed"]


def test_what_is_seen_is_not_written(
    kind: str, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages may belong to the user who grades: here the canary's folder is visible."""
    seen = [*commands.visible(), str(places["canary"].parent)]
    monkeypatch.setattr(commands, "visible", lambda: seen)
    reads = "assert open('{canary}').read() == 'alive'"
    names = [n for n in attacks.PYTHON if n.endswith("outside") and n != "read outside"]
    sources = [reads, *(attacks.PYTHON[n][0] for n in [*names, "through a link"])]
    programs = [Program("python", attacks.filled(s, **places), 20.0) for s in sources]
    first, *others = grade(programs)
    assert first.passed
    assert [v.end for v in others] == ["failed"] * 9


def test_endless_output_is_stopped(kind: str) -> None:
    start = time.monotonic()
    (verdict,) = grade([Program("python", "while True: print('x' * 1000)", 100.0)])
    assert verdict.end == "output" and time.monotonic() - start < 50


def test_order_and_details(kind: str) -> None:
    texts = ("x = 1", "assert 1 == 2, 'two'", "print('é ✓')", "x = '\ud800'", "x = '\0'", "é = 1")
    first, second, *others = grade([Program("python", text, 5.0) for text in texts], workers=3)
    assert first == Verdict("passed")
    assert second == Verdict("failed", "AssertionError: two")
    assert [v.end for v in others] == ["passed", "passed", "failed", "passed"]
    assert grade([]) == []


def test_a_program_finds_itself_at_home(kind: str) -> None:
    """As in `python main.py`, with installed packages, in a folder of its own, and no more."""
    source = """
import asyncio, os, pickle, sys, tempfile, threading
import numpy
class Point: x: "int" = 1
assert pickle.loads(pickle.dumps(Point())).x == 1 and __name__ == "__main__"
assert numpy.ones(3).sum() == 3
assert sys.argv == ["main.py"] and sys.stdin.read() == ""
assert {*os.environ} == {"PATH", "HOME", "TMPDIR", "LANG"}, os.environ
assert os.getcwd() == os.environ["HOME"] == tempfile.gettempdir()
open("data.txt", "w").write("x")
assert sorted(os.listdir()) == ["data.txt", "main.py", "run.py"]
assert os.system("echo hello > word.txt") == 0 and open("word.txt").read() == "hello\\n"
asyncio.run(asyncio.sleep(0))
thread = threading.Thread(target=print)
thread.start()
thread.join()
"""
    if os.geteuid() == 0 and kind == "Landlock":
        source = source.replace("import numpy", "").replace("assert numpy", "# ")
    assert grade([Program("python", source, 10.0)]) == [Verdict("passed")]


def test_a_deep_folder_is_removed(kind: str, room: Path) -> None:
    """Deeper than Python's recursion limit, and longer than a path may be."""
    source = "import os\nfor _ in range(1500): os.mkdir('folder'); os.chdir('folder')"
    assert grade([Program("python", source, 10.0)]) == [Verdict("passed")]


def test_descendants_end_with_a_program_that_passes(kind: str, mark: str) -> None:
    source = "import os, time\nif os.fork() == 0: os.setsid(); os.closerange(0, 3); time.sleep(99)"
    assert grade([Program("python", source, 10.0)]) == [Verdict("passed")]
    assert marked(mark) == []


def test_the_calls_of_the_tables_are_refused(kind: str) -> None:
    """With invalid arguments, so that a call that came through would do nothing."""
    column = walls._machine()
    tables = walls._NEVER | (walls._LEFT_OPEN if kind == "Landlock" else {})
    others = walls._OTHERS if kind == "Landlock" else {}
    source = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def number(*arguments):
    ctypes.set_errno(0)
    result = libc.syscall(*map(ctypes.c_long, arguments))
    return ctypes.get_errno() if result < 0 else 0
for call in {[n[column] for n in tables.values() if n[column]]}:
    assert number(call, -1, -1, -1, -1, -1) == 1, call
for call in {[n[column] for n in others.values()]}:
    assert number(call, 1, -1, -1, -1) == 1, call
assert number({walls._CLONE3}, -1, -1) == 38
assert number({walls._CLONE[column]}, 0x10000000) == 1
assert number({walls._X32} + 39) == 1
"""
    (verdict,) = grade([Program("python", source, 5.0)])
    assert verdict == Verdict("passed")


def test_the_tables_are_the_kernels() -> None:
    headers = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
    extra = {"clone": walls._CLONE, "fcntl": walls._FCNTL}
    tables = walls._NEVER | walls._LEFT_OPEN | walls._OTHERS | extra
    for column, header in enumerate(headers):
        require("headers", Path(header).is_file(), f"there is no {header}")
        text = Path(header).read_text()
        known = {a: int(b) for a, b in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", text)}
        for name, numbers in tables.items():
            assert known.get(name, numbers[column]) == numbers[column], name
        assert (
            len(known.keys() & tables.keys()) >= len([n for n in tables.values() if n[column]]) - 5
        )


GRADER = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
for name, path in zip(("fedsim", "fedsim.evaluate"), sys.argv[1:]):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [path]
from fedsim.tasks import Program
from fedsim.evaluate import commands, sandbox
order = json.load(sys.stdin)
packages = [*commands._packages(), order["mark"]]
commands._packages = lambda: packages
sandbox._walls = lambda: order["walls"]
me, limits = str(os.getpid()), commands.Limits(**order["limits"])
programs = [Program(x, text.replace("{pid}", me), t) for x, text, t in order["programs"]]
verdicts = sandbox.grade(programs, workers=order["workers"], limits=limits)
json.dump([[v.end, v.detail] for v in verdicts], sys.stdout)
"""


def grader(python: str, order: dict[str, Any], **options: Any) -> subprocess.Popen[str]:
    """A process of its own that grades; without torch, so that it starts at once."""
    folder = Path(sandbox.__file__).parent
    process = subprocess.Popen(
        [python, "-B", "-c", GRADER, str(folder.parent), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
        **options,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(order))
    process.stdin.close()
    process.stdin = None
    return process


@pytest.mark.parametrize("which", ["namespaces", "Landlock"])
def test_attacks_fail_for_an_ordinary_user(which: str, mark: str, places: dict[str, Any]) -> None:
    """Who grades and what is graded are the same user, so rights alone protect nothing."""
    if os.geteuid() != 0:
        pytest.skip("the other tests run as an ordinary user already")
    python, user = readable_python(), 54321
    require("sandbox", python is not None, "nobody may run the interpreter")
    who: dict[str, Any] = {"user": user, "group": user, "extra_groups": []}
    reads = subprocess.run(["test", "-r", sandbox.__file__], check=False, **who).returncode == 0
    require("sandbox", reads, "the project lies in a folder that only root may enter")
    for place in (places["canary"], places["canary"].parent):
        os.chown(place, user, user)
    places["pid"] = "{pid}"  # the process knows it better
    programs = [astuple(attack("python", name, places)[0])[:3] for name in attacks.PYTHON]
    workers = 1 if which == "Landlock" else 2  # as one user a fork bomb takes a neighbour's room
    order = {"walls": which, "mark": mark, "programs": programs, "limits": vars(SMALL),
             "workers": workers}  # fmt: skip
    process = grader(str(python), order, **who)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for (name, (_, ends)), (end, detail) in zip(attacks.PYTHON.items(), json.loads(out)):
        assert end in ends, (name, end, detail)
    assert marked(mark) == []


def endless(mark: str, kind: str, number: int) -> subprocess.Popen[str]:
    programs = [("python", "import time; time.sleep(99)", 4.0)] * number
    order = {"walls": kind, "mark": mark, "programs": programs, "limits": vars(SMALL), "workers": 2}
    process = grader(sys.executable, order)
    start = time.monotonic()
    while not marked(mark):
        assert process.poll() is None and time.monotonic() - start < 20
        time.sleep(0.05)
    return process


def test_a_killed_grader_takes_its_programs_along(mark: str) -> None:
    with endless(mark, sandbox._walls(), 4) as process:
        process.kill()
        start = time.monotonic()
    while marked(mark):
        assert time.monotonic() - start < 3
        time.sleep(0.05)


def test_an_interrupt_ends_what_waits(mark: str) -> None:
    """Two of fifty programs of 4 seconds run; the others never begin."""
    with endless(mark, sandbox._walls(), 50) as process:
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert "KeyboardInterrupt" in err
        assert time.monotonic() - start < 10
    assert marked(mark) == []


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing remembered of this machine, before and after."""
    caches = (commands.tool, commands.visible, sandbox._walls, sandbox._ready)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_missing_compiler_is_said_before_anything_runs(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    verdict = sandbox._verdict
    monkeypatch.setattr(sandbox, "_verdict", lambda p, *a: (ran.append(p), verdict(p, *a))[1])
    monkeypatch.setattr(commands.shutil, "which", lambda name: None)
    programs = [Program("python", "ours = 1", 5.0), Program("cpp", "int main() {}", 5.0)]
    with pytest.raises(RunError, match=r"Programs in cpp.*expected g\+\+ on the PATH.*Install"):
        grade(programs)
    assert programs[0] not in ran and programs[1] not in ran
    assert ("cpp", "not installed") in sandbox.isolation()


def test_nothing_runs_without_walls(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> Verdict:
        raise RunError("no", got=1)

    monkeypatch.setattr(sandbox, "_within", unable)
    with pytest.raises(RunError, match=r"cannot be contained.*namespaces: no.*Landlock: no"):
        grade([Program("python", "", 5.0)])
    (row,) = sandbox.isolation()
    assert row[1].startswith("is not run: Generated code cannot be contained")
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Darwin")
    with pytest.raises(RunError, match="got 'Darwin'; expected Linux"):
        grade([Program("python", "", 5.0)])


def test_a_jail_that_breaks_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails on our side is an error, never a program that failed."""
    program = Program("python", "", 5.0)
    kind = sandbox._walls()
    with monkeypatch.context() as patch:
        patch.setattr(commands, "visible", lambda: ["/nowhere"])
        with pytest.raises(RunError, match=r"cannot be set up.*nowhere"):
            sandbox._verdict(program, SMALL, kind)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "tool", lambda language: "/usr/bin/nowhere")
        with pytest.raises(RunError, match=r"cannot be set up.*nowhere"):
            sandbox._verdict(program, SMALL, kind)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_BOOT", "raise SystemExit('broken')")
        with pytest.raises(RunError, match=r"without a report.*broken"):
            sandbox._verdict(program, SMALL, kind)


def test_isolation_names_walls_and_gaps() -> None:
    rows = dict(sandbox.isolation())
    assert rows["generated code"] == f"runs behind {sandbox._walls()}"
    assert {"processes", "network", "files", "user", "not covered", *TABLES} <= rows.keys()


def rows(name: str) -> list[dict[str, Any]]:
    path = REAL / "code" / f"{name}.test.jsonl.gz"
    require("data", path.is_file(), f"FEDSIM_DATA has no code/{path.name}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def humaneval(row: dict[str, Any], body: str) -> Program:
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    return Program("python", f"{row['prompt']}{body}\n{tests}", 30.0)


def test_humaneval_references_pass_and_empty_ones_fail() -> None:
    data = rows("humaneval")
    verdicts = grade([humaneval(row, row["canonical_solution"]) for row in data])
    assert [(r["task_id"], v) for r, v in zip(data, verdicts) if not v.passed] == []
    verdicts = grade([humaneval(row, "    return None\n") for row in data[::3]])
    assert [r["task_id"] for r, v in zip(data[::3], verdicts) if v.end != "failed"] == []


@pytest.mark.slow
def test_mbpp_references_pass_and_negated_tests_fail() -> None:
    data = rows("mbpp")

    def program(row: dict[str, Any], tests: list[str]) -> Program:
        text = "\n".join([row["code"], row["test_setup_code"], *tests])
        return Program("python", text, 30.0)

    verdicts = grade([program(row, row["test_list"]) for row in data])
    assert [(r["task_id"], v) for r, v in zip(data, verdicts) if not v.passed] == []
    negated = [[re.sub(r"\bassert\b(.*)", r"assert not (\1)", row["test_list"][0], flags=re.S)]
               for row in data]  # fmt: skip
    verdicts = grade([program(row, tests) for row, tests in zip(data, negated)])
    assert [r["task_id"] for r, v in zip(data, verdicts) if v.end != "failed"] == []


@pytest.mark.parametrize(
    ("language", "name", "known"),
    [("javascript", "multiple_humaneval_js", solutions.JAVASCRIPT),
     ("cpp", "multiple_humaneval_cpp", solutions.CPP)],
)  # fmt: skip
def test_solutions_by_hand_pass_and_wrong_ones_fail(
    language: Any, name: str, known: dict[str, str]
) -> None:
    installed(language)
    data = [row for row in rows(name) if row["name"] in known]
    assert len(data) == len(known) >= 5

    def verdicts(bodies: list[str]) -> list[str]:
        texts = [row["prompt"] + body + row["tests"] for row, body in zip(data, bodies)]
        return [v.end for v in grade([Program(language, text, 15.0) for text in texts])]

    assert verdicts([known[row["name"]] for row in data]) == ["passed"] * len(data)
    empty = "    return {};\n" if language == "cpp" else "  return null;\n}\n"
    assert verdicts([empty] * 2) == ["failed"] * 2
