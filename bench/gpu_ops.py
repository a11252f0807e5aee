"""Part `ops` of gpu.py: how close is every operation to the card's limits?

An operation's limit is the larger of its least bytes over measured copy bandwidth and its FLOPs
over the measured rate of a large bf16 product, both of the same process. Events time the device
alone: the host queues all repeats behind a sleeping kernel, and its own time per call is `host_us`.
Inputs of one call may still lie in the cache from the last one, so a small operation can beat the
limit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from gpu_cases import Item, kernels
from torch import Tensor

from fedsim_kernels.segments import Segments

Timing = tuple[Callable[[], object], float, float]  # run, FLOPs, least bytes


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder layer and of a pass."""

    hidden: int
    heads: int
    key_heads: int
    head: int
    ffn: int
    vocabulary: int
    layers: int
    tokens: int
    clients: int
    sequence: int
    labels: int
    rank: int = 16

    @property
    def sites(self) -> dict[str, tuple[int, list[int]]]:
        """name -> in features, out features of each linear."""
        keys = self.key_heads * self.head
        return {
            "qkv": (self.hidden, [self.heads * self.head, keys, keys]),
            "gate_up": (self.hidden, [self.ffn, self.ffn]),
            "down": (self.ffn, [self.hidden]),
        }

    @property
    def parameters(self) -> int:
        """P of an adapter on every linear."""
        o = (self.heads * self.head, [self.hidden])
        sites = (*self.sites.values(), o)
        return self.layers * self.rank * sum(len(w) * i + sum(w) for i, w in sites)


SHAPES = {
    "smollm2": Shape(576, 9, 3, 64, 1536, 49152, 30, 16384, 32, 512, 2048),
    "8b": Shape(4096, 32, 8, 128, 14336, 128256, 4, 8192, 16, 512, 1024),
}
TINY = Shape(32, 4, 2, 8, 48, 96, 2, 64, 2, 16, 20, rank=4)


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Of the device and of the host, for one call."""
    if device.type != "cuda":
        spent = harness.seconds_of(run, 3)
        return spent, spent
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(20)]
    torch.cuda.synchronize()
    torch.cuda._sleep(30_000_000)  # cycles: about 20 ms
    began = time.perf_counter()
    for first, last in events:
        first.record()
        run()
        last.record()
    host = (time.perf_counter() - began) / len(events)
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) / 1e3, host


def ops(device: torch.device, tiny: bool) -> Iterator[Item]:
    """What the card can do, then every operation at the size of both models."""
    kernels()  # this registers the operations
    peaks: dict[str, float] = {}

    def peak() -> dict[str, Any]:
        if not peaks:
            n = 64 if tiny else 8192
            x = torch.randn(n, n, device=device, dtype=torch.bfloat16)
            large = torch.empty(n * n * (4 if tiny else 8), device=device, dtype=torch.bfloat16)
            other = torch.empty_like(large)
            spent = seconds(lambda: other.copy_(large), device)[0]
            peaks["bytes"] = 2 * large.nbytes / spent
            peaks["flops"] = 2 * n**3 / seconds(lambda: torch.mm(x, x), device)[0]
        return {"gb_per_second": peaks["bytes"] / 1e9, "tflop_per_second": peaks["flops"] / 1e12}

    def measure(build: Callable[[], Timing]) -> dict[str, Any]:
        peak()
        run, flops, moved = build()
        spent, host = seconds(run, device)
        memory, compute = moved / peaks["bytes"], flops / peaks["flops"]
        return {
            "ms": 1e3 * spent, "host_us": 1e6 * host, "gb_per_second": moved / spent / 1e9,
            "tflop_per_second": flops / spent / 1e12, "of_limit": max(memory, compute) / spent,
            "bound": "memory" if memory > compute else "compute",
        }  # fmt: skip

    yield "peaks", peak
    for name, shape in {"tiny": TINY}.items() if tiny else SHAPES.items():
        for op, build in listed(shape, device).items():
            yield f"{name} {op}", partial(measure, build)


def listed(s: Shape, device: torch.device) -> dict[str, Callable[[], Timing]]:
    """The operations of one model; inputs are made when the operation's turn comes."""
    out: dict[str, Callable[[], Timing]] = {}
    for site, (i, widths) in s.sites.items():
        out[f"mm {site}"] = partial(frozen, s, i, sum(widths), device)
        out[f"grouped_lora {site}"] = partial(lora, s, i, widths, False, device)
        out[f"grouped_lora_backward {site}"] = partial(lora, s, i, widths, True, device)
    out["packed_attention"] = partial(attention, s, False, device)
    out["packed_attention_backward"] = partial(attention, s, True, device)
    out["sdpa of torch"] = partial(sdpa, s, device)
    for name, form in (("rms_norm", norm), ("rotary", rotary), ("swiglu", swiglu)):
        out[name] = partial(form, s, False, device)
        out[f"{name}_backward"] = partial(form, s, True, device)
    out["dropout"] = partial(dropout, s, device)
    out["softmax_xent"] = partial(xent, s, False, device)
    out["linear_xent"] = partial(xent, s, True, device)
    out["adamw"] = partial(adamw, s, device)
    out["weighted_rows"] = partial(weighted, s, device)
    return out


