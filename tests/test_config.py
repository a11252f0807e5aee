"""A configuration is complete, closed and frozen: what cannot hold is an error that says why.

The keys are pinned, so that a new one is a visible change. Unknown keys, names and sections
suggest the nearest known one; wrong types, impossible values and values that do not fit each other
name the key, what was got and what was expected; a resolved configuration written to TOML and read
again is the same. About 4 s.
"""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from fedsim import cli, domains, privacy, strategies
from fedsim.config import KEYS, PRESETS, Config, build, override, preset, read_toml, resolved
from fedsim.errors import ConfigError, DataError, FedSimError, nearest

PINNED = """
run.name run.seed run.protocol run.device run.out
model.name model.revision model.dtype model.quantisation model.double_quantisation model.hold
model.sharding model.offload
adapter.rank adapter.ranks adapter.alpha adapter.rslora adapter.lora_plus adapter.dora
adapter.init adapter.dropout adapter.targets
data.domain data.source data.dir data.train data.max_length data.rows data.limit
data.max_unlabelled
clients.number clients.partition clients.min_size clients.by clients.clusters clients.alpha
clients.classes clients.shards clients.skew
server.strategy server.options server.rounds server.fraction server.min_clients
server.export_every
attack.kind attack.fraction attack.options
channel.compression channel.block channel.keep channel.feedback channel.secure
channel.threshold channel.bits channel.range
privacy.level privacy.noise privacy.clip privacy.adaptive privacy.quantile privacy.clip_rate
privacy.delta
train.schedule train.warmup
train.steps train.batch train.lr_max train.lr_min train.weight_decay train.clip_norm train.beta1
train.beta2 train.eps train.slots train.budget_tokens train.mode train.chunk_tokens train.tile
train.shared_prefix train.recompute train.memory train.graphs
evaluate.every evaluate.first evaluate.tasks evaluate.limit evaluate.clients
"""

# key -> values that must be refused.
REFUSED: dict[str, list[Any]] = {
    "run.name": ["", ".", "..", "a/b", "a b", "a\n", 3], "run.seed": [-1, 1.5, "1", True],
    "run.protocol": ["flower", 1], "run.device": ["gpu", "cuda:", "cuda:x", ""], "run.out": [1],
    "model.name": [1], "model.revision": [1], "model.dtype": ["float16", "fp32"],
    "model.quantisation": ["int5", 4], "model.double_quantisation": ["yes", 1],
    "model.hold": ["codes"],
    "model.sharding": ["zero2"], "model.offload": ["disk"],
    "adapter.rank": [0, 1025, 8.0, "8"], "adapter.ranks": [8, "8"],
    "adapter.alpha": [0.0, -1.0, "16"], "adapter.rslora": [1], "adapter.lora_plus": [0.5, "16"],
    "adapter.dora": ["yes"], "adapter.init": ["random", 1],
    "adapter.dropout": [-0.1, 1.0], "adapter.targets": [[1]],
    "data.domain": [1], "data.source": ["disk"], "data.dir": [1], "data.train": [1],
    "data.max_length": [7, 512.0], "data.limit": [0, -1],
    "data.max_unlabelled": [-0.1, 1.1, "1"],
    "clients.number": [0, 1 << 28, 2.0], "clients.partition": ["random", 1],
    "clients.min_size": [0, 1.0], "clients.by": [1], "clients.clusters": [1, 2.0],
    "clients.alpha": [0.0, -1.0, "1"], "clients.classes": [0, 1.5], "clients.shards": [0, 1.5],
    "clients.skew": [-0.1, "1"],
    "server.strategy": [1], "server.options": [1, "eta"],
    "server.rounds": [0, 1 << 16], "server.fraction": [0.0, 1.1, -0.1],
    "server.min_clients": [0], "server.export_every": [0],
    "attack.kind": ["flip", 1], "attack.fraction": [-0.1, 1.1], "attack.options": [1, "factor"],
    "channel.compression": ["gzip", 8], "channel.block": [0, 256.0], "channel.keep": [0.0, 1.1],
    "channel.feedback": [1, "yes"], "channel.secure": [1, "yes"],
    "channel.threshold": [0.5, 1.1], "channel.bits": [15, 49, 32.0], "channel.range": [0.0, "1"],
    "privacy.level": ["examples", 1], "privacy.noise": [0.0, "1"], "privacy.clip": [0.0, -1.0],
    "privacy.adaptive": [1, "yes"], "privacy.quantile": [0.0, 1.0], "privacy.clip_rate": [0.0],
    "privacy.delta": [0.0, 1.0],
    "train.schedule": ["step", 1], "train.warmup": [-1, "1"], "data.rows": ["both", 1],
    "train.steps": [0, -1, 1 << 16], "train.batch": [0, 1 << 16], "train.lr_max": [0.0, "5e-5"],
    "train.lr_min": [-1e-9], "train.weight_decay": [-0.1], "train.clip_norm": [0.0],
    "train.beta1": [1.0, -0.1], "train.beta2": [1.0, -0.1], "train.eps": [0.0],
    "train.slots": [0], "train.budget_tokens": [-1], "train.mode": ["exact", 1],
    "train.chunk_tokens": [0, 512.0], "train.tile": [48, 0, "64"], "train.shared_prefix": ["no"],
    "train.recompute": [1, "sometimes"], "train.memory": [-1.0, "16"],
    "train.graphs": [True, "always"],
    "evaluate.every": [-1], "evaluate.first": [0, "no"],
    "evaluate.tasks": [[1]], "evaluate.limit": [-1],
    "evaluate.clients": [0, 1.0],
}  # fmt: skip
NOT_FINITE = ("adapter.alpha", "train.lr_max", "train.lr_min", "train.weight_decay", "train.eps",
              "channel.range", "privacy.noise", "privacy.clip", "privacy.clip_rate")  # fmt: skip


