"""From questions to scores: ask, read the answers, grade, count. Every example is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fedsim.core import Score
from fedsim.data import pieces
from fedsim.evaluate import sandbox
from fedsim.evaluate.generation import Adapter, Backend, Output, Request, Sampling
from fedsim.evaluate.padding import behind
from fedsim.evaluate.statistics import proportion
from fedsim.evaluate.suite import Questions, Suite
from fedsim.tasks import MENDED, Form, Grades, Item, Program

Records = dict[str, list[dict[str, Any]]]  # task -> one record an example and adapter


@dataclass(frozen=True)
class Subject:
    """What is evaluated: adapters over one base, as a backend holds it.

    Attributes:
        rounds: of each adapter, 0 for what was not trained.
        precision: what the base computes with, for the record.
        defaults: what the model's own generation_config asks for.
    """

    backend: Backend
    tokenizer: Any
    adapters: Sequence[Adapter]
    rounds: Sequence[int]
    precision: str
    defaults: Sampling


def evaluate(subject: Subject, tests: Suite) -> tuple[list[Score], Records]:
    """Every task under every adapter: scores, and each example's prompt, answer and grades."""
    scores: list[Score] = []
    records: Records = {}
    for name, task in tests.tasks.items():
        lines = records[name] = answer(subject, name, task)
        asked = hashlib.sha256("\0".join((
            task.content, tests.protocol, subject.backend.name, subject.precision
        )).encode()).hexdigest()[:12]  # fmt: skip
        ranked = ["likelihood"] if task.form.likelihood and subject.backend.ranks else []
        metrics = [*ranked, *graded(subject, task.form)]
        n = len(task.items)
        for a, (adapter, round) in enumerate(zip(subject.adapters, subject.rounds, strict=True)):
            mine = lines[a * n : (a + 1) * n]  # by place: names are for people
            if adapter.subject:
                for line in mine:
                    line |= {"subject": adapter.subject, "asked": asked}
            for metric in metrics:
                value, stderr = proportion([line[metric] for line in mine])
                scores.append(Score(
                    round=round, domain=tests.domain, task=name, metric=metric, value=value,
                    n=len(mine), stderr=stderr, precision=subject.precision,
                    protocol=tests.protocol, source=task.origin, file=f"eval/{name}.jsonl",
                    adapter=adapter.name, backend=subject.backend.name, whole=task.whole,
                    subject=adapter.subject, asked=asked, no_op=adapter.no_op,
                ))  # fmt: skip
    return scores, records


def answer(subject: Subject, name: str, task: Questions) -> list[dict[str, Any]]:
    """Ask every question of one task under every adapter, and grade what comes.

    A record has the text that is graded as `output`, and as `mended` the one that `MENDED` grades.
    """
    form, n = task.form, len(task.items)
    absent = {*form.metrics} - {*graded(subject, form)}
    asked = questions(subject, form, task.items)
    # Where padding changes what is written, the unpadded prompt is continued beside it.
    twice = [i for i, r in enumerate(asked) if r.padded and behind(subject.tokenizer)]
    again = [replace(asked[i], padded=0) for i in twice]
    written = subject.backend.generate(
        [*asked, *again], subject.adapters, sampling(form, subject.defaults)
    )
    outputs = mended = written[: len(asked)]
    if twice:
        more = dict(zip(twice, written[len(asked) :], strict=True))
        mended = [more.get(i, output) for i, output in enumerate(outputs)]
    ranges = [slice(a * n, a * n + n) for a in range(len(subject.adapters))]
    grades = [g for r in ranges for g in grade(form, task.items, outputs[r], mended[r])]
    lines = []
    for i, (output, other, marks) in enumerate(zip(outputs, mended, grades, strict=True)):
        a, item = i // n, task.items[i % n]
        texts = {} if absent else {"output": output.text}
        if MENDED in form.metrics:
            texts["mended"] = other.plain
        line: dict[str, Any] = {
            "round": subject.rounds[a], "adapter": subject.adapters[a].name, "task": name,
            "index": i % n, "prompt": item.prompt, "gold": item.gold, **texts,
            "end": output.end, **{m: mark for m, mark in marks.items() if m not in absent},
        }  # fmt: skip
        if output.logprob:
            best = item.choices[int(np.argmax(output.logprob))]
            line |= {
                "choice": best, "logprob": [float(f"{v:.5g}") for v in output.logprob],
                "likelihood": best == item.gold,
            }  # fmt: skip
        lines.append(line)
    return lines


