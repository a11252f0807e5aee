"""transformers' own causal LM, as its weights are computed with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedsim import mapped
from fedsim.config import Config
from fedsim.errors import FedSimError, ModelError
from fedsim.quantised import quantise
from fedsim.weights import Weights, model_type


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """`model.dtype`; where that is auto, fp32 under `flowertune`, else bf16 where the device
    multiplies it in hardware.

    On CPU that is AMX or AVX512-BF16: products of 2048 rows ran 2.4 times faster with the latter.
    """
    if config.model.dtype != "auto":
        return torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    if config.run.protocol == "flowertune":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def understood(weights: Weights) -> Iterator[None]:
    """Say of a model which foreign exception it leads to, and what helps.

    Raises:
        ModelError: for every exception but ours and a lack of memory.
    """
    try:
        yield
    except (FedSimError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        if "out of memory" in str(failure).lower() or "can't allocate memory" in str(failure):
            raise
        said = (str(failure).strip().splitlines() or ["no message"])[0][:300]
        raise ModelError(
            f"{weights.origin} cannot be computed ({type(failure).__name__}: {said})",
            expected="a causal language model of attention and gated MLPs, as Llama",
            remedy=f"Models of type {model_type(weights)!r} are not all computed: give another, or "
            "mend its files.",
        ) from failure


def outline(weights: Weights) -> Any:
    """The model without its weights, on torch's meta device. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with understood(weights), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(weights.path))


def stock(
    weights: Weights, config: Config, device: torch.device, attention: str | None = None,
    *, pack: bool = False,
) -> Any:  # fmt: skip
    """transformers' own causal LM from a folder, in the computing dtype, with the values that a
    quantised base has, and with `pack` held in its bits. Raises ModelError where it cannot be
    loaded."""
    from transformers import AutoModelForCausalLM

    dtype, kind = compute_dtype(config, device), config.model.quantisation
    try:
        if weights.values is not None:
            return mapped.read(weights, dtype, attention).to(device)
        # What is quantised is converted weight by weight, where all have one dtype on disk.
        lazily = weights.stored if kind != "none" else None
        model = AutoModelForCausalLM.from_pretrained(
            weights.path, dtype=lazily or dtype, attn_implementation=attention
        )
    except (OSError, ValueError, RuntimeError) as failure:
        raise ModelError(
            f"{weights.origin} cannot be loaded ({failure})",
            expected="a Hugging Face causal language model",
        ) from failure
    if kind != "none":
        double = config.model.double_quantisation
        model.quantisation_errors = quantise(model, kind, double, dtype, device, pack=pack)
    model = model.to(device)
    mapped.align(model)
    return model
