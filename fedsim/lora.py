"""The multi-LoRA linear: one frozen weight, many adapters, one for each packed row's slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import seeds
from fedsim.adapters import Factors
from fedsim_kernels.grouped_lora import grouped_lora_backward_ref, grouped_lora_ref
from fedsim_kernels.segments import Segments


@dataclass(frozen=True)
class Dropout:
    """What a LoRA dropout mask is a function of, for each packed row (T,) int64."""

    p: float
    key: int
    round: int
    client: Tensor
    step: Tensor
    sequence: Tensor
    position: Tensor

    def mask(self, features: int, module: int) -> Tensor:
        """(T, features) bool, True where kept."""
        return seeds.keep_mask(
            self.key, self.p, features, client=self.client, round=self.round, step=self.step,
            sequence=self.sequence, position=self.position, module=module,
        )  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """Everything the adapted linears of one pass share. Valid until its backward has ended.

    Attributes:
        factors: module -> (A (K, R, I), B (K, O, R)) fp32.
        grads: the same views of the fp32 gradient arena, or None when nothing trains.
        scale: K numbers, alpha / rank.
        anchor: a scalar that requires grad. No weight does, so without it there is no graph;
            with it, a module whose input needs no gradient skips dx by itself.
    """

    segments: Segments
    factors: Factors
    grads: Factors | None
    scale: tuple[float, ...]
    anchor: Tensor
    dropout: Dropout | None = None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, module: MultiLoraLinear, work: Pass) -> Tensor:
        a, b = work.factors[module.name]
        y = F.linear(x, module.weight, module.bias)
        mask = work.dropout.mask(x.shape[1], module.number) if work.dropout else None
        lora_in = x if mask is None else _drop(x, mask, work)
        h = grouped_lora_ref(y, lora_in, a, b, work.scale, work.segments)
        ctx.save_for_backward(lora_in, h, *(() if mask is None else (mask,)))
        ctx.module, ctx.work = module, work
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lora_in, h, *masks = ctx.saved_tensors
        module, work = ctx.module, ctx.work
        g = grads[0].contiguous()
        a, b = work.factors[module.name]
        grad_a, grad_b = work.grads[module.name]
        needs_x = ctx.needs_input_grad[0]
        gx = torch.mm(g, module.weight) if needs_x else None
        lora_gx = gx if not masks else torch.zeros_like(lora_in) if needs_x else None
        grouped_lora_backward_ref(
            g, lora_in, h, a, b, work.scale, work.segments, grad_a, grad_b, lora_gx
        )
        if masks and gx is not None and lora_gx is not None:
            gx += _drop(lora_gx, masks[0], work)
        return gx, None, None, None


def _drop(x: Tensor, mask: Tensor, work: Pass) -> Tensor:
    assert work.dropout is not None
    return torch.where(mask, x / (1 - work.dropout.p), 0)


class MultiLoraLinear(nn.Module):
    """A frozen linear whose output also carries each row's own low-rank update."""

    def __init__(self, linear: nn.Linear, name: str, number: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.name, self.number = name, number
        self.work: Pass | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, I) -> (1, T, O); outside a pass, the frozen linear alone."""
        work = self.work
        if work is None:
            return F.linear(x, self.weight, self.bias)
        if work.grads is None:
            y = F.linear(x[0], self.weight, self.bias)
            grouped_lora_ref(y, x[0], *work.factors[self.name], work.scale, work.segments)
            return y[None]
        out: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x[0], work.anchor, self, work
        )
        return out[None]
