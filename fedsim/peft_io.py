"""Adapters in PEFT's format: what stock `peft` loads is exactly what was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedsim.checkpoint import write_atomic, write_failed
from fedsim.config import Adapter
from fedsim.core import AdapterLayout, Piece
from fedsim.correction import factors_of
from fedsim.errors import ModelError

_PREFIX = "base_model.model."
# A piece's tensor in a file. PEFT's parameter has a `.weight` after the last; its files have not.
_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "mag": "lora_magnitude_vector"}


def default_targets(model_type: str) -> tuple[str, ...]:
    """PEFT's default LoRA targets for an architecture. Raises ModelError when it has none."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    if model_type not in known:
        raise ModelError(
            "adapter.targets is empty, and PEFT has no default for model type",
            got=model_type,
            expected="module names",
            remedy='Set adapter.targets, for example ["all-linear"].',
        )
    return tuple(known[model_type])


def export(
    folder: Path, row: Tensor, layout: AdapterLayout, adapter: Adapter, base_model: str,
    base: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write one row as adapter_config.json + adapter_model.safetensors, whole or not at all.

    Args:
        row: (P,) fp32, of rank adapter.rank.
        base_model: what `peft` should name as the base.
        base: what a rule has added to the frozen weights (`ServerState.base`). It goes into the
            adapter, whose rank at those modules is larger by that of the correction.
    """
    tensors, ranks, alphas = {}, {}, {}
    for piece in layout.pieces:
        values = layout.view(row[None].cpu(), piece)[0].contiguous()
        tensors[_key(piece)] = values[0] if piece.kind == "mag" else values
    for module in layout.modules:
        if (more := factors_of(base or {}, module)) is None:
            continue
        a, b = (_key(layout.piece(module, kind)) for kind in ("A", "B"))
        tensors[a] = torch.cat([tensors[a], more[0].cpu()])
        tensors[b] = torch.cat([tensors[b], more[1].cpu() / adapter.scale()], 1)
        rank = len(tensors[a])
        ranks[module], alphas[module] = rank, adapter.alpha_for(rank)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout,
        "bias": "none", "target_modules": list(layout.modules), "inference_mode": True,
        "fan_in_fan_out": False, "use_rslora": adapter.rslora, "use_dora": adapter.dora,
        "modules_to_save": None, "rank_pattern": ranks, "alpha_pattern": alphas,
    }  # fmt: skip
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_atomic(
            partial / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"})
        )
        shutil.rmtree(folder, ignore_errors=True)  # a killed round may have left its own
        partial.replace(folder)
    except OSError as failure:
        raise write_failed(folder, failure) from failure
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _key(piece: Piece) -> str:
    return f"{_PREFIX}{piece.module}.{_NAMES[piece.kind]}"


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        return config, load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as failure:
        raise ModelError(
            f"{folder} cannot be read ({failure})",
            expected="adapter_config.json and adapter_model.safetensors",
        ) from failure


def load(folder: Path, layout: AdapterLayout, onto: Tensor | None = None) -> Tensor:
    """Read a PEFT LoRA or DoRA adapter into a row (P,) fp32; a lower rank leaves its tail zero.

    Args:
        onto: (P,) what modules have of which the file holds nothing; without it that is an error.

    Raises:
        ModelError: a file or factor is missing, a factor has another shape, or the file holds
            tensors that have no place in the layout.
    """
    config, tensors = _read(folder)
    row = torch.zeros(1, layout.size) if onto is None else onto.clone()[None]
    for module in layout.modules:
        pieces = [layout.piece(module, kind) for kind in _NAMES if layout.has(module, kind)]
        given = [tensors.pop(_key(piece)) for piece in pieces if _key(piece) in tensors]
        if onto is not None and not given:
            continue
        got = [tuple(t.shape) for t in given]
        r = min(layout.rank, got[0][0]) if got and got[0] else 0
        a, b, *lengths = (layout.view(row, piece)[0] for piece in pieces)
        views = [a[:r], b[:, :r], *(m[0] for m in lengths)]
        if r == 0 or got != [tuple(v.shape) for v in views]:
            whole = [p.shape[p.kind == "mag" :] for p in pieces]
            raise ModelError(
                f"{folder}: {' and '.join([_key(pieces[0]), *(p.kind for p in pieces[1:])])}",
                got=got, expected=f"{' and '.join(map(str, whole))}, or a lower rank",
                remedy=f"The adapter has r = {config.get('r')}, other targets or another base.",
            )  # fmt: skip
        for view, values in zip(views, given, strict=True):
            view.copy_(values)
    if tensors:
        raise ModelError(
            f"{folder}: tensors such as {min(tensors)}", got=len(tensors),
            expected="none but those of adapter.targets, with magnitudes only under adapter.dora",
            remedy="Set adapter.targets and adapter.dora as they were when it was made.",
        )  # fmt: skip
    return row[0]


def load_scaled(folder: Path, layout: AdapterLayout, onto: Tensor) -> tuple[Tensor, float]:
    """The row (P,) of `load` and the scale that the adapter's own configuration gives it.

    A module whose rank or alpha is of a pattern has its own scale: it goes into that module's B.
    """
    from peft.utils.other import get_pattern_key

    row = load(folder, layout, onto)
    config = json.loads((folder / "adapter_config.json").read_text())

    def scale(module: str) -> float:
        r, alpha = (
            config.get(pattern, {}).get(get_pattern_key(config.get(pattern, {}), module), value)
            for pattern, value in (("rank_pattern", config["r"]),
                                   ("alpha_pattern", config["lora_alpha"]))
        )  # fmt: skip
        return float(alpha / (r**0.5 if config.get("use_rslora") else r))

    usual = scale("")
    for module in layout.modules:
        if (own := scale(module)) != usual:
            layout.view(row[None], layout.piece(module, "B")).mul_(own / usual)
    return row, usual


def attach(model: Any, folder: Path) -> Any:
    """A stock model under an adapter; its `unload` gives the bare model back."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()
