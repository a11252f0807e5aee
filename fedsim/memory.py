"""What a process of a run takes at its peak, and the slots and passes that fit."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fedsim.config import Config
from fedsim.linears import target_linears
from fedsim.plan import pass_budget

GIB = 1 << 30
# Python and libraries, without and with a GPU's context; the second is not measured.
RUNTIME = {"cpu": 560 << 20, "cuda": 1 << 30}
USED = 0.9  # of what is free: predictions are right to a tenth
# Activations of so many layers glibc's heap keeps in holes between blocks in use: 0 to 7 were
# measured, with dropout, whose blocks have more sizes, 18 and 19. Blocks that go back to the system
# at once leave none, and a pass takes a fifth longer.
_HOLES, _HOLES_OF_DROPOUT = 4, 18
_AFTER_ATTENTION = ("o_proj", "dense")  # read what attention keeps in any case
_Word = TypeVar("_Word")


@dataclass(frozen=True)
class Activations:
    """Bytes that a pass keeps from its forward for its backward.

    Attributes:
        kept, recomputed: for each packed row, without and with recomputation.
        once: logits of 256 rows.
        heap: for each row, what a CPU's heap keeps besides.
    """

    kept: int
    recomputed: int
    once: int
    heap: int = 0

    def of(self, rows: int, *, recompute: bool) -> int:
        return rows * self._each(recompute) + self.once

    def rows(self, size: int, *, recompute: bool) -> int:
        """Most rows that so many bytes hold; at least 0."""
        return max(0, size - self.once) // self._each(recompute)

    def _each(self, recompute: bool) -> int:
        return (self.recomputed if recompute else self.kept) + self.heap


@dataclass(frozen=True)
class Limits:
    """What a device trains at once.

    Attributes:
        budget: most packed rows of a pass.
        recompute: the backward computes activations anew.
        note: says, where the memory is too small for what was asked for, what it has room for.
    """

    slots: int
    budget: int
    recompute: bool
    note: str = ""


def activations(
    model: Any, targets: tuple[str, ...], config: Config, device: torch.device, dtype: torch.dtype,
) -> Activations:  # fmt: skip
    """Count what the layers keep; the model may be on the meta device.

    Per row and layer, with d hidden, q = heads x head_dim, k = key heads x head_dim, f
    intermediate features, r the rank (performance.md 3.5, with q apart from d):

        d each  the inputs of its norms; of norms of queries and keys q and k
        2 q + 2 k  queries, keys, values and the attention's output
        2 f  gate and up; with another gate than SiLU f more
        d, f  what a site with adapters reads, once a site; with dropout once an adapter
        r  an adapter's low-rank product, fp32;  under DoRA also its linear's output

    Recomputed, one layer has all of these, and the gradients of gate and up, and every layer its
    input (d). The last layer, of which fewer rows reach the MLP, counts as the others do.
    """
    text = model.config.get_text_config()
    heads, d = text.num_attention_heads, text.hidden_size
    f = getattr(text, "intermediate_size", None) or 4 * d
    f = f if isinstance(f, int) else max(f)  # Gemma 3n has one for each layer
    width = getattr(text, "head_dim", None) or d // heads
    q, k = heads * width, (getattr(text, "num_key_value_heads", None) or heads) * width
    gate = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", "")
    every = text.num_hidden_layers
    plain = 2 * q + 2 * k + (2 if gate == "silu" else 3) * f
    norms = sum(
        {"q_norm": q, "k_norm": k}.get(name.rpartition(".")[2], d)
        for name, module in model.named_modules()
        if ".layers." in name and type(module).__name__.endswith("Norm")
    )
    sites: dict[tuple[str, int], int] = {}
    each = low = 0
    for name, module in target_linears(model, targets).items():
        parent, _, leaf = name.rpartition(".")
        low += config.adapter.rank
        if config.adapter.dropout:
            each += module.in_features
        elif leaf not in _AFTER_ATTENTION:
            sites[parent, module.in_features] = module.in_features
        if config.adapter.dora:
            each += module.out_features
    size = dtype.itemsize
    whole = (every * plain + norms + sum(sites.values()) + each) * size + 4 * low
    layer = whole // every
    again = every * d * size + layer + 2 * f * size
    heap = 0
    if device.type == "cpu":
        heap = layer * (_HOLES_OF_DROPOUT if config.adapter.dropout else _HOLES)
    return Activations(whole, again, 256 * 4 * text.vocab_size, heap)


def slot_bytes(config: Config, size: int, rows: int) -> int:
    """Of one client in training: fp32 row (P,), gradient, two moments, under privacy of examples a
    sum of clipped gradients, `rows` of the rule's terms, and a finished one that waits its turn."""
    return 4 * size * (5 + config.privacy.of_examples + rows)


