"""What the activations of a pass take, and whether they are worth keeping."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fedsim.config import Config
from fedsim.plan import pass_budget


def activation_bytes(hf: Any, rows: int, itemsize: int, *, recompute: bool = False) -> int:
    """Bytes that a pass keeps from its forward for its backward.

    Per row and layer, with d hidden, q = heads x head_dim, k = key heads x head_dim, f
    intermediate features (performance.md 3.5, with q apart from d):

        2 d  the inputs of both norms       2 d  their outputs, which the linears read
        2 q + 2 k  queries, keys, values and the attention's output
        q + 2 k  the product that these were cut from, before rotation
        3 f  gate, up and their product

    Recomputed, one layer has all of these, and every layer its input (d). Low-rank products
    (rank numbers a module) and the logits of 256 rows at once are left out: SmolLM2 in fp32 with
    rank 16 on all linears kept 2,149 MiB of 2,036 rows, where this says 2,192; with adapters on
    q_proj and v_proj alone 1,902, for linears without adapters keep no input.
    """
    text = hf.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * width
    d, layers = text.hidden_size, text.num_hidden_layers
    layer = 4 * d + 3 * heads * width + 4 * keys + 3 * text.intermediate_size
    numbers = layer + layers * d if recompute else layers * layer
    return int(rows * numbers * itemsize)


def free_bytes(device: torch.device) -> int:
    """Memory that the device can still give to one of the processes that share it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    table = Path("/proc/meminfo")
    if table.is_file():  # Linux; free pages alone would leave out what the page cache gives back
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // sharing
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sharing


def out_of_memory(failure: BaseException) -> bool:
    """Whether an allocation has failed; torch's of the CPU is a RuntimeError among others."""
    known = isinstance(failure, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator" in str(failure)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps it between what is still in use, after the
    loading of 5 layers of width 1,024 in 4 bits 40 to 115 MiB of it."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def recomputes(config: Config, hf: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the backward computes activations anew: as configured, or, with `auto`, when those
    of a full pass would take more than half of the memory that is free."""
    if config.train.recompute != "auto":
        return config.train.recompute == "always"
    kept = activation_bytes(hf, pass_budget(config, device), dtype.itemsize)
    return kept > free_bytes(device) // 2


def agreed(word: bool) -> bool:
    """The leader's word, where all processes must make the same passes."""
    words = [word]
    dist.broadcast_object_list(words, src=0)
    return words[0]
