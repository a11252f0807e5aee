"""Tiny random models of six architectures and a byte-level tokenizer, made on the spot.

Nothing is downloaded. The models are small enough for a training step in milliseconds, and each
keeps what makes its architecture different: grouped queries, biases, query norms, sliding windows,
soft-caps, fused projections.
"""

from __future__ import annotations

import os

# Triton reads this when it is first imported, which torch does: its kernels run on the CPU.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as fedsim sets it, where torch comes later
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM as CausalLM
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from fedsim.config import Config, build
from fedsim.data.embedded import finance
from fedsim_kernels import dispatch, native

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3")
VOCABULARY = 384
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def _config(architecture: str) -> Any:
    if architecture == "llama":
        return LlamaConfig(**_SHARED, tie_word_embeddings=True)
    if architecture == "qwen2":
        return Qwen2Config(**_SHARED)
    if architecture == "qwen3":
        return Qwen3Config(**_SHARED, head_dim=16)
    if architecture == "mistral":
        return MistralConfig(**_SHARED, sliding_window=5)
    if architecture == "gemma2":
        return Gemma2Config(
            **_SHARED, head_dim=16, query_pre_attn_scalar=24, sliding_window=5,
            attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        )  # fmt: skip
    return Phi3Config(**_SHARED)


def require(what: str, there: bool, reason: str) -> None:
    """Skip where something is not installed, unless FEDSIM_REQUIRE says it must be."""
    if not there:
        if what in os.environ.get("FEDSIM_REQUIRE", "").split(","):
            pytest.fail(f"FEDSIM_REQUIRE names {what}, but {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens, trained on the embedded set; token 0 is EOS."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator((row["input"] for row in finance.train()[:300]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


@pytest.fixture(scope="session")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """architecture -> a model folder with random fp32 weights, made once."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama") -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(len(architecture))
            model = CausalLM.from_config(_config(architecture), dtype=torch.float32)
            for p in model.parameters():
                if p.ndim > 1:  # the default 0.02 leaves attention almost uniform
                    torch.nn.init.normal_(p, std=0.2)
            for p in model.parameters():
                if p.ndim == 1:  # a norm of weight 1 or a bias of 0 would not be missed
                    p.data += torch.randn_like(p) * 0.1
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return make


@pytest.fixture
def lab(settings: Callable[..., Config]) -> Callable[..., Any]:
    """(architecture, **changes) -> a `tests.lab.Lab`."""
    from tests.lab import open_lab

    return partial(open_lab, settings)


@pytest.fixture(params=["native", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs twice: with the C++ kernels, and in PyTorch."""
    if request.param == "native":
        require("native", native.available(), "the C++ kernels were not built, or are switched off")
    with dispatch.use(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("FEDSIM_CACHE", str(cache))


@pytest.fixture
def settings(
    tiny: Callable[[str], Path], tmp_path: Path
) -> Callable[..., Config]:  # fmt: skip
    """A small embedded-finance configuration on a tiny model; keyword `section__key` overrides."""

    def make(architecture: str = "llama", **changes: Any) -> Config:
        values: dict[str, dict[str, Any]] = {
            "run": {"name": "run", "out": str(tmp_path)},
            "model": {"name": str(tiny(architecture)), "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 8.0, "targets": ["all-linear"]},
            "data": {"source": "embedded", "max_length": 256, "limit": 200},
            "clients": {"number": 8},
            "server": {"rounds": 3, "fraction": 0.5, "export_every": 2},
            "train": {"steps": 2, "batch": 3, "lr_max": 1e-2, "lr_min": 1e-3, "slots": 4},
            "evaluate": {"limit": 12},
        }
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            values.setdefault(section, {})[leaf] = value
        return build(values, "test")

    return make
