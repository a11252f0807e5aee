"""What of a transformers model runs as one operation instead of many.

RMS norms, gated MLPs, rotary embeddings and the rows behind the last attention are replaced on the
instance, never in the library, and only where they are what they seem: norms are compared on
random input, and `model.Base` compares the whole model with the stock one on eight tokens. What is
not recognised keeps transformers' own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

import fedsim_kernels.rms_norm
import fedsim_kernels.rotary
import fedsim_kernels.swiglu  # noqa: F401  these register their operations
from fedsim.lora import Site


class FusedNorm(nn.Module):
    """y = x / sqrt(mean x^2 + eps) weight, over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y, _ = torch.ops.fedsim.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps)
        out: Tensor = y.view(x.shape)
        return out


def _fused_norm(norm: nn.Module) -> FusedNorm | None:
    """The same norm as one operation, or None when it is another one."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) + 0.5
    x = x.to(weight)
    want = norm(x).float()
    for scale in (weight.data, 1 + weight.data.float()):  # Gemma's weights are offsets from one
        found = FusedNorm(scale, eps)
        if (found(x).float() - want).abs().max() <= 4 * torch.finfo(x.dtype).eps * want.abs().max():
            return found
    return None


def fuse_norms(model: nn.Module) -> int:
    """Replace every RMS norm; returns how many."""
    count = 0
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and (fused := _fused_norm(module)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fused)
            count += 1
    return count


def fuse_mlps(model: nn.Module, sites: dict[str, Site]) -> int:
    """SiLU-gated MLPs: down(silu(gate) up) with gate and up from one product; returns how many.

    Args:
        sites: module name -> the site that it belongs to.
    """
    count = 0
    for name, module in model.named_modules():
        act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
        if not isinstance(act, nn.SiLU) and type(act).__name__ != "SiLUActivation":
            continue
        site = sites.get(f"{name}.gate_proj") or sites.get(f"{name}.gate_up_proj")
        members = [] if site is None else [m.name.rpartition(".")[2] for m in site.members]
        if members in (["gate_proj", "up_proj"], ["gate_up_proj"]) and hasattr(module, "down_proj"):
            module.forward = MethodType(_gated(site), module)  # type: ignore[arg-type, assignment]
            count += 1
    return count


def _gated(site: Site) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(mlp: nn.Module, x: Tensor) -> Tensor:
        both = site(x)
        product = torch.ops.fedsim.swiglu(both.view(-1, both.shape[-1]))
        out: Tensor = mlp.down_proj(product.view(*x.shape[:-1], -1))  # type: ignore[operator]
        return out

    return forward


def fuse_rotary(model: nn.Module) -> int:
    """Give attention modules a forward in which `apply_rotary_pos_emb` is one operation.

    The copy of the forward has its own globals; transformers' module stays as it is.
    """
    count = 0
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        stock = getattr(forward, "__globals__", {}).get("apply_rotary_pos_emb")
        if stock is None or "apply_rotary_pos_emb" not in forward.__code__.co_names:
            continue
        names = {**forward.__globals__, "apply_rotary_pos_emb": _rotary(stock)}
        copy = FunctionType(
            forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
        )
        copy.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(copy, module)  # type: ignore[assignment]
        count += 1
    return count


def _rotary(stock: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        packed = len(q) == len(cos) == 1 and unsqueeze_dim == 1
        if not packed or cos.shape[-1] != q.shape[-1]:  # partial rotary keeps transformers' own
            return stock(q, k, cos, sin, unsqueeze_dim)
        rotated = torch.ops.fedsim.rotary(
            q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0]
        )
        return tuple(x.transpose(0, 1)[None] for x in rotated)

    return rotate


class _TakeRows(torch.autograd.Function):
    """x[rows], where a row may be taken up to `repeats` times; gradients add up in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, repeats: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count, ctx.repeats = len(x), repeats
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        g = grads[0]
        out = g.new_zeros(ctx.count + 1, g.shape[1])
        if not out.is_cuda or ctx.repeats == 1:
            return out.index_add_(0, rows, g)[:-1], None, None
        # index_add_ is atomic on CUDA: the n-th taking of every row has a launch of its own, and
        # what is not its turn goes to the row that is thrown away.
        order = torch.sort(rows, stable=True).indices
        at = rows[order]
        turn = torch.empty_like(rows)
        turn[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(at, at)
        for n in range(ctx.repeats):
            out.index_add_(0, torch.where(turn == n, rows, ctx.count), g)
        return out[:-1], None, None


def take_rows(x: Tensor, rows: Tensor, repeats: int) -> Tensor:
    """(T, D) -> (L, D)."""
    out: Tensor = _TakeRows.apply(x, rows, repeats)  # type: ignore[no-untyped-call]
    return out


_PARTS = {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}


def shorten_last_layer(layer: nn.Module, sites: dict[str, Site], prefix: str) -> bool:
    """Let the last decoder layer's MLP see only the rows that have labels, where the layer is

        x = x + attn(norm(x))     x = x + mlp(norm(x))

    Anything with more parts is left as it is. Returns whether it was changed.
    """
    parts = {name for name, _ in layer.named_children()}
    drops = {n for n in parts if isinstance(layer.get_submodule(n), nn.Dropout)}
    if parts - drops != _PARTS:
        return False
    mlp_sites = {id(s): s for name, s in sites.items() if name.startswith(f"{prefix}.mlp.")}
    if not mlp_sites:
        return False
    stock, some = layer.forward, next(iter(mlp_sites.values()))
    for site in mlp_sites.values():
        site.late = True

    def forward(self: nn.Module, hidden_states: Tensor, **rest: Any) -> Tensor:
        if some.labels is None:
            out: Tensor = stock(hidden_states, **rest)
            return out
        x: Any = self
        attended, _ = x.self_attn(hidden_states=x.input_layernorm(hidden_states), **rest)
        hidden = take_rows((hidden_states + attended)[0], *some.labels)[None]
        out = hidden + x.mlp(x.post_attention_layernorm(hidden))
        return out

    layer.forward = MethodType(forward, layer)  # type: ignore[assignment]
    return True
