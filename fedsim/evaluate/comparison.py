"""`fedsim eval`: many adapters over one base, one domain, every example kept.

The folder that it writes: `scores.json`, `eval/<task>.jsonl`, `config.toml`, `environment.json`,
and `plots/scores.svg` where several rounds were evaluated.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from fedsim import domains, model, peft_io, pretrained, record, references, seeds, weights
from fedsim.checkpoint import write_atomic
from fedsim.config import Config, build, merge, override, resolved
from fedsim.core import Score, pick_device
from fedsim.errors import ConfigError
from fedsim.evaluate.engine import Engine
from fedsim.evaluate.generation import Backend, own_sampling
from fedsim.evaluate.scores import Subject, evaluate
from fedsim.evaluate.stock import Stock
from fedsim.evaluate.suite import Suite, suite
from fedsim.evaluate.targets import Target, read_adapter
from fedsim.folder import RunFolder
from fedsim.plan import pass_budget
from fedsim.report import score_curve

BACKENDS = ("engine", "transformers", "vllm")


@dataclass(frozen=True)
class Comparison:
    """What is asked of whom.

    Attributes:
        config: protocol, data, tasks, limit, seed and device; its model and adapter sections
            describe the base.
        python: interpreter of vLLM's own environment.
    """

    config: Config
    targets: Sequence[Target]
    backend: str = "engine"
    python: Path | None = None

    def run(self, out: Path, *, fresh: bool = False) -> list[Score]:
        """Evaluate, task group by task group as their bases differ, and write the folder.

        Raises:
            ConfigError: the folder holds something and `fresh` was not asked for.
        """
        folder = begin(out, self.config, fresh=fresh)
        found = weights.find(self.targets[0].base, self.config.model.revision)
        tokenizer = weights.tokenizer(found)
        key = seeds.run_key(self.config.run.seed)
        tests = suite(self.config, domains.load(self.config.data.domain), key)
        folder.write_json("environment.json", surroundings(self.config, found, self.backend))
        folder.write_json("references.json", references.trivial(tests))
        scores: list[Score] = []
        for config, part in by_precision(self.config, tests):
            config = fit(config, self.targets)
            with self._backend(found, tokenizer, config) as (backend, precision):
                subject = Subject(
                    backend, tokenizer, [t.adapter for t in self.targets],
                    [t.round for t in self.targets], precision, own_sampling(found.path),
                )  # fmt: skip
                for name, task in part.tasks.items():  # what is done is on disk
                    some, records = evaluate(subject, replace(part, tasks={name: task}))
                    scores += some
                    folder.append(f"eval/{name}.jsonl", records[name])
                    folder.write_json("scores.json", [s.record() for s in scores])
        if len({t.round for t in self.targets}) > 1:
            (out / "plots").mkdir(exist_ok=True)
            drawn = score_curve([s.record() for s in scores])
            write_atomic(out / "plots" / "scores.svg", drawn.encode())
        return scores

    @contextmanager
    def _backend(
        self, found: weights.Weights, tokenizer: Any, config: Config
    ) -> Iterator[tuple[Backend, str]]:
        device = pick_device(config.run.device)
        precision = weights.precision(str(pretrained.compute_dtype(config, device))[6:], config)
        if self.backend == "engine":
            targets = config.adapter.targets or peft_io.default_targets(weights.model_type(found))
            base = model.load(found, config, device, targets, tokenizer=tokenizer)
            yield Engine(base, tokenizer, config.adapter, pass_budget(config, device)), precision
        elif self.backend == "transformers":
            yield Stock(found, tokenizer, config), precision
        elif self.backend == "vllm":
            from fedsim.evaluate.vllm import VLLM

            with VLLM(found, tokenizer, config, self.python) as backend:
                yield backend, precision
        else:
            raise ConfigError("--backend", got=self.backend, expected=" or ".join(BACKENDS))


def by_precision(config: Config, tests: Suite) -> Iterator[tuple[Config, Suite]]:
    """Tasks by the base that their protocol asks for: the leaderboard's scripts quantise to fp4 in
    general, finance and medical, and not at all in coding (flowertune.md 1.4)."""
    usual = "fp4" if config.run.protocol == "flowertune" else config.model.quantisation
    for kind in dict.fromkeys((usual, "none")):
        wanted = {n: t for n, t in tests.tasks.items()
                  if ("none" if t.form.precision == "full" else usual) == kind}  # fmt: skip
        if wanted:
            base = config.model.model_copy(update={"quantisation": kind})
            yield config.model_copy(update={"model": base}), replace(tests, tasks=wanted)


def fit(config: Config, targets: Sequence[Target]) -> Config:
    """The configuration whose layout holds every adapter: the largest rank, all their modules."""
    settings = [read_adapter(t.adapter.folder) for t in targets if t.adapter.folder]
    if not settings:
        return config
    dora = {bool(s.get("use_dora")) for s in settings}
    if len(dora) > 1:
        raise ConfigError(
            "adapters of one evaluation", got="with and without DoRA", expected="one kind",
            remedy="Evaluate them in two calls.",
        )  # fmt: skip
    modules = dict.fromkeys(m for s in settings for m in _names(s.get("target_modules")))
    ranks = [int(r) for s in settings for r in (s["r"], *s.get("rank_pattern", {}).values())]
    adapter = config.adapter.model_copy(update={
        "rank": max(ranks), "ranks": (), "dora": dora.pop(),
        "targets": tuple(modules), "dropout": 0.0,
    })  # fmt: skip
    return config.model_copy(update={"adapter": adapter})


def _names(modules: Any) -> list[str]:
    return [modules] if isinstance(modules, str) else list(modules or ())


def configure(
    targets: Sequence[Target], given: Mapping[str, Any], assignments: Sequence[str]
) -> Config:
    """The configuration of the targets' run, or the defaults, under what was given.

    Raises:
        ConfigError: neither a run nor `--domain` says which domain.
    """
    run = next((t.config for t in targets if t.config is not None), None)
    values: dict[str, Any] = resolved(run) if run else {}
    if run is None and given["data"]["domain"] is None:
        raise ConfigError(
            "--domain", expected=" or ".join(domains.known()),
            remedy="Only a run's folder knows its domain.",
        )  # fmt: skip
    values.setdefault("model", {})["name"] = targets[0].base
    for section, keys in given.items():
        values = merge(values, {section: {k: v for k, v in keys.items() if v is not None}})
    return build(override(values, assignments), "fedsim eval")


def begin(out: Path, config: Config, *, fresh: bool) -> RunFolder:
    """An empty folder with the configuration in it."""
    if (out / "config.toml").is_file() and fresh:
        shutil.rmtree(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(
            f"{out} is not empty", remedy="Give another --out, or replace it with --fresh."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "config.toml", tomli_w.dumps(resolved(config)).encode())
    return RunFolder(out)


def surroundings(config: Config, found: weights.Weights, backend: str) -> dict[str, Any]:
    """What the scores depend on, for environment.json."""
    return record.surroundings(pick_device(config.run.device)) | {
        "backend": backend,
        "model": {"name": found.name, "origin": found.origin, "sha256": found.digest()},
    }


def comparable(config: Config, scores: Sequence[Score]) -> str:
    """Why these scores are not to be compared with published ones; "" where they are."""
    if config.run.protocol != "flowertune":
        return ""
    reasons = []
    if config.data.source != "hub":
        reasons.append(f"{config.data.source} data instead of the hub's")
    if not all(s.whole for s in scores):
        reasons.append("a subset of the questions")
    if config.model.dtype == "bfloat16":
        reasons.append("computed in bfloat16 instead of float32")
    return f"not comparable with published scores: {', '.join(reasons)}" if reasons else ""
