"""Tests of what a module computes, on a copy of it in fp32, element by element:

    |got - want| <= 8 x 2^-24 |want|

The dtype of the base plays no part: in bf16, 1 + w and w are the same to rounding where w is 300.
Large linears are replaced by columns of the input, so that no product rounds, and inputs are such
that no sum cancels: torch's formulas for norms of 16 to 65,536 features and for SwiGLU then give
the very numbers of transformers' modules, and the near misses of norms that
`tests/test_recognition.py` plants are off by at least 100 times the limit.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = 8 * 2.0**-24
_SIZES = torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0, 10.0, 100.0, 100.0])  # of rows


def agree(got: Tensor, want: Tensor) -> bool:
    """Test whether all elements are equal up to a few roundings in fp32; NaN never is."""
    got, want = got.float(), want.float()
    if got.shape != want.shape:
        return False
    return bool(((got - want).abs() <= LIMIT * want.abs()).all())


def numbers(*shape: int) -> Tensor:
    """Fixed standard normal numbers, fp32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def in_fp32(module: nn.Module) -> nn.Module:
    """A copy of a small module, on the CPU in fp32."""
    return copy.deepcopy(module).to("cpu", torch.float32)


def with_parts(module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of a module with other submodules."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    return other


class Columns(nn.Module):
    """Columns of the input, in place of a linear's product."""

    def __init__(self, first: int, width: int) -> None:
        super().__init__()
        self.span = slice(first, first + width)

    def forward(self, x: Tensor) -> Tensor:
        columns: Tensor = x[..., self.span]
        return columns


class Line(nn.Module):
    """The map a x + b in place of a submodule; in attention's place it returns no weights, too."""

    def __init__(self, a: float, b: float, *, attention: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.attention = a, b, attention

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        y = self.a * hidden_states + self.b
        return (y, None) if self.attention else y


@torch.no_grad()
def outcome(module: nn.Module, x: Tensor) -> Tensor | None:
    """A module's value of x, with None for every other argument that it must have; None where it
    cannot be called so, or has a forward of its own, and is something else than it seemed."""
    if "forward" in module.__dict__:
        return None
    needs = list(inspect.signature(module.forward).parameters.values())[1:]
    given = {
        p.name: None for p in needs if p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    }
    try:
        out = module.forward(x, **given)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return None
    return out if isinstance(out, Tensor) else None


def is_norm(norm: nn.Module, scale: Callable[[Tensor], Tensor], eps: float) -> bool:
    """Test whether it is x / sqrt(mean x^2 + eps) scale(weight), where eps shows: mean x^2 is
    1.25e-4 in most rows. The mean of x is not 0: a norm that subtracts it is another."""
    alone = in_fp32(norm)
    weight: Any = alone.weight
    x = _SIZES[:, None] * 1e-2 * (numbers(8, len(weight)) + 0.5)
    got = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale(weight.detach())
    want = outcome(alone, x)
    return want is not None and agree(got, want)


def is_swiglu(mlp: nn.Module, joined: bool) -> bool:
    """Test whether it is down(silu(gate x) (up x)), unclamped up to 40 and more.

    Args:
        joined: one linear computes gate and up, in this order.
    """
    width = 64
    parts: dict[str, nn.Module] = {"down_proj": Columns(0, width)}
    if joined:
        parts["gate_up_proj"] = Columns(0, 2 * width)
    else:
        parts |= {"gate_proj": Columns(0, width), "up_proj": Columns(width, width)}
    x = 0.2 * _SIZES[:, None] * numbers(1, 8, 2 * width)
    gate, up = x.chunk(2, -1)
    want = outcome(with_parts(mlp, parts), x)
    return want is not None and agree(nn.functional.silu(gate) * up, want)


def is_half_rotation(rotate: Callable[..., Any]) -> bool:
    """Test whether it is x cos + (-x2 | x1) sin of queries and keys. Some architectures turn
    neighbours against each other; others turn a part, or scale."""
    if list(inspect.signature(rotate).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    size = 16
    signs = torch.ones(size)
    signs[size // 2 :] = -1  # of x2 and sin2: both sums then add numbers of one sign
    q, k, cos, sin = (numbers(1, 9, 3, size).abs() + 0.1).split((3, 4, 1, 1), 1)
    q, k, cos, sin = q * signs, k * signs, cos[:, 0], sin[:, 0] * signs

    def turned(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        out: Tensor = x * cos[:, None] + torch.cat((-x2, x1), -1) * sin[:, None]
        return out

    try:
        want = rotate(q, k, cos, sin)
        return all(agree(turned(x), y) for x, y in zip((q, k), want, strict=True))
    except (TypeError, ValueError, IndexError, RuntimeError):
        return False


def is_pre_norm(layer: nn.Module, formula: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    """Test whether a decoder layer puts norms, attention and MLP together as the formula does."""
    alone = with_parts(layer, {
        "input_layernorm": Line(2.0, 1.0), "self_attn": Line(3.0, 0.5, attention=True),
        "post_attention_layernorm": Line(0.5, 2.0), "mlp": Line(1.5, 0.25),
    })  # fmt: skip
    x = numbers(1, 4, 8).abs() + 0.1
    want = outcome(alone, x)
    return want is not None and agree(formula(alone, x), want)


def is_linear(module: nn.Linear) -> bool:
    """Test whether it computes x W^T + bias: subclasses may quantise x or scale."""
    if type(module).forward is nn.Linear.forward and "forward" not in module.__dict__:
        return True
    alone = copy.copy(module)
    weight, bias, x = (numbers(*n).abs() + 0.1 for n in ((8, 16), (8,), (1, 4, 16)))
    alone._parameters = {**module._parameters, "weight": nn.Parameter(weight)}
    if module.bias is not None:
        alone._parameters["bias"] = nn.Parameter(bias)
    want = outcome(alone, x)
    whole = nn.functional.linear(x, weight, None if module.bias is None else bias)
    return want is not None and agree(whole, want)
