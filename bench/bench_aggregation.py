"""What does a federated rule cost the server, in time and memory?

    flexlora_qr_speedup     seconds of FlexLoRA as published, the dense product of 10 clients of
                            rank 16 on a module of 4,096 x 4,096 and its SVD in fp32, over ours: QR
                            of the stacked factors and the SVD of a small core, in fp64
    flexlora_max_rel_error  ||ours - best|| / ||best||, best: the fp64 SVD cut to rank 16
    streaming_extra_mb_1000_clients  most memory that a rule of sums takes beside the server's row
                            and one update, for 1,000 clients of 4.9 M numbers (SmolLM2-135M, rank
                            16 on every linear)

The table has every rule at 10, 100 and 1,000 clients. Updates are copies of eight, again and
again, so that a rule's time is its own; what clients keep on disk is not written. A rule that needs
all updates at once is left out where they do not fit half of the free memory.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import harness
import numpy as np
import torch
from harness import Arm
from torch import Tensor

from fedsim import strategies
from fedsim.adapters import initial_row
from fedsim.core import AdapterLayout, ClientUpdates, RoundPlan
from fedsim.errors import FedSimError
from fedsim.factors import Products
from fedsim.reduce import Reduce
from fedsim.rehearsal import Forgetful

MIB = 1 << 20
RANK, SCALE, KEY = 16, 2.0, 1
WIDE, CLIENTS = 4096, 10
COUNTS = (10, 100, 1000)
# (in, out) of a layer's linears
LAYER = {
    "q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576),
    "gate": (576, 1536), "up": (576, 1536), "down": (1536, 576),
}  # fmt: skip
# Those that hold all updates of a round; `reduce.rows`.
WHOLE = ("bulyan", "geometric_median", "krum", "median", "multi_krum", "trimmed_mean")
# Those that form products, whose memory is bounded by the base's and not by an adapter's.
PRODUCTS = ("fedex_lora", "flexlora", "flora", "lora_fair")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flexlora(wide: int, repeats: int) -> tuple[dict[str, float], float]:
    """How many times faster than the dense SVD, and how far from the best of its rank."""
    layout = AdapterLayout.build({"wide": (wide, wide)}, RANK)
    rows = [normal(layout.size, seed=k) for k in range(CLIENTS)]
    pairs = [tuple(f[0] for f in layout.factors(row[None])["wide"]) for row in rows]
    p = SCALE / CLIENTS

    def ours() -> Tensor:
        products = Products(layout)
        for row in rows:
            products.add(row, RANK, p)
        parts = products.over(1.0)["wide"].svd(RANK)
        return (parts.u * parts.s) @ parts.vt

    def dense(dtype: torch.dtype = torch.float32) -> Tensor:
        g = sum(p * b.to(dtype) @ a.to(dtype) for a, b in pairs)
        assert isinstance(g, Tensor)
        u, s, vt = torch.linalg.svd(g, full_matrices=False)
        return (u[:, :RANK] * s[:RANK]) @ vt[:RANK]

    best = dense(torch.float64)
    error = float((ours() - best).norm() / best.norm())
    arms = {"qr": Arm(ours, ours), "dense": Arm(dense, lambda: None)}
    timed = harness.time_arms(arms, repeats, "flexlora")
    return harness.ratio(timed["dense"].seconds, timed["qr"].seconds), error


@dataclass(frozen=True)
class Round:
    """A round's updates, made as they are asked for."""

    plan: RoundPlan
    start: Tensor
    pool: list[Tensor]

    @classmethod
    def build(cls, layout: AdapterLayout, clients: int) -> Round:
        start = initial_row(layout, KEY)
        used = layout.mask(("A", "B"))
        pool = [torch.where(used, start + 0.01 * normal(layout.size, seed=k), 0) for k in range(8)]
        ones = np.ones(clients, dtype=np.int64)
        plan = RoundPlan(
            round=1, client_ids=np.arange(clients), weights=1.0 + np.arange(clients) % 7,
            rank=RANK * ones, scale=SCALE * ones, steps=10 * ones, lr=1e-3 * ones,
            version=0 * ones, lanes=(np.arange(clients),), population=10 * clients,
        )  # fmt: skip
        return cls(plan, start, pool)

    def updates(self) -> Iterator[ClientUpdates]:
        for k in range(len(self.plan)):
            yield ClientUpdates(
                index=np.array([k]), row=self.pool[k % len(self.pool)].clone()[None],
                start=self.start,
                tokens=np.array([1]), loss_first=np.array([2.0]), loss_last=np.array([1.0]),
                ok=np.array([True]), seconds=0.0,
            )  # fmt: skip