def fits(config: Config, kept: Activations, slot: int, room: int) -> bool:
    """Whether one client and the shortest pass, of recomputed activations if need be, do."""
    least = kept.of(config.largest_chunk, recompute=config.train.recompute != "never")
    return slot + least <= room * USED


def recomputes(config: Config, kept: Activations, room: int, device: torch.device) -> bool:
    """Whether the backward computes activations anew: as configured, or, with `auto`, where those
    of a full pass would take more than half of the room."""
    if config.train.recompute != "auto":
        return config.train.recompute == "always"
    return kept.of(pass_budget(config, device), recompute=False) > room * USED / 2


def limits(
    config: Config, kept: Activations, slot: int, room: int, device: torch.device,
    *, recompute: bool,
) -> Limits:  # fmt: skip
    """What was asked for, or what fits: then slots take half of the room at most, and passes get
    shorter, down to what cannot be split.

    Args:
        slot: bytes of one. room: bytes for slots and passes.
    """
    asked = min(config.train.slots, config.most_clients), pass_budget(config, device)
    slots, budget = asked
    room = int(room * USED)
    if slots * slot + kept.of(budget, recompute=recompute) <= room:
        return Limits(slots, budget, recompute)
    slots = max(1, min(slots, room // 2 // slot))
    rows = kept.rows(room - slots * slot, recompute=recompute)
    budget = min(budget, max(config.largest_chunk, rows // 256 * 256))
    note = f"memory has room for {slots} of {asked[0]} slots and passes of {budget:,} tokens"
    return Limits(slots, budget, recompute, note)


def room(config: Config, device: torch.device) -> int:
    """Bytes that slots and passes may take, now that the base is loaded."""
    free = free_bytes(device)
    if not config.train.memory:
        return free
    given = int(config.train.memory * GIB) // sharing(device)
    return min(free, given - taken_bytes(device))


def taken_bytes(device: torch.device) -> int:
    """By this process; of what processes on a CPU share, its share."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + RUNTIME["cuda"]
    own, shared = _resident()
    return own + shared // sharing(device)


def _resident() -> tuple[int, int]:
    """Bytes of this process alone, and of files that others may have mapped too."""
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        return RUNTIME["cpu"], 0
    whole, shared = map(int, pages.read_text().split()[1:3])
    size = os.sysconf("SC_PAGE_SIZE")
    return (whole - shared) * size, shared * size


def sharing(device: torch.device) -> int:
    """Processes that share the device: on a CPU all of this machine."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_bytes(device: torch.device) -> int:
    """Memory that the device can still give to one of the processes that share it."""
    if device.type == "cuda":
        # What torch holds and nothing uses: joining the linears of a site leaves gigabytes.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    table = Path("/proc/meminfo")
    if table.is_file():  # Linux; free pages alone would leave out what the page cache gives back
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // sharing(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sharing(device)


def out_of_memory(failure: BaseException) -> bool:
    """Whether an allocation has failed; torch's of the CPU is a RuntimeError among others."""
    known = isinstance(failure, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator" in str(failure)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps it between what is still in use, after the
    loading of 5 layers of width 1,024 in 4 bits 40 to 115 MiB of it."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def agreed(word: _Word) -> _Word:
    """The leader's word, where all processes must make the same passes."""
    words = [word]
    dist.broadcast_object_list(words, src=0)
    return words[0]
