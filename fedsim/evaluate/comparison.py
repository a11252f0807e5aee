"""`fedsim eval`: many adapters over one base, one domain, every example kept.

Everything is checked before anything is written (`checked`), and what one task has given is on disk
before the next is asked (`results.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsim import domains, model, pretrained, record, references, seeds, weights
from fedsim.config import KEYS, Config, build, merge, override, resolved
from fedsim.core import Score, pick_device
from fedsim.errors import ConfigError, ModelError
from fedsim.evaluate.engine import Engine
from fedsim.evaluate.generation import Backend, own_sampling
from fedsim.evaluate.results import Results
from fedsim.evaluate.scores import Subject, evaluate
from fedsim.evaluate.stock import Stock
from fedsim.evaluate.subjects import Checked, check
from fedsim.evaluate.suite import Suite, suite
from fedsim.evaluate.targets import Target
from fedsim.plan import pass_budget

BACKENDS = ("engine", "transformers", "vllm")
# What an evaluation hangs on; every other key would have no effect.
EFFECTIVE = {
    "run.seed", "run.protocol", "run.device", "model.name", "model.revision", "model.dtype",
    "model.quantisation", "model.double_quantisation", "model.hold",
    "data.domain", "data.source", "data.dir",
    "evaluate.tasks", "evaluate.limit", "train.mode", "train.tile", "train.budget_tokens",
    "train.memory",
}  # fmt: skip
# Of several runs, what must be the same or said: questions and base are those of one of them.
SHARED = ("data.domain", "data.source", "data.dir", "run.protocol", "model.dtype",
          "model.quantisation", "model.double_quantisation", "model.revision")  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What is asked of whom.

    Attributes:
        config: protocol, data, tasks, limit, seed and device; its model section is the base.
        python: interpreter of vLLM's own environment.
        based: the base was named by the user, who answers for its being the right one.
    """

    config: Config
    targets: Sequence[Target]
    backend: str = "engine"
    python: Path | None = None
    based: bool = False
    _checked: list[Checked] = field(default_factory=list)

    def run(self, out: Path | None = None, *, fresh: bool = False) -> tuple[Path, list[Score]]:
        """Evaluate, task group by task group as their bases differ; returns folder and scores.

        Args:
            out: folder to add to, or by default one of these targets' own (`place`).
            fresh: replace the evaluation that is there.

        Raises:
            ConfigError: something does not fit, found before anything is written.
        """
        if self.backend not in BACKENDS:
            raise ConfigError("--backend", got=self.backend, expected=" or ".join(BACKENDS))
        pick_device(self.config.run.device)
        tests = suite(
            self.config, domains.load(self.config.data.domain), seeds.run_key(self.config.run.seed)
        )
        if not len(tests):
            raise ConfigError(
                "evaluate.limit", got=0, expected="at least 1", remedy="Leave it out for all."
            )
        found = self._base()
        tokenizer = weights.tokenizer(found)
        checked = check(found, self.targets, based=self.based)
        self._checked[:] = checked
        results = Results(out or place(self.targets, checked, self.config), fresh=fresh)
        environment = surroundings(self.config, found, self.backend) | {
            "subjects": [c.record() for c in checked]
        }
        scores: list[Score] = []
        with results.open(self.config, environment, references.trivial(tests)):
            for config, part in by_precision(self.config, tests):
                config = fit(config, checked)
                with self._backend(found, tokenizer, config) as (backend, precision):
                    subject = Subject(
                        backend, tokenizer, [c.adapter for c in checked],
                        [t.round for t in self.targets], precision, own_sampling(found.path),
                    )  # fmt: skip
                    for name, task in part.tasks.items():  # what is done is on disk
                        some, records = evaluate(subject, replace(part, tasks={name: task}))
                        scores += some
                        results.add(some, name, records[name])
            results.draw(scores)
        return results.path, scores

    @property
    def notes(self) -> list[str]:
        """What a reader of the scores has to know of the adapters, after `run`."""
        return [note for c in self._checked for note in c.notes]

    def _base(self) -> weights.Weights:
        try:
            return weights.find(self.config.model.name, self.config.model.revision)
        except ModelError as failure:
            if self.based or all(t.adapter.folder is None for t in self.targets):
                raise
            raise ModelError(
                f"{failure} The base of the adapter is looked for where it says itself",
                remedy="Where it lies elsewhere, give --base MODEL.",
            ) from None

    @contextmanager
    def _backend(
        self, found: weights.Weights, tokenizer: Any, config: Config
    ) -> Iterator[tuple[Backend, str]]:
        device = pick_device(config.run.device)
        precision = weights.precision(str(pretrained.compute_dtype(config, device))[6:], config)
        if self.backend == "engine":
            targets = config.adapter.targets or ("all-linear",)
            base = model.load(found, config, device, targets, tokenizer=tokenizer)
            yield Engine(base, tokenizer, config.adapter, pass_budget(config, device)), precision
        elif self.backend == "transformers":
            yield Stock(found, tokenizer, config), precision
        else:
            from fedsim.evaluate.vllm import VLLM

            with VLLM(found, tokenizer, config, self.python) as backend:
                yield backend, precision


