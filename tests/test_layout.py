"""The design's layout, kept: who may import whom, how large files are, what names are not used.

Imports are read from syntax, wherever in a file they stand. A process that starts in the
repository's root proves that the folder `kernels` does not take the place of the package of that
name, which transformers and bitsandbytes ask for. What setup.py installs is what there is. About
10 s, almost all of it that process.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from fedsim import domains, strategies
from tests.conftest import require

ROOT = Path(__file__).parents[1]
CODE = sorted(p.relative_to(ROOT).as_posix() for d in ("fedsim", "kernels")
              for p in (ROOT / d).rglob("*.py"))  # fmt: skip
FORBIDDEN = re.compile(r"(^|_)(utils?|helpers?|common|managers?|base|misc)$|_v\d+$")


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def modules(file: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Absolute names of everything that import statements name, members included."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def imported(file: str) -> set[str]:
    """Everywhere in the file."""
    return modules(file, ast.walk(tree(file)))


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def folder(name: str) -> list[str]:
    files = [f for f in CODE if f.startswith(f"{name}/")]
    assert files
    return files


def offenders(files: list[str], *packages: str) -> list[str]:
    return [f"{f}: {n}" for f in files for n in sorted(imported(f)) if within(n, *packages)]


def test_kernels_stand_alone() -> None:
    assert offenders(folder("kernels"), "fedsim") == []
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_strategies_import_the_vocabulary_only() -> None:
    shared = ("core", "errors", "factors", "names", "options", "reduce", "strategies")
    allowed = [f"fedsim.{name}" for name in shared]
    for file in folder("fedsim/strategies"):
        ours = {n for n in imported(file) if within(n, "fedsim", "fedsim_kernels")}
        assert {n for n in ours if not within(n, *allowed)} == set(), file


def test_domains_are_plain_python() -> None:
    shared = (  # what several domains are made of
        "answers", "completion", "emphasis", "extraction", "forms", "lines", "mentions", "tasks",
        "vocabulary",
    )  # fmt: skip
    files = folder("fedsim/domains") + [f"fedsim/{name}.py" for name in shared]
    allowed = ("domains", "errors", "names", *shared)
    assert offenders(files, "torch", "numpy", "transformers", "datasets") == []
    for file in files:
        ours = {n for n in imported(file) if within(n, "fedsim")} - {"fedsim"}
        assert {n for n in ours if not within(n, *(f"fedsim.{name}" for name in allowed))} == set()


def test_peft_is_in_one_place() -> None:
    """What a file says and what its tensors become."""
    own = ["fedsim/adapter_file.py", "fedsim/peft_io.py"]
    assert offenders([f for f in CODE if f not in own], "peft") == []
    assert all(offenders([file], "peft") for file in own)


@pytest.mark.parametrize(
    ("package", "home"),
    [("vllm", "fedsim/evaluate/vllm_worker.py"), ("deepspeed", "fedsim/sharded.py")],
)
def test_extras_are_imported_late_and_in_one_place(package: str, home: str) -> None:
    assert offenders([f for f in CODE if f != home], package) == []
    top = {f: modules(f, iter(tree(f).body)) for f in CODE}
    assert [f for f, names in top.items() if any(within(n, package) for n in names)] == []


def test_the_worker_of_another_environment_needs_nothing_of_this_one() -> None:
    ours = {n for n in imported("fedsim/evaluate/vllm_worker.py") if not within(n, "vllm", "torch")}
    assert {n.partition(".")[0] for n in ours} <= sys.stdlib_module_names


def test_bitsandbytes_is_imported_late() -> None:
    top = {f: modules(f, iter(tree(f).body)) for f in CODE}
    late = ("bitsandbytes", "datasets", "matplotlib", "jinja2", "transformers", "huggingface_hub")
    assert [f for f, names in top.items() if any(within(n, *late) for n in names)] == []


def test_only_entrances_import_the_loop() -> None:
    entrances = {"fedsim/cli.py", "fedsim/leaderboard.py", "fedsim/__init__.py"}
    assert offenders([f for f in CODE if f not in entrances], "fedsim.simulate") == []


def test_the_package_imports_quickly() -> None:
    """`import fedsim` and its command line load neither torch nor transformers."""
    done = _process("import fedsim.cli; print({'torch', 'transformers', 'peft'} & {*sys.modules})")
    assert done == ["set()"]


@pytest.mark.parametrize("file", CODE)
def test_sizes(file: str) -> None:
    part = next((p for p in ("kernels/", "fedsim/strategies/", "fedsim/domains/")
                 if file.startswith(p)), "")  # fmt: skip
    limit = {"kernels/": 400, "fedsim/strategies/": 120, "fedsim/domains/": 120}.get(part, 300)
    limit = 200 if file == "fedsim/simulate.py" else limit
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= limit
    functions = (n for n in ast.walk(tree(file))
                 if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))  # fmt: skip
    sizes = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: size for name, size in sizes.items() if size > 60} == {}


def test_names_say_what_is_inside() -> None:
    files = [p for d in ("fedsim", "kernels", "bench", "tests", "csrc")
             for p in (ROOT / d).rglob("*") if "__pycache__" not in p.parts]  # fmt: skip
    assert [p for p in files if FORBIDDEN.search(p.stem)] == []


@pytest.mark.parametrize(
    "name", ["utils", "model_utils", "helpers", "common", "manager", "base", "plan_v2"]
)
def test_the_forbidden_names_are_seen(name: str) -> None:
    assert FORBIDDEN.search(name) and not FORBIDDEN.search(f"{name}_of_it")


@pytest.mark.parametrize("name", [f"fedsim.strategies.{n}" for n in strategies.known()])
def test_every_strategy_is_one(name: str) -> None:
    rule = importlib.import_module(name).STRATEGY
    assert all(callable(getattr(rule, part)) for part in ("start", "rule", "aggregate"))


@pytest.mark.parametrize("name", domains.known())
def test_every_domain_is_one(name: str) -> None:
    assert isinstance(domains.load(name), domains.Domain)


@pytest.mark.parametrize("file", CODE)
def test_every_module_says_what_it_is(file: str) -> None:
    about = ast.get_docstring(tree(file))
    assert about and about.splitlines()[0].endswith((".", ":", "?"))


def _process(code: str, safe: str = "1") -> list[str]:
    """The lines that a process of its own prints, started in the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", f"import importlib.util, pathlib, sys\n{code}"], cwd=ROOT,
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONSAFEPATH": safe},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _setup() -> dict[str, ast.expr]:
    calls = [n for n in ast.walk(tree("setup.py")) if isinstance(n, ast.Call)
             and ast.unparse(n.func) == "setup"]  # fmt: skip
    return {str(k.arg): k.value for k in calls[0].keywords}


