"""An adapter as its folder holds it: settings are computed, change nothing, or are refused by name.

`adapter_config.json` is read by peft's own class, so that a key that is missing has the value that
stock peft gives it, and modules are matched by peft's own function. Which settings are computed and
which change nothing is listed here; whatever else a file says is refused, also what a later peft
may add. LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.errors import ModelError

OVER = "base_sha256"  # in the metadata of our own files
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# A piece's tensor in a file. PEFT's parameter has a `.weight` after the last; its files have not.
NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "mag": "lora_magnitude_vector"}
# What decides which modules have factors, and how large they count.
COMPUTED = {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern",
            "alpha_pattern", "use_rslora", "use_dora", "target_modules", "exclude_modules",
            "layers_to_transform", "layers_pattern"}  # fmt: skip
# What changes nothing once factors are read: how they began, were trained or were saved.
NEUTRAL = {"auto_mapping", "peft_version", "inference_mode", "lora_dropout", "fan_in_fan_out",
           "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
           "megatron_core", "qalora_group_size"}  # fmt: skip
# What changes nothing at these values only. Others of init_lora_weights take from the base what
# the factors begin with (PiSSA, OLoRA, CorDA, LoftQ, MiCA, LoRA-GA), each time that peft loads.
ONLY: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"), "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
# Options that are off when they are empty; of others peft takes an empty value for an order.
_EMPTY = {"modules_to_save", "target_parameters", "layer_replication"}
_CONVERT = (
    "Save it again with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
    "which makes a plain LoRA adapter of it."
)


def settings(folder: Path) -> Any:
    """peft's `LoraConfig` of an adapter's folder.

    Raises:
        ModelError: it cannot be read, is of another method, or has a setting that is not computed.
    """
    file = folder / CONFIG
    try:
        given: Any = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as failure:
        raise ModelError(f"{file} cannot be read ({failure})", expected="a JSON object") from None
    if not isinstance(given, dict):
        raise ModelError(f"{file}", got=type(given).__name__, expected="a JSON object")
    if given.get("peft_type") != "LORA":
        raise ModelError(
            f"{file}: peft_type", got=given.get("peft_type"), expected="LORA",
            remedy="Other methods are not computed.",
        )  # fmt: skip
    from peft import LoraConfig

    for name, value in given.items():
        if not _allowed(name, value):
            known = name in LoraConfig.__dataclass_fields__
            raise ModelError(
                f"{file}: {name}", got=value, expected=_expected(name),
                remedy=_CONVERT if name == "init_lora_weights" else
                "Evaluate the model into which peft has merged the adapter, where it can."
                if known else "It is no setting of the installed peft: remove it if it is a note.",
            )  # fmt: skip
    kept = {k: v for k, v in given.items() if k in LoraConfig.__dataclass_fields__}
    kept.pop("runtime_config", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = LoraConfig(**kept)
            ranks = [found.r, *(found.rank_pattern or {}).values()]
            numbers = [*ranks, found.lora_alpha, *(found.alpha_pattern or {}).values()]
            whole = all(isinstance(r, int) for r in ranks)
            if not whole or not all(isinstance(n, int | float) and 0 < n < inf for n in numbers):
                raise ValueError(f"ranks and alphas are {numbers}, not numbers above 0")
            modules = found.target_modules
            if not isinstance(modules, str | list | set) or not modules:
                raise ValueError(f"target_modules, {modules!r}, names no modules")
            for pattern in [*(found.rank_pattern or {}), *(found.alpha_pattern or {})]:
                re.compile(pattern)
    except (TypeError, ValueError, AttributeError, ImportError, re.error) as failure:
        raise ModelError(f"{file}: {failure}", expected="settings that peft accepts") from None
    return found


def _allowed(name: str, value: Any) -> bool:
    if name in COMPUTED | NEUTRAL:
        return True
    if name in ONLY:
        return any(value is one or (isinstance(one, str) and value == one) for one in ONLY[name])
    return value is None or value is False or (name in _EMPTY and value in ([], {}))


def _expected(key: str) -> str:
    return " or ".join(map(repr, ONLY[key])) if key in ONLY else "none: it is not computed"


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder as they are stored: safetensors, or else the pickle of
    older versions, read without running any code. Raises ModelError."""
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        if file.is_file() or not (folder / PICKLED).is_file():
            return load_file(file)
        file = folder / PICKLED
        found = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
            raise ValueError("it holds something else than named tensors")
    except Exception as failure:  # torch.load raises whatever a damaged pickle leads to
        raise ModelError(
            f"{file} cannot be read ({type(failure).__name__}: {str(failure).splitlines()[0]})"
            if str(failure)
            else f"{file} cannot be read ({type(failure).__name__})",
            expected=f"{WEIGHTS} or {PICKLED} as peft writes them",
        ) from None
    return found


