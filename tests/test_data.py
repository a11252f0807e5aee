"""From rows to clients: sources, label masks, the token store, partitions and batches.

Proved against other code where there is some: the partition against `datasets`, the label mask
against the leaderboard's rule (the template's token ids, the last match counts), on the tiny
tokenizer and on a real one where it is. Broken sources are errors that name the file; the real
finance sets load with their counts and labels where they are. About 8 s, 3 more with real data.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import domains, seeds, weights
from fedsim.config import Config, Data, build
from fedsim.data import partition, sources, tokens, training
from fedsim.data.embedded import finance
from fedsim.domains import PROMPT, RESPONSE_MARK, DataSet
from fedsim.errors import ConfigError, DataError
from fedsim.plan import cosine_lr, plan_round, step_examples
from tests.conftest import require

USER_CACHE = tokens.cache_root()  # before a fixture turns it elsewhere
REAL = Path(os.environ.get("FEDSIM_DATA") or Path(__file__).parents[2] / "shared" / "data")
FINANCE = domains.load("finance")
COLUMNS, OPTIONAL = ("instruction", "output"), ("input",)

# ---------------------------------------------------------------------------------- partition


@pytest.mark.parametrize(
    ("clients", "examples"), [(1, 1), (1, 10), (3, 10), (7, 100), (20, 4001), (50, 13961), (9, 9)]
)
@pytest.mark.parametrize("seed", [42, 7])
def test_partition_is_that_of_datasets(clients: int, examples: int, seed: int) -> None:
    from datasets import Dataset

    whole = Dataset.from_dict({"i": range(examples)}).shuffle(seed=seed)
    ours = partition.iid(examples, clients, seed)
    assert len(ours) == clients and sorted(ours.examples) == list(range(examples))
    assert max(ours.sizes) - min(ours.sizes) <= 1
    for client in {0, clients // 2, clients - 1}:
        theirs = whole.shard(clients, client, contiguous=True)["i"]
        assert ours.of(client).tolist() == list(theirs)


def test_more_clients_than_examples() -> None:
    with pytest.raises(ConfigError, match=r"clients.number: got 11; expected at most 10"):
        partition.iid(10, 11, 42)


@pytest.mark.parametrize(("protocol", "same"), [("flowertune", True), ("fedsim", False)])
def test_flowertune_always_cuts_with_seed_42(protocol: str, same: bool) -> None:
    values = {"run": {"protocol": protocol, "seed": 3}, "clients": {"number": 5}}
    got = partition.build(build(values, "test"), 60).examples
    assert np.array_equal(got, partition.iid(60, 5, 42).examples) is same
    assert np.array_equal(got, partition.iid(60, 5, 3).examples) is not same


# --------------------------------------------------------------------------------- label masks


def official(tokenizer: Any, text: str, max_length: int) -> int:
    """Where the leaderboard's collator begins the labels, or the length where it finds nothing.

    It looks in the truncated ids for those of the template; its last match counts. The ids are
    taken as this tokenizer writes them after a line break, which is where the prompt has them.
    """
    before = tokenizer("a\n")["input_ids"]
    template = tokenizer(f"a\n{RESPONSE_MARK}")["input_ids"]
    assert template[: len(before)] == before
    template = template[len(before) :]
    ids = tokenizer(text)["input_ids"][:max_length]
    ends = [i + len(template) for i in range(len(ids)) if ids[i : i + len(template)] == template]
    return ends[-1] if ends else len(ids)


ANSWERS = {
    "plain": "positive",
    "long": "It rose because revenue grew in every one of the quarters of the year.",
    "unicode": "«überraschend» 成長 🚀",
    "line": "first\n### Response: second",
    "twice": "one\n### Response: two\n### Response: three",
    "inline": "the text ### Response: stands here",
    "quoted": 'it says "### Response:" and no more',
    "heading": "#### Response: is another",
    "newline": "\nthe answer is on the next line",
    "empty": "",
}
ASKED = ("Is it so?", "Quote this:\n### Response: nothing\nand go on.", "")


def check_masks(tokenizer: Any, max_length: int) -> Counter[bool]:
    """Compare every text's labels with the official rule; counts of labelled and not."""
    pairs = [(asked, answer) for asked in ASKED for answer in ANSWERS.values()]
    store = tokens.build([tokens.training_text(*pair) for pair in pairs], tokenizer,
                         protocol="flowertune", max_length=max_length, digest="masks")  # fmt: skip
    found: Counter[bool] = Counter()
    for i, (asked, answer) in enumerate(pairs):
        text = PROMPT.format(instruction=asked) + f" {answer}"
        ids = tokenizer(text)["input_ids"]
        assert store.of(i).tolist() == ids[:max_length], answer
        assert store.cut[i] == (len(ids) > max_length)
        want = official(tokenizer, text, max_length)
        assert store.first[i] == want, (answer, store.of(i)[store.first[i] :])
        assert store.labels[i] == len(store.of(i)) - want
        found[bool(want < len(store.of(i)))] += 1
    assert store.unlabelled == found[False]
    return found


