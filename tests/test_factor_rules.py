"""Rules that treat A and B apart: FedIT, FFA-LoRA, RoLoRA, FedSA-LoRA.

Their means against float64 products, what trains and travels, and that a private factor reaches
nobody else. About 6 s.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedsim import simulate, strategies
from fedsim.aggregation_error import relative_error
from fedsim.checkpoint import load_checkpoint
from fedsim.client_memory import DiskMemory
from fedsim.config import Config
from fedsim.core import ServerState
from fedsim.folder import RunFolder
from fedsim.world import load_world
from tests.rules import LAYOUT, Kept, M, blocks, plan_of, random_rows, reduce, step

WEIGHTS = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]
P = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)


def rows_of(start: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """Clients that moved these kinds only."""
    return torch.where(LAYOUT.mask(kinds), start + 0.1 * random_rows(2, M), start)


def products(rows: Tensor) -> dict[str, Tensor]:
    """module -> B A of every row, fp64."""
    return {m: b.double() @ a.double() for m, (a, b) in LAYOUT.factors(rows).items()}


def test_fedit_is_fedavg() -> None:
    start = random_rows(1, 1)[0]
    rows, server = rows_of(start, ("A", "B")), ServerState(0, start)
    got, want = (step(strategies.load(n), server, rows, WEIGHTS) for n in ("fedit", "fedavg"))
    assert torch.equal(got.row, want.row)


@pytest.mark.parametrize(("rule", "round", "kind"), [
    ("ffa_lora", 1, "B"), ("ffa_lora", 2, "B"), ("rolora", 1, "B"), ("rolora", 2, "A"),
])  # fmt: skip
def test_one_factor_is_averaged_exactly(rule: str, round: int, kind: str) -> None:
    """sum_k p_k B_k A_k of what the clients sent is the product of the server's row."""
    strategy, start = strategies.load(rule), random_rows(1, 1)[0]
    server = ServerState(round - 1, start)
    local = strategy.rule(server, plan_of(WEIGHTS, round))
    assert set(local.trained) - {"mag"} == {kind} == set(local.up) - {"mag"}
    rows = rows_of(start, (kind,))
    got = step(strategy, server, rows, WEIGHTS)
    for module, each in products(rows).items():
        want = torch.einsum("k,kij->ij", P, each)
        assert float((products(got.row[None])[module][0] - want).abs().max()) <= 1e-6
    frozen = LAYOUT.mask([k for k in ("A", "B") if k != kind])
    assert torch.equal(got.row[frozen], start[frozen])
    assert relative_error(rows, P.tolist(), [2.0] * M, 2.0, LAYOUT) <= 1e-12


def test_rolora_can_begin_with_a() -> None:
    rule = strategies.load("rolora", {"first": "A"})
    turns = [rule.rule(ServerState(0, random_rows(1, 1)[0]), plan_of(WEIGHTS, r)) for r in (1, 2)]
    assert [t.trained for t in turns] == [("A",), ("B", "mag")]
    assert turns[1].down == ("A",)


def test_fedsa_shares_a_and_keeps_b() -> None:
    """A is the mean, the server's B that of the start, and each client's B its own."""
    rule, start, memory = strategies.load("fedsa_lora"), random_rows(1, 1)[0], Kept()
    rows = rows_of(start, ("A", "B"))
    got = step(rule, ServerState(0, start), rows, WEIGHTS, memory=memory)
    a, b = LAYOUT.mask(("A",)), LAYOUT.mask(("B",))
    want = torch.einsum("k,kp->p", P, rows.double())
    assert float((got.row.double() - want)[a].abs().max()) <= 1e-6
    assert torch.equal(got.row[b], start[b])
    for client in range(M):
        kept = memory.read("row", client)
        assert kept is not None and torch.equal(kept[b], rows[client][b])


def test_a_failed_client_keeps_its_b() -> None:
    rule, start, memory = strategies.load("fedsa_lora"), random_rows(1, 1)[0], Kept()
    rows = rows_of(start, ("A", "B"))
    rows[2] = float("nan")
    plan = plan_of(WEIGHTS)
    ok = [c != 2 for c in range(M)]
    rule.aggregate(ServerState(0, start), plan, blocks(start, rows, ok), reduce(), memory)
    memory.commit()
    assert memory.clients("row") == [0, 1, 3, 4, 5]


