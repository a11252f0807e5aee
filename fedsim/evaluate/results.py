"""The folder of evaluations: a second one adds to it, and nothing is written before a task is done.

`scores.json`, `eval/<task>.jsonl`, `config.toml`, `environment.json`, `references.json`, and
`plots/scores.svg` where several rounds were evaluated. A result belongs to its subject, the content
of adapter and base, and to the questions by content: the same subject asked the same again replaces
its lines, everything else is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsim.checkpoint import write_atomic
from fedsim.config import Config
from fedsim.core import Score
from fedsim.errors import ConfigError
from fedsim.folder import RunFolder, locked, made, recover, replacing
from fedsim.report import score_curve

# What tells results apart; under the same, the later one counts. `asked` is of the questions by
# content, and of protocol, backend and precision.
KEY = ("subject", "round", "task", "metric", "asked")
_OWN = {"scores.json", "eval", "config.toml", "environment.json", "references.json", "plots"}


class Results:
    """Evaluations in one folder.

    Args:
        fresh: what is there is replaced when the first task is done.

    Raises:
        ConfigError: something else than evaluations is there.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        path = path.resolve()
        if not path.name:
            raise ConfigError("--out", got=str(path), expected="a folder that has a name")
        self.path, self._fresh = path, fresh
        self._heads: dict[str, Any] = {}
        self._folder = RunFolder(path)
        self._began = False
        there = (
            {p.name.removesuffix(".partial") for p in path.iterdir()} if path.is_dir() else set()
        )
        strange = sorted(there - _OWN)
        if strange or path.is_file():
            raise ConfigError(
                f"{path} is no folder of evaluations: it holds {', '.join(strange[:3]) or 'data'}",
                remedy="Give another --out.",
            )  # fmt: skip
        self._read()
        if not fresh:  # what cannot be read is said before anything is computed
            for file in sorted(path.glob("eval/*.jsonl")):
                self._folder.read(str(file.relative_to(path)))
            for name in ("references.json", "environment.json"):
                self._known(name)

    def _known(self, name: str) -> dict[str, Any]:
        there = (self._folder.path / name).is_file()
        return self._folder.read_json(name) if there else {}

    def _read(self) -> list[dict[str, Any]]:
        file = self._folder.path / "scores.json"
        if not file.is_file():
            return []
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if not all(isinstance(s, dict) and "task" in s for s in found):
                raise ValueError("it holds something else than scores")
        except (OSError, ValueError, TypeError) as failure:
            if self._fresh:
                return []
            raise ConfigError(
                f"{file} cannot be read ({failure})",
                expected="the scores of evaluations",
                remedy="Give another --out, or replace them with --fresh.",
            ) from None
        return list(found)

    @contextmanager
    def open(
        self, config: Config, environment: Mapping[str, Any], references: Mapping[str, Any]
    ) -> Iterator[None]:
        """Keep the folder for this process; with the first task these are written as well."""
        self._heads = {"config": config, "environment": environment, "references": references}
        with locked(self.path):
            yield

    def add(self, scores: Sequence[Score], task: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Write one task's scores and answers; what the same subject had there is replaced."""
        if not self._began:
            self._begin()
        new = [s.record() for s in scores]
        over = {tuple(s[k] for k in KEY) for s in new}
        kept = [s for s in self._read() if tuple(s.get(k) for k in KEY) not in over]
        own = ("subject", "round", "asked")
        marks = {tuple(s[k] for k in own) for s in new}
        folder = self._folder
        lines = [line for line in folder.read(f"eval/{task}.jsonl")
                 if tuple(line.get(k) for k in own) not in marks]  # fmt: skip
        made(folder.path / "eval")
        text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in [*lines, *records])
        write_atomic(folder.path / "eval" / f"{task}.jsonl", text.encode())
        folder.write_json("scores.json", kept + new)
        folder.publish()

    def _begin(self) -> None:
        self._began = True
        recover(self.path)
        if self._fresh and self.path.is_dir():
            self._folder = replacing(self.path)
        folder = self._folder
        folder.begin(self._heads["config"])
        now = dict(self._heads["environment"])
        ids = {s["subject"] for s in now["subjects"]}
        old = [s for s in self._known("environment.json").get("subjects") or []
               if isinstance(s, dict) and s.get("subject") not in ids]  # fmt: skip
        folder.write_json("environment.json", now | {"subjects": [*old, *now["subjects"]]})
        references = self._known("references.json") | dict(self._heads["references"])
        folder.write_json("references.json", references)

    def draw(self, scores: Sequence[Score]) -> None:
        """The curve over the rounds, where there are several."""
        if len({s.round for s in scores}) > 1:
            made(self.path / "plots")
            drawn = score_curve([s.record() for s in scores])
            write_atomic(self.path / "plots" / "scores.svg", drawn.encode())