def by_precision(config: Config, tests: Suite) -> Iterator[tuple[Config, Suite]]:
    """Tasks by the base that their protocol asks for: the leaderboard's scripts quantise to fp4 in
    general, finance and medical, and not at all in coding (flowertune.md 1.4)."""
    usual = "fp4" if config.run.protocol == "flowertune" else config.model.quantisation
    for kind in dict.fromkeys((usual, "none")):
        wanted = {n: t for n, t in tests.tasks.items()
                  if ("none" if t.form.precision == "full" else usual) == kind}  # fmt: skip
        if wanted:
            double = config.model.double_quantisation and config.run.protocol != "flowertune"
            base = config.model.model_copy(
                update={"quantisation": kind, "double_quantisation": double and kind != "none"}
            )
            yield config.model_copy(update={"model": base}), replace(tests, tasks=wanted)


def fit(config: Config, checked: Sequence[Checked]) -> Config:
    """The configuration whose layout holds every adapter: the largest rank, all their modules."""
    some = [c for c in checked if c.modules]
    if not some:
        return config
    if len({c.dora for c in some}) > 1:
        raise ConfigError(
            "adapters of one evaluation", got="with and without DoRA", expected="one kind",
            remedy="Evaluate them in two calls.",
        )  # fmt: skip
    modules = dict.fromkeys(m for c in some for m in c.modules)
    adapter = config.adapter.model_copy(update={
        "rank": max(c.rank for c in some), "ranks": (), "dora": some[0].dora,
        "targets": tuple(modules), "dropout": 0.0, "init": "default",
    })  # fmt: skip
    return config.model_copy(update={"adapter": adapter})


def place(targets: Sequence[Target], checked: Sequence[Checked], config: Config) -> Path:
    """The folder of these targets' evaluations: in a run's own, or by names and content."""
    runs = {t.place for t in targets if t.config is not None and t.place is not None}
    others = [t for t in targets if t.config is None]
    if len(runs) == 1 and not others:
        return next(iter(runs)) / "evaluation"
    content = "".join([config.model.name, *sorted(c.adapter.subject for c in checked)])
    named = [t.place.name for t in targets if t.place is not None] or [Path(config.model.name).name]
    code = hashlib.sha256(content.encode()).hexdigest()[:8]
    return Path("evaluations") / f"{named[0]}-{config.data.domain.rpartition('.')[2]}-{code}"


def configure(
    targets: Sequence[Target], given: Mapping[str, Any], assignments: Sequence[str]
) -> Config:
    """The configuration of the targets' runs, or the defaults, under what was given.

    Raises:
        ConfigError: neither a run nor `--domain` says which domain, runs differ in what must be
            one, or a key would have no effect.
    """
    for text in assignments:
        key = text.partition("=")[0].strip()
        if key in KEYS and key not in EFFECTIVE:
            raise ConfigError(
                f"--set {key}", expected=f"one of {', '.join(sorted(EFFECTIVE))}",
                remedy="Other keys change nothing in an evaluation: adapters say what they are.",
            )  # fmt: skip
    runs = list({id(t.config): t.config for t in targets if t.config is not None}.values())
    values: dict[str, Any] = resolved(runs[0]) if runs else {}
    if not runs and given["data"]["domain"] is None and not _assigned("data.domain", assignments):
        raise ConfigError(
            "--domain", expected=" or ".join(domains.known()),
            remedy="Only a run's folder knows its domain.",
        )  # fmt: skip
    values.setdefault("model", {})["name"] = targets[0].base
    if not Path(targets[0].base).is_dir():
        named = {t.revision for t in targets if t.revision}
        if len(named) > 1:
            raise ConfigError("revisions of the base that adapters name",
                              got=", ".join(sorted(named)), expected="one",
                              remedy="Say with --set model.revision=... which it is.")  # fmt: skip
        if named:
            values["model"].setdefault("revision", named.pop())
    said = {f"{section}.{k}" for section, keys in given.items()
            for k, v in keys.items() if v is not None}  # fmt: skip
    for section, keys in given.items():
        values = merge(values, {section: {k: v for k, v in keys.items() if v is not None}})
    for key in SHARED:
        section, _, leaf = key.partition(".")
        if key in said or _assigned(key, assignments):
            continue
        if len(found := list(dict.fromkeys(getattr(getattr(r, section), leaf) for r in runs))) > 1:
            raise ConfigError(
                f"{key} of these runs", got=", ".join(map(str, found)), expected="one value",
                remedy=f"Say with --set {key}=... which it is, or evaluate them one by one.",
            )  # fmt: skip
    config = build(override(values, assignments), "fedsim eval")
    fixed = ("model.quantisation", "model.double_quantisation")
    for key in (k for k in fixed if _assigned(k, assignments)):
        if config.run.protocol == "flowertune":
            raise ConfigError(
                f"--set {key}", expected="nothing: protocol flowertune computes over fp4 where "
                "the leaderboard's script does",
                remedy="Leave it out, or evaluate with --protocol fedsim.",
            )  # fmt: skip
    if config.model.name != targets[0].base:
        raise ConfigError(
            "--set model.name", got=config.model.name, expected=targets[0].base,
            remedy="A model is its own base: name it as the target.",
        )  # fmt: skip
    return config


def _assigned(key: str, assignments: Sequence[str]) -> bool:
    return any(a.partition("=")[0].strip() == key for a in assignments)


def surroundings(config: Config, found: weights.Weights, backend: str) -> dict[str, Any]:
    """What the scores depend on, for environment.json."""
    return record.surroundings(pick_device(config.run.device)) | {
        "backend": backend,
        "model": {"name": found.name, "origin": found.origin, "sha256": found.digest()},
    }