def nested(key: str, value: Any) -> dict[str, Any]:
    section, _, leaf = key.partition(".")
    return {section: {leaf: value}}


def test_the_keys_are_pinned() -> None:
    assert list(KEYS) == PINNED.split()
    assert REFUSED.keys() == set(KEYS)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values]
)
def test_impossible_values_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build(nested(key, value), "here.toml")
    assert str(caught.value).startswith(f"here.toml: {key}")
    shown = value[0] if isinstance(value, list) else value
    assert f"got {shown!r}" in str(caught.value)
    assert "expected" in str(caught.value) and "--keys" in str(caught.value)


@pytest.mark.parametrize("key", NOT_FINITE)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        build(nested(key, value), "here.toml")


def test_clipping_can_be_switched_off() -> None:
    assert build(nested("train.clip_norm", float("inf")), "here").train.clip_norm == float("inf")


@pytest.mark.parametrize(
    ("values", "key", "remedy"),
    [
        ({"train": {"step": 3}}, "train.step", "Did you mean 'train.steps'?"),
        ({"server": {"fractoin": 0.1}}, "server.fractoin", "Did you mean 'server.fraction'?"),
        ({"trian": {"steps": 3}}, "trian", "Did you mean 'train'?"),
        (
            {"zzz": 1},
            "zzz",
            "Known: adapter, attack, channel, clients, data, evaluate, model, privacy, run, "
            "server, train.",
        ),
    ],
)
def test_unknown_keys_suggest_the_nearest(values: dict[str, Any], key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(values, "here.toml")
    assert str(caught.value) == f"here.toml: unknown key {key!r}. {remedy}"


def test_a_section_is_a_table() -> None:
    with pytest.raises(ConfigError, match=r"here.toml: train: got 3; expected"):
        build({"train": 3}, "here.toml")


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"train": {"lr_min": 1e-3, "lr_max": 1e-4}}, ("train.lr_min", "train.lr_max")),
        ({"train": {"budget_tokens": 256}}, ("train.budget_tokens", "data.max_length")),
        (
            {"train": {"mode": "strict", "chunk_tokens": 600, "budget_tokens": 600}},
            ("train.budget_tokens", "expected >= 640"),
        ),
        ({"train": {"beta1": 0.9, "beta2": 0.81}}, ("train.beta1", "train.beta2")),
        ({"adapter": {"rank": 32, "ranks": [8, 16]}}, ("adapter.rank", "adapter.ranks")),
        ({"adapter": {"init": "pissa", "dora": True}}, ("adapter.init", "adapter.dora")),
    ],
)
def test_values_that_do_not_fit_each_other(values: dict[str, Any], keys: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(values, "here.toml")
    assert str(caught.value).startswith(f"here.toml: {keys[0]}: got ")
    assert "expected" in str(caught.value) and keys[1] in str(caught.value)


@pytest.mark.parametrize("ranks", [[0], [8, 2000], [8.0], ["8"]])
def test_every_rank_is_checked(ranks: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.ranks\.[01]: got"):
        build({"adapter": {"ranks": ranks}}, "here.toml")


def test_recompute_was_once_a_switch() -> None:
    """Older files say true or false."""
    for old, new in ((True, "always"), (False, "never")):
        assert build({"train": {"recompute": old}}, "here").train.recompute == new


def test_equal_limits_fit() -> None:
    config = build({"train": {"lr_min": 5e-5, "budget_tokens": 512}}, "here")
    assert config.train.lr_min == config.train.lr_max
    assert config.train.budget_tokens == config.data.max_length


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.steps = 3


@pytest.mark.parametrize(
    ("number", "fraction", "least", "want"),
    [(20, 0.1, 1, 2), (50, 0.1, 1, 5), (10, 0.25, 1, 2), (8, 0.05, 1, 1), (8, 0.05, 2, 2),
     (10, 0.28, 1, 2), (100, 0.29, 1, 28), (8, 1.0, 1, 8), (3, 0.1, 5, 3),
     (100_000, 0.001, 1, 100)],
)  # fmt: skip
def test_clients_of_a_round(number: int, fraction: float, least: int, want: int) -> None:
    values = {"clients": {"number": number},
              "server": {"fraction": fraction, "min_clients": least}}  # fmt: skip
    assert build(values, "here").per_round == want


@pytest.mark.parametrize("name", sorted(p.stem for p in PRESETS.glob("*.toml")))
def test_every_preset_builds(name: str) -> None:
    config = build(preset(name), name)
    assert config.data.domain in domains.known() and config.server.strategy in strategies.known()


def test_there_is_a_demo() -> None:
    assert build(preset("demo"), "demo").data.source == "embedded"


@pytest.mark.parametrize("path", [None, *sorted(PRESETS.glob("*.toml"))])
def test_resolved_is_read_back_as_it_was(tmp_path: Path, path: Path | None) -> None:
    values = read_toml(path) if path else {
        "data": {"limit": 7, "dir": 'a "b" \\ c', "source": "directory"},
        "adapter": {"targets": ["q_proj", "v_proj"]}, "train": {"lr_max": 1 / 3, "eps": 1e-300},
    }  # fmt: skip
    config = build(values, "first")
    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps(resolved(config)), encoding="utf-8")
    assert build(read_toml(file), "again") == config
    written = {f"{s}.{k}" for s, table in tomllib.loads(file.read_text()).items() for k in table}
    optional = {"model.revision", "data.dir", "data.train", "data.limit", "evaluate.limit"}
    optional |= {f"clients.{k}" for k in ("by", "clusters", "alpha", "classes", "shards", "skew")}
    optional |= {
        f"channel.{k}" for k in ("block", "keep", "feedback", "threshold", "bits", "range")
    }
    optional |= {f"privacy.{k}" for k in privacy.KEYS}
    assert set(KEYS) - optional <= written <= set(KEYS)


def test_bad_toml_names_the_file_and_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[run]\nname = 'x'\nseed == 3\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: .*line 3"):
        read_toml(file)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(b"\xff\xfe[run]")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        read_toml(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.steps=3", 3), ("train.lr_max = 1e-4", 1e-4), ("run.name=a=b", "a=b"),
        ("data.dir=/some/where", "/some/where"), ('run.name="x"', "x"), ("run.name='1'", "1"),
        ("train.shared_prefix=false", False), ('adapter.targets=["q", "v"]', ["q", "v"]),
        ("model.name=org/name-1", "org/name-1"), ("data.train=", ""),
    ],
)  # fmt: skip
def test_override(text: str, value: Any) -> None:
    section, leaf = text.partition("=")[0].strip().split(".")
    before: dict[str, Any] = {"run": {"seed": 1}}
    after = override(before, [text])
    assert after[section][leaf] == value and after["run"]["seed"] == 1
    assert before == {"run": {"seed": 1}}


