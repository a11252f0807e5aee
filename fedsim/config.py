"""One TOML file -> one frozen configuration. Unknown keys and impossible values are errors."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from fedsim.attackers import Attack
from fedsim.bases import Model
from fedsim.channel import Channel
from fedsim.clients import Clients
from fedsim.errors import ConfigError, nearest
from fedsim.privacy import Privacy
from fedsim.scheduled import Scheduled
from fedsim.section import Names, Recompute, Section

PRESETS = Path(__file__).parent / "presets"
Rank = Annotated[int, Field(strict=True, ge=1, le=1024)]


class Run(Section):
    name: str = Field("run", pattern=r"^\w[\w.-]*$", description="folder below `out`")
    seed: int = Field(42, ge=0)
    protocol: Literal["fedsim", "flowertune"] = "fedsim"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    out: str = "runs"


class Adapter(Section):
    rank: Rank = 32
    ranks: Annotated[tuple[Rank, ...], Field(strict=False)] = Field(
        (), description="each client draws one of these; empty: all have adapter.rank"
    )
    alpha: float = Field(64.0, gt=0)
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank), not alpha / rank")
    lora_plus: float = Field(1.0, ge=1, description="B's learning rate over A's")
    dora: bool = Field(False, description="train the magnitude of every adapted row, too")
    init: Literal["default", "pissa"] = Field(
        "default", description="pissa: begin as the weights' largest singular parts"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Names = Field((), description="names, x? where there is one; empty: PEFT's default")

    def scale(self, rank: int | None = None) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732); r: `rank` if not given."""
        r = self.rank if rank is None else rank
        return self.alpha / (r**0.5 if self.rslora else r)

    def alpha_for(self, rank: int) -> float:
        """The alpha that gives another rank the scale of `rank`."""
        return self.scale() * (rank**0.5 if self.rslora else rank)


class Data(Section):
    domain: str = "finance"
    source: Literal["hub", "directory", "embedded"] = "hub"
    dir: str | None = Field(None, description="with source = directory; else FEDSIM_DATA")
    train: str | None = Field(None, description="a set, an id of the hub, a folder or a .jsonl")
    max_length: int = Field(512, ge=8)
    rows: Literal["domain", "joined"] = Field("domain", description="joined: input appended")
    limit: int | None = Field(None, ge=1, description="use only the first n training rows")
    max_unlabelled: float = Field(0.1, ge=0, le=1, description="share of rows without a label")


class Server(Section):
    strategy: str = "fedavg"
    options: Annotated[dict[str, Any], Field(strict=False)] = Field(
        {}, description="of the strategy, by name; see `fedsim list --options`"
    )
    rounds: int = Field(10, ge=1, lt=1 << 16)
    fraction: float = Field(0.1, gt=0, le=1, description="of the clients, each round")
    min_clients: int = Field(1, ge=1)
    export_every: int = Field(5, ge=1, description="rounds between exported adapters")


class Train(Scheduled):
    steps: int = Field(10, ge=1, lt=1 << 16)
    batch: int = Field(16, ge=1, lt=1 << 16)
    lr_max: float = Field(5e-5, gt=0)
    lr_min: float = Field(1e-6, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0, allow_inf_nan=True, description="inf: none; nor in DP-SGD")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    slots: int = Field(32, ge=1, description="clients trained in one pass")
    budget_tokens: int = Field(0, ge=0, description="packed tokens in one pass; 0: by device")
    mode: Literal["fast", "strict"] = Field(
        "fast", description="strict: bit for bit the same in any packing"
    )
    chunk_tokens: int = Field(1024, ge=1, description="of one chunk of a step; with mode = strict")
    tile: Literal[16, 32, 64, 128, 256] = Field(
        128, description="rows of one product; with mode = strict"
    )
    shared_prefix: bool = Field(
        True, description="compute a step's common prompt prefix once, where dropout is 0"
    )
    recompute: Recompute = Field(
        "never", description="activations in the backward; auto: where memory asks for it"
    )
    memory: float = Field(
        0.0, ge=0, description="GiB of a device that a run may take; 0: what is free"
    )
    graphs: Literal["auto", "never"] = Field(
        "never", description="auto: CUDA graphs for small bases; not run on a GPU yet"
    )

    @property
    def rows_per_product(self) -> int:
        """The tile in strict mode; 0 where the rows of a product are as they come."""
        return self.tile if self.mode == "strict" else 0


class Evaluate(Section):
    every: int = Field(0, ge=0, description="rounds between evaluations; the last is always one")
    first: bool = Field(True, description="also before the first round")
    tasks: Names = ()
    limit: int | None = Field(None, ge=0, description="examples of each task; 0: no evaluation")
    clients: int = Field(8, ge=1, description="adapters, where the rule leaves each its own")


