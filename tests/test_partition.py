"""Who holds which example: partitions by size and by label, labels, and clusters of text.

Proved against flwr-datasets, example by example and in order, on what it recorded in
flower_partitions.json; against moments of the Dirichlet distribution; by hand; and by properties
that hold for any data. Clusters are proved on planted topics, and on real text against its
categories. About 5 s, 2 more with real data.

flwr-datasets does not go together with the `datasets` that fedsim needs. The record was made with
its version 0.6.1 in an environment of its own (datasets 4.8.5, numpy 2.4.6). Everything but
"clients" was written by hand; that is what this script fills in, given the file:

    import json, pathlib, sys
    from datasets import Dataset
    from flwr_datasets import partitioner
    file = pathlib.Path(sys.argv[1])
    record = json.loads(file.read_text())
    for case in record["cases"]:
        n, column = case["rows"], case["column"]
        table = {"i": range(n)} | ({column: record["labels"][column][:n]} if column else {})
        part = getattr(partitioner, case["partitioner"])(**case["arguments"])
        part.dataset = Dataset.from_dict(table).shuffle(seed=case["seed"])
        case["clients"] = [part.load_partition(c)["i"][:] for c in range(part.num_partitions)]
    lines = ",\\n".join(map(json.dumps, record["cases"]))
    file.write_text(f'{{"labels": {json.dumps(record["labels"])},\\n"cases": [\\n{lines}\\n]}}\\n')
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from fedsim import clients, cost, domains, seeds
from fedsim.config import Config, build, read_toml, resolved
from fedsim.core import Population
from fedsim.data import clusters, labels, partition, sources
from fedsim.data.labels import Labels
from fedsim.errors import ConfigError, DataError
from fedsim.world import load_world
from tests.conftest import require

REAL = Path(os.environ.get("FEDSIM_DATA") or Path(__file__).parents[2] / "shared" / "data")
FLOWER = json.loads((Path(__file__).parent / "flower_partitions.json").read_text(encoding="utf-8"))


def column(cells: Sequence[Any]) -> Labels:
    return labels.column([{"label": cell} for cell in cells], "label")


def balanced(values: int, each: int) -> Labels:
    return column([i % values for i in range(values * each)])


def check_cover(population: Population, examples: int) -> None:
    """Every example once."""
    assert sorted(population.examples.tolist()) == list(range(examples))
    assert population.offsets[0] == 0 and population.offsets[-1] == examples
    assert population.offsets.dtype == population.examples.dtype == np.int64
    assert (population.sizes >= 0).all()


def same(a: Population, b: Population) -> bool:
    return np.array_equal(a.offsets, b.offsets) and np.array_equal(a.examples, b.examples)


# ------------------------------------------------------------------------------------- Flower


def ours(case: dict[str, Any]) -> Population:
    """What we give for a case of Flower's."""
    given, rows, seed = case["arguments"], case["rows"], case["seed"]
    number = given.get("num_partitions", len(case["clients"]))
    kind = case["partitioner"].removesuffix("Partitioner")
    if kind == "Iid":
        return partition.iid(rows, number, seed)
    if kind in ("Linear", "Square"):
        return partition.power(rows, number, seed, skew={"Linear": 1.0, "Square": 2.0}[kind])
    if kind == "Exponential":
        return partition.exponential(rows, number, seed, skew=1.0)
    held = column(FLOWER["labels"][case["column"]][:rows])
    if kind == "NaturalId":
        return partition.natural(held, number, seed)
    assert given["seed"] == seed
    if kind == "Dirichlet":
        size = given["min_partition_size"]
        return partition.dirichlet(held, number, seed, alpha=given["alpha"], min_size=size)
    if kind == "Pathological":
        classes = given["num_classes_per_partition"]
        return partition.pathological(held, number, seed, classes=classes)
    return partition.shards(held, number, seed, shards=given["num_shards_per_partition"])


@pytest.mark.parametrize("case", FLOWER["cases"], ids=lambda c: f"{c['partitioner']}-{c['column']}")
def test_flower_deals_out_the_same(case: dict[str, Any]) -> None:
    got = ours(case)
    check_cover(got, case["rows"])
    assert [got.of(c).tolist() for c in range(len(got))] == case["clients"]