def comparable(scores: Iterable[Mapping[str, Any]], training: str = "hub:") -> str:
    """Why these scores are not to be compared with published ones; "" where they are.

    Args:
        scores: as recorded. training: where the training rows come from, if it was asked here.
    """
    found = [s for s in scores if s["protocol"] == "flowertune"]
    reasons = []
    for origin in dict.fromkeys([training, *(s["source"] for s in found)]):
        kind = origin.partition(":")[0]
        if kind != "hub" and (why := f"{kind} data instead of the hub's") not in reasons:
            reasons.append(why)
    if not all(s["whole"] for s in found):
        reasons.append("a subset of the questions")
    if any("bfloat16" in s["precision"] for s in found):
        reasons.append("computed in bfloat16 instead of float32")
    if not found or not reasons:
        return ""
    return f"not comparable with published scores: {', '.join(reasons)}"


def graded(subject: Subject, form: Form) -> tuple[str, ...]:
    """The form's metrics, less what the backend cannot ask: of padded prompts, all but `MENDED`."""
    if form.generation.padded and not subject.backend.pads:
        return (MENDED,)
    return form.metrics


def questions(subject: Subject, form: Form, items: Sequence[Item]) -> list[Request]:
    """What every adapter is asked, one adapter after another."""
    g, tokenizer, backend = form.generation, subject.tokenizer, subject.backend
    stop = (*g.stop, tokenizer.eos_token) if g.special else g.stop
    wide = padded(form, items, tokenizer) if g.padded and backend.pads else [0] * len(items)
    return [
        Request(item.prompt, a, most, stop, partial(form.decided, item) if form.decided else None,
                item.choices if form.likelihood and backend.ranks else (),
                padded=width, one_end=g.one_end, special=g.special)
        for a in range(len(subject.adapters))
        for item, most, width in zip(
            items, most_tokens(form, items, tokenizer), wide, strict=True
        )
    ]  # fmt: skip


def padded(form: Form, items: Sequence[Item], tokenizer: Any) -> list[int]:
    """Tokens that each prompt is padded to: its batch's longest; 0 for that one itself."""
    given = [len(ids) for ids, _ in pieces.read(tokenizer, [item.prompt for item in items])]
    n = form.generation.batch
    wide = [max(given[i - i % n : i - i % n + n]) for i in range(len(given))]
    return [width if count < width else 0 for count, width in zip(given, wide, strict=True)]


def most_tokens(form: Form, items: Sequence[Item], tokenizer: Any) -> list[int]:
    """New tokens that each answer may have, at least 1 (see `domains.Generation`)."""
    generation, most = form.generation, []
    given = [len(ids) for ids, _ in pieces.read(tokenizer, [item.prompt for item in items])]
    for first in range(0, len(items), generation.batch):
        batch = slice(first, first + generation.batch)
        n = generation.max_new
        if generation.max_length is not None:  # the script pads a batch to its longest prompt
            room = generation.max_length - max(given[batch])
            n = min(n, room) if n else room
        elif not n:
            n = len(tokenizer(items[first].gold, add_special_tokens=False)["input_ids"])
        most += [n] * len(given[batch])
    return [max(m, 1) for m in most]


def sampling(form: Form, defaults: Sampling) -> Sampling:
    """How the form's answers are drawn; a temperature of None is the model's own."""
    g = form.generation
    if g.temperature is None:
        return defaults
    return Sampling(g.temperature, g.top_p, g.top_k)


def grade(
    form: Form, items: Sequence[Item], outputs: Sequence[Output], mended: Sequence[Output] = ()
) -> list[dict[str, bool]]:
    """Grades of one adapter's answers; programs are run, the same one once.

    Args:
        mended: those that `MENDED` grades, where they are others.
    """
    texts = [output.text for output in outputs]
    if form.shared_outputs:
        last = {item.prompt: text for item, text in zip(items, texts, strict=True)}
        texts = [last[item.prompt] for item in items]
    marks = [form.grade(item, text) for item, text in zip(items, texts, strict=True)]
    if MENDED in form.metrics:
        plain = [output.plain for output in mended or outputs]
        marks = [{**mark, MENDED: form.grade(item, text)[MENDED]}
                 for mark, item, text in zip(marks, items, plain, strict=True)]  # fmt: skip
    return settle(marks)


def settle(grades: Sequence[Grades]) -> list[dict[str, bool]]:
    """Replace every program by whether it passes in the sandbox."""
    programs = list(dict.fromkeys(
        replace(mark, early=False)
        for marks in grades for mark in marks.values() if isinstance(mark, Program)
    ))  # fmt: skip
    verdicts = dict(zip(programs, sandbox.grade(programs) if programs else [], strict=True))

    def hit(mark: bool | Program) -> bool:
        if not isinstance(mark, Program):
            return bool(mark)
        verdict = verdicts[replace(mark, early=False)]
        return verdict.passed or (mark.early and verdict.end == "early")

    return [{metric: hit(mark) for metric, mark in marks.items()} for marks in grades]
