"""The load check accepts what is right and refuses what is wrong, in fp32 and in bf16.

Ten planted faults, on tiny models over dense, quantised and sharded bases, and on the real models
that have what each needs; a fault in the base's own dtype alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsim import model, weights
from fedsim.attention import packed_attention
from fedsim.config import Config
from fedsim.errors import ModelError
from tests.conftest import ARCHITECTURES
from tests.faults import FAULTS
from tests.lab import open_base
from tests.real import REAL, real

DTYPES = ("float32", "bfloat16")
BASES: dict[str, dict[str, Any]] = {
    "dense": {}, "4 bits": {"model__quantisation": "nf4", "model__hold": "packed"},
    "8 bits": {"model__quantisation": "int8", "model__hold": "packed"},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated"  # bitsandbytes 0.50
)


@pytest.fixture(scope="session")
def biased(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Path:
    """A tiny Llama with biases everywhere."""
    folder = tmp_path_factory.mktemp("biased")
    hf = LlamaConfig.from_pretrained(tiny("llama"), attention_bias=True, mlp_bias=True)
    torch.manual_seed(1)
    found = LlamaForCausalLM(hf)
    for p in found.parameters():
        torch.nn.init.normal_(p, std=0.2)
    found.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_tiny_models(
    settings: Callable[..., Config], biased: Path, monkeypatch: pytest.MonkeyPatch,
    fault: str | None, dtype: str, base: str,
) -> None:  # fmt: skip
    if fault is None:
        for architecture in ARCHITECTURES:
            open_base(settings(architecture, model__dtype=dtype, **BASES[base]))
        open_base(settings(model__dtype=dtype, model__name=str(biased), **BASES[base]))
        return
    plant, architecture = FAULTS[fault]
    own = {"model__name": str(biased)} if architecture == "biased" else {}
    name = "llama" if own else architecture
    config = settings(name, model__dtype=dtype, **own, **BASES[base])
    plant(monkeypatch)
    with pytest.raises(ModelError, match="other logits when packed"):
        open_base(config)
    monkeypatch.undo()
    open_base(config)


def opened(name: str, settings: Callable[..., Config], dtype: str) -> Any:
    found = real(name)
    config = settings(model__name=str(found.path), model__dtype=dtype, adapter__rank=16)
    return model.load(
        found, config, torch.device("cpu"), ("all-linear",), tokenizer=weights.tokenizer(found)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, fault) for name in REAL for fault in (
            "a scale 1 % off", "positions that do not restart", "a row of another sequence",
            "a place in the cache that is one off")),
        *((name, "another key head") for name in REAL if name != "gemma"),
        *((name, "the last residual lost") for name in REAL if name != "gemma"),
        ("gemma", "a window that is one longer"), ("gemma", "an offset of norms lost"),
    ],
)  # fmt: skip
def test_real_models(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, dtype: str, name: str,
    fault: str,
) -> None:  # fmt: skip
    """That they are accepted without a fault, tests/test_real_models.py shows by training them."""
    found = real(name)
    FAULTS[fault][0](monkeypatch)
    assert found
    with pytest.raises(ModelError, match="other logits when packed"):
        opened(name, settings, dtype)


def test_a_fault_of_bf16_alone(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that keeps 4 bits where bf16 has 8: what runs is checked beside what it means."""

    def coarse(q: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        out = packed_attention(q, *rest, **how)
        if out.dtype == torch.float32:
            return out
        unit = 2.0 ** (out.float().abs().log2().floor() - 3)
        return ((out.float() / unit).round() * unit).to(out.dtype)

    monkeypatch.setattr("fedsim.attention.packed_attention", coarse)
    open_base(settings())
    with pytest.raises(ModelError, match="in bfloat16"):
        open_base(settings(model__dtype="bfloat16"))


def test_of_many_layers_some_of_each_kind_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fedsim.layerwise import few_of

    layers = [torch.nn.Linear(4, 4, bias=False) for _ in range(9)]
    layers[3].sliding_window = 7  # type: ignore[assignment]
    assert few_of(layers, 9, 9 * 16) == list(range(9))
    assert few_of(layers, 9, 8 * 16 - 1) == [0, 1, 3, 4, 6, 8]
    assert few_of(layers, 9, 0) == [0, 3, 8]
