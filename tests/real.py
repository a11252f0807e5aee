"""Real models, where this machine has them: SmolLM2, from its package, and two that
`FEDSIM_MODELS` (default: ~/.cache/fedsim-models) holds as folders."""

from __future__ import annotations

import os
from pathlib import Path

from fedsim.data import tokens
from fedsim.weights import Weights
from tests.conftest import require

CACHE = tokens.cache_root()  # before a fixture turns it elsewhere
MODELS = Path(os.environ.get("FEDSIM_MODELS") or Path.home() / ".cache" / "fedsim-models")
REAL = {
    "smollm2": "smollm2-135m-instruct", "qwen": "qwen2.5-coder-0.5b-instruct",
    "gemma": "gemma-3-270m",
}  # fmt: skip


def real(name: str) -> Weights:
    """A real model's folder; skips where it is not there, unless FEDSIM_REQUIRE says it must be."""
    if name == "smollm2":
        folders = sorted((CACHE / "models").glob(f"{REAL[name]}-*"))
        require("model", bool(folders), f"no converted model lies in {CACHE}/models")
        return Weights(folders[0], "test", "test")
    folder = MODELS / REAL[name]
    require("models", (folder / "config.json").is_file(), f"{folder} is not there")
    return Weights(folder, "test", "test")
