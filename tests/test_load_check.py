"""The load check accepts what is right and refuses what is wrong, in fp32 and in bf16.

Planted faults, on tiny models over dense, quantised and sharded bases, and on the real models
that have what each needs; a fault in the base's own dtype alone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsim import fused, model, stock_rows, verdicts, weights
from fedsim.attention import packed_attention
from fedsim.config import Config
from fedsim.errors import ModelError
from tests.conftest import ARCHITECTURES, require
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


PLANT = """
import sys
from pathlib import Path
import pytest, torch
from fedsim import attention, model
from fedsim.config import build
from fedsim.errors import ModelError
from fedsim.weights import Weights
from tests.faults import FAULTS
dtype, biased, *folders = sys.argv[1:]
torch.distributed.init_process_group("gloo")
def opened(folder):
    config = build({"model": {"name": folder, "dtype": dtype, "sharding": "zero3"}}, "test")
    cpu = torch.device("cpu")
    return model.load(Weights(Path(folder), "t", "t"), config, cpu, ("all-linear",), shard=True)
where = dict(zip(("biased", *(a for _, a in FAULTS.values() if a != "biased")), (biased, *folders)))
for fault, (plant, architecture) in FAULTS.items():
    assert opened(where[architecture]).shards is not None
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        try:
            opened(where[architecture])
        except ModelError as refused:
            assert "other logits when packed" in str(refused), refused
            print("refused:", fault)
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharded_bases(
    tiny: Callable[[str], Path], biased: Path, dtype: str, tmp_path: Path
) -> None:
    """All faults, each accepted without, over DeepSpeed's shards in a process of its own."""
    there = importlib.util.find_spec("deepspeed") is not None
    require("deepspeed", there, "DeepSpeed is not installed: pip install fedsim-llm[deepspeed]")
    folders = [str(tiny(a)) for _, a in FAULTS.values() if a != "biased"]
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
           "PYTHONPATH": str(Path(__file__).parents[1]), "FEDSIM_CACHE": str(tmp_path)}  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", PLANT, dtype, str(biased), *folders], capture_output=True, text=True,
        check=False, env=os.environ | one,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = [s.removeprefix("refused: ") for s in ran.stdout.splitlines() if s.startswith("refused")]
    assert said == list(FAULTS)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_verdict_is_kept_for_what_it_is_of(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a large base: the second load does not check; another dtype, other sources and other
    weights do."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "LEAST", 0)
    config = settings()
    other = tmp_path / "model"
    shutil.copytree(config.model.name, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert open_base(config).differences
    assert not open_base(config).differences
    assert open_base(settings(model__dtype="bfloat16")).differences
    assert open_base(config, other).differences
    monkeypatch.setattr(verdicts, "_sources", lambda: "others")
    assert open_base(config).differences


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
        ("gemma", "a window that is one longer"),
        ("gemma", "a window of the cache that is one longer"), ("gemma", "an offset of norms lost"),
    ],
)  # fmt: skip
def test_real_models(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, dtype: str, name: str,
    fault: str,
) -> None:  # fmt: skip
    """That they are accepted without a fault, tests/test_real_models.py shows by training them."""
    FAULTS[fault][0](monkeypatch)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_are_right_but_unlike_others(
    settings: Callable[..., Config], tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that adds nothing yet, as models that were made deeper have; and a fault in one
    layer, where few are compared in fp32: the others are compared in the base's dtype."""
    hf = LlamaConfig.from_pretrained(settings().model.name, num_hidden_layers=6)
    torch.manual_seed(1)
    found = LlamaForCausalLM(hf)
    for p in found.parameters():
        torch.nn.init.normal_(p, std=0.2)
    for linear in (found.model.layers[2].self_attn.o_proj, found.model.layers[2].mlp.down_proj):
        linear.weight.data.zero_()
    found.save_pretrained(tmp_path)
    config = settings(model__name=str(tmp_path), model__dtype=dtype)
    open_base(config)
    monkeypatch.setattr(stock_rows, "WEIGHTS", 0)
    assert "layer 3, " + dtype in open_base(config).differences
    build = fused._fused_norm
    made: list[int] = []

    def wrong(norm: torch.nn.Module) -> Any:
        out = build(norm)
        made.append(0)
        if len(made) == 7:  # of the fourth layer
            assert out is not None
            out.weight.data *= 1.5
        return out

    monkeypatch.setattr(fused, "_fused_norm", wrong)
    with pytest.raises(ModelError, match=r"other logits when packed than .* layer 3"):
        open_base(config)


def test_of_many_layers_some_of_each_kind_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fedsim.layerwise import few_of

    layers = [torch.nn.Linear(4, 4, bias=False) for _ in range(9)]
    layers[3].sliding_window = 7  # type: ignore[assignment]
    assert few_of(layers, 9, 9 * 16) == list(range(9))
    assert few_of(layers, 9, 8 * 16 - 1) == [0, 1, 3, 4, 6, 8]
    assert few_of(layers, 9, 0) == [0, 3, 8]
