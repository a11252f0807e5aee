"""A base held in 8 or 4 bits trains to the numbers of the dense base with the same values.

Codes are held against bitsandbytes' own and against a formula in float64; gradients against a dense
base whose weights are what the codes stand for, in every way that a site takes part in a pass; and
memory as the system counts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedsim import quantised, simulate
from fedsim.config import Config, build
from fedsim.quantised import Packed, bytes_each
from fedsim.room import Room
from fedsim.weights import Weights
from tests.conftest import require
from tests.lab import CLIENTS, Lab

KINDS = ("fp4", "nf4", "int8")


@pytest.fixture(autouse=True)
def _installed() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        require("quant", False, "bitsandbytes is not installed")


def whole(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(packed.shape, dtype=dtype)
    packed.into(out)
    return out


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_four_bits_are_those_of_bitsandbytes(kind: str, double: bool) -> None:
    import bitsandbytes as bnb

    linear = nn.Linear(128, 64, bias=False)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(1))
    weight = linear.weight.data.clone()
    theirs = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=kind, compress_statistics=double
    ).to("cpu")
    want = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    packed = Packed(weight, kind, double)
    assert torch.equal(whole(packed), want)
    error = float((want - weight).norm() / weight.norm())
    assert packed.error == pytest.approx(error, rel=1e-6) and 0.05 < error < 0.2
    config = build({"model": {"quantisation": kind, "double_quantisation": double}}, "test")
    said = weight.numel() * bytes_each(config)
    assert said <= packed.nbytes <= said + (1028 if double else 0)  # its table has 256 numbers


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_blocks_that_end_amid_a_row(kind: str) -> None:
    """By hand, from the table of codes and each block's largest: bitsandbytes 0.50 has other values
    with AVX-512 where 64 does not divide the width."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    blocks = weight.view(-1, 64)
    peak = blocks.abs().amax(1, keepdim=True)
    _, state = bnb.quantize_4bit(weight.view(1, -1), quant_type=kind)
    nearest = ((blocks / peak)[..., None] - state.code).abs().argmin(-1)
    want = (state.code[nearest] * peak).view(64, 96)
    got = whole(Packed(weight, kind, False))
    # A number amid two codes may go either way in rounding.
    assert ((got - want).abs() <= 1e-6 * peak.max()).double().mean() > 0.999
    assert float((got - weight).norm() / weight.norm()) < 0.15


def test_eight_bits_by_the_formula() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(2)) * 0.1
    weight[3] = 0
    exact, peak = weight.double(), weight.double().abs().amax(1, keepdim=True)
    codes = torch.where(peak > 0, exact * 127 / peak, 0).round()
    torch.testing.assert_close(
        whole(Packed(weight, "int8", False)).double(), codes * peak / 127, rtol=1e-6, atol=1e-9
    )
    by_hand = Packed(torch.tensor([[1.27, -0.634, 0.006]]), "int8", False)
    torch.testing.assert_close(whole(by_hand), torch.tensor([[1.27, -0.63, 0.01]]))


def test_one_weight_is_whole_at_a_time() -> None:
    parts = [Packed(torch.full((2, 64), float(n)), "int8", False) for n in (1, 2, 3)]
    room = Room()
    first = room.whole(parts[:2])
    assert first[:, 0].tolist() == pytest.approx([1, 1, 2, 2])
    second = room.whole(parts[2:])
    assert first[0, 0] == second[0, 0] == pytest.approx(3)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"adapter__dropout": 0.3},
    "dora": {"adapter__dora": True},
    "dora and dropout": {"adapter__dora": True, "adapter__dropout": 0.3},
    "strict": {"train__mode": "strict", "train__chunk_tokens": 48, "train__tile": 16},
    "recompute": {"train__recompute": "always"},
    "some adapted": {"adapter__targets": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_base(
    lab: Callable[..., Lab], kind: str, way: str
) -> None:
    """Same values, same products: equal to rounding, in strict mode to the bit."""
    made = [lab(model__quantisation=kind, model__hold=hold, **WAYS[way])
            for hold in ("packed", "dense")]  # fmt: skip
    assert all(site.dense is None for site in made[0].base.sites)
    assert all(site.dense is not None for site in made[1].base.sites)
    (loss, got), (same, want) = (one.gradients(range(CLIENTS)) for one in made)
    if way == "strict":
        assert torch.equal(got, want) and torch.equal(loss, same)
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
        torch.testing.assert_close(loss, same, rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "phi3"])
