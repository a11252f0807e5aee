"""The vLLM backend: many adapters in one batch, in a process and an environment of its own.

vLLM pins its own torch, so it lives in `.venv-vllm` (`make install-vllm`) and is reached by path;
`vllm_worker.py` runs there. Two of its defects on a CPU (0.32) are kept away from results:

* a request without adapter beside requests with one is answered with another's adapter: the bare
  base is given an adapter of zeros, and the worker refuses a batch that mixes the two;
* log-probabilities of a prompt crash beside adapters: this backend has no likelihood.

It knows no padding, so that `official` of the finance tasks cannot be had of it (`padding.py`).

`Request.decided` cannot be asked in another process: it is asked afterwards, token by token, which
saves no time but gives the text of the other backends.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedsim import adapter_file, peft_io, pretrained, seeds
from fedsim.config import Config
from fedsim.core import pick_device
from fedsim.errors import ConfigError, ModelError
from fedsim.evaluate.generation import Adapter, Output, Request, Sampling
from fedsim.evaluate.vllm_process import Worker
from fedsim.evaluate.writing import Reader, Writing, tokenise
from fedsim.weights import Weights

PYTHON = Path(".venv-vllm/bin/python")
INSTALL = "Run `make install-vllm`, or name its interpreter with --vllm-python."
SCRIPT = Path(__file__).with_name("vllm_worker.py")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM makes room for
SLOTS = 8  # adapters in a batch; more wait their turn
ROOM = 2048  # tokens of a sequence, at least: a longer one restarts the worker
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that ending it ends everything
    "PYTHONSAFEPATH": "1",
}  # fmt: skip

FOREIGN = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")  # are about this environment


class VLLM:
    """Continues texts with vLLM. In a `with` its process stays between calls; else for one call."""

    name = "vllm"
    ranks = False
    pads = False

    def __init__(
        self, weights: Weights, tokenizer: Any, config: Config, python: Path | None = None, *,
        patience: float = 600.0,
    ) -> None:  # fmt: skip
        """`patience`: seconds without a sign of life until the worker is given up.

        Raises:
            ConfigError: there is no such interpreter, the base is quantised, or adapters have DoRA
                or a rank that vLLM has no room for.
        """
        kind, rank = config.model.quantisation, config.adapter.rank
        if kind != "none":
            raise ConfigError(
                "model.quantisation with the vllm backend", got=kind, expected="none",
                remedy="vLLM quantises by another rule, so it would be another base: "
                "use the engine backend.",
            )  # fmt: skip
        if rank > RANKS[-1]:
            raise ConfigError(
                "adapter.rank with the vllm backend", got=rank, expected=f"at most {RANKS[-1]}",
                remedy="Use the engine backend.",
            )  # fmt: skip
        # Not resolved: an environment's interpreter is a link, and finds its packages by its name.
        self.python = (python or PYTHON).absolute()
        if not self.python.is_file():
            raise ConfigError("vLLM's interpreter", got=str(self.python), expected="a file",
                              remedy=INSTALL)  # fmt: skip
        self.folder = weights.path.resolve()
        self.tokenizer = tokenizer
        self.reader = Reader(tokenizer, _generation(self.folder))
        self.patience = patience
        self.dtype = str(pretrained.compute_dtype(config, pick_device(config.run.device)))[6:]
        self.rank = next(r for r in RANKS if r >= rank)
        self._warm = False
        self._worker: Worker | None = None
        self._room = 0  # tokens of a sequence that the worker has made room for
        # Adapters handed over so far: vLLM caches by number and name, and never looks again.
        self._adapters = 0

    def __enter__(self) -> VLLM:
        self._warm = True
        return self

    def __exit__(self, *_: object) -> None:
        self._warm = False
        self.close()

    def close(self) -> None:
        """End the worker and all that it started: its memory is free when this returns."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def generate(
        self, requests: Sequence[Request], adapters: Sequence[Adapter], sampling: Sampling
    ) -> list[Output]:
        """One output a request, in order; draws are vLLM's, from `sampling.seed`.

        Raises:
            DataError: a prompt has no tokens.
            ConfigError: an adapter is only a row, has DoRA or too high a rank, or a sequence is
                longer than the model's context, or a request has choices to rank or is padded.
            ModelError: an adapter cannot be read, or vLLM cannot be imported where it should be.
            RunError: the worker failed, or made no progress for `patience` seconds.
        """
        if not requests:
            return []
        if any(request.choices for request in requests):
            raise ConfigError(
                "log-probabilities of choices with the vllm backend",
                expected="generation only",
                remedy="vLLM cannot score prompts beside adapters: use the engine backend.",
            )
        if any(request.padded for request in requests):
            raise ConfigError(
                "padded prompts with the vllm backend", expected="prompts as they are",
                remedy="Use the engine backend.",
            )  # fmt: skip
        ids = tokenise(self.tokenizer, requests)
        need = max(len(i) + r.max_new for i, r in zip(ids, requests, strict=True))
        try:
            with tempfile.TemporaryDirectory(prefix="fedsim-vllm-") as scratch:
                batch = Path(scratch) / "batch.json"
                batch.write_text(json.dumps({
                    "adapters": self._folders(requests, adapters, Path(scratch) / "zero"),
                    "requests": self._plain(requests, ids, sampling.seed),
                    "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p,
                                 "top_k": sampling.top_k},
                }))  # fmt: skip
                got = self._start(need).answer(batch, len(requests))
        except BaseException:
            self.close()  # in the middle of a batch: nothing could be asked of it next
            raise
        if not self._warm:
            self.close()
        return [self._output(r, ids[i], got[i]) for i, r in enumerate(requests)]

    def _output(self, request: Request, ids: list[int], answer: dict[str, Any]) -> Output:
        """What vLLM wrote, written once more by the rules of the other backends.

        Its own detokeniser decodes beside the prompt, and differs at the very beginning.
        """
        writing = Writing(request, ids, self.reader)
        for token in answer["tokens"]:
            writing.add(token)
            if writing.end:
                break
        writing.end = writing.end or answer["end"]
        return writing.output()

    def _start(self, need: int) -> Worker:
        """The worker, with room for sequences of `need` tokens."""
        if self._worker is None or need > self._room:
            self.close()
            most = _context(self.folder)
            if need > most:
                raise ConfigError(
                    "tokens of a prompt and what may follow", got=need,
                    expected=f"at most {most}, the model's context",
                )  # fmt: skip
            self._room = min(most, max(ROOM, 1 << (need - 1).bit_length()))
            settings = {
                "model": str(self.folder), "dtype": self.dtype, "max_model_len": self._room,
                "enable_lora": True, "max_lora_rank": self.rank, "max_loras": SLOTS,
                "enforce_eager": True,
            }  # fmt: skip
            inherited = {k: v for k, v in os.environ.items() if k not in FOREIGN}
            environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **inherited, **ENVIRONMENT}
            command = [str(self.python), "-I", str(SCRIPT), json.dumps(settings)]
            self._worker = Worker(command, environment, self.patience, INSTALL)
        return self._worker

    def _plain(
        self, requests: Sequence[Request], ids: Sequence[list[int]], seed: int
    ) -> list[dict[str, Any]]:
        """Requests as JSON holds them, adapter by adapter: a slot is then filled once, and prefixes
        that an adapter's prompts share lie near each other."""
        key = seeds.run_key(seed)
        order = sorted(range(len(requests)), key=lambda i: requests[i].adapter)
        return [
            {
                "index": i, "ids": ids[i], "adapter": requests[i].adapter,
                "max_new": requests[i].max_new, "stop": list(requests[i].stop),
                "seed": (key + i) % (1 << 63), "special": requests[i].special,
                # Where the tokenizer's own EOS alone ends a text, the model's others are ignored.
                "ends": sorted(self.reader.ends(requests[i])) if requests[i].one_end else [],
            }
            for i in order
        ]  # fmt: skip

    def _folders(
        self, requests: Sequence[Request], adapters: Sequence[Adapter], zero: Path
    ) -> list[dict[str, Any] | None]:
        """Number and folder of each adapter that is asked for. The bare base is None where nothing
        else is asked for, and else an adapter of zeros, written to `zero`."""
        asked = {r.adapter for r in requests}
        folders = {i: self._readable(adapters[i], zero.with_name(f"adapter-{i}"))
                   for i in sorted(asked)}  # fmt: skip
        real = next((folder for folder in folders.values() if folder), None)
        out: list[dict[str, Any] | None] = [None] * len(adapters)
        for i, folder in folders.items():
            if real and not folder:
                folder = zero if zero.is_dir() else _zeros(real, zero)
            if folder:
                self._adapters += 1
                out[i] = {"id": self._adapters, "folder": str(folder.resolve())}
        return out

    def _readable(self, adapter: Adapter, into: Path) -> Path | None:
        """The folder that vLLM reads, written anew; None of the bare base."""
        if adapter.folder is None:
            if adapter.row is None:
                return None
            raise ConfigError(
                f"adapter {adapter.name!r} with the vllm backend", got="a row",
                expected="a folder in PEFT's format", remedy="Export it, or use the engine.",
            )  # fmt: skip
        found = adapter_file.factors(
            adapter.folder, adapter_file.shapes(adapter_file.tensors(adapter.folder))
        )
        rank = max(len(f.a) for f in found.values())
        dora = any(f.mag is not None for f in found.values())
        if dora or rank > self.rank:
            raise ConfigError(
                f"{adapter.folder} with the vllm backend", got="DoRA" if dora else f"rank {rank}",
                expected=f"LoRA of rank at most {self.rank}",
                remedy="Use the engine backend." if dora else "Raise adapter.rank.",
            )  # fmt: skip
        peft_io.write_plain(into, found)  # vLLM reads no patterns, pickles or modules per layer
        return into


def _zeros(like: Path, folder: Path) -> Path:
    """An adapter of the same shape that changes nothing."""
    try:
        tensors = load_file(like / "adapter_model.safetensors")
    except (OSError, SafetensorError) as failure:
        raise ModelError(f"{like}/adapter_model.safetensors cannot be read ({failure})",
                         expected="an adapter in PEFT's format") from failure  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((like / "adapter_config.json").read_bytes())
    save_file({k: torch.zeros_like(t) for k, t in tensors.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return folder


def _context(folder: Path) -> int:
    """The longest sequence that the model's configuration allows."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config") or config
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 30)


def _generation(folder: Path) -> Any:
    """The model's generation_config.json, or None."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    return GenerationConfig.from_pretrained(folder) if file.is_file() else None
