"""What of a transformers model runs as one operation instead of many.

RMS norms, gated MLPs, rotary embeddings and the rows behind the last attention are replaced on the
instance, never in the library, and only where they are what they seem (`recognition.py`). What is
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
from fedsim import recognition
from fedsim.lora import Site


class FusedNorm(nn.Module):
    """y = x / sqrt(mean x^2 + eps) weight, over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # q of a site is a part of its columns
        y, _ = torch.ops.fedsim.rms_norm(rows, self.weight, self.eps)
        out: Tensor = y.view(x.shape)
        return out


def _fused_norm(norm: nn.Module) -> FusedNorm | None:
    """The same norm as one operation, or None when it is another one."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    for scale in (Tensor.clone, _offset):
        if recognition.is_norm(norm, scale, eps):
            return FusedNorm(scale(weight.data), eps)
    return None


def _offset(weight: Tensor) -> Tensor:
    """Gemma's weights are offsets from one; their sum with it is fp32 there, too."""
    return 1 + weight.float()


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
        site = sites.get(f"{name}.gate_proj") or sites.get(f"{name}.gate_up_proj")
        members = [] if site is None else [m.name.rpartition(".")[2] for m in site.members]
        gated = members in (["gate_proj", "up_proj"], ["gate_up_proj"])
        if site is None or not gated or not hasattr(module, "down_proj"):
            continue
        if recognition.is_swiglu(module, joined=len(members) == 1):
            module.forward = MethodType(_gated(site), module)
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
    count, same = 0, {}
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        stock = getattr(forward, "__globals__", {}).get("apply_rotary_pos_emb")
        if stock is None or "apply_rotary_pos_emb" not in forward.__code__.co_names:
            continue
        if stock not in same:
            same[stock] = recognition.is_half_rotation(stock)
        if not same[stock]:
            continue
        names = {**forward.__globals__, "apply_rotary_pos_emb": _rotary(stock)}
        copy = FunctionType(
            forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
        )
        copy.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(copy, module)
        count += 1
    return count


def _rotary(stock: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        packed = len(q) == len(cos) == 1 and unsqueeze_dim == 1
        if not packed or cos.shape[-1] != q.shape[-1]:  # partial rotary keeps transformers' own
            return stock(q, k, cos, sin, unsqueeze_dim)
        rotated = torch.ops.fedsim.rotary(
            q.squeeze(0).transpose(0, 1), k.squeeze(0).transpose(0, 1), cos[0], sin[0]
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
        # index_add_ is atomic on CUDA: it would add a row's gradients in any order.
        repeats = ctx.repeats if g.is_cuda else 1
        return put_rows(g, rows, ctx.count, repeats), None, None


def put_rows(g: Tensor, rows: Tensor, count: int, repeats: int) -> Tensor:
    """out[r] = sum of g[j] over rows[j] = r: (L, D) -> (count, D), in `repeats` launches.

    The n-th taking of every row has the n-th launch, and a launch meets no row twice; what is not
    its turn goes to a row that is thrown away. One launch takes all.
    """
    out = g.new_zeros(count + 1, g.shape[1])
    if repeats == 1:
        return out.index_add_(0, rows, g)[:-1]
    order = torch.sort(rows, stable=True).indices
    at = rows[order]
    turn = torch.empty_like(rows)
    turn[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(at, at)
    for n in range(repeats):
        out.index_add_(0, torch.where(turn == n, rows, count), g)
    return out[:-1]


def take_rows(x: Tensor, rows: Tensor, repeats: int) -> Tensor:
    """(T, D) -> (L, D)."""
    out: Tensor = _TakeRows.apply(x, rows, repeats)  # type: ignore[no-untyped-call]
    return out


_PARTS = {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}


def shorten_last_layer(layer: nn.Module, sites: dict[str, Site], prefix: str) -> bool:
    """Let the last decoder layer's MLP see only the rows that have labels, where the layer is

        x = x + attn(norm(x))     x = x + mlp(norm(x))

    Anything with more parts, or that puts them together otherwise, is left as it is; returns
    whether it was done.
    """
    parts = {name for name, _ in layer.named_children()}
    drops = {n for n in parts if isinstance(layer.get_submodule(n), nn.Dropout)}
    mlp_sites = {id(s): s for name, s in sites.items() if name.startswith(f"{prefix}.mlp.")}
    if parts - drops != _PARTS or not mlp_sites or not recognition.is_pre_norm(layer, _pre_norm):
        return False
    stock, some = layer.forward, next(iter(mlp_sites.values()))
    for site in mlp_sites.values():
        site.late = True

    def forward(self: nn.Module, hidden_states: Tensor, **rest: Any) -> Tensor:
        if some.labels is None:
            out: Tensor = stock(hidden_states, **rest)
            return out
        return _pre_norm(self, hidden_states, some.labels, **rest)

    # transformers checkpoints the class's forward, so this one keeps its activations: the backward
    # begins here, and would only compute again what it has just let go.
    layer.forward = MethodType(forward, layer)
    return True


def _pre_norm(
    layer: Any, hidden_states: Tensor, labels: tuple[Tensor, int] | None = None, **rest: Any
) -> Tensor:
    """The layer; with label rows and their repeats, behind its attention of these rows only."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **rest)
    hidden = hidden_states + attended
    if labels is not None:
        hidden = take_rows(hidden.squeeze(0), *labels)[None]
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out
