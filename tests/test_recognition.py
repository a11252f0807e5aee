"""What is recognised is what it seems, whatever its weights and whatever the base computes in.

Near misses, planted at weights of 0.01, 1, 60 and 300, each at least 100 times the limit away: an
offset of norms, the two eps, a mean that is subtracted, other gates, gate and up swapped, another
rotation or a part of it, a scaled residual, a linear that quantises. What is right is recognised in
bf16 as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GraniteConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from fedsim import fused, recognition
from fedsim.recognition import LIMIT

WEIGHTS = (0.01, 1.0, 60.0, 300.0)
DTYPES = (torch.float32, torch.bfloat16)


def norm(kind: type, weight: float, dtype: torch.dtype, eps: float = 1e-6) -> nn.Module:
    found: nn.Module = kind(64, eps=eps)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(1))
    found.weight.data = weight * (1 + 0.1 * noise)  # type: ignore[assignment]
    return found.to(dtype)


class MeanNorm(LlamaRMSNorm):
    """Subtracts the mean."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x - x.mean(-1, keepdim=True))
        return out


class OtherEps(LlamaRMSNorm):
    """Says one eps and computes with another."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * (x.float() * scale).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_norms(weight: float, dtype: torch.dtype) -> None:
    plain, offset = norm(LlamaRMSNorm, weight, dtype), norm(Gemma3RMSNorm, weight, dtype)
    found = fused._fused_norm(plain)
    assert found is not None and torch.equal(found.weight, plain.weight)
    found = fused._fused_norm(offset)
    assert found is not None and torch.equal(found.weight, 1 + offset.weight.float())
    for kind in (MeanNorm, OtherEps):
        assert fused._fused_norm(norm(kind, weight, dtype)) is None


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_near_misses_of_norms_are_far_from_the_limit(
    monkeypatch: pytest.MonkeyPatch, eps: float
) -> None:
    """Every element differs by at least 100 times what is allowed, where eps shows: in half of the
    rows."""
    nearest: list[float] = []

    def agree(got: Tensor, want: Tensor) -> bool:
        nearest.append(float(((got - want).abs() / want.abs())[:4].min()))
        return False

    monkeypatch.setattr(recognition, "agree", agree)
    other = 1.1e-5 - eps
    for weight in WEIGHTS:
        plain = norm(LlamaRMSNorm, weight, torch.float32, eps)
        recognition.is_norm(plain, lambda w: 1 + w, eps)
        recognition.is_norm(norm(Gemma3RMSNorm, weight, torch.float32, eps), Tensor.clone, eps)
        recognition.is_norm(plain, Tensor.clone, other)
    assert len(nearest) == 12 and min(nearest) >= 100 * LIMIT


class Gated(nn.Module):
    def __init__(self, gate: Callable[..., Tensor], swapped: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj, self.gate, self.swapped = nn.Linear(16, 8), gate, swapped

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gate_proj(x), self.up_proj(x)
        a, b = (b, a) if self.swapped else (a, b)
        out: Tensor = self.down_proj(self.gate(a) * b)
        return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype) -> None:
    hf = LlamaConfig(hidden_size=32, intermediate_size=48)
    assert recognition.is_swiglu(LlamaMLP(hf).to(dtype), joined=False)
    assert recognition.is_swiglu(Gated(F.silu).to(dtype), joined=False)
    others: list[nn.Module] = [
        Gated(F.silu, swapped=True), Gated(F.gelu), Gated(partial(F.gelu, approximate="tanh")),
        Gated(lambda x: x * torch.sigmoid(1.702 * x)), Gated(F.relu),
        Gated(lambda x: F.silu(1.001 * x)), Gated(lambda x: F.silu(x.clamp(max=10))),
    ]  # fmt: skip
    assert not any(recognition.is_swiglu(one.to(dtype), joined=False) for one in others)


class Scaled(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Added(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., : x.shape[-1] // 2]


def test_gates_whose_input_or_output_is_changed() -> None:
    assert not recognition.is_swiglu(Scaled(F.silu), joined=False)
    assert not recognition.is_swiglu(Added(F.silu), joined=False)


def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    def turn(x: Tensor) -> Tensor:
        pair = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos[:, None] + pair * sin[:, None]

    return turn(q), turn(k)


def turned_in_part(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    n = q.shape[-1] // 2
    some = apply_rotary_pos_emb(q[..., :n], k[..., :n], cos[..., :n], sin[..., :n])
    return tuple(torch.cat((x, y[..., n:]), -1) for x, y in zip(some, (q, k), strict=True))


def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    return apply_rotary_pos_emb(1.001 * q, k, cos, sin)


def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    return apply_rotary_pos_emb(q, k, cos, -sin)


def test_rotations() -> None:
    assert recognition.is_half_rotation(apply_rotary_pos_emb)
    for other in (neighbours, turned_in_part, scaled, backwards, lambda q, k, cos, sin: (q, k)):
        assert not recognition.is_half_rotation(other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}

    def is_pre_norm(layer: nn.Module) -> bool:
        return recognition.is_pre_norm(layer.to(dtype), fused._pre_norm)

    assert is_pre_norm(LlamaDecoderLayer(LlamaConfig(**sizes), 0))
    for multiplier, same in ((1.0, True), (0.999, False), (0.22, False)):
        hf = GraniteConfig(**sizes, residual_multiplier=multiplier)
        assert is_pre_norm(GraniteDecoderLayer(hf, 0)) == same


class Coarse(nn.Linear):
    """Rounds its input, as linears of few bits do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x * 16).round() / 16, self.weight, self.bias)


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("bias", [False, True])
def test_linears(bias: bool) -> None:
    assert recognition.is_linear(nn.Linear(8, 4, bias=bias))
    assert recognition.is_linear(Transposed(8, 4, bias=bias))
    assert not recognition.is_linear(Coarse(8, 4, bias=bias))