class Config(Section):
    """Everything a run depends on. Written back, resolved, beside its results."""

    run: Run = Run()
    model: Model = Model()
    adapter: Adapter = Adapter()
    data: Data = Data()
    clients: Clients = Clients()
    server: Server = Server()
    attack: Attack = Attack()
    channel: Channel = Channel()
    privacy: Privacy = Privacy()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _fit(self) -> Config:
        if self.train.lr_min > self.train.lr_max:
            raise ValueError(
                f"train.lr_min: got {self.train.lr_min}; expected <= train.lr_max "
                f"({self.train.lr_max})"
            )
        if self.train.beta1**2 >= self.train.beta2:
            raise ValueError(
                f"train.beta1: got {self.train.beta1}; expected beta1^2 < train.beta2 "
                f"({self.train.beta2}), or a step of Adam has no bound"
            )
        if 0 < self.train.budget_tokens < self.data.max_length:
            raise ValueError(
                f"train.budget_tokens: got {self.train.budget_tokens}; expected >= "
                f"data.max_length ({self.data.max_length}), or a sequence may not fit a pass"
            )
        if 0 < self.train.budget_tokens < self.largest_chunk:
            raise ValueError(
                f"train.budget_tokens: got {self.train.budget_tokens}; expected >= "
                f"{self.largest_chunk}, or a chunk of train.chunk_tokens "
                f"({self.train.chunk_tokens}) in whole tiles may not fit a pass"
            )
        if self.adapter.ranks and max(self.adapter.ranks) != self.adapter.rank:
            raise ValueError(
                f"adapter.rank: got {self.adapter.rank}; expected {max(self.adapter.ranks)}, the "
                "largest of adapter.ranks: the server's adapter has that rank"
            )
        if self.adapter.init == "pissa" and (self.adapter.dora or self.adapter.ranks):
            raise ValueError(
                "adapter.init: got pissa; expected default with adapter.dora or adapter.ranks: "
                "its factors are those of one rank, beside weights whose norms they change"
            )
        if self.run.protocol == "flowertune" and self.clients.partition != "iid":
            raise ValueError(
                f"clients.partition: got {self.clients.partition}; expected iid with "
                "run.protocol = flowertune"
            )
        server = self.channel.misfit(self.per_round) or self.privacy.misfit(self)
        base = self.model.misfit() or self.train.misfit()
        if misfit := self.clients.misfit() or self.attack.misfit() or server or base:
            raise ValueError(misfit)
        return self

    @property
    def largest_chunk(self) -> int:
        """Most packed rows that cannot be split over passes."""
        if self.train.mode == "fast":
            return self.data.max_length
        rows = max(self.train.chunk_tokens, self.data.max_length)
        return -(-rows // self.train.tile) * self.train.tile

    @property
    def per_round(self) -> int:
        """M: int(fraction N), at least min_clients and at most N, as Flower samples."""
        m = max(int(self.clients.number * self.server.fraction), self.server.min_clients)
        return min(m, self.clients.number)

    @property
    def expected_clients(self) -> float:
        """q N, of a round under privacy of clients."""
        return self.server.fraction * self.clients.number

    @property
    def most_clients(self) -> int:
        """Of a round: M, or under privacy of clients everybody."""
        return self.clients.number if self.privacy.of_clients else self.per_round


def _leaves(section: type[BaseModel], prefix: str = "") -> list[str]:
    out = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            out += _leaves(kind, f"{prefix}{name}.")
        else:
            out.append(f"{prefix}{name}")
    return out


KEYS: tuple[str, ...] = tuple(_leaves(Config))


def build(values: Mapping[str, Any], origin: str) -> Config:
    """Validate a nested mapping. Raises ConfigError that names the first offending key."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as failure:
        error = failure.errors()[0]
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            known: Iterable[str] = KEYS if "." in key else Config.model_fields
            raise ConfigError(
                f"{origin}: unknown key {key!r}", remedy=nearest(key, known)
            ) from None
        if not key:
            raise ConfigError(f"{origin}: {error['ctx']['error']}", remedy="Change one.") from None
        raise ConfigError(
            f"{origin}: {key}",
            got=error["input"],
            expected=_expected(error["msg"]),
            remedy="See `fedsim list --keys` for every key with its default.",
        ) from None


def _expected(message: str) -> str:
    """pydantic's sentence as the end of ours: "a valid number", "a list"."""
    text = message.removeprefix("Input should be ").replace("a valid tuple", 'a list: ["a", "b"]')
    return text[0].lower() + text[1:]


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; a syntax error names the file and the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise ConfigError(f"{path} is not valid TOML: {failure}") from None


def preset(name: str) -> dict[str, Any]:
    """The values of a preset that ships with fedsim."""
    path = PRESETS / f"{name}.toml"
    if not path.is_file():
        known = [p.stem for p in PRESETS.glob("*.toml")]
        raise ConfigError("preset", got=name, remedy=nearest(name, known))
    return read_toml(path)


def merge(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, section by section; `over` wins. What is no section is left to `build`."""
    out = dict(values)
    for section, keys in over.items():
        known = out.get(section, {})
        if isinstance(known, Mapping):
            out[section] = {**known, **keys} if isinstance(keys, Mapping) else keys
    return out


def override(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `section.key=value` assignments; a value is TOML, or else a plain string."""
    for text in assignments:
        key, equals, value = text.partition("=")
        section, dot, leaf = key.strip().partition(".")
        if not (equals and dot):
            raise ConfigError("--set", got=text, expected="section.key=value")
        if key.strip() not in KEYS:
            raise ConfigError(f"--set: unknown key {key.strip()!r}", remedy=nearest(key, KEYS))
        try:
            parsed = tomllib.loads(f"v = {value.strip()}")["v"]
        except tomllib.TOMLDecodeError:
            parsed = value.strip()
        values = merge(values, {section: {leaf: parsed}})
    return values


def resolved(config: Config) -> dict[str, Any]:
    """Every value, as nested plain types that TOML can hold (unset optional keys left out)."""
    return config.model_dump(mode="json", exclude_none=True)
