"""Token loss from hidden states; only label positions meet the vocabulary.

    z = W h[j]        s = z / divide, then c tanh(s / c) where there is a soft-cap c
    nll[j] = weight[j] (logsumexp(s) - s[target[j]])
    dz = weight[j] (softmax(s) - onehot(target[j])) (1 - (s / c)^2) / divide        dh[j] = W^T dz

The gradient is formed in the forward, chunk by chunk and in place of the logits, so at most
(CHUNK, V) of them exist. A label of weight 0 gives nll 0 and gradient 0 by selection: what its
row holds, NaN included, does not matter.

Paper: Wijmans et al., Cut Your Losses, arXiv:2411.09009 (never keeping the logits).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim_kernels import native
from fedsim_kernels.dispatch import LIBRARY, define, differentiate
from fedsim_kernels.grouped_lora import tiled_linear
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw

CHUNK = 256  # rows of logits at once: 50 MB in fp32 at a vocabulary of 49,152
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def head_logits(
    h: Tensor, weight: Tensor, *, divide: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Next-token logits of hidden rows: (L, D) x (V, D) -> (L, V) fp32."""
    return _scores(torch.mm(h, weight.T), divide, softcap or 0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the arithmetic is done in."""
    return torch.promote_types(dtype, torch.float32)


def _scores(z: Tensor, divide: float, softcap: float) -> Tensor:
    s = z.to(_wide(z.dtype))
    if divide != 1.0:
        s = s / divide
    return torch.tanh(s / softcap) * softcap if softcap else s


def _check(z: Tensor, targets: Tensor, weight: Tensor) -> None:
    labels = (targets, torch.int64, "targets"), (weight, torch.float32, "weight")
    if z.ndim != 2 or not z.is_floating_point() or not z.is_contiguous():
        raise ValueError(
            f"softmax_xent: got z {tuple(z.shape)} {z.dtype} with strides {z.stride()}; expected "
            "contiguous floating (L, V). Call .contiguous() first."
        )
    for x, dtype, name in labels:
        if x.shape != z.shape[:1] or x.dtype != dtype or not x.is_contiguous():
            raise ValueError(
                f"softmax_xent: got {name} {tuple(x.shape)} {x.dtype}; expected contiguous "
                f"({len(z)},) {dtype}."
            )
    if z.device.type == "cpu":  # on other devices the answer would have to be waited for
        wrong = ((targets < 0) | (targets >= z.shape[1])) & (weight != 0)
        if wrong.any():
            raise ValueError(
                f"softmax_xent: got target {int(targets[wrong][0])}; expected 0 to "
                f"{z.shape[1] - 1}. Give labels without a target weight 0."
            )


def softmax_xent_ref(
    z: Tensor, targets: Tensor, weight: Tensor, divide: float, softcap: float
) -> Tensor:
    """Weighted token loss of rows of logits, which become its gradient.

    Args:
        z: (L, V) raw logits of any floating dtype, overwritten by dLoss/dz.
        targets: (L,) int64. weight: (L,) fp32.
        softcap: c, or 0 for none.

    Returns:
        nll (L,) fp32 (fp64 for fp64).

    Raises:
        ValueError: other shapes, dtypes or strides; on CPU, a target beyond V.
    """
    _check(z, targets, weight)
    on = weight != 0
    s = _scores(z, divide, softcap)
    target = torch.where(on, targets, 0)[:, None]
    norm = torch.logsumexp(s, 1)
    nll = torch.where(on, weight * (norm - s.gather(1, target)[:, 0]), 0)
    d = torch.exp(s - norm[:, None])
    d.scatter_add_(1, target, torch.full_like(target, -1, dtype=d.dtype))
    if softcap:
        d.mul_(1 - (s / softcap).square_())
    d.mul_(weight[:, None] / divide)
    z.copy_(torch.where(on[:, None], d, 0))
    return nll


def _native(z: Tensor, targets: Tensor, weight: Tensor, divide: float, softcap: float) -> Tensor:
    _check(z, targets, weight)
    nll = torch.empty_like(weight)
    native.call(
        f"softmax_xent_{_SUFFIX[z.dtype]}", z, targets, weight, nll, float(divide), float(softcap),
        *z.shape,
    )  # fmt: skip
    return nll


define(
    "softmax_xent(Tensor(a!) z, Tensor targets, Tensor weight, float divide, float softcap) "
    "-> Tensor",
    "linear_xent",
    reference=softmax_xent_ref,
    native=_native,
    fake=lambda z, *_: z.new_empty(len(z), dtype=_wide(z.dtype)),
)


# The loss from hidden states: the same code on every device, chunk by chunk


def _forward(
    h: Tensor, weight: Tensor, targets: Tensor, label_weight: Tensor, tile: int, divide: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """nll (L,) and d nll[j] / d h[j] (L, D) in h.dtype; with a tile, products of `tile` rows."""
    if h.dtype != weight.dtype or h.ndim != 2 or h.shape[1:] != weight.shape[1:]:
        raise ValueError(
            f"linear_xent: got h {tuple(h.shape)} {h.dtype}, weight {tuple(weight.shape)} "
            f"{weight.dtype}; expected (L, D) and (V, D) of one dtype."
        )
    if tile and CHUNK % tile:
        raise ValueError(f"linear_xent: got tile {tile}; expected a divisor of {CHUNK}.")
    labels = len(h)
    if tile and labels % tile:  # filled up with labels of weight 0
        more = -labels % tile
        h = F.pad(h, (0, 0, 0, more))
        targets, label_weight = F.pad(targets, (0, more)), F.pad(label_weight, (0, more))
    nll, grad = h.new_empty(len(h), dtype=_wide(h.dtype)), torch.empty_like(h)
    # One buffer for all chunks: fresh pages for 50 MB cost as much as a pass over it.
    room = h.new_empty(0 if tile else min(CHUNK, len(h)), len(weight))
    for first in range(0, len(h), CHUNK):
        part = slice(first, min(first + CHUNK, len(h)))
        x = h[part]
        z = (
            tiled_linear(x, weight, None, tile)
            if tile
            else torch.mm(x, weight.T, out=room[: len(x)])
        )
        nll[part] = torch.ops.fedsim.softmax_xent(
            z, targets[part], label_weight[part], divide, softcap
        )
        if tile:
            grad[part] = tiled_linear(z, weight.T, None, tile)
        else:
            torch.mm(z, weight, out=grad[part])
    return nll[:labels], grad[:labels]


LIBRARY.define(
    "linear_xent(Tensor h, Tensor weight, Tensor targets, Tensor label_weight, int tile, "
    "float divide, float softcap) -> (Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("linear_xent", _forward, _key)
torch.library.register_fake(
    "fedsim::linear_xent",
    lambda h, *_: (h.new_empty(len(h), dtype=_wide(h.dtype)), torch.empty_like(h)),
    lib=LIBRARY,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no (L, D) of zeros for it
    ctx.save_for_backward(output[1], inputs[3])


def _backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, label_weight = ctx.saved_tensors
    # The gradient of a label that does not count may be NaN: its row is selected away.
    gh = torch.where((label_weight != 0)[:, None], grad * g[:, None], 0).to(grad.dtype)
    return gh, *(None,) * 6


differentiate("linear_xent", _backward, _setup)


# Inputs and definition: every packed row is a label; every fifth counts nothing, and padding too


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """h, head, targets, label weights and the gradient of each label's loss."""
    (d, v), t = case.features, case.rows
    weight = draw(t, seed=3).exp() / t
    off = (torch.arange(t) % 5 == 3) | (case.slot_of_row() < 0)
    return (
        draw(t, d, dtype=dtype, seed=1), draw(v, d, dtype=dtype, seed=2), torch.arange(t) * 5 % v,
        weight.masked_fill(off, 0), draw(t, seed=4),
    )  # fmt: skip


_DIVIDE = 3.0


def _run(case: Case, inputs: Tensors) -> Tensors:
    h, head, targets, weight, g = inputs
    h = h.clone().requires_grad_()
    nll, _ = torch.ops.fedsim.linear_xent(h, head, targets, weight, 0, _DIVIDE, case.softcap or 0.0)
    return nll.detach(), *torch.autograd.grad(nll, h, g)


def _formula(case: Case, inputs: Tensors) -> Tensors:
    h, head, targets, weight, g = inputs
    h = h.clone().requires_grad_()
    s = h @ head.T / _DIVIDE
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    nll = -weight * torch.log_softmax(s, 1).gather(1, targets[:, None])[:, 0]
    return nll.detach(), *torch.autograd.grad(nll, h, g)


def _work(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Two products; h and the head are read and dh written, the logits never leave the cache."""
    (d, v), t = case.features, case.rows
    return 4.0 * t * d * v, float((2 * t * d + 2 * v * d) * dtype.itemsize)


KERNEL = KernelSpec("linear_xent", ("linear_xent", "softmax_xent"), _inputs, _run, _formula, _work)
