"""Sets of the hub: stand-ins in a convert branch's layout, and what helps against each failure.

`datasets` itself reads the stand-ins: a folder of an id's name goes before the hub. The failures
are those that `datasets` 5 raises, from its own code where it can be made to raise them without a
network, else built as it builds them. About 10 s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import errors
from typer.testing import CliRunner

from fedsim import cli, doctor, domains
from fedsim.config import Data
from fedsim.data import hub, sources
from fedsim.errors import DataError
from fedsim.evaluate import comparable
from fedsim.tasks import CONVERTED, DataSet

HTTP = import_module(errors.HTTPError.__module__.partition(".")[0])  # httpx, or its successor
HUB = Data(source="hub")
ROWS = [{"instruction": "Is it?", "input": f"line {n}", "output": "yes"} for n in range(12)]
LABELLED = Features({"sentence": Value("string"),
                     "label": ClassLabel(names=["negative", "neutral", "positive"])})  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, whose folders `datasets` takes for ids, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def converted(name: str, config: str, splits: dict[str, list[dict[str, Any]]], **how: Any) -> None:
    """<config>/<split>/0000.parquet."""
    for split, rows in splits.items():
        folder = Path(name) / config / split
        folder.mkdir(parents=True)
        Dataset.from_list(rows, **how).to_parquet(str(folder / "0000.parquet"))


def lines(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def scripted(name: str) -> None:
    Path(name).mkdir(parents=True)
    (Path(name) / f"{Path(name).name}.py").write_text("import datasets\n")


def load(domain: str, task: str) -> sources.Rows:
    found = domains.load(domain)
    data = found.tasks[task].data
    return sources.load(HUB, found, data, found.tasks[task].columns)


# ------------------------------------------------------------------------------------ what loads


def test_a_convert_branch_is_read_config_by_config() -> None:
    """FPB: the config's folder alone, and of it the evaluator's quarter."""
    said = [{"sentence": f"Sales rose {n} percent.", "label": n % 3} for n in range(40)]
    name = "takala/financial_phrasebank"
    converted(name, "sentences_50agree", {"train": said}, features=LABELLED)
    converted(name, "sentences_allagree", {"train": said[:3]}, features=LABELLED)
    got = load("finance", "fpb")
    whole = Dataset.from_list(said, features=LABELLED)
    assert got.rows == list(whole.train_test_split(test_size=0.25, seed=42)["test"])
    assert got.origin == "folder:financial_phrasebank"  # a folder is not the hub's


def test_only_the_split_of_a_config() -> None:
    asked = [{"QUESTION": f"Is it {n}?", "CONTEXTS": ["a", "b"], "final_decision": "yes"}
             for n in range(4)]  # fmt: skip
    folds = {"test": asked, "train": asked[:2], "validation": asked[:1]}
    for config in ("pubmed_qa_labeled_fold0_source", "pubmed_qa_labeled_fold1_source"):
        converted("bigbio/pubmed_qa", config, folds)
    got = load("medical", "pubmedqa")
    assert got.rows == asked
    for form in domains.load("medical").tasks["pubmedqa"].forms.values():
        assert form.item(got.rows[0]).gold == "yes"


def test_configs_are_joined_in_order() -> None:
    name, subjects = "cais/mmlu", domains.load("general").tasks["mmlu_stem"].data.configs
    head = "---\nconfigs:\n"
    for subject in subjects:
        lines(f"{name}/{subject}/test.jsonl",
              [{"question": subject, "choices": ["a", "b"], "answer": 1}])  # fmt: skip
        head += f"- config_name: {subject}\n  data_files:\n  - split: test\n"
        head += f"    path: {subject}/test.jsonl\n"
    Path(name, "README.md").write_text(head + "---\n")
    assert [row["question"] for row in load("general", "mmlu_stem").rows] == list(subjects)


def test_no_set_asks_for_a_loading_script() -> None:
    """What those ids had on the hub when this was written; the rest are data files."""
    sets = {d.hub: d for domain in map(domains.load, domains.known())
            for d in (*domain.train, *(t.data for t in domain.tasks.values()))}  # fmt: skip
    assert not sets.keys() & {"lukaemon/mmlu", "medmcqa", "financial_phrasebank", "pubmed_qa"}
    for name in ("takala/financial_phrasebank", "bigbio/pubmed_qa"):
        assert sets[name].revision == CONVERTED
    assert sets["bigbio/med_qa"].revision not in (None, "main")


def own(train: str) -> sources.Rows:
    general = domains.load("general")
    data = Data(source="hub", train=train)
    dataset = sources.training_set(data, general)
    return sources.load(data, general, dataset, general.columns, general.optional)


def test_a_folder_and_a_file_are_not_the_hub(place: Path) -> None:
    lines("mine/train.jsonl", ROWS)
    Path("tables").mkdir()
    Dataset.from_list(ROWS).to_csv("tables/train.csv")
    found = {name: own(name) for name in ("mine", str(place / "mine"), "mine/", "tables")}
    file = own(str(place / "mine" / "train.jsonl"))
    assert {n: r.origin for n, r in found.items()} == {
        "mine": "folder:mine", str(place / "mine"): "folder:mine", "mine/": "folder:mine",
        "tables": "folder:tables",
    }  # fmt: skip
    assert file.origin == "file:train.jsonl"
    assert {r.digest for r in (*found.values(), file)} == {file.digest} and file.rows == ROWS
    scores = [{"protocol": "flowertune", "source": "hub:x@main", "whole": True,
               "precision": "fp4, float32"}]  # fmt: skip
    for rows in (*found.values(), file):
        assert "data instead of the hub's" in comparable(scores, rows.origin)
    assert not comparable(scores, "hub:x@main")


def test_a_path_that_is_not_there() -> None:
    Path("table.csv").write_text("a,b\n")
    for name in ("./none", "/none/at/all", "a/b/c"):
        with pytest.raises(DataError, match=rf"data.train: got '{name}'.*Correct the path"):
            own(name)
    with pytest.raises(
        DataError, match=r"'table.csv'; expected a file .jsonl.gz or .jsonl.*folder"
    ):
        own("table.csv")


# -------------------------------------------------------------------------------- what does not


def response(status: int) -> Any:
    return HTTP.Response(status, request=HTTP.Request("GET", "https://hub"))


def caused(failure: Exception, by: Exception) -> Exception:
    failure.__cause__ = by
    return failure


FAILURES: dict[str, tuple[Exception, str, str]] = {
    "script": (RuntimeError("Dataset scripts are no longer supported, but found set.py"),
               "has a loading script", "data.train = org/set@refs/convert/parquet"),
    "gated": (DatasetNotFoundError("Dataset 'org/set' is a gated dataset on the Hub. You must be "
              "authenticated to access it."), "is gated", "hf auth login"),
    "gated, by the client": (errors.GatedRepoError("no", response=response(403)), "is gated",
                             "huggingface.co/datasets/org/set"),
    "no such set": (DatasetNotFoundError("Dataset 'org/set' doesn't exist on the Hub or cannot be "
                    "accessed."), "is not on the hub, or is private", "Correct the name"),
    "no such revision": (DatasetNotFoundError("Revision 'x' doesn't exist for dataset 'org/set' "
                         "on the Hub."), "has no revision", "Name another behind @"),
    "connection": (ConnectionError("Couldn't reach 'org/set' on the Hub (ConnectError)"),
                   "cannot be reached .Couldn't reach", "Without a network use --data-dir"),
    "connection amid a file": (caused(DatasetGenerationError("An error occurred"),
                               HTTP.ReadTimeout("slow")), "cannot be reached", "--data-dir"),
    "not in the cache": (errors.LocalEntryNotFoundError("not found in the cache"),
                         "cannot be reached", "--data-dir"),
    "config": (ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"),
               r"has no config.*\['a', 'b'\]", "--data-dir"),
    "config missing": (ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"),
                       r"has no config of its own.*\['a', 'b'\]", "--data-dir"),
    "split": (ValueError("Unknown split \"x\". Should be one of ['train']."),
              r"has other parts .*\['train'\]", "--data-dir"),
    "server": (errors.HfHubHTTPError("502 Bad Gateway", response=response(502)),
               "was not given out by the hub .502", "Try again later"),
    "broken file": (caused(DatasetGenerationError("An error occurred"), ValueError("bad JSON")),
                    "has files that cannot be read .bad JSON", "Mend or replace"),
    "unforeseen": (KeyError("oops"), "does not load .KeyError: 'oops'", "--data-dir"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILURES)
def test_a_remedy_by_cause(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    failure, what, remedy = FAILURES[kind]

    def fails(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("datasets.load_dataset", fails)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=rf"data set 'org/set' {what}.*{remedy}") as caught:
        hub.read(DataSet("set", "train", "org/set"))
    assert ("network" in str(caught.value)) is ("reached" in what)
    assert "\n" not in str(caught.value)


def test_causes_that_datasets_itself_finds() -> None:
    """Offline, a script, an empty folder, another config, another split, no JSON."""
    scripted("org/script")
    Path("org/empty").mkdir(parents=True)
    lines("org/plain/train.jsonl", ROWS)
    Path("org/broken").mkdir()
    Path("org/broken/train.jsonl").write_text('{"a": 1}\n{half\n')
    found = {
        DataSet("x", "train", "org/offline"): r"reached \(HF_HUB_OFFLINE is set\)\. Unset HF_HUB_O",
        DataSet("x", "train", "org/script"): r"loading script.*org/script@refs/convert/parquet",
        DataSet("x", "test", "org/script"): r"loading script, which datasets no longer runs\. --da",
        DataSet("x", "train", "org/empty"): "holds no data files",
        DataSet("x", "train", "org/plain", ("other",)): r"no config other .*Available: \['default",
        DataSet("x", "train", "org/plain", ("other",), CONVERTED): "holds no data files",
        DataSet("x", "test", "org/plain"): r"has other parts .*\['train'\]",
        DataSet("x", "train", "org/broken"): "has files that cannot be read",
        DataSet("x", "train"): "data set 'x' is not on the hub",
    }
    for dataset, message in found.items():
        with pytest.raises(DataError, match=message):
            hub.read(dataset)


# ----------------------------------------------------------------------------------------- doctor


def few(monkeypatch: pytest.MonkeyPatch, *train: DataSet) -> None:
    finance = domains.load("finance")
    tasks = {"fpb": finance.tasks["fpb"], "tfns": finance.tasks["tfns"]}
    one = replace(finance, train=train, tasks=tasks)
    monkeypatch.setattr(domains, "known", lambda: ["finance"])
    monkeypatch.setattr(domains, "load", lambda name: one)


def stand_ins() -> None:
    said = [{"sentence": f"Sales rose {n} percent.", "label": n % 3} for n in range(40)]
    converted("takala/financial_phrasebank", "sentences_50agree", {"train": said},
              features=LABELLED)  # fmt: skip
    lines("zeroshot/twitter-financial-news-sentiment/validation.jsonl",
          [{"text": "up", "label": 1}] * 5)  # fmt: skip
    lines("org/own/train.jsonl", ROWS)


def test_doctor_says_which_sets_load(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins()
    few(monkeypatch, DataSet("own", "train", "org/own"), DataSet("local", "train"))
    assert [(name, found.split()[0], ok) for name, found, ok in doctor.hub()] == [
        ("finance own", "12", True), ("finance fpb", "10", True), ("finance tfns", "5", True)
    ]  # fmt: skip
    said = CliRunner().invoke(cli.app, ["doctor", "--hub"])
    assert said.exit_code == 0 and "finance fpb  10 rows of takala/financial_phrasebank@refs" in (
        said.stdout
    )


def broken_read(row: Any) -> dict[str, Any]:
    raise KeyError("column")


WRONG: dict[str, tuple[Callable[[], object], DataSet, str]] = {
    "script": (lambda: scripted("org/bad"), DataSet("bad", "train", "org/bad"), "loading script"),
    "offline": (lambda: None, DataSet("bad", "train", "org/bad"), "HF_HUB_OFFLINE is set"),
    "columns": (lambda: lines("org/bad/train.jsonl", [{"a": 1}]),
                DataSet("bad", "train", "org/bad"), "column 'instruction' is missing"),
    "values": (lambda: lines("org/bad/train.jsonl", [{**ROWS[0], "output": ["yes"]}]),
               DataSet("bad", "train", "org/bad"), "column 'output': got \\['yes'\\]"),
    "reading": (lambda: lines("org/bad/train.jsonl", ROWS),
                DataSet("bad", "train", "org/bad", read=broken_read), "KeyError: 'column'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_doctor_goes_on_after_a_set_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make, dataset, reason = WRONG[kind]
    stand_ins()
    make()
    few(monkeypatch, dataset)
    said = CliRunner().invoke(cli.app, ["doctor", "--hub"])
    assert said.exit_code == 1 and isinstance(said.exception, SystemExit)
    first, *rest = said.stdout.strip().splitlines()
    assert first.startswith("finance bad") and "Traceback" not in said.stdout
    assert re.search(reason, first)
    assert [line.split("  ")[0] for line in rest] == ["finance fpb", "finance tfns"]
    assert all(" rows of " in line for line in rest)


def test_a_question_that_cannot_be_read_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins()
    lines("zeroshot/twitter-financial-news-sentiment/validation.jsonl",
          [{"text": "up", "label": 9}])  # fmt: skip
    few(monkeypatch)
    found = list(doctor.hub())
    assert [ok for *_, ok in found] == [True, False] and "row 0 is no question" in found[1][1]