@pytest.mark.parametrize("max_length", [1024, 150, 110, 98])
def test_masks_follow_the_official_rule(tokenizer: Any, max_length: int) -> None:
    found = check_masks(tokenizer, max_length)
    assert found[True] and bool(found[False]) is (max_length < 100)


@pytest.mark.parametrize("max_length", [512, 60, 36, 30])
def test_masks_of_a_real_tokenizer(monkeypatch: pytest.MonkeyPatch, max_length: int) -> None:
    folders = list((USER_CACHE / "models").glob("smollm2-135m-instruct-*"))
    require("model", bool(folders), f"no converted model lies in {USER_CACHE}/models")
    real = weights.tokenizer(weights.Weights(folders[0], "folder", "real"))
    found = check_masks(real, max_length)
    assert found[True] and bool(found[False]) is (max_length < 40)


def stores(tokenizer: Any, *pairs: tuple[str, str], **how: Any) -> tokens.TokenStore:
    texts = [tokens.training_text(*pair) for pair in pairs]
    how = {"protocol": "fedsim", "max_length": 512, "digest": repr(pairs), **how}
    return tokens.build(texts, tokenizer, **how)


def test_one_example_by_hand(tokenizer: Any) -> None:
    """Labels are what stands after the mark: a space, the answer, and EOS under `fedsim`."""
    pairs = [("Up or down?", "down"), ("Again?", "positive")]
    plain, ours = (stores(tokenizer, *pairs, protocol=p) for p in ("flowertune", "fedsim"))
    for i, (_, answer) in enumerate(pairs):
        assert tokenizer.decode(plain.of(i)[plain.first[i] :]) == f" {answer}"
        assert tokenizer.decode(ours.of(i)[ours.first[i] :]) == f" {answer}<eos>"
        assert tokenizer.decode(plain.of(i)[: plain.first[i]]).endswith(RESPONSE_MARK)


def test_eos_is_the_first_to_be_cut(tokenizer: Any) -> None:
    text = PROMPT.format(instruction="Up or down?") + " down"
    n = len(tokenizer(text)["input_ids"])
    for length, labels in ((n + 1, 1), (n, 0)):
        store = stores(tokenizer, ("Up or down?", "down"), max_length=length)
        assert (store.of(0)[-1] == tokenizer.eos_token_id) == labels and len(store.of(0)) == length
        assert store.cut.tolist() == [not labels]


def test_an_answer_that_is_cut_off_leaves_no_labels(tokenizer: Any) -> None:
    store = stores(tokenizer, ("word " * 80, "positive"), ("Short?", "positive"), max_length=100)
    assert store.unlabelled == 1 and store.first[0] == len(store.of(0)) == 100
    assert store.labels.tolist() == [0, len(store.of(1)) - store.first[1]]


# --------------------------------------------------------------------------------- token store


