"""Adapters in PEFT's format: what stock `peft` loads is exactly what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedsim.checkpoint import write_atomic, write_failed
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
        "fan_in_fan_out": False, "use_rslora": adapter.rslora, "use_dora": False,
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
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


def load(folder: Path, layout: AdapterLayout) -> Tensor:
    """Read a PEFT LoRA adapter into a row (P,) fp32; a lower rank leaves its tail zero.

    Raises:
        ModelError: a file or factor is missing, or a factor has another shape.
    """
    import torch

    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as failure:
        raise ModelError(
            f"{folder} cannot be read ({failure})",
            expected="adapter_config.json and adapter_model.safetensors",
        ) from failure
    row = torch.zeros(1, layout.size)
    for module, views in layout.factors(row).items():
        names = [f"{_PREFIX}{module}.lora_{kind}.weight" for kind in "AB"]
        a, b = (tensors.get(name) for name in names)
        (rank, features_in), features_out = views[0].shape[1:], views[1].shape[1]
        r = a.shape[0] if a is not None else 0
        fits = (
            a is not None and b is not None and r <= rank
            and a.shape == (r, features_in) and b.shape == (features_out, r)
        )  # fmt: skip
        if a is None or b is None or not fits:
            got = [None if t is None else tuple(t.shape) for t in (a, b)]
            raise ModelError(
                f"{folder}: {names[0]} and B", got=got,
                expected=f"({rank}, {features_in}) and ({features_out}, {rank}), or a lower rank",
                remedy=f"The adapter has r = {config.get('r')}, other targets or another base.",
            )  # fmt: skip
        views[0][0, :r].copy_(a)
        views[1][0, :, :r].copy_(b)
    return row[0]