def test_the_record_has_every_partitioner_of_both() -> None:
    kinds = Counter(case["partitioner"] for case in FLOWER["cases"])
    assert len(kinds) == 8 and sum(kinds.values()) == 17
    # Only lognormal is ours alone; power is two of Flower's.
    assert len(partition.PARTITIONERS) == len(kinds) - 1 + 1


# --------------------------------------------------------------------------------- properties

SEEDS = st.integers(0, 2**32)
DATA = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=120)


@effort(max_examples=100, deadline=None)
@given(
    examples=st.integers(1, 300), share=st.floats(0, 1), seed=SEEDS, skew=st.floats(0, 5),
    name=st.sampled_from(["iid", "power", "exponential", "lognormal"]),
)  # fmt: skip
def test_partitions_by_size(
    examples: int, share: float, seed: int, skew: float, name: str
) -> None:  # fmt: skip
    number = max(1, int(share * examples))
    options = {} if name == "iid" else {"skew": skew}
    got = partition.PARTITIONERS[name](examples, number, seed, **options)
    check_cover(got, examples)
    assert len(got) == number
    assert same(got, partition.PARTITIONERS[name](examples, number, seed, **options))
    if name in ("power", "exponential"):
        assert (np.diff(got.sizes) >= 0).all()
    if name == "lognormal":
        assert got.sizes.min() >= 1
    # Sizes aside, all of them are one shuffle.
    assert np.array_equal(got.examples, partition.iid(examples, 1, seed).examples)


@effort(max_examples=200, deadline=None)
@given(cells=DATA, share=st.floats(0, 0.25), seed=SEEDS, data=st.data())
def test_partitions_by_label(
    cells: list[str], share: float, seed: int, data: st.DataObject
) -> None:  # fmt: skip
    held, name = column(cells), data.draw(st.sampled_from(clients.BY_LABEL))
    number = max(1, int(share * len(cells)))
    options: dict[str, Any] = {}
    if name == "natural":
        number = len(held.values)
    elif name == "shards":
        options["shards"] = data.draw(st.integers(1, len(cells) // number))
    elif name == "pathological":
        options["classes"] = data.draw(st.integers(1, len(held.values)))
    else:
        options["alpha"] = data.draw(st.floats(1e-3, 1e3))
    try:
        got = partition.PARTITIONERS[name](held, number, seed, **options)
    except ConfigError:
        assert name in ("dirichlet", "pathological")  # the others have no reason to fail
        return
    check_cover(got, len(cells))
    assert len(got) == number and got.sizes.min() >= 1
    assert same(got, partition.PARTITIONERS[name](held, number, seed, **options))
    counts = labels.histogram(got, held)
    assert np.array_equal(counts.sum(axis=0), held.counts)
    assert np.array_equal(counts.sum(axis=1), got.sizes)
    if name == "natural":
        assert np.array_equal(counts, np.diag(held.counts))
    if name == "pathological":
        assert set((counts > 0).sum(axis=1)) == {options["classes"]}
        for shares in counts.T:  # a label is shared evenly
            assert np.ptp(shares[shares > 0]) <= 1
    if name == "shards":  # blocks of even size, each with a run of the sorted labels
        assert np.ptp(got.sizes) <= options["shards"]


@pytest.mark.parametrize("name", list(partition.PARTITIONERS))
def test_another_seed_deals_otherwise(name: str) -> None:
    held = balanced(4, 50)
    data: Any = held if name in clients.BY_LABEL else len(held)
    options = clients.OPTIONS[name]
    a, b = (partition.PARTITIONERS[name](data, 4, seed, **options) for seed in (1, 2))
    assert not np.array_equal(a.examples, b.examples)


# ------------------------------------------------------------------------------------- by hand


def test_sizes_by_hand() -> None:
    assert partition.power(10, 4, 0, skew=1.0).sizes.tolist() == [1, 2, 3, 4]
    assert partition.power(31, 4, 0, skew=2.0).sizes.tolist() == [1, 4, 9, 17]  # 1/30 .. 16/30
    assert partition.power(11, 4, 0, skew=0.0).sizes.tolist() == [2, 2, 2, 5]
    # 151 (1, 2, 4, 8) / 15 is 10.07, 20.13, 40.27, 80.53.
    doubling = partition.exponential(151, 4, 0, skew=math.log(2))
    assert doubling.sizes.tolist() == [10, 20, 40, 81]
    assert partition.lognormal(11, 4, 0, skew=0.0).sizes.tolist() == [3, 3, 3, 2]


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.5])
def test_lognormal_sizes_are_lognormal(sigma: float) -> None:
    sizes = partition.lognormal(2_000_000, 1000, 3, skew=sigma).sizes
    # A standard deviation over n draws is off by about sigma / sqrt(2 n), 2.2 % here.
    assert np.log(sizes - 1).std() == pytest.approx(sigma, rel=0.08)
    assert partition.lognormal(400, 20, 3, skew=sigma, min_size=9).sizes.min() >= 9