class Counting:
    """A tokenizer that counts the texts it is given in lists."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner, self.texts = tokenizer, 0

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        self.texts += len(text) if isinstance(text, list) else 0
        return self.inner(text, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "own"))
    return tmp_path / "own" / "tokens"


def test_the_second_time_nothing_is_tokenised(
    tokenizer: Any, cache: Path, settings: Callable[..., Config]
) -> None:
    config, counting = settings(), Counting(tokenizer)
    rows = sources.Rows(finance.train(), "embedded", "content")

    def store() -> tokens.TokenStore:
        return training.load(config, rows, FINANCE, counting, KEY).store

    first = store()
    assert counting.texts == 200 and len(list(cache.iterdir())) == 1
    tokenizer(["another"], truncation=True, max_length=4)  # leaves state behind
    second = store()
    assert counting.texts == len(first) == config.data.limit == 200
    for name in ("ids", "offsets", "trained", "cut", "unmarked"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert isinstance(second.ids, np.memmap) and second.ids.dtype == np.int32


@pytest.mark.parametrize(
    "change",
    [{"run__protocol": "flowertune"}, {"data__max_length": 255}, {"data__limit": 199},
     {"data__rows": "joined"}, "rows", "domain", "tokenizer"],
)  # fmt: skip
def test_whatever_changes_the_tokens_is_in_the_key(
    tokenizer: Any, cache: Path, settings: Callable[..., Config], change: Any
) -> None:
    rows = sources.Rows(finance.train(), "embedded", "content")
    training.load(settings(), rows, FINANCE, tokenizer, KEY)
    counting, domain = Counting(tokenizer), FINANCE
    if change == "rows":
        rows = sources.Rows(finance.train(), "embedded", "other content")
    elif change == "domain":
        domain = domains.load("general")
    elif change == "tokenizer":
        from tokenizers import AddedToken

        counting.inner = type(tokenizer)(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>"
        )
        counting.inner.add_tokens(AddedToken("Response"))
    config = settings(**change) if isinstance(change, dict) else settings()
    training.load(config, rows, domain, counting, KEY)
    assert counting.texts == config.data.limit and len(list(cache.iterdir())) == 2


def test_a_store_is_made_whole_or_not_at_all(
    tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def store() -> tokens.TokenStore:
        return stores(tokenizer, ("Up?", "yes"), ("Down?", "no"), max_length=99)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store()
    assert all(p.name.startswith(".partial") for p in cache.iterdir())
    assert len(store()) == 2


# ------------------------------------------------------------------------------------- sources


def write(folder: Path, rows: Sequence[Any], name: str = "fingpt_sentiment.train") -> Path:
    path = folder / "finance" / f"{name}.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    return path


def read(folder: Path | None) -> sources.Rows:
    data = Data(source="directory", dir=None if folder is None else str(folder))
    return sources.load(data, FINANCE, sources.training_set(data, FINANCE), COLUMNS, OPTIONAL)


def row(n: int, **changes: Any) -> dict[str, Any]:
    return {"instruction": "Is it?", "input": f"line {n} …", "output": "yes"} | changes


def test_rows_of_a_directory(tmp_path: Path) -> None:
    write(tmp_path, [row(0), row(1, more=3)])
    got = read(tmp_path)
    assert got.rows == [row(0), row(1, more=3)]
    assert got.origin == "directory:finance/fingpt_sentiment.train"
    write(tmp_path, [row(0), row(1, more=4)])  # a column that is not read
    assert read(tmp_path).digest == got.digest
    write(tmp_path, [row(0), row(1, output="no")])
    assert read(tmp_path).digest != got.digest


def test_the_directory_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [row(0)])
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    assert len(read(None)) == 1
    with pytest.raises(DataError, match="elsewhere"):  # what is configured goes first
        read(tmp_path / "elsewhere")
    monkeypatch.delenv("FEDSIM_DATA")
    with pytest.raises(DataError, match="--data-dir PATH or set FEDSIM_DATA"):
        read(None)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data directory: got .*gone"):
        read(tmp_path / "gone")
    with pytest.raises(DataError, match=r"fingpt_sentiment.train.jsonl.gz.*: nothing\."):
        read(tmp_path)
    write(tmp_path, [row(0)], name="other.train")
    with pytest.raises(DataError, match=r": other.train.jsonl.gz\."):
        read(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), row(1, output=None)], r"row 1: column 'output' is missing or null"),
        (
            [{"input": "x", "output": "y"}],
            r"'instruction' .*, and input if there is one\. .*has inpu",
        ),
        ([], r"has no rows"),
        ([row(0), row(1), "{half"], r"fingpt_sentiment.train.jsonl.gz, line 3: "),
        ([row(0), "", "[1, 2]"], r"fingpt_sentiment.train.*line 3: .*one JSON object on each line"),
        ([row(0), '"text"'], r"fingpt_sentiment.train.*line 2.*Mend or remove the line"),
    ],
)
def test_broken_rows(tmp_path: Path, rows: list[Any], message: str) -> None:
    write(tmp_path, rows)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 8]) + content[
        middle + 8 :]  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"not gzip at all", lambda c: c[: len(c) // 2], flipped,
     lambda c: c[:-8] + b"\0" * 8],
    ids=["text", "cut", "flipped", "checksum"],
)  # fmt: skip
def test_broken_files(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path, [row(n) for n in range(500)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train.jsonl.gz cannot be read to its end.*Copy the file"):
        read(tmp_path)


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0)])
    path.write_bytes(gzip.compress(b'{"input": "\xff"}\n'))
    with pytest.raises(DataError, match=r"jsonl.gz.*expected UTF-8\. Store the file as UTF-8"):
        read(tmp_path)


FORMS = {
    "blank lines": "\n\n{}\n\n \n{}\n\n\n", "BOM": "\ufeff{}\n{}\n", "CRLF": "{}\r\n{}\r\n",
    "no newline": "{}\n{}", "BOM, CRLF, blank": "\ufeff\r\n{}\r\n\r\n{}",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [True, False])
def test_json_lines_as_people_have_them(tmp_path: Path, form: str, packed: bool) -> None:
    path = write(tmp_path, [])
    made = FORMS[form].format(*(json.dumps(row(n), ensure_ascii=False) for n in range(2))).encode()
    if packed:
        path.write_bytes(gzip.compress(made))
    else:
        path.unlink()
        path.with_suffix("").write_bytes(made)
    assert read(tmp_path).rows == [row(0), row(1)]


def test_one_file_of_a_name(tmp_path: Path) -> None:
    write(tmp_path, [row(0)]).with_suffix("").write_text(json.dumps(row(1)))
    with pytest.raises(
        DataError, match=r"got \['.*train.jsonl.gz', '.*train.jsonl'\].*one of them"
    ):
        read(tmp_path)


CELLS = [
    ("a", "a"),
    (None, ""),
    (7, "7"),
    (0.1, "0.1"),
    (True, "true"),
    ("7", "7"),
    ("None", "None"),
]


@pytest.mark.parametrize(("value", "text"), CELLS)
def test_a_cell_as_text(value: Any, text: str) -> None:
    """A number is written as JSON writes it."""
    assert domains.cell({"x": value}, "x") == text and domains.cell({}, "x") == ""


@pytest.mark.parametrize("value", [["positive"], {"a": 1}, []])
def test_a_list_is_no_answer(tokenizer: Any, settings: Callable[..., Config], value: Any) -> None:
    made = sources.Rows([row(0), row(1, output=value)], "folder:own", "d")
    with pytest.raises(DataError, match=r"folder:own, row 1, column 'output': got [\[{].*one text"):
        training.load(settings(clients__number=1), made, FINANCE, tokenizer, KEY)


@pytest.mark.parametrize("name", ["coding", "finance", "general"])
def test_input_may_be_missing_or_null(name: str) -> None:
    domain = domains.load(name)
    assert domain.columns == COLUMNS and domain.optional == OPTIONAL
    for given in ({}, {"input": None}, {"input": ""}):
        made = {"instruction": "I", "output": 3} | given
        assert domain.pairs["fedsim"](made) == ("I", "3")
        assert domain.pairs["flowertune"](made)[0].rstrip() == "I"  # the apps' own space


def test_no_source_in_place_of_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    data = Data(source="hub")
    with pytest.raises(DataError, match=r"flwrlabs/fingpt.*no network.*--data-dir"):
        sources.load(data, FINANCE, sources.training_set(data, FINANCE), COLUMNS, OPTIONAL)
    bare = replace(FINANCE, name="bare", embedded=None)
    with pytest.raises(DataError, match=r"data.source: got 'embedded'.*'bare'"):
        sources.load(Data(source="embedded"), bare, bare.train[0], bare.columns)


def test_hub_sets_are_cut_as_the_evaluator_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """fpb and fiqa: all parts joined, then a quarter drawn with seed 42."""
    import datasets

    parts = {name: datasets.Dataset.from_dict({"sentence": [f"{name} {n}" for n in range(size)],
             "label": [n % 3 for n in range(size)]})
             for name, size in (("train", 40), ("test", 20))}  # fmt: skip
    asked = []

    def local(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        whole = datasets.DatasetDict(parts)
        return whole[kwargs["split"]] if "split" in kwargs else whole

    monkeypatch.setattr(datasets, "load_dataset", local)
    task = FINANCE.tasks["fpb"]
    got = sources.load(Data(source="hub"), FINANCE, task.data, task.columns)
    joined = datasets.concatenate_datasets(list(parts.values()))
    want = joined.train_test_split(test_size=0.25, seed=42)["test"]
    assert got.rows == list(want) and len(got) == 15
    assert asked[0][0] == ("takala/financial_phrasebank",)
    assert asked[0][1] == {"data_dir": "sentences_50agree", "revision": "refs/convert/parquet"}
    assert got.origin == "hub:takala/financial_phrasebank@refs/convert/parquet"
    plain = sources.load(Data(source="hub"), FINANCE, DataSet("x", "test", "org/x"), ("sentence",))
    assert plain.rows == list(parts["test"]) and asked[1][1]["split"] == "test"


def test_training_sets_by_name() -> None:
    medical = domains.load("medical")
    assert sources.training_set(Data(), medical) is medical.train[0]
    for name in (medical.train[1].name, medical.train[1].hub):
        assert sources.training_set(Data(train=name), medical) is medical.train[1]
    own = sources.training_set(Data(train="org/own"), medical)
    assert (own.name, own.split, own.hub, own.revision) == ("own", "train", "org/own", None)
    at = sources.training_set(Data(train="org/own@refs/pr/3"), medical)
    assert (at.name, at.hub, at.revision) == ("own", "org/own", "refs/pr/3")
    there = sources.training_set(Data(train="own", source="directory"), medical)
    assert (there.name, there.split, there.hub) == ("own", "train", "")


def test_tasks_by_name() -> None:
    assert list(sources.tasks(Data(), FINANCE, ())) == ["fpb", "fiqa", "tfns"]
    assert list(sources.tasks(Data(), FINANCE, ("tfns",))) == ["tfns"]
    assert list(sources.tasks(Data(source="embedded"), FINANCE, ())) == ["newswire"]
    with pytest.raises(DataError, match=r"evaluate.tasks: got 'fbp'\. Did you mean 'fpb'\?"):
        sources.tasks(Data(), FINANCE, ("fbp",))


PAIRS = {
    "finance": ("I Q", "A"), "coding": ("I Q", "A"), "general": ("I", "A"), "medical": ("Q", "A"),
}  # fmt: skip


@pytest.mark.parametrize("name", domains.known())
def test_columns_become_pairs_as_in_the_apps(name: str) -> None:
    domain = domains.load(name)
    row = {"instruction": "I", "input": "Q", "output": "A"}
    assert domain.pairs["flowertune"](row) == PAIRS[name]
    assert domain.name == name and domain.train[0].hub.startswith("flwrlabs/")


LABELLED = [
    ("fpb", {"sentence": "s", "label": 0}, "negative", "news"),
    ("fpb", {"sentence": "s", "label": 1}, "neutral", "news"),
    ("fpb", {"sentence": "s", "label": 2}, "positive", "news"),
    ("fiqa", {"sentence": "s", "sentiment_score": -0.11, "format": "post"}, "negative", "tweet"),
    ("fiqa", {"sentence": "s", "sentiment_score": -0.1, "format": "headline"}, "neutral", "news"),
    ("fiqa", {"sentence": "s", "sentiment_score": 0.09, "format": "post"}, "neutral", "tweet"),
    ("fiqa", {"sentence": "s", "sentiment_score": "0.1", "format": "post"}, "positive", "tweet"),
    ("tfns", {"text": "s", "label": 0}, "negative", "tweet"),
    ("tfns", {"text": "s", "label": 1}, "positive", "tweet"),
    ("tfns", {"text": "s", "label": 2}, "neutral", "tweet"),
]


@pytest.mark.parametrize(("task", "values", "gold", "kind"), LABELLED)
def test_labels(task: str, values: dict[str, Any], gold: str, kind: str) -> None:
    item = FINANCE.tasks[task].forms["fedsim"].item(values)
    assert item.gold == gold and item.choices == ("negative", "neutral", "positive")
    question = (
        f"What is the sentiment of this {kind}? "
        "Please choose an answer from {negative/neutral/positive}. s"
    )
    assert item.prompt == PROMPT.format(instruction=question)


COUNTS = {
    "fpb": {"negative": 125, "neutral": 665, "positive": 301},
    "fiqa": {"negative": 91, "neutral": 22, "positive": 161},
    "tfns": {"negative": 319, "neutral": 1393, "positive": 437},
}


def real() -> Data:
    require("data", REAL.is_dir(), f"there is no data set in {REAL}; see FEDSIM_DATA")
    return Data(source="directory", dir=str(REAL))


def test_the_real_training_set() -> None:
    data = real()
    rows = sources.load(data, FINANCE, sources.training_set(data, FINANCE), COLUMNS, OPTIONAL)
    assert len(rows) == 13_961
    answers = Counter(FINANCE.pairs["fedsim"](row)[1] for row in rows.rows)
    assert answers == {"neutral": 8366, "positive": 3451, "negative": 2144}


@pytest.mark.parametrize(("name", "size"), [("fpb", 1091), ("fiqa", 274), ("tfns", 2149)])
def test_the_real_tasks(name: str, size: int) -> None:
    task = FINANCE.tasks[name]
    rows = sources.load(real(), FINANCE, task.data, task.columns)
    items = [task.forms["fedsim"].item(row) for row in rows.rows]
    assert len(items) == size
    assert Counter(item.gold for item in items) == COUNTS[name]


@pytest.mark.parametrize("name", ["coding", "general", "medical"])
def test_the_other_real_training_sets(name: str) -> None:
    domain, data = domains.load(name), real()
    chosen = next(d for d in domain.train if (REAL / domain.folder / f"{d.name}.train.jsonl.gz")
                  .is_file())  # fmt: skip
    rows = sources.load(data, domain, chosen, domain.columns)
    assert len(rows) > 900 and all(all(domain.pairs["fedsim"](row)) for row in rows.rows)


# ------------------------------------------------------------------------------ plans and batches

KEY = seeds.run_key(42)


def plan_config(protocol: str = "fedsim", **server: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"protocol": protocol}, "clients": {"number": 20}, "server": server,
        "train": {"batch": 4, "steps": 3},
    }  # fmt: skip
    return build(values, "test")


@pytest.mark.parametrize(("protocol", "repeats"), [("flowertune", True), ("fedsim", False)])
def test_what_a_visit_sees(protocol: str, repeats: bool) -> None:
    config, owned = plan_config(protocol), np.arange(100, 130)

    def visit(round: int, client: int = 3) -> list[list[int]]:
        return [step_examples(config, owned, KEY, client, round, step).tolist()
                for step in range(3)]  # fmt: skip

    assert visit(1) == visit(1)
    assert (visit(1) == visit(2)) is repeats
    assert visit(1, client=3) != visit(1, client=4)
    seen = [example for step in visit(1) for example in step]
    assert len(set(seen)) == 12 and set(seen) <= set(owned.tolist())


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("protocol", ["flowertune", "fedsim"])
def test_every_epoch_sees_every_example_once(protocol: str, size: int) -> None:
    config, owned = plan_config(protocol), np.arange(50, 50 + size)
    batches = math.ceil(size / 4)
    epochs = []
    for epoch in range(3):
        picked = [step_examples(config, owned, KEY, 0, 1, epoch * batches + b)
                  for b in range(batches)]  # fmt: skip
        assert [len(p) for p in picked[:-1]] == [4] * (batches - 1)
        epochs.append(np.concatenate(picked).tolist())
        assert sorted(epochs[-1]) == owned.tolist()
    assert size < 5 or epochs[0] != epochs[1]


@pytest.mark.parametrize("rounds", [1, 2, 7, 200])
def test_the_learning_rate_is_a_cosine_over_the_rounds(rounds: int) -> None:
    rates = [cosine_lr(r, rounds, 5e-5, 1e-6) for r in range(1, rounds + 1)]
    assert rates[-1] == 1e-6 and rates == sorted(rates, reverse=True)
    assert len(set(rates)) == rounds
    assert cosine_lr(0, rounds, 5e-5, 1e-6) == pytest.approx(5e-5, rel=1e-15)
    assert cosine_lr(rounds, 2 * rounds, 5e-5, 1e-6) == pytest.approx(2.55e-5, rel=1e-12)


def test_a_round_plan() -> None:
    config, population = plan_config(rounds=10, fraction=0.25), partition.iid(210, 20, 42)
    plans = [plan_round(config, population, r, KEY) for r in range(1, 11)]
    for plan in plans:
        ids = plan.client_ids
        assert len(plan) == 5 and len(set(ids)) == 5 and sorted(ids) == ids.tolist()
        assert set(ids) <= set(range(20))
        assert plan.weights.tolist() == population.sizes[ids].tolist()
        assert set(plan.lr) == {cosine_lr(plan.round, 10, 5e-5, 1e-6)}
        assert sorted(np.concatenate(plan.lanes)) == list(range(5))
    again = plan_round(config, population, 3, KEY)
    assert again.client_ids.tolist() == plans[2].client_ids.tolist()
    assert len({tuple(p.client_ids) for p in plans}) > 1
    other = [plan_round(config, population, r, seeds.run_key(43)) for r in range(1, 11)]
    assert [o.client_ids.tolist() for o in other] != [p.client_ids.tolist() for p in plans]


def test_every_client_is_drawn_as_often() -> None:
    """4 of 20 in 1000 rounds: 200 each, standard deviation sqrt(1000 x 0.2 x 0.8) = 12.6."""
    config, population = plan_config(rounds=1000, fraction=0.2), partition.iid(40, 20, 42)
    drawn = np.concatenate([plan_round(config, population, r, KEY).client_ids
                            for r in range(1, 1001)])  # fmt: skip
    assert abs(np.bincount(drawn, minlength=20) - 200).max() < 4.5 * 12.65


@pytest.mark.parametrize(("fraction", "least", "want"), [(0.26, 1, 5), (0.01, 1, 1), (0.01, 2, 2)])
def test_clients_of_a_plan(fraction: float, least: int, want: int) -> None:
    config = plan_config(fraction=fraction, min_clients=least)
    assert len(plan_round(config, partition.iid(40, 20, 42), 1, KEY)) == want
