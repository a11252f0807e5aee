"""A base as a file that all processes of a machine map: many processes, one copy in memory.

The file holds the weights as they are computed with: in the computing dtype, with a quantised
base's values, and with the linears that read one input behind each other, so that no process makes
a copy of its own by converting or joining them. What a process writes into its weights, as a rule's
correction, becomes its own, page by page.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedsim.checkpoint import write_failed
from fedsim.config import Config
from fedsim.data.tokens import cache_root
from fedsim.errors import ModelError
from fedsim.linears import ALIGNED, groups, inputs_of, linears
from fedsim.record import versions
from fedsim.weights import Weights


def mapped(
    weights: Weights, config: Config, dtype: torch.dtype, load: Callable[[], Any]
) -> Weights:
    """The same weights with the file to map, which is written where there is none yet.

    Args:
        load: a causal LM with the values to keep, on the CPU.

    Raises:
        RunError: the disk is full or not writable.
    """
    # Changed weights and other versions get another file. By place, size and time: a digest would
    # read all of them in every process.
    model = config.model
    parts = [str(versions()), str(dtype), model.quantisation, str(model.double_quantisation)]
    for source in sorted(weights.path.resolve().iterdir()):
        stat = source.stat()
        parts += [str(source), str(stat.st_size), str(stat.st_mtime_ns)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    file = cache_root() / "bases" / f"{name}.pt"
    if not file.is_file():
        whole = load()
        for group in _groups(whole):
            for kind in ("weight", "bias"):
                _lay(group, kind)
        partial = file.with_name(f".{name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                torch.save({"class": type(whole).__name__, "values": whole.state_dict()}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        except (OSError, RuntimeError) as failure:  # torch reports a full disk as the latter
            raise write_failed(file, OSError(str(failure))) from failure
        finally:
            partial.unlink(missing_ok=True)
    return replace(weights, values=file)


def _groups(model: Any) -> list[list[torch.nn.Linear]]:
    """The linears that read the same input."""
    found = linears(model)
    with torch.no_grad(), inputs_of(found) as seen:
        model(torch.arange(8)[None], use_cache=False)
    return [[found[name] for name in group] for group in groups(found, seen)]


def _lay(group: Sequence[torch.nn.Linear], kind: str) -> None:
    """Put the group's weights, or biases where all have one, behind each other in one storage."""
    parts = [getattr(linear, kind) for linear in group]
    if len(parts) < 2 or any(p is None for p in parts):
        return
    whole = torch.cat([p.data for p in parts])
    for part, rows in zip(parts, whole.split([len(p) for p in parts]), strict=True):
        part.data = rows


def align(model: torch.nn.Module) -> None:
    """Copy weights that do not lie at multiples of 64 bytes, as those in a safetensors file."""
    for p in model.parameters():
        if p.data_ptr() % ALIGNED:
            p.data = p.data.clone()


def read(weights: Weights, dtype: torch.dtype, attention: str | None) -> Any:
    """transformers' causal LM over the mapped file.

    Raises:
        ModelError: the file is not whole.
    """
    import transformers

    assert weights.values is not None
    try:
        found = torch.load(weights.values, mmap=True, weights_only=True)
        model, report = getattr(transformers, found["class"]).from_pretrained(
            None, config=transformers.AutoConfig.from_pretrained(weights.path),
            state_dict=found["values"], dtype=dtype, attn_implementation=attention,
            output_loading_info=True,
        )  # fmt: skip
        if report["missing_keys"] or report["mismatched_keys"]:
            raise RuntimeError(f"without {sorted(report['missing_keys'])[:3]}")
    except (OSError, RuntimeError, EOFError) as failure:
        raise ModelError(
            f"{weights.values} cannot be mapped ({failure})",
            expected="the file of this base",
            remedy="Delete it; the next run writes it again.",
        ) from failure
    own_generation(model, weights)
    return model


def own_generation(model: Any, weights: Weights) -> None:
    """Give a model that was made from values its folder's settings of generation."""
    from transformers import GenerationConfig

    if (weights.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(weights.path)
