"""Examples that lose their labels, and clients who have none: counted, said, and at last refused.

Losses are those of stock transformers over the labelled examples; a client or a step without any
measures nothing, which is not 0. About 15 s.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from fedsim import cost, display, report, simulate
from fedsim.config import Config
from fedsim.core import LocalRule, Population
from fedsim.data import training
from fedsim.data.tokens import TokenStore
from fedsim.data.training import Training
from fedsim.errors import DataError
from fedsim.evaluate.generation import Request
from fedsim.evaluate.writing import tokenise
from fedsim.record import Meter
from fedsim.world import load_world
from tests.lab import CLIENTS, EXAMPLES, Lab, labels, plan_of, stored, without
from tests.stock import Stock

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def rows(long: set[int], n: int = 6) -> list[dict[str, str]]:
    """Those of `long` have a prompt of more than 200 tokens; `seed` 42 deals 3 to each of two."""
    return [{"instruction": "word " * (60 if i in long else 1), "input": str(i), "output": "yes"}
            for i in range(n)]  # fmt: skip


def directory(folder: Path, made: list[dict[str, Any]]) -> dict[str, Any]:
    path = folder / "data" / "finance" / "fingpt_sentiment.train.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in made)
    return {
        "data__source": "directory", "data__dir": str(folder / "data"), "data__limit": None,
        "clients__number": 2, "server__fraction": 1.0, "server__rounds": 1, "evaluate__limit": 0,
        "train__batch": 3, "data__max_length": 180,
    }  # fmt: skip


DEALT = np.random.default_rng(42).permutation(6)  # three rows of each client


def test_a_client_without_labels_measures_nothing(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    values = directory(tmp_path, rows(set(DEALT[:3].tolist())))
    config, meter = settings(**values, data__max_unlabelled=0.5), Meter()
    said = "6 examples: 3 cut at 180 tokens, 3 without a label, 1 of 2 clients without any"
    assert dict(cost.estimate(config).lines())["  of"] == said
    folder = simulate.run(config, meter=meter)
    assert meter.notes == [said]
    first, second = (json.loads(line) for line in (folder / "clients.jsonl").read_text().split("\n")
                     if line)  # fmt: skip
    assert (first["loss_first"], first["loss_last"]) == (None, None)
    assert first["ok"] and first["weight"] == second["weight"] == 3
    (line,) = [json.loads(x) for x in (folder / "rounds.jsonl").read_text().splitlines()]
    assert second["loss_first"] > 1 and line["loss_first"] == second["loss_first"]
    assert line["loss_last"] == second["loss_last"] and not line["failed"]
    found = json.loads((folder / "environment.json").read_text())["data"]
    counts = {"examples": 6, "cut": 3, "unlabelled": 3, "clients_without_labels": 1}
    assert {name: found[name] for name in counts} == counts
    page = report.write(folder).read_text()
    assert "Of 6 training examples 3 are cut at 180 tokens and 3 have no label; 1 clients" in page


def test_nothing_is_said_where_nothing_is_lost(settings: Callable[..., Config]) -> None:
    config, meter = settings(server__rounds=1, evaluate__limit=0), Meter()
    assert "  of" not in dict(cost.estimate(config).lines())
    page = report.write(simulate.run(config, meter=meter)).read_text()
    assert meter.notes == [] and "have no label" not in page


def test_a_step_without_labels(lab: Callable[..., Lab]) -> None:
    """Client 1's second step has none, client 2 has none at all; their losses are no number."""
    one = lab(train__batch=3)
    second = one.batch(1, 1)
    gone = [*second, *range(2 * EXAMPLES, 3 * EXAMPLES)]
    one = replace(one, store=without(one.store, gone))
    plan = plan_of(range(CLIENTS), (3, 2, 4, 1))
    meter, losses = Meter(), []
    count = Meter.count

    def spy(self: Meter, **given: Any) -> None:
        if given["losses"] is not None:
            losses.append(given["losses"].clone())
        count(self, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, "count", spy)
        found = {int(b.index[0]): b for b in one.trainer().train(plan, LocalRule(one.start), meter)}
    assert all(block.ok.all() for block in found.values())
    assert np.isnan(found[2].loss_first[0]) and np.isnan(found[2].loss_last[0])
    assert torch.equal(found[2].row[0], one.start)
    stock = Stock(one, 1)
    stock.backward(0)
    assert found[1].loss_first[0] == pytest.approx(float(stock.loss), rel=1e-5)
    assert np.isnan(found[1].loss_last[0])
    for client in (0, 3):
        assert np.isfinite([found[client].loss_first[0], found[client].loss_last[0]]).all()
    assert all((loss[torch.isfinite(loss)] > 0).all() for loss in losses)


def test_private_steps_count_the_labelled(lab: Callable[..., Lab]) -> None:
    privacy = {"privacy__level": "example", "privacy__noise": 1.0, "privacy__clip": 1.0}
    one = lab(**privacy, train__batch=EXAMPLES)
    gone = [EXAMPLES, EXAMPLES + 3]
    one = replace(one, store=without(one.store, gone))
    (block,) = one.trainer().train(plan_of([1], (1,) * CLIENTS), LocalRule(one.start), Meter())
    stock, losses = Stock(one, 1), []
    for example in set(one.batch(1, 0).tolist()) - set(gone):
        ids = torch.as_tensor(one.store.of(example))[None]
        losses.append(stock.model(input_ids=ids, labels=labels(one.store, example)[None]).loss)
    mean = float(torch.stack(losses).detach().mean())
    assert len(losses) == EXAMPLES - 2 and block.loss_first[0] == pytest.approx(mean, rel=1e-5)


