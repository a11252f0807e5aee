"""Runs in vLLM's own environment, as a process of its own, and imports nothing of fedsim.

`python -I vllm_worker.py '{"model": ..., ...}'`. A line on standard input is the path of a batch;
lines on standard output are JSON: `{"ready": version}`, then for each batch `{"step": n}` as a sign
of life, `{"index": i, "tokens": [...], "end": "eos" | "stop" | "length"}` as each request ends, and
`{"done": n}`. Everything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

UNUSABLE = 3  # the exit status when vLLM cannot be imported
_PULSE = 1.0  # seconds between signs of life
_GPU_SHARE = 0.9  # of the memory that is free: the parent's own models may lie on the same card


def load(settings: dict[str, Any]) -> Any:
    """vLLM's engine, in this process; `settings` are arguments of its EngineArgs."""
    from vllm import EngineArgs, LLMEngine  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    if current_platform.is_cuda():
        import torch

        free, total = torch.cuda.mem_get_info()
        settings = {**settings, "gpu_memory_utilization": _GPU_SHARE * free / total}
    return LLMEngine.from_engine_args(EngineArgs(**settings))


def add(engine: Any, batch: dict[str, Any]) -> None:
    """Queue every request of a batch. Raises ValueError where some have an adapter, some none."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    loras = [a and LoRARequest(f"adapter-{a['id']}", a["id"], a["folder"])
             for a in batch["adapters"]]  # fmt: skip
    if len({loras[r["adapter"]] is None for r in batch["requests"]}) > 1:
        raise ValueError("on a CPU, vLLM answers a request without adapter with another's adapter")
    for r in batch["requests"]:
        parameters = SamplingParams(
            max_tokens=r["max_new"], stop=r["stop"], seed=r["seed"], ignore_eos=bool(r["ends"]),
            stop_token_ids=r["ends"], skip_special_tokens=not r["special"], **batch["sampling"],
        )  # fmt: skip
        engine.add_request(
            str(r["index"]), {"prompt_token_ids": r["ids"]}, parameters,
            lora_request=loras[r["adapter"]],
        )  # fmt: skip


def outputs(engine: Any) -> Iterator[dict[str, Any]]:
    """Run the engine until its queue is empty: what to tell the parent."""
    steps, told = 0, time.monotonic()
    while engine.has_unfinished_requests():
        steps += 1
        for request in engine.step():
            if request.finished:
                got = request.outputs[0]
                end = got.finish_reason
                if end == "stop" and not isinstance(got.stop_reason, str):
                    end = "eos"  # the reason is the text that was met, or the token, or None
                yield {"index": int(request.request_id), "tokens": list(got.token_ids), "end": end}
        if time.monotonic() - told > _PULSE:
            told = time.monotonic()
            yield {"step": steps}


def main() -> None:
    """Serve batches until standard input ends, that is, until the parent is gone."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output

    def tell(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    serve(json.loads(sys.argv[1]), sys.stdin.readline, tell)


def serve(
    settings: dict[str, Any], receive: Callable[[], str], tell: Callable[[dict[str, Any]], None]
) -> None:
    """Load, then answer one batch after another."""
    try:
        import vllm
    except (ImportError, RuntimeError, OSError):  # RuntimeError: torchvision beside another torch
        traceback.print_exc()
        sys.exit(UNUSABLE)
    engine = load(settings)
    tell({"ready": vllm.__version__})
    while path := receive().rstrip("\n"):
        with open(path, encoding="utf-8") as stream:
            batch = json.load(stream)
        add(engine, batch)
        for message in outputs(engine):
            tell(message)
        tell({"done": len(batch["requests"])})


if __name__ == "__main__":
    main()