def test_clients_do_not_leak(settings: Callable[..., Config]) -> None:
    """The public defect: clients that come one after another inherit the last one's B. One slot
    and four slots, two rounds of everybody: the same rows, and none of them another's."""
    kept = []
    for slots in (1, 4):
        config = settings(run__name=f"slots{slots}", server__strategy="fedsa_lora",
                          server__rounds=2, server__fraction=1.0, train__slots=slots,
                          evaluate__limit=0)  # fmt: skip
        folder = simulate.run(config)
        saved = load_checkpoint(folder / "checkpoint")
        assert saved is not None
        memory = DiskMemory(folder / "clients", len(saved.server.row), saved.clients)
        rows = [memory.read("row", client) for client in range(8)]
        assert all(row is not None for row in rows)
        kept.append(torch.stack([row for row in rows if row is not None]))
    moved = (kept[0] - kept[0].mean(0)).norm(dim=1)
    assert float((kept[0] - kept[1]).norm(dim=1).max()) <= 1e-2 * float(moved.min())


def test_half_of_the_traffic(settings: Callable[..., Config]) -> None:
    """FFA sends B both ways; FedSA sends A: together what FedIT sends."""
    sent = {}
    for rule in ("fedit", "ffa_lora", "fedsa_lora"):
        config = settings(run__name=rule, server__strategy=rule, server__rounds=1,
                          evaluate__limit=0)  # fmt: skip
        (line,) = RunFolder(simulate.run(config)).read("rounds.jsonl")
        assert line["down_mib"] == line["up_mib"]
        sent[rule] = line["up_mib"]
    assert sent["ffa_lora"] + sent["fedsa_lora"] == pytest.approx(sent["fedit"], rel=1e-12)


def test_its_clients_are_evaluated(settings: Callable[..., Config]) -> None:
    folder = simulate.run(settings(server__strategy="fedsa_lora", server__rounds=1,
                                   evaluate__limit=2, evaluate__clients=3))  # fmt: skip
    names = {line["adapter"] for line in RunFolder(folder).read("eval/newswire.jsonl")}
    assert len([n for n in names if n.startswith("client ")]) == 3 and "global" in names


def test_a_clients_model_is_the_servers_a_and_its_own_b(settings: Callable[..., Config]) -> None:
    config, kept = settings(server__strategy="fedsa_lora"), Kept()
    world = load_world(config, 1)
    layout = world.base.layout
    server = ServerState(1, torch.full((layout.size,), 2.0))
    kept.write("row", 5, torch.full((layout.size,), 3.0))
    kept.commit()
    (adapter,) = world.subject(server, kept, ("B",), 4).adapters
    assert adapter.name == "client 5" and adapter.row is not None
    assert (adapter.row[layout.mask(("A",))] == 2).all()
    assert (adapter.row[layout.mask(("B",))] == 3).all()


@pytest.mark.parametrize("scales", [[2.0] * M, [2.0, 1.0, 0.5, 2.0, 4.0, 1.0]])
def test_the_error_against_dense_products(scales: list[float]) -> None:
    rows, s = random_rows(3, M), torch.tensor(scales, dtype=torch.float64)
    mean = torch.einsum("k,kp->p", P, rows.double())[None]
    whole = error = torch.zeros((), dtype=torch.float64)
    for module, each in products(rows).items():
        exact = torch.einsum("k,kij->ij", P * s, each)
        apart = 2.0 * products(mean)[module][0]
        whole, error = whole + exact.square().sum(), error + (exact - apart).square().sum()
    got = relative_error(rows, P.tolist(), scales, 2.0, LAYOUT)
    assert got == pytest.approx(float((error / whole).sqrt()), rel=1e-9)


def test_the_error_by_hand() -> None:
    """A and B all 1, and all 3, p = 1/2: B A is R and 9 R, their mean 5 R, the product of the
    means 4 R: a fifth is missed. Equal clients miss nothing."""
    used = LAYOUT.mask(("A", "B"))
    rows = torch.stack([torch.where(used, value, 0.0) for value in (1.0, 3.0)])
    assert relative_error(rows, [0.5, 0.5], [2.0, 2.0], 2.0, LAYOUT) == pytest.approx(0.2)
    assert relative_error(rows[[0, 0]], [0.5, 0.5], [2.0, 2.0], 2.0, LAYOUT) == 0.0