def memory(what: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, its peak since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{what}:")).split()[1]) * 1024


def forget() -> None:
    """Give freed memory back, which a rule would else get again unseen, and the peak with it."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024


def cost(name: str, layout: AdapterLayout, work: Round) -> dict[str, Any]:
    """Seconds and MiB of one round's aggregation, beside the server's state before it."""
    needed = 4 * 4 * len(work.plan) * layout.size  # rows, updates, and both stacked
    if name in WHOLE and needed > free_memory() / 2:
        return {"needs_gib": needed / 2**30}
    rule = strategies.load(name)
    server = rule.start(work.start, layout)
    reduce = Reduce(layout, SCALE, KEY)
    local = rule.rule(server, work.plan)  # what it needs for training is not the aggregation's
    gc.collect()
    forget()
    before, began = memory("VmRSS"), time.perf_counter()
    rule.aggregate(server, work.plan, work.updates(), reduce, Forgetful())
    seconds, extra = time.perf_counter() - began, memory("VmHWM") - before
    del local
    return {"seconds": seconds, "extra_mib": max(extra, 0) / MIB}


def measure(counts: Sequence[int], layers: int) -> dict[str, dict[str, Any]]:
    """rule -> number of clients -> what it costs."""
    shapes = {f"{n}.{name}": shape for n in range(layers) for name, shape in LAYER.items()}
    layout = AdapterLayout.build(shapes, RANK)
    names = [n for n in strategies.known() if n != "local"]  # which combines nothing
    out: dict[str, dict[str, Any]] = {name: {"numbers": layout.numel()} for name in names}
    cost("fedavg", layout, Round.build(layout, 2))  # loads the kernels
    for count in counts:
        work = Round.build(layout, count)
        for name in names:
            out[name][str(count)] = cost(name, layout, work)
            harness.say(f"{name}, {count} clients: {out[name][str(count)]}")
    return out


def cell(found: dict[str, Any]) -> list[str]:
    if "needs_gib" in found:
        return ["", f"{found['needs_gib']:.0f} GiB needed"]
    return [f"{found['seconds']:.2f} s", f"{found['extra_mib']:,.0f} MiB"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.options(str(__doc__).partition("\n")[0])
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="clients of a round")
    parser.add_argument("--wide", type=int, default=WIDE, help="of FlexLoRA's module")
    parser.add_argument("--layers", type=int, default=30, help="of seven linears each")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    counts = [int(count) for count in given.counts.split(",")]
    try:
        rules = measure(counts, given.layers)
        faster, error = flexlora(given.wide, 1 if given.quick else 3)
    except FedSimError as failure:
        sys.exit(f"error: {failure}")
    columns = [text for count in counts for text in (f"{count} clients", "")]
    rows = [[name, "", *(text for count in counts for text in cell(found[str(count)]))]
            for name, found in rules.items()]  # fmt: skip
    harness.show("aggregation", ["rule", "", *columns], rows)
    last = str(counts[-1])
    extra = max(found[last]["extra_mib"] for name, found in rules.items()
                if name not in (*WHOLE, *PRODUCTS))  # fmt: skip
    summary = {
        "flexlora_qr_speedup": faster["median"], "flexlora_max_rel_error": error,
        f"streaming_extra_mb_{last}_clients": extra,
    }  # fmt: skip
    result = {"quick": given.quick, "machine": harness.machine(torch.device("cpu")),
              "flexlora": faster, "rules": rules, "counts": counts}  # fmt: skip
    harness.finish("aggregation", result, summary, given.save or not given.quick)


if __name__ == "__main__":
    main()