def test_a_round_whose_last_step_measured_nothing_is_shown() -> None:
    line = {"round": 1, "clients": 1, "failed": 0, "tokens": 10, "loss_first": 2.0,
            "loss_last": None, "seconds": {"train": 1.0}, "total_mib": 0.0,
            "over_budget": False}  # fmt: skip
    console = Console(record=True, width=200)
    with display.Display(console, Meter(lines=[line])):
        pass
    assert "round   1  1 clients  10 tokens/s" in console.export_text()


# --------------------------------------------------------------------------- how many are too many


def lost(n: int, of: int, unmarked: int = 0, cut: bool = True) -> TokenStore:
    """`n` of so many examples have no label, the first `unmarked` for want of the mark."""
    made = stored([np.arange(8)] * of, [8] * n + [5] * (of - n))
    where = np.arange(of)
    return replace(made, cut=(where < n) & cut, unmarked=where < unmarked)


def test_the_share_that_stops_a_run(settings: Callable[..., Config]) -> None:
    usual = settings()
    assert usual.data.max_unlabelled == 0.1
    training.check_labels(lost(10, 100), usual)
    with pytest.raises(DataError, match=r"^11 of 100 .*expected at most 10%.*unlabelled = 0.11\."):
        training.check_labels(lost(11, 100), usual)
    training.check_labels(lost(11, 100), settings(data__max_unlabelled=0.11))
    training.check_labels(lost(99, 100), settings(data__max_unlabelled=1.0))
    with pytest.raises(DataError, match=r"^1 of 100 .*at most 0%"):
        training.check_labels(lost(1, 100), settings(data__max_unlabelled=0.0))
    with pytest.raises(DataError, match=r"^100 of 100 ") as none:
        training.check_labels(lost(100, 100), settings(data__max_unlabelled=1.0))
    assert "Or accept it" not in str(none.value)


@pytest.mark.parametrize(
    ("store", "cause", "remedy"),
    [(lost(2, 4), r"2 have their answer behind the first 256 tokens;", "Raise data.max_length"),
     (lost(2, 4, 2, cut=False), r"in 2 this tokenizer merges '### Response:' with its neigh",
      "run.protocol = fedsim"),
     (lost(2, 4, cut=False), "2 have an empty answer;", "Or accept it"),
     (lost(3, 4, 1), r"2 have their answer .*, in 1 this tokenizer", "max_length.*protocol")],
)  # fmt: skip
def test_the_cause_is_the_true_one(
    settings: Callable[..., Config], store: TokenStore, cause: str, remedy: str
) -> None:
    with pytest.raises(DataError, match=rf"{cause}.*{remedy}") as caught:
        training.check_labels(store, settings())
    assert ("data.max_length" in str(caught.value)) is (
        "answer behind" in cause + str(caught.value)
    )


def test_a_run_stops_before_it_begins(settings: Callable[..., Config], tmp_path: Path) -> None:
    config = settings(**directory(tmp_path, rows({0, 1, 2})))
    for start in (simulate.run, cost.estimate):
        with pytest.raises(
            DataError, match=r"3 of 6 training examples have no label: 3 have their"
        ):
            start(config)


def test_who_has_no_label() -> None:
    """Clients of 2, 0 and 3 examples; the first's two are gone. Nobody's example counts too."""
    population = Population(np.array([0, 2, 2, 5]), np.array([4, 1, 0, 2, 3]))
    found = Training(without(lost(0, 6), [1, 4]), population, np.zeros(3, dtype=bool))
    assert dict(found.counts) == {
        "examples": 6, "cut": 0, "unlabelled": 2, "clients_without_labels": 2,
    }  # fmt: skip
    assert found.said(64) == "6 examples: 2 without a label, 2 of 3 clients without any"


# ------------------------------------------------------------------ tokens without an embedding


@pytest.fixture
def padded(settings: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """A model whose tokenizer has a token more than it; the rows are given."""

    def make(made: list[dict[str, str]]) -> Config:
        config = settings(**directory(tmp_path, made))
        folder = tmp_path / "model"
        folder.mkdir()
        for file in Path(config.model.name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        more = PreTrainedTokenizerFast.from_pretrained(folder)
        more.add_special_tokens({"pad_token": "[PAD]"})
        more.save_pretrained(folder)
        return config.model_copy(
            update={"model": config.model.model_copy(update={"name": str(folder)})}
        )

    return make


def test_a_token_beyond_the_embedding_names_its_row(padded: Callable[..., Config]) -> None:
    made = rows(set())
    made[4]["input"] = "the token [PAD] in a text"
    config = padded(made)
    for start in (simulate.run, cost.estimate):
        with pytest.raises(DataError, match=r"row 4: token '\[PAD\]' has number 384; .* below 384"):
            start(config)


def test_a_tokenizer_that_is_larger_than_its_model_may_be(padded: Callable[..., Config]) -> None:
    world = load_world(padded(rows(set())), 1)
    with pytest.raises(DataError, match=r"prompt 'a \[PAD\]': token '\[PAD\]' has number 384"):
        tokenise(world.tokenizer, [Request("a [PAD]", 0, 1)], world.base.model)
    assert tokenise(world.tokenizer, [Request("a", 0, 1)], world.base.model)