def test_names_with_commas() -> None:
    for text, names in (("q_proj, v_proj", ("q_proj", "v_proj")), ("all-linear", ("all-linear",))):
        config = build(override({}, [f"adapter.targets={text}"]), "test")
        assert config.adapter.targets == names


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b"\xef\xbb\xbf[run]\r\nseed = 7\r\n")
    assert read_toml(file) == {"run": {"seed": 7}}


def test_the_last_override_counts() -> None:
    assert override({}, ["train.steps=3", "train.steps=4"]) == {"train": {"steps": 4}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.steps", "--set: got 'train.steps'; expected section.key=value."),
        ("steps=3", "--set: got 'steps=3'; expected section.key=value."),
        ("train.step=3", "--set: unknown key 'train.step'. Did you mean 'train.steps'?"),
        ("=3", "--set: got '=3'; expected section.key=value."),
        ("", "--set: got ''; expected section.key=value."),
    ],
)
def test_bad_overrides(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({}, [text])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("load", "key", "near", "name"),
    [
        (domains.load, "data.domain", "finanse", "finance"),
        (strategies.load, "server.strategy", "fedavgg", "fedavg"),
        (preset, "preset", "demoo", "demo"),
    ],
)
def test_unknown_names(load: Any, key: str, near: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(near)
    assert str(caught.value) == f"{key}: got {near!r}. Did you mean {name!r}?"
    with pytest.raises(ConfigError, match=rf"^{key}: got 'qqqq'\. Known: .*{name}"):
        load("qqqq")


def test_domains_and_strategies_that_ship() -> None:
    assert domains.known() == ["coding", "finance", "general", "medical"]
    assert "fedavg" in strategies.known()
    assert [domains.load(name).clients for name in domains.known()] == [10, 50, 20, 20]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the user's."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "half.py").write_text(
        "from fedsim.strategies.fedavg import FedAvg\n"
        "class Half(FedAvg):\n    '''Half a step.'''\n"
        "STRATEGY = Half\n"
    )
    (package / "field.py").write_text(
        "from dataclasses import replace\nfrom fedsim.domains.finance import DOMAIN as F\n"
        "DOMAIN = replace(F, name='mine', clients=3)\n"
    )
    (package / "bare.py").write_text(
        "from dataclasses import dataclass\nfrom fedsim.core import Strategy\n"
        "@dataclass(frozen=True)\nclass Bare(Strategy):\n    '''Nothing.'''\n"
        "@dataclass(frozen=True)\nclass Other:\n    '''Not one.'''\n"
        "STRATEGY = Bare\n"
    )
    (package / "other.py").write_text("from mine.bare import Other\nSTRATEGY = Other\n")
    (package / "empty.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)


def test_options_of_a_strategy() -> None:
    rule: Any = strategies.load("fedavg", {"equal": True})
    assert rule.equal and strategies.describe("fedavg")[1] == {"equal": False}
    for options, said in (
        ({"eqal": True}, "unknown key 'eqal' of fedavg. Did you mean 'equal'?"),
        ({"equal": 1}, "server.options.equal of fedavg: got 1; expected"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            strategies.load("fedavg", options)


def test_a_strategy_and_a_domain_of_ones_own(own: None) -> None:
    assert inspect.getdoc(strategies.load("mine.half")) == "Half a step."
    assert domains.load("mine.field").clients == 3
    config, _ = cli.configure(None, None, "mine.field", None, ["server.strategy=mine.half"])
    assert config.clients.number == 3 and config.run.name.startswith("field-half-42-")


@pytest.mark.parametrize(
    ("name", "said"),
    [("mine.bare", "a rule with a `step` or an `aggregate`"), ("mine.other", "core.Strategy")],
)
def test_half_a_strategy_is_refused_before_the_run(own: None, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        strategies.load(name)


@pytest.mark.parametrize("load", [domains.load, strategies.load])
@pytest.mark.parametrize("name", ["mine.nothing", "nowhere.at.all", "mine.empty", ".half", "mine."])
def test_a_dotted_path_that_leads_nowhere(own: None, load: Any, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert repr(name) in str(caught.value)


def test_errors_are_one_paragraph() -> None:
    error = FedSimError("key", got=3, expected="four", remedy="Add one.")
    assert str(error) == "key: got 3; expected four. Add one."
    assert str(DataError("it is gone")) == "it is gone."
    assert nearest("b", ["c", "a"]) == "Known: a, c."
