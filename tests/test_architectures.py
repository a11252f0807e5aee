"""Promise 9: no architecture is silently wrong; and promise 8, what a base computes with.

Proved here: what runs as one operation, architecture by architecture, and that it gives stock
transformers' logits; that every such operation is left out where a model computes something else;
that settings of the attention reach the numbers; refusals of what would be computed wrongly; 4-bit
bases. About 5 seconds on one thread.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from fedsim import attention, lora, model
from fedsim.config import Config
from fedsim.errors import ModelError
from fedsim_kernels.segments import Segments
from tests.conftest import ARCHITECTURES, require
from tests.lab import Lab, open_base

# bitsandbytes 0.50 decorates functions with torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def fused(norms: int, mlps: int, rotary: int, last_layer: int) -> dict[str, int]:
    return {"norms": norms, "mlps": mlps, "rotary": rotary, "last_layer": last_layer}


def made(folder: Path, hf: Any) -> str:
    """A random model of an architecture that the other tests have not."""
    torch.manual_seed(1)
    stock = AutoModelForCausalLM.from_config(hf, dtype=torch.float32)
    for p in stock.parameters():
        p.data = p.data + torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.1)
    stock.save_pretrained(folder)
    return str(folder)


def logits(base: model.Base, ids: Tensor, rows: Tensor | None = None) -> Tensor:
    """Of one sequence under an adapter that changes nothing; of some rows, as label rows."""
    n, row = len(ids), base.magnitudes(torch.zeros(base.layout.size))
    labels = None if rows is None else Segments.build([len(rows)], [0])
    work = lora.Pass(
        Segments.build([n], [0]), base.layout.site_views(row[None]), None, torch.ones(1),
        base.anchor, label_rows=rows, label_segments=labels,
    )  # fmt: skip
    with torch.no_grad():
        return base.logits(base.hidden(ids, torch.arange(n), work))


def as_stock(base: model.Base, folder: str) -> None:
    """Twenty tokens give stock transformers' logits, in whole and in the label rows of a pass."""
    ids, rows = torch.arange(20) * 5 % 97, torch.tensor([1, 2, 7, 7, 19])
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = stock(ids[None], use_cache=False).logits[0]
    for got, wanted in ((logits(base, ids), want), (logits(base, ids, rows), want[rows])):
        assert (got - wanted).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("architecture", "found"),
    [
        ("llama", fused(5, 2, 2, 1)), ("qwen2", fused(5, 2, 2, 1)), ("mistral", fused(5, 2, 2, 1)),
        ("qwen3", fused(9, 2, 2, 1)),  # norms of q and k
        ("gemma2", fused(9, 0, 2, 0)),  # weights that are offsets, GELU, norms behind the sublayers
        ("phi3", fused(5, 2, 2, 1)),
    ],
)  # fmt: skip
def test_what_is_fused_gives_stock_logits(
    settings: Callable[..., Config], implementation: str, architecture: str, found: dict[str, int]
) -> None:
    config = settings(architecture)
    base = open_base(config)
    assert base.fused == found
    as_stock(base, config.model.name)


def test_every_architecture_is_listed() -> None:
    (cases,) = (m for m in test_what_is_fused_gives_stock_logits.pytestmark  # type: ignore[attr-defined]
                if m.name == "parametrize")  # fmt: skip
    assert {name for name, _ in cases.args[1]} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        # What the last layer adds is multiplied: it stays whole.
        ("Granite", {"residual_multiplier": 0.3, "logits_scaling": 2.0}, fused(5, 2, 2, 0)),
        # Neighbours are rotated against each other, not halves.
        ("Ernie4_5", {"head_dim": 8}, fused(5, 2, 0, 1)),
        ("Helium", {"head_dim": 8}, fused(5, 2, 0, 1)),
        # q and k are normed as columns of their site's product.
        ("Olmo2", {}, fused(9, 2, 2, 0)),
        # LayerNorm, an MLP without a gate, biases everywhere.
        ("Starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0}, fused(0, 0, 2, 1)),
    ],
)  # fmt: skip
def test_what_looks_alike_but_is_not_is_left_alone(
    settings: Callable[..., Config], tmp_path: Path, name: str, values: dict[str, Any],
    found: dict[str, int],
) -> None:  # fmt: skip
    folder = made(tmp_path / "model", getattr(transformers, f"{name}Config")(**_SIZES, **values))
    base = open_base(settings(model__name=folder))
    assert base.fused == found
    as_stock(base, folder)