def test_biases_and_fused_projections(lab: Callable[..., Lab], architecture: str) -> None:
    targets = {"adapter__targets": ["all-linear"], "model__quantisation": "nf4"}
    made = [lab(architecture, model__hold=hold, **targets) for hold in ("packed", "dense")]
    got, want = (one.gradients(range(CLIENTS))[1] for one in made)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("changes", [{"server__strategy": "flora"}, {"adapter__init": "pissa"}])
def test_what_joins_the_base_joins_its_values(
    settings: Callable[..., Config], changes: dict[str, Any]
) -> None:
    """A corrected module becomes dense; it is not quantised again."""
    rows = []
    for hold in ("packed", "dense"):
        config = settings(
            model__quantisation="fp4",
            model__hold=hold,
            run__name=hold,
            evaluate__limit=4,
            **changes,
        )
        folder = simulate.run(config)
        last = sorted((folder / "adapters").iterdir())[-1]
        rows.append(load_file(last / "adapter_model.safetensors"))
        record = json.loads((folder / "environment.json").read_text())["model"]
        assert record["held"] == hold and 0.05 < record["quantisation_error"]["mean"] < 0.2
        assert record["quantisation_error"]["largest"] >= record["quantisation_error"]["mean"]
    for name, value in rows[0].items():
        torch.testing.assert_close(value, rows[1][name], rtol=2e-3, atol=2e-5)


CHILD = """
import re, sys
from pathlib import Path
import torch
from fedsim.config import build
from fedsim.model import load
from fedsim.weights import Weights
torch.set_num_threads(1)
base = {"quantisation": sys.argv[2], "hold": sys.argv[3], "dtype": "float32"}
config = build({"model": base}, "")
base = load(Weights(Path(sys.argv[1]), "", ""), config, torch.device("cpu"), ("q_proj",))
text = Path("/proc/self/smaps_rollup").read_text()
print(int(re.search(r"Pss_Anon:\\s+(\\d+)", text)[1]) / 1024)
"""


def test_memory_is_saved(tmp_path: Path) -> None:
    """200 MiB of linears in fp32: in 4 bits they and the buffer for one take less than a fifth."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        vocab_size=384, hidden_size=1024, intermediate_size=2048, num_hidden_layers=5,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path)
    linears = [m for m in made.modules() if isinstance(m, nn.Linear) and m.out_features != 384]
    mib = sum(m.weight.numel() for m in linears) * 4 / 2**20
    used = {}
    for hold in ("packed", "dense"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path), "fp4", hold], capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        used[hold] = float(done.stdout.split()[-1])
    # 4 bits and a scale of 4 bytes in 64 are 0.14 of fp32; the buffer is one MLP's, 16 MiB.
    assert used["dense"] - used["packed"] > mib * (1 - 0.14) - 16 - 10, (used, mib)


def test_what_is_held_follows_from_memory(
    settings: Callable[..., Config], tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, cpu = Weights(tiny("llama"), "", ""), torch.device("cpu")
    config = settings(model__quantisation="fp4")
    size = found.numbers * 4
    for free, packed in ((2 * size, False), (2 * size - 2, True)):
        monkeypatch.setattr(quantised, "free_bytes", lambda _, free=free: free)
        assert quantised.holds(found.numbers, config, torch.float32, cpu) is packed
    dense = replace_model(config, hold="dense")
    assert not quantised.holds(found.numbers, dense, torch.float32, cpu)
    none = replace_model(config, quantisation="none", hold="packed")
    assert not quantised.holds(found.numbers, none, torch.float32, cpu)


def replace_model(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})