def key(module: str, kind: str) -> str:
    """The name of a factor in a file."""
    return f"base_model.model.{module}.{NAMES[kind]}"


def base_digest(folder: Path) -> str | None:
    """sha256 of the base's weights that the adapter was trained over, where fedsim wrote it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as stream:
            return (stream.metadata() or {}).get(OVER)
    except (OSError, SafetensorError):
        return None


def shapes(found: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(I, O) of every module that has both factors, as the tensors say."""
    pairs = {n.removeprefix("base_model.model.").removesuffix("." + NAMES["A"]): t
             for n, t in found.items() if n.endswith(NAMES["A"])}  # fmt: skip
    return {m: (a.shape[-1], found[key(m, "B")].shape[0])
            for m, a in pairs.items() if key(m, "B") in found}  # fmt: skip


def digest(folder: Path) -> str:
    """sha256 of an adapter's settings and tensors: the same for a copy, whatever its name."""
    h = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, PICKLED):
        if (folder / name).is_file():
            h.update(name.encode() + (folder / name).read_bytes())
    return h.hexdigest()


def targets(found: Any, linears: Iterable[str]) -> list[str]:
    """The linears, of all that a base has, to which stock peft gives factors.

    Raises:
        ModelError: target_modules names none, or a pattern is no regular expression.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    wanted, linears = copy(found), list(linears)
    if wanted.target_modules == "all-linear":
        wanted.target_modules = set(linears)
    try:
        out = [
            n for n in linears if wanted.target_modules and check_target_module_exists(wanted, n)
        ]
    except (re.error, TypeError) as failure:
        raise ModelError(
            "modules that an adapter names",
            got=found.target_modules,
            expected=f"names or a regular expression ({failure})",
        ) from None
    if not out:
        raise ModelError(
            "target_modules of an adapter", got=found.target_modules,
            expected="some linear of this base", remedy="The adapter is of another base.",
        )  # fmt: skip
    return out


def scale(found: Any, module: str) -> float:
    """What stock peft multiplies B A of a module by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    r, alpha = rank(found, module), _of(found.alpha_pattern, module, found.lora_alpha)
    return float(alpha / (r**0.5 if found.use_rslora else r))


def rank(found: Any, module: str) -> int:
    """The rank that stock peft gives a module."""
    return int(_of(found.rank_pattern, module, found.r))


def _of(pattern: Mapping[str, Any] | None, module: str, value: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return (pattern or {}).get(get_pattern_key((pattern or {}).keys(), module), value)


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one linear: A (r, I), B (O, r), with DoRA mag (O,); fp32."""

    a: Tensor
    b: Tensor
    mag: Tensor | None
    scale: float

    def norm(self) -> float:
        """||scale B A||, Frobenius: sqrt of the sum of (B'B) * (A A')."""
        a, b = self.a.double(), self.b.double()
        square = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0)
        return float(self.scale * square.sqrt())


def factors(folder: Path, linears: Mapping[str, tuple[int, int]]) -> dict[str, Factors]:
    """The factors of every module that has some, in the order of `linears`.

    Args:
        linears: name -> (I, O) of every linear of the base that may have factors.

    Raises:
        ModelError: a tensor has no place among them, a target lacks one, or a shape is another.
    """
    found, left = settings(folder), tensors(folder)
    kinds = ("A", "B", "mag") if found.use_dora else ("A", "B")
    out = {}
    for module in targets(found, linears):
        i, o = linears[module]
        keys = [key(module, kind) for kind in kinds]
        got = [left.pop(key, None) for key in keys]
        shapes = [None if t is None else tuple(t.shape) for t in got]
        r = rank(found, module)
        if shapes != [(r, i), (o, r), (o,)][: len(kinds)]:
            raise ModelError(
                f"{folder}: {keys[0]} and {', '.join(kinds[1:])}", got=shapes,
                expected=f"{[(r, i), (o, r), (o,)][: len(kinds)]}, as r and this base have it",
                remedy="The file is of another base, or incomplete.",
            )  # fmt: skip
        parts = [t.float() for t in got if t is not None]
        out[module] = Factors(parts[0], parts[1], (*parts, None)[2], scale(found, module))
    if left:
        raise ModelError(
            f"{folder}: tensors such as {min(left)}", got=len(left),
            expected="only factors of linears that target_modules names and this base has",
            remedy="Heads, embeddings, biases and saved modules are not computed; or the adapter "
            "is of another base.",
        )  # fmt: skip
    return out
