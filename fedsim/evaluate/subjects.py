"""Adapters checked against the base that they are to be evaluated over, before anything is loaded.

An adapter is of this base if every factor has its place and shape there, and if it was trained over
these weights where that is known. One whose B A is zero in every module changes nothing: that is
said, as some published adapters are such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsim import adapter_file, pretrained, weights
from fedsim.adapter_file import Factors
from fedsim.errors import ModelError
from fedsim.evaluate.generation import Adapter
from fedsim.evaluate.targets import Target
from fedsim.linears import linears

_SAME = 1e-6  # of a magnitude and the norm of a weight's row: both are summed in fp32


@dataclass(frozen=True)
class Checked:
    """One adapter that fits its base, or the bare base.

    Attributes:
        adapter: under its own name, with what its results belong to.
        norm: ||scale B A||, Frobenius, over all modules.
        other: trained over other weights than these, which the user has chosen.
    """

    adapter: Adapter
    base: str
    modules: tuple[str, ...] = ()
    rank: int = 0
    dora: bool = False
    norm: float = 0.0
    other: bool = False

    @property
    def notes(self) -> list[str]:
        """What a reader of its scores has to know."""
        name, out = self.adapter.name, []
        if self.adapter.no_op:
            out.append(f"{name} changes nothing: B A is zero in every module")
        if self.other:
            out.append(f"{name} was trained over other weights than these")
        return out

    def record(self) -> dict[str, Any]:
        """For environment.json."""
        folder = self.adapter.folder
        return {
            "name": self.adapter.name, "subject": self.adapter.subject,
            "folder": None if folder is None else str(folder.resolve()), "base_sha256": self.base,
            "modules": len(self.modules), "rank": self.rank, "dora": self.dora,
            "norm": self.norm, "no_op": self.adapter.no_op,
            "trained_over_other_weights": self.other,
        }  # fmt: skip


def check(
    found: weights.Weights, targets: Sequence[Target], *, based: bool = False
) -> list[Checked]:
    """Every target, checked; see `Checked`.

    Args:
        based: the user has said which base it is.

    Raises:
        ModelError: an adapter is not computed here, of another base, or was trained over other
            weights and nobody has said that these are to be used.
    """
    base, shapes = found.digest(), _shapes(found, targets)
    return [_check(found, base, shapes, target, based) for target in targets]


def _shapes(found: weights.Weights, targets: Sequence[Target]) -> dict[str, tuple[int, int]]:
    if all(t.adapter.folder is None for t in targets):
        return {}
    every = linears(pretrained.outline(found))
    return {name: (m.in_features, m.out_features) for name, m in every.items()}


def _check(
    found: weights.Weights, base: str, shapes: Mapping[str, tuple[int, int]], target: Target,
    based: bool,
) -> Checked:  # fmt: skip
    folder, other = target.adapter.folder, target.over not in (None, base)
    if other and not based:
        raise ModelError(
            f"{target.adapter.name}: sha256 of its base's weights", got=base[:12],
            expected=f"{str(target.over)[:12]}, those that it was trained over",
            remedy=f"Put them back, or say with --base {target.base} that these are to be used.",
        )  # fmt: skip
    content = base + (adapter_file.digest(folder) if folder else "")
    subject = hashlib.sha256(content.encode()).hexdigest()[:16]
    if folder is None:
        return Checked(replace(target.adapter, subject=subject), base)
    parts = adapter_file.factors(folder, shapes)
    norm = sum(f.norm() ** 2 for f in parts.values()) ** 0.5
    idle = norm == 0 and all(f.mag is None or _of_the_weight(found, m, f) for m, f in parts.items())
    return Checked(
        replace(target.adapter, subject=subject, no_op=idle), base, tuple(parts),
        max(len(f.a) for f in parts.values()), any(f.mag is not None for f in parts.values()),
        norm, other,
    )  # fmt: skip


def _of_the_weight(found: weights.Weights, module: str, factors: Factors) -> bool:
    """Whether a module's magnitudes are the norms of its weight's rows, so that DoRA is idle."""
    from safetensors import safe_open

    entry, mag = found.entries.get(f"{module}.weight"), factors.mag
    if entry is None or mag is None:
        return False
    with safe_open(entry["file"], framework="pt") as stream:
        norms = stream.get_tensor(f"{module}.weight").float().norm(dim=1)
    return bool(((norms - mag).abs() <= _SAME * norms).all())
