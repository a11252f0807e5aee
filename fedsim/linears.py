"""The linears of a model: which carry adapters, which read the same input, and their product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.errors import ModelError, nearest
from fedsim.recognition import is_linear
from fedsim_kernels.grouped_lora import tiled_linear, whole

ALIGNED = 64  # bytes: a product's last bit may depend on where its operands lie


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear but the head, in the model's order; a subclass that computes something else
    than x W^T + bias is none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        n: m for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and is_linear(m)
    }  # fmt: skip


def target_linears(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linears that carry adapters, in the model's order.

    Args:
        targets: last parts of module names (`q_proj`), whole names, or `all-linear` for every
            linear but the head. One with a `?` behind it (`qkv_proj?`) may match nothing, as any
            may with PEFT; not all of them.

    Raises:
        ModelError: a target matches nothing, or something that is not a linear.
    """
    every = linears(model)
    if targets == ("all-linear",):
        return every
    found: set[str] = set()
    amiss = []
    for target in targets:
        name = target.removesuffix("?")
        hits = {n for n, _ in model.named_modules() if n == name or n.endswith(f".{name}")}
        found |= hits & every.keys()
        if not hits & every.keys() and (hits or name == target):
            amiss.append(name)
    if amiss or not found:
        name = (amiss or [targets[0].removesuffix("?")])[0]
        raise ModelError(
            "adapter.targets", got=name, expected="the name of a linear of this model",
            remedy=nearest(name, {n.rpartition(".")[2] for n in every}),
        )  # fmt: skip
    return {n: m for n, m in every.items() if n in found}


@contextmanager
def inputs_of(modules: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Note the tensor that each module is called with inside the block."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0]})

    hooks = [m.register_forward_pre_hook(note(name)) for name, m in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def groups(modules: dict[str, nn.Linear], seen: dict[str, Tensor]) -> list[list[str]]:
    """Names of linears that read the very same tensor, in the order of their first call."""
    found: dict[int, list[str]] = {}
    for name, x in seen.items():
        found.setdefault(id(x), []).append(name)
    return [*found.values(), *([name] for name in modules if name not in seen)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` of them; no copy where they lie behind each other, from an aligned place on."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        apart = part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        if apart or part.storage_offset() != at or not part.is_contiguous():
            return torch.cat([*parts])
        at += part.numel()
    if first.data_ptr() % ALIGNED:
        return torch.cat([*parts])
    shape = (sum(len(p) for p in parts), *first.shape[1:])
    return first.as_strided(shape, first.stride())


class _Tiled(torch.autograd.Function):
    """x W^T + bias in products of a fixed number of rows, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tile: int) -> Tensor:
        ctx.weight, ctx.tile = weight, tile
        out: Tensor = tiled_linear(x, weight, bias, tile)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight = whole(ctx.weight)
        return tiled_linear(grads[0].contiguous(), weight.T, None, ctx.tile), None, None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tile: int) -> Tensor:
    """(T, I) -> (T, O) without adapters, differentiable in x."""
    if not tile and not hasattr(weight, "renew"):
        return F.linear(x, weight, bias)
    out: Tensor = _Tiled.apply(x, weight, bias, tile)  # type: ignore[no-untyped-call]
    return out