@pytest.mark.parametrize("alpha", [0.05, 0.5, 5.0])
def test_dirichlet_shares_have_the_second_moment_of_a_dirichlet(alpha: float) -> None:
    """E sum_c p_c^2 = (alpha + 1) / (N alpha + 1); labels are independent draws."""
    held, n = balanced(800, 200), 10
    counts = labels.histogram(partition.dirichlet(held, n, 5, alpha=alpha), held)
    squares = ((counts / 200) ** 2).sum(axis=0)
    error = squares.std() / math.sqrt(len(squares))
    # Cutting at whole examples moves a share by up to 1/200.
    assert abs(squares.mean() - (alpha + 1) / (n * alpha + 1)) <= 4 * error + 0.005


def test_smaller_alpha_means_less_alike() -> None:
    """Mean total variation between a client's labels and everyone's, over five seeds."""
    held = balanced(10, 200)

    def distance(alpha: float, seed: int) -> float:
        counts = labels.histogram(partition.dirichlet(held, 10, seed, alpha=alpha), held)
        shares = counts / counts.sum(axis=1, keepdims=True)
        return float(np.abs(shares - 0.1).sum(axis=1).mean() / 2)

    means = [np.mean([distance(a, s) for s in range(5)]) for a in (0.1, 0.5, 2.0, 10.0, 100.0)]
    assert all(a > b + 0.03 for a, b in pairwise(means))
    assert means[-1] < 0.1 and means[0] > 0.5


def test_shards_by_hand() -> None:
    """12 examples of a, b, c in 3 x 2 blocks of two: no block crosses a label."""
    held = column(list("aaaabbbbcccc"))
    got = partition.shards(held, 3, 8, shards=2)
    counts = labels.histogram(got, held)
    assert set(counts.ravel()) <= {0, 2, 4} and got.sizes.tolist() == [4, 4, 4]


def test_shards_leave_nothing_out() -> None:
    """Flower's would have blocks of one and drop 99 of these."""
    got = partition.shards(balanced(1, 199), 50, 8, shards=2)
    check_cover(got, 199)
    assert set(got.sizes) == {3, 4} and (got.sizes == 4).sum() == 49


def test_dirichlet_draws_again_until_everyone_has_enough() -> None:
    held = balanced(3, 100)
    assert partition.dirichlet(held, 8, 0, alpha=0.5).sizes.min() == 13
    assert partition.dirichlet(held, 8, 0, alpha=0.5, min_size=14).sizes.min() >= 14


def test_a_client_no_longer_has_its_labels_in_order() -> None:
    held = balanced(2, 100)
    for deal in (
        partition.dirichlet(held, 2, 0, alpha=100.0), partition.shards(held, 2, 0, shards=2),
        partition.pathological(held, 2, 0, classes=2),
    ):  # fmt: skip
        codes = held.codes[deal.of(0)]
        assert len(set(codes)) == 2 and 20 < np.abs(np.diff(codes)).sum() < 80


# -------------------------------------------------------------------------------------- errors

FEW = column(list("aaab"))