def _draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def frozen(s: Shape, i: int, o: int, device: torch.device) -> Timing:
    """The base's own product, for comparison."""
    x, w = _draw(s.tokens, i, device=device), _draw(o, i, device=device)
    return lambda: F.linear(x, w), 2.0 * s.tokens * i * o, x.nbytes + w.nbytes + 2.0 * s.tokens * o


def _tables(s: Shape, device: torch.device) -> list[Tensor]:
    """Sequences of one length, as many of each client."""
    n = s.tokens // s.sequence
    slots = [b * s.clients // n for b in range(n)]
    return Segments.build([s.sequence] * n, slots).tables(device)


def lora(s: Shape, i: int, widths: list[int], backward: bool, device: torch.device) -> Timing:
    t, n, o, k, r = s.tokens, len(widths), sum(widths), s.clients, s.rank
    x, y, g = (_draw(t, f, device=device) for f in (i, o, o))
    a, b = (_draw(k, *f, device=device, dtype=torch.float32) for f in ((n * r, i), (o, r)))
    arenas, scale = (torch.zeros_like(a), torch.zeros_like(b)), torch.ones(k, device=device)
    rest = (_tables(s, device), [sum(widths[:m]) for m in range(n)], widths)
    flops, factors = 2.0 * t * r * (n * i + o), a.nbytes + b.nbytes
    h = torch.ops.fedsim.grouped_lora(y, x, a, b, scale, *rest)
    if not backward:
        moved = x.nbytes + 2 * y.nbytes + h.nbytes + factors
        return lambda: torch.ops.fedsim.grouped_lora(y, x, a, b, scale, *rest), flops, moved
    gx = torch.zeros_like(x)
    moved = g.nbytes + x.nbytes + h.nbytes + 2 * gx.nbytes + 3 * factors
    return lambda: torch.ops.fedsim.grouped_lora_backward(
        g, x, h, a, b, scale, *arenas, gx, *rest
    ), 2 * flops, moved  # fmt: skip


def attention(s: Shape, backward: bool, device: torch.device) -> Timing:
    """Of 7 products over the visible pairs, 2 are the forward's."""
    heads = (s.heads, s.key_heads, s.key_heads)
    q, k, v = _draw(s.tokens, sum(heads), s.head, device=device).split(heads, 1)
    g, rest = _draw(s.tokens, s.heads, s.head, device=device), (s.head**-0.5, 0, 0.0)
    tables = _tables(s, device)
    pairs = s.tokens * (s.sequence + 1) / 2
    flops, size = 4.0 * pairs * s.heads * s.head, 2.0 * s.tokens * s.head
    o, lse = torch.ops.fedsim.packed_attention(q, k, v, tables, *rest)
    if not backward:
        run = partial(torch.ops.fedsim.packed_attention, q, k, v, tables, *rest)
        return run, flops, size * (2 * s.heads + 2 * s.key_heads)
    run = partial(torch.ops.fedsim.packed_attention_backward, g, q, k, v, o, lse, tables, *rest)
    return run, 2.5 * flops, size * (4 * s.heads + 4 * s.key_heads)


def sdpa(s: Shape, device: torch.device) -> Timing:
    """The same attention, forward, as stock PyTorch has it: sequences of equal length."""
    n = s.tokens // s.sequence
    q, k, v = (_draw(n, h, s.sequence, s.head, device=device)
               for h in (s.heads, s.key_heads, s.key_heads))  # fmt: skip
    run = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    pairs = s.tokens * (s.sequence + 1) / 2
    moved = 2.0 * s.tokens * s.head * (2 * s.heads + 2 * s.key_heads)
    return run, 4.0 * pairs * s.heads * s.head, moved


def norm(s: Shape, backward: bool, device: torch.device) -> Timing:
    x, g = (_draw(s.tokens, s.hidden, device=device) for _ in range(2))
    weight = _draw(s.hidden, device=device)
    _, rstd = torch.ops.fedsim.rms_norm(x, weight, 1e-5)
    if backward:
        run = partial(torch.ops.fedsim.rms_norm_backward, g, x, weight, rstd)
        return run, 8.0 * x.numel(), 3.0 * x.nbytes
    return partial(torch.ops.fedsim.rms_norm, x, weight, 1e-5), 4.0 * x.numel(), 2.0 * x.nbytes


def rotary(s: Shape, backward: bool, device: torch.device) -> Timing:
    q, k = (_draw(s.tokens, h, s.head, device=device) for h in (s.heads, s.key_heads))
    cos, sin = (_draw(s.tokens, s.head, device=device) for _ in range(2))
    op = torch.ops.fedsim.rotary_backward if backward else torch.ops.fedsim.rotary
    n = q.numel() + k.numel()
    return partial(op, q, k, cos, sin), 3.0 * n, 4.0 * n + cos.nbytes + sin.nbytes


def swiglu(s: Shape, backward: bool, device: torch.device) -> Timing:
    y, g = (_draw(s.tokens, n * s.ffn, device=device) for n in (2, 1))
    if backward:
        run = partial(torch.ops.fedsim.swiglu_backward, g, y)
        return run, 14.0 * g.numel(), 5.0 * g.nbytes
    return partial(torch.ops.fedsim.swiglu, y), 6.0 * g.numel(), 3.0 * g.nbytes


def dropout(s: Shape, device: torch.device) -> Timing:
    x = _draw(s.tokens, s.hidden, device=device)
    counters = torch.zeros(s.tokens, 4, dtype=torch.int64, device=device)
    counters[:, 0] = torch.arange(s.tokens, device=device) % s.sequence
    run = partial(torch.ops.fedsim.dropout, x, counters, 42, 1, 0.1)
    return run, 20.0 * x.numel(), 2.0 * x.nbytes


def xent(s: Shape, product: bool, device: torch.device) -> Timing:
    """`product`: from hidden states of all label rows; else the logits of one chunk."""
    rows = s.labels if product else min(256, s.labels)
    targets = torch.arange(rows, device=device) % s.vocabulary
    weight = torch.full((rows,), 1 / rows, device=device)
    if product:
        h, head = (_draw(n, s.hidden, device=device) for n in (rows, s.vocabulary))
        run = partial(torch.ops.fedsim.linear_xent, h, head, targets, weight, 0, 1.0, 0.0)
        return run, 4.0 * rows * head.numel(), 2.0 * (h.nbytes + head.nbytes)
    z = _draw(rows, s.vocabulary, device=device)
    run = partial(torch.ops.fedsim.softmax_xent, z, targets, weight, 1.0, 0.0)
    return run, 8.0 * z.numel(), 2.0 * z.nbytes


def adamw(s: Shape, device: torch.device) -> Timing:
    k, rows = s.clients, torch.zeros(4, s.clients, s.parameters, device=device)
    rows[:2].normal_()
    run = partial(
        torch.ops.fedsim.adamw, *rows, torch.full((k,), 1e-4, device=device),
        torch.ones(k, device=device), torch.ones(k, dtype=torch.bool, device=device), None,
        0.9, 0.999, 1e-8, 0.0, 1.0,
    )  # fmt: skip
    return run, 20.0 * rows[0].numel(), 36.0 * rows[0].numel()


def weighted(s: Shape, device: torch.device) -> Timing:
    rows = _draw(s.clients, s.parameters, device=device, dtype=torch.float32)
    total = torch.zeros(s.parameters, dtype=torch.float64, device=device)
    weights = torch.ones(s.clients, dtype=torch.float64, device=device)
    run = partial(torch.ops.fedsim.weighted_rows, total, rows, rows[0].clone(), weights)
    return run, 3.0 * rows.numel(), rows.nbytes + 20.0 * s.parameters
