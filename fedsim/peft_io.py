"""Adapters in PEFT's format: what stock `peft` loads is exactly what was trained."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsim.checkpoint import write_failed
from fedsim.config import Adapter
from fedsim.core import AdapterLayout
from fedsim.errors import ModelError

_PREFIX = "base_model.model."


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
    folder: Path, row: Tensor, layout: AdapterLayout, adapter: Adapter, base_model: str
) -> None:
    """Write one row as adapter_config.json + adapter_model.safetensors, whole or not at all.

    Args:
        row: (P,) fp32.
        base_model: what `peft` should name as the base.
    """
    tensors, modules = {}, []
    for module, (a, b) in layout.factors(row[None].cpu()).items():
        modules.append(module)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a[0].contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b[0].contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout,
        "bias": "none", "target_modules": modules, "inference_mode": True,
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        with (partial / "adapter_model.safetensors").open("rb") as stream:
            os.fsync(stream.fileno())
        shutil.rmtree(folder, ignore_errors=True)  # a killed round may have left its own
        partial.replace(folder)
    except OSError as failure:
        shutil.rmtree(partial, ignore_errors=True)
        raise write_failed(folder, failure) from failure


def load(folder: Path, layout: AdapterLayout) -> Tensor:
    """Read a PEFT LoRA adapter into a row (P,) fp32.

    Raises:
        ModelError: a factor is missing or has another shape.
    """
    import torch

    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    row = torch.zeros(1, layout.size)
    for piece in layout.pieces:
        name = f"{_PREFIX}{piece.module}.lora_{piece.kind}.weight"
        found = tensors.get(name)
        rank_axis = 0 if piece.kind == "A" else 1
        if found is None or found.shape[1 - rank_axis] != piece.shape[1 - rank_axis] or (
            found.shape[rank_axis] > layout.rank
        ):  # fmt: skip
            raise ModelError(
                f"{folder}: {name}",
                got=None if found is None else tuple(found.shape),
                expected=f"shape {piece.shape}",
                remedy=f"The adapter has r = {config.get('r')} for other targets or another base.",
            )
        layout.view(row, piece).narrow(1 + rank_axis, 0, found.shape[rank_axis]).copy_(found[None])
    return row[0]