@pytest.mark.parametrize("part", ["LlamaMLP", "LlamaRMSNorm"])
def test_a_part_that_computes_something_else_is_not_replaced(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The same names and weights, another result: twice as much."""
    from transformers.models.llama import modeling_llama

    config, kind = settings(), getattr(modeling_llama, part)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    base = open_base(config)
    key = {"LlamaMLP": "mlps", "LlamaRMSNorm": "norms"}[part]
    assert base.fused == fused(5, 2, 2, 1) | {key: 0}
    as_stock(base, config.model.name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alibi": 1}, "unknown arguments .'alibi'."), ({"segments": None}, "no segments"),
     ({}, None)],
)  # fmt: skip
def test_unknown_attention_arguments_raise(
    lab: Callable[..., Lab], arguments: dict[str, Any], message: str | None
) -> None:
    base = lab().base
    ids, positions = torch.arange(4)[None], torch.arange(4)[None]
    call = {"segments": Segments.build([4], [0]), "use_cache": False} | arguments
    if message is None:
        assert base.decoder(ids, position_ids=positions, **call).last_hidden_state.isfinite().all()
        return
    with pytest.raises(ModelError, match=message):
        base.decoder(ids, position_ids=positions, **call)


def altered(config: Config, tmp_path: Path, **values: Any) -> str:
    """A copy of the model folder with other values in its config.json."""
    folder = tmp_path / "altered"
    shutil.copytree(config.model.name, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return str(folder)


def test_attention_dropout_is_refused(settings: Callable[..., Config], tmp_path: Path) -> None:
    config = settings()
    with pytest.raises(ModelError, match=r"attention_dropout: got 0\.1; expected 0"):
        open_base(config, altered(config, tmp_path, attention_dropout=0.1))
    starcoder = transformers.Starcoder2Config(**_SIZES, residual_dropout=0.1)
    with pytest.raises(ModelError, match=r"residual_dropout: got 0.1; expected 0"):
        model.check_config(starcoder, 64)
    model.check_config(transformers.Starcoder2Config(**_SIZES, attention_dropout=0.0), 64)


def test_positions_that_look_at_the_pass_are_refused() -> None:
    """Both kinds choose their frequencies by the longest sequence of a pass."""
    dynamic = LlamaConfig(
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    long = Phi3Config(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                         "long_factor": [2.0] * 4},
    )  # fmt: skip
    for hf in (dynamic, long):
        model.check_config(hf, 64)
        with pytest.raises(ModelError, match="at most 64"):
            model.check_config(hf, 65)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_base_that_differs_when_packed_is_refused(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    packed = attention.packed_attention

    def wrong(*args: Any, scale: float, **rest: Any) -> Tensor:
        out: Tensor = packed(*args, scale=scale * 1.01, **rest)
        return out

    monkeypatch.setattr(attention, "packed_attention", wrong)
    with pytest.raises(ModelError, match="other logits when packed"):
        open_base(settings(architecture))


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [("mistral", "sliding_window", 6), ("gemma2", "sliding_window", 6),
     ("gemma2", "attn_logit_softcapping", 3.0), ("gemma2", "query_pre_attn_scalar", 16),
     ("gemma2", "final_logit_softcapping", 4.0)],
)  # fmt: skip
def test_attention_settings_matter(
    settings: Callable[..., Config], tmp_path: Path, architecture: str, key: str, value: float
) -> None:
    """The load check compares with stock; here the setting is seen to reach the numbers at all."""
    config = settings(architecture)
    ids = torch.arange(12) * 5 % 97
    folders = (config.model.name, altered(config, tmp_path, **{key: value}))
    ours, theirs = (logits(open_base(config, folder), ids) for folder in folders)
    assert not torch.allclose(ours, theirs, rtol=1e-2)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_quantised_base_has_the_weights_of_a_4_bit_model(
    settings: Callable[..., Config], kind: str, double: bool
) -> None:
    """Against transformers' own 4-bit loading: every linear, and the head left alone."""
    from transformers import BitsAndBytesConfig

    for package in ("bitsandbytes", "accelerate"):
        there = importlib.util.find_spec(package) is not None
        require("quant", there, f"{package} is not installed")
    import bitsandbytes.functional as bnb

    config = settings(model__quantisation=kind, model__double_quantisation=double)
    ours = open_base(config).model
    plain = open_base(settings()).model
    stock = AutoModelForCausalLM.from_pretrained(
        config.model.name, dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )  # fmt: skip
    assert torch.equal(ours.lm_head.weight, plain.lm_head.weight)
    for name, module in stock.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            got = ours.get_submodule(name).weight
            state = module.weight.quant_state
            state.shape = torch.Size((1, got.numel()))  # see test_blocks_that_end_amid_a_row
            want = bnb.dequantize_4bit(module.weight, state)
            assert torch.equal(got, want.view_as(got)), name
            assert not torch.equal(got, plain.get_submodule(name).weight)