@pytest.mark.parametrize(
    ("deal", "message"),
    [
        (lambda: partition.shards(FEW, 3, 0, shards=2), "clients.shards: got 2; .* at most 1"),
        (lambda: partition.natural(FEW, 3, 0), "clients.number: got 3; expected 2, the number of"),
        (lambda: partition.pathological(FEW, 3, 0, classes=3), "clients.classes: got 3; .* most 2"),
        (lambda: partition.pathological(FEW, 1, 0, classes=1), "label 'b' falls to 0 clients"),
        (lambda: partition.pathological(FEW, 4, 0, classes=2), "'a' falls to 4 clients; .* 1 to 3"),
        (lambda: partition.dirichlet(FEW, 5, 0, alpha=1.0), "clients.number: got 5; .* at most 4"),
        (lambda: partition.dirichlet(FEW, 3, 0, alpha=1.0, min_size=2), "at most 2, .* 2 each"),
        (lambda: partition.dirichlet(FEW, 4, 0, alpha=0.01), "clients.alpha: in 11 draws .* fewer"),
        (lambda: partition.lognormal(9, 5, 0, skew=1.0, min_size=2), "clients.number: got 5"),
        (lambda: partition.power(3, 4, 0, skew=1.0), "clients.number: got 4; expected at most 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_dealt_out(deal: Callable[[], Population], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deal()


def config(**values: Any) -> Config:
    return build({"clients": values, "run": {"seed": 7}}, "here")


def test_the_smallest_client_is_checked_whatever_the_partition() -> None:
    with pytest.raises(ConfigError, match=r"clients.min_size: client 0 has 0 examples; expected"):
        partition.build(config(number=9, partition="power", skew=3.0), 20)
    with pytest.raises(ConfigError, match=r"client 1 has 3 examples; expected at least 4"):
        partition.build(config(number=2, min_size=4), 7)
    with pytest.raises(ConfigError, match=r"clients.min_size: client 1 has 1 examples"):
        partition.build(config(number=2, partition="natural", by="x", min_size=2), 4, FEW)


def test_a_partition_by_label_needs_labels() -> None:
    with pytest.raises(ConfigError, match=r"clients.partition: got 'shards'"):
        partition.build(config(partition="shards", by="label"), 4)


# ------------------------------------------------------------------------------- configuration


def test_what_is_configured_is_what_is_built() -> None:
    literals = get_args(clients.Clients.model_fields["partition"].annotation)
    assert list(literals) == list(clients.OPTIONS) == list(partition.PARTITIONERS)


def test_every_partition_has_its_defaults() -> None:
    held = balanced(4, 50)
    for name, options in clients.OPTIONS.items():
        by = {"by": "label"} if name in clients.BY_LABEL else {}
        asked = config(number=4, partition=name, **by)
        assert asked.clients.options == options
        data: Any = held if by else len(held)
        want = partition.PARTITIONERS[name](data, 4, 7, **options)
        assert same(partition.build(asked, len(held), held), want)


def test_options_reach_the_partitioner(tmp_path: Path) -> None:
    held = balanced(4, 50)
    asked = config(number=5, partition="dirichlet", by="label", alpha=0.2, min_size=3)
    want = partition.dirichlet(held, 5, 7, alpha=0.2, min_size=3)
    assert same(partition.build(asked, 200, held), want)
    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps(resolved(asked)), encoding="utf-8")
    assert build(read_toml(file), "again") == asked


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 1.0}, "clients.alpha: got 1.0; expected only, and then, with "
         "clients.partition = dirichlet, which is iid"),
        ({"partition": "shards", "by": "x", "classes": 3}, "clients.classes: got 3; expected only"),
        ({"partition": "iid", "skew": 1.0}, "clients.skew: .* = power or exponential or lognormal"),
        ({"by": "x"}, "got clients.by; expected neither: clients.partition = iid"),
        ({"partition": "natural"}, "got neither; expected either clients.by"),
        ({"partition": "shards", "by": "x", "clusters": 3}, "got clients.by and clients.clusters"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_with_the_partition(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"here: {message}" if message[:3] != "got" else message):
        config(**values)


def test_flowertune_is_iid() -> None:
    values = {"run": {"protocol": "flowertune"}, "clients": {"partition": "lognormal"}}
    with pytest.raises(ConfigError, match=r"clients.partition: got lognormal; expected iid"):
        build(values, "here")


# -------------------------------------------------------------------------------------- labels


def test_columns_by_hand() -> None:
    got = column([10, 9, 10, 2])
    assert got.values == ("2", "9", "10") and got.codes.tolist() == [2, 1, 2, 0]
    got = column(["10", "9", "b", "B"])
    assert got.values == ("10", "9", "B", "b") and got.codes.tolist() == [0, 1, 3, 2]
    got = column([["x"], ["x", "y"], 3])
    assert got.values == ("3", "['x', 'y']", "['x']")
    assert got.codes.dtype == np.int64 and got.counts.tolist() == [1, 1, 1]


def test_columns_that_are_not_there() -> None:
    rows = [{"text": "a", "topic": "x"}, {"text": "b", "topic": None}, {"text": "c"}]
    with pytest.raises(ConfigError, match=r"clients.by: got 'topics'; .* Columns: text, topic\."):
        labels.column(rows, "topics")
    with pytest.raises(DataError, match=r"row 1 has no 'topic'"):
        labels.column(rows, "topic")


@pytest.fixture
def finance() -> tuple[list[dict[str, Any]], domains.Domain]:
    domain = domains.load("finance")
    data = build({"data": {"source": "embedded"}}, "here").data
    return sources.load(data, domain, domain.train[0], domain.columns).rows, domain


def test_labels_of_a_run(finance: tuple[list[dict[str, Any]], domains.Domain]) -> None:
    rows, domain = finance

    def of(limit: int, **values: Any) -> Labels | None:
        return labels.of(build({"clients": values, "data": {"limit": limit}}, ""), rows, domain)

    assert of(100) is None and of(100, partition="lognormal") is None
    held = of(100, partition="natural", by="output", number=3)
    assert held is not None and held.values == ("negative", "neutral", "positive")
    assert [held.values[c] for c in held.codes] == [row["output"] for row in rows[:100]]
    held = of(300, partition="shards", clusters=4)
    assert held is not None and len(held) == 300 and len(held.values) == 4
    assert (held.counts > 0).all()


def test_a_run_has_the_clients_that_were_asked_for(
    settings: Callable[..., Config], finance: tuple[list[dict[str, Any]], domains.Domain]
) -> None:  # fmt: skip
    """In training and in `plan`, which fails where a run would."""
    asked = settings(
        clients__partition="natural", clients__by="output", clients__number=3, server__fraction=1.0
    )
    held = labels.of(asked, *finance)
    assert held is not None and len(held) == asked.data.limit == 200
    population = load_world(asked, seeds.run_key(asked.run.seed)).data.population
    assert np.array_equal(labels.histogram(population, held), np.diag(held.counts))
    assert cost.estimate(asked).work is not None
    with pytest.raises(ConfigError, match="expected 3, the number of labels"):
        cost.estimate(settings(clients__partition="natural", clients__by="output"))


# ------------------------------------------------------------------------------------ clusters

TOPICS = (
    "piano violin concert melody orchestra chord", "river mountain forest valley glacier lake",
    "flour butter oven sugar yeast dough", "court judge verdict lawyer appeal trial",
)  # fmt: skip


def planted(each: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Texts of five words of one topic and two that all share."""
    rng = np.random.default_rng(seed)
    topic = rng.permutation(np.repeat(np.arange(len(TOPICS)), each))
    words = [[*rng.choice(TOPICS[t].split(), 5), "question", "please"] for t in topic]
    return [" ".join(rng.permutation(w)) for w in words], topic


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Normalised mutual information, 0 (none) to 1 (the same partition)."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1 / len(a))

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    rows, columns, both = entropy(table.sum(1)), entropy(table.sum(0)), entropy(table.ravel())
    return (rows + columns - both) / math.sqrt(rows * columns)


def test_vectors_are_tfidf() -> None:
    """Against the formula, dense: (1 + log tf) log(E / df), rows of norm 1."""
    texts = ["Cats purr; cats sleep", "dogs sleep", "cats and dogs", "", "dogs of the the 42 cat_s"]
    got = clusters.vectors(texts)
    words = [re.findall(r"[a-z]{3,}", text.lower()) for text in texts]
    df = Counter(w for ws in words for w in set(ws))
    vocabulary = sorted(w for w in df if df[w] == 2)
    assert got.vocabulary == tuple(vocabulary) == ("cats", "sleep")  # dogs are in more than half
    dense = np.array([
        [(1 + math.log(ws.count(w))) * math.log(5 / df[w]) if w in ws else 0 for w in vocabulary]
        for ws in words
    ])  # fmt: skip
    norm = np.linalg.norm(dense, axis=1, keepdims=True)
    dense = np.divide(dense, norm, out=np.zeros_like(dense), where=norm > 0)
    assert np.allclose([got.dense(i) for i in range(len(texts))], dense, rtol=0, atol=1e-15)


@pytest.mark.parametrize("at_once", [1, 7, 1 << 16])
def test_sparse_products_are_the_dense_ones(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_AT_ONCE", at_once)
    texts = ["", *planted(10)[0], "nothing known", ""]
    got = clusters.vectors(texts)
    dense = np.array([got.dense(i) for i in range(len(texts))])
    centres = np.random.default_rng(0).standard_normal((len(got.vocabulary), 3))
    assert np.allclose(got.cosines(centres), dense @ centres, rtol=0, atol=1e-13)
    codes = np.arange(len(texts)) % 3
    means = np.array([dense[codes == c].sum(axis=0) for c in range(4)]).T
    means[:, :3] /= np.linalg.norm(means[:, :3], axis=0)
    assert np.allclose(got.centres(codes, 4), means, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_planted_topics_are_found(seed: int) -> None:
    texts, topic = planted(50, seed)
    codes, names = clusters.cluster(texts, 8, seed)
    # More clusters than topics: whatever was drawn first, no cluster mixes two.
    assert all(len(set(topic[codes == c])) == 1 for c in range(8))
    for c, name in enumerate(names):
        own = TOPICS[topic[codes == c][0]].split()
        assert name.split()[0] == str(c) and set(name.split()[1:]) <= set(own)


def test_clusters_are_a_function_of_texts_and_seed() -> None:
    texts, _ = planted(30)
    first, again = clusters.cluster(texts, 4, 1), clusters.cluster(list(texts), 4, 1)
    assert np.array_equal(first[0], again[0]) and first[1] == again[1]
    assert any(not np.array_equal(first[0], clusters.cluster(texts, 4, s)[0]) for s in (2, 3))


@effort(max_examples=60, deadline=None)
@given(texts=st.lists(st.sampled_from(["", "aaa", "aaa bbb", "bbb", "ccc ddd", "12", "ddd"]),
                      min_size=2, max_size=30), seed=SEEDS)  # fmt: skip
@example(texts=["aaa", "aaa bbb"], seed=0)
@example(texts=["", "12"], seed=0)
@example(texts=["aaa", "aaa bbb", "ccc ddd", "ccc ddd"], seed=0)
def test_every_cluster_has_a_text(texts: list[str], seed: int) -> None:
    k = len(set(texts))
    if k >= 2:
        codes, names = clusters.cluster(texts, k, seed)
        assert set(codes) == set(range(k)) and len(names) == k and len(codes) == len(texts)
    with pytest.raises(ConfigError, match=rf"clients.clusters: got {k + 1}; expected at most {k}"):
        clusters.cluster(texts, k + 1, seed)


def real(name: str, *columns: str) -> tuple[list[str], list[dict[str, Any]]]:
    path = REAL / "general" / f"{name}.train.jsonl.gz"
    require("data", path.is_file(), f"no {path.name} in FEDSIM_DATA")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [" ".join(row[c] for c in columns) for row in rows], rows


def test_clusters_of_real_text_follow_its_categories() -> None:
    """Dolly has eight kinds of request, which a topic says something, not everything, about."""
    texts, rows = real("dolly", "instruction", "context")
    category = labels.column(rows, "category").codes
    found = [clusters.cluster(texts, 16, seed)[0] for seed in (0, 1)]
    rng = np.random.default_rng(0)
    chance = max(agreement(rng.permutation(found[0]), category) for _ in range(20))
    assert min(agreement(codes, category) for codes in found) > 5 * chance


def test_clusters_of_real_text_are_stable() -> None:
    """Two seeds find related topics; no cluster swallows the set."""
    texts, _ = real("alpaca", "instruction", "input")
    a, b = (clusters.cluster(texts, 16, seed)[0] for seed in (0, 1))
    chance = agreement(np.random.default_rng(0).permutation(a), b)
    assert agreement(a, b) > 10 * chance
    assert np.bincount(a).max() < len(texts) / 3 and np.bincount(a).min() > len(texts) / 500