def test_what_is_installed_is_what_there_is() -> None:
    given = _setup()
    packages = set(ast.literal_eval(given["packages"]))
    there = {str(Path(f).parent).replace("/", ".") for f in CODE if f.startswith("fedsim/")}
    assert packages == there | {"fedsim_kernels", "fedsim_kernels.cuda"}
    assert ast.literal_eval(given["package_dir"]) == {"fedsim_kernels": "kernels"}
    patterns = ast.literal_eval(given["package_data"])["fedsim"]
    data = [p.relative_to(ROOT / "fedsim").as_posix() for p in (ROOT / "fedsim").rglob("*")
            if p.is_file() and p.suffix not in (".py", ".pyc")]  # fmt: skip
    assert [d for d in data if not any(fnmatch(d, pattern) for pattern in patterns)] == []
    assert [p for p in patterns if not any(fnmatch(d, p) for d in data)] == []


def test_the_audit_names_tests_that_there_are() -> None:
    """`test_x.py::test_y`, or `::test_z` of the file named last."""
    file, seen = "", 0
    for found in re.findall(r"`(?:(test_\w+\.py))?(?:::(test_\w+))?`",
                            (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")):  # fmt: skip
        if any(found):
            file, name, seen = found[0] or file, found[1], seen + 1
            names = {n.name for n in ast.walk(tree(f"tests/{file}"))
                     if isinstance(n, ast.FunctionDef)}  # fmt: skip
            assert not name or name in names, f"{file}::{name}"
    assert seen >= 20


def test_setup_probes_nothing() -> None:
    allowed = {"setuptools", "pathlib", "os", "sys", "concurrent"}
    assert {n.split(".")[0] for n in imported("setup.py")} <= allowed


FOUND = """
spec = importlib.util.find_spec("kernels")
places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin or ""]
print([p for p in map(pathlib.Path, places) if p == pathlib.Path.cwd() / "kernels"] != [])
"""


def test_the_folder_kernels_shadows_nothing() -> None:
    require("quant", importlib.util.find_spec("bitsandbytes") is not None, "no bitsandbytes")
    code = """
import transformers.utils
print(transformers.utils.is_kernels_available() in (True, False))
import bitsandbytes
print(bitsandbytes.nn.Linear4bit.__name__)
import fedsim_kernels.segments
print(pathlib.Path(fedsim_kernels.segments.__file__).resolve().parent.name)
"""
    assert _process(FOUND + code) == ["False", "True", "Linear4bit", "kernels"]


def test_without_the_safe_path_it_would() -> None:
    assert _process(FOUND, safe="") == ["True"]
