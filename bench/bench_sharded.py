"""Does a model train of which no process ever holds a copy, and what does sharing it cost?

A random Llama of 1.07 billion fp32 weights (16 layers of width 2,048, the vocabulary of
SmolLM2-135M-Instruct), 8 clients x batch 2 of FinGPT sentiment, rank 32 on q_proj and v_proj, in 4
processes of one thread: sharded by ZeRO-3, and with the whole base, which all four then map from
one file. The same rounds, whole; seconds are those between the lines that a round and the one
before it add to rounds.jsonl. First, both must have learnt the same, as far as packings may differ.

`peak_over_weights` is the largest peak of resident memory (VmHWM) of any process of the sharded run
over the bytes of the weights; `sharded_over_whole` its seconds a round over the whole base's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tomli_w

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import harness
import torch
from bench_clients import data_folder
from bench_workers import BOUND, apart, family
from safetensors.torch import load_file

from fedsim import weights
from fedsim.errors import FedSimError, RunError

PROCESSES, CLIENTS, BATCH = 4, 8, 2
FULL, QUICK = 4, 2  # rounds
MIB = 1 << 20


@dataclass(frozen=True)
class Seen:
    """Seconds until the first round's end and of each other, peaks in MiB, and the last adapter."""

    first: float
    rounds: tuple[float, ...]
    peaks: tuple[float, ...]
    adapter: dict[str, torch.Tensor]


def made(folder: Path, like: str) -> int:
    """Write the model, in files of 500 MB, with a real tokenizer; returns its weights' bytes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = weights.tokenizer(weights.find(like))
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")
    tokenizer.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def peaks(processes: list[int], known: dict[int, float]) -> None:
    """Raise each process's peak of resident memory so far, in MiB."""
    for process in processes:
        with suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    known[process] = int(line.split()[1]) / 1024


def whole_run(model: Path, data: Path, rounds: int, sharding: str) -> Seen:
    """Run once in its own folder. Raises RunError where it fails."""
    with tempfile.TemporaryDirectory(dir=model.parent) as name:
        folder = Path(name)
        values = {
            "run": {"name": "run", "out": str(folder)},
            "model": {"name": str(model), "dtype": "float32", "sharding": sharding},
            "adapter": {"rank": 32, "alpha": 64.0, "targets": ["q_proj", "v_proj"]},
            "data": {"source": "directory", "dir": str(data)},
            "clients": {"number": CLIENTS},
            "server": {"fraction": 1.0, "rounds": rounds, "export_every": rounds},
            "train": {"batch": BATCH, "steps": 1, "slots": CLIENTS // PROCESSES},
            "evaluate": {"limit": 0},
        }  # fmt: skip
        (folder / "run.toml").write_text(tomli_w.dumps(values))
        began, errors = time.perf_counter(), (folder / "errors").open("w+")
        started = subprocess.Popen(
            [sys.executable, "-m", "fedsim", "run", str(folder / "run.toml"), "--devices",
             str(PROCESSES)],
            stdout=subprocess.DEVNULL, stderr=errors, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1",
                              "FEDSIM_CACHE": str(model.parent / "cache")},
        )  # fmt: skip
        lines, at = folder / "run" / "rounds.jsonl", [began]
        most: dict[int, float] = {}
        while started.poll() is None:
            done = lines.read_text().count("\n") if lines.is_file() else 0
            at += [time.perf_counter()] * (done + 1 - len(at))
            with suppress(FileNotFoundError):
                peaks(family(started.pid)[1:], most)
            time.sleep(0.02)
        errors.seek(0)
        said = errors.read()
        errors.close()
        if started.returncode or len(at) != rounds + 1:
            raise RunError(f"sharding = {sharding}: {said[-500:]}")
        last = folder / "run" / "adapters" / f"round_{rounds:05d}" / "adapter_model.safetensors"
        seconds = [b - a for a, b in pairwise(at)]
        return Seen(seconds[0], tuple(seconds[1:]), tuple(most.values()), load_file(last))


def main() -> None:
    given = harness.options(str(__doc__).partition("\n")[0]).parse_args()
    rounds = QUICK if given.quick else FULL
    try:
        data = data_folder(given.data)
        with tempfile.TemporaryDirectory() as name:
            model = Path(name) / "model"
            size = made(model, given.model)
            seen = {how: whole_run(model, data, rounds, how) for how in ("zero3", "none")}
        error = apart(seen["zero3"], seen["none"])
        if not error <= BOUND:
            raise RunError("adapters over a sharded base", got=error, expected=f"<= {BOUND}")
    except FedSimError as failure:
        sys.exit(f"error: {failure}")
    cost = harness.ratio(seen["zero3"].rounds, seen["none"].rounds)
    result = {
        "machine": harness.machine(torch.device("cpu")), "weights_mib": size / MIB,
        "arms": {how: {"first_s": s.first, "round_s": s.rounds, "peak_mib": s.peaks}
                 for how, s in seen.items()},
        "sharded_over_whole": cost, "apart": error,
    }  # fmt: skip
    harness.show(
        f"1.07 billion weights, {size / MIB:,.0f} MiB",
        ("base", "s a round", "s to the first", "largest peak MiB"),
        [[{"zero3": "sharded", "none": "whole, mapped"}[how],
          f"{sorted(s.rounds)[len(s.rounds) // 2]:.1f}", f"{s.first:.0f}", f"{max(s.peaks):,.0f}"]
         for how, s in seen.items()],
    )  # fmt: skip
    figures = {
        "peak_over_weights": max(seen["zero3"].peaks) / (size / MIB),
        "sharded_over_whole": cost["median"],
    }
    harness.finish("sharded", result, figures, not given.quick or given.save)


if __name__ == "__main__":
    main()
