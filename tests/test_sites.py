"""Sites: the linears of one input computed together, and the rows behind the last attention.

Proved here: which linears share a site; that a member computes what its linear did, in any order of
calls, and keeps nothing; no gradient below the first adapter; label rows give the gradients of all
rows, a row that is taken twice as well; a site's operation under torch.compile. About 5 seconds on
one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.fused import put_rows, take_rows
from fedsim.lora import Pass, Site, SiteMember
from fedsim_kernels import dispatch
from fedsim_kernels.segments import Segments
from tests.lab import CLIENTS, GRADIENT, Lab, worst

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("architecture", "members"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"],
                   ["down_proj"]]),
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
    ],
)  # fmt: skip
def test_linears_of_one_input_are_a_site(
    lab: Callable[..., Lab], architecture: str, members: list[list[str]]
) -> None:
    base = lab(architecture).base
    names = [[m.name.rpartition(".")[2] for m in site.members] for site in base.sites]
    assert names == members * 2
    late = [site for site in base.sites if site.late]
    assert late == base.sites[-2:]  # the MLP of the last layer
    assert [list(site) for site in base.layout.sites] == [
        [m.name for m in site.members] for site in base.sites
    ]


def test_only_targets_have_adapters(lab: Callable[..., Lab]) -> None:
    """k lies between q and v in one product; o and the MLP are sites without adapters."""
    base = lab(adapter__targets=["q_proj", "v_proj"]).base
    first, second = base.sites[0], base.sites[1]
    assert [m.number >= 0 for m in first.members] == [True, False, True]
    assert (first.columns, first.widths) == ([0, 48], [32, 16])
    assert second.index is None and not second.adapted
    assert len(base.layout.sites) == 2 and len(base.layout.modules) == 4


@pytest.mark.parametrize("biased", [(), (0,), (0, 1, 2)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,)])
def test_a_member_computes_what_its_linear_did(order: Sequence[int], biased: Sequence[int]) -> None:
    """In any order, for some or for all; then nothing of the input is kept once all were asked."""
    torch.manual_seed(0)
    linears = [nn.Linear(8, n, bias=i in biased) for i, n in enumerate((5, 3, 4))]
    want = [nn.Linear(8, len(p.weight), bias=p.bias is not None) for p in linears]
    for copy, original in zip(want, linears, strict=True):
        copy.load_state_dict(original.state_dict())
    site = Site({str(i): p for i, p in enumerate(linears)}, {})
    members = [SiteMember(site, i, p) for i, p in enumerate(linears)]
    for member, linear in zip(members, want, strict=True):
        assert torch.equal(member.weight, linear.weight)
        assert (
            member.weight.untyped_storage().data_ptr() == site.weight.untyped_storage().data_ptr()
        )
    for x in torch.randn(2, 1, 6, 8).unbind():
        for i in order:
            torch.testing.assert_close(members[i](x), want[i](x))
    assert ("given" in site.__dict__) == (len(order) < 3)
    one, other = torch.randn(2, 1, 6, 8).unbind()
    members[0](one)
    torch.testing.assert_close(members[2](other), want[2](other))


@pytest.mark.parametrize("recompute", [False, True])
def test_no_gradient_below_the_first_adapter(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    """Of o and q in the second layer: o's dx is needed, q's is not, nor any of the first layer."""
    names = [f"model.layers.1.self_attn.{n}_proj" for n in "qo"]
    one = lab(adapter__targets=names, train__recompute=recompute)
    needs: list[bool] = []
    for layer in one.base.decoder.layers:
        layer.register_forward_hook(lambda _, args, out: needs.append(out.requires_grad))
    given: list[bool] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.fedsim.grouped_lora_backward.default:
                given.append(args[8] is not None)
            return func(*args, **(kwargs or {}))

    with Spy():
        one.gradients(range(CLIENTS))
    assert needs[:2] == [False, True]
    assert given == [True, False]


# Label rows


def learnt(lab: Lab, rows: Tensor, repeats: int | None) -> tuple[Tensor, Tensor]:
    """Hidden states of some rows and the gradients of two slots, from all rows or (`repeats`) with
    the rows as label rows of the pass."""
    base, lengths = lab.base, [9, 7]
    grads = torch.zeros(2, base.layout.size)
    split = int((rows < lengths[0]).sum())
    labels = Segments.build([split, len(rows) - split], [0, 1])
    work = Pass(
        Segments.build(lengths, [0, 1]), base.layout.site_views(lab.start.repeat(2, 1)),
        base.layout.site_views(grads), torch.tensor([2.0, 0.5]), base.anchor,
        label_rows=rows if repeats else None, label_segments=labels if repeats else None,
        label_repeats=repeats or 1,
    )  # fmt: skip
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = base.hidden(torch.arange(16) * 7 % 383, positions, work)
    hidden = hidden if repeats else hidden[rows]
    weight = torch.linspace(-1, 2, hidden.numel()).view(hidden.shape)
    (hidden * weight).sum().backward()
    return hidden.detach(), grads


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_label_rows_give_the_gradients_of_all_rows(
    lab: Callable[..., Lab], implementation: str, architecture: str
) -> None:
    """A row that several labels follow is taken as often: where a prefix ends, for example."""
    one = lab(architecture)
    rows = torch.tensor([3, 5, 5, 5, 8, 9, 9, 15])
    (want, grads), (got, ours) = learnt(one, rows, None), learnt(one, rows, 3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert worst(one.base.layout, ours, grads) <= GRADIENT


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_put_back_where_they_were_taken(seed: int) -> None:
    """In as many launches as a row is taken, as on a GPU, and in one: the sums, and the same bits.
    What is taken more often than that is left out: padding, whose gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 9, (24,), generator=generator)
    g = torch.randn(24, 5, generator=generator)
    most = int(torch.bincount(rows).max())
    want = torch.zeros(9, 5).index_add_(0, rows, g)
    for repeats in (1, most, most + 2):
        assert torch.equal(put_rows(g, rows, 9, repeats), want)
    firsts = torch.tensor([j not in rows[:i].tolist() or (rows[:i] == j).sum() < 2
                           for i, j in enumerate(rows.tolist())])  # fmt: skip
    some = torch.zeros(9, 5).index_add_(0, rows[firsts], g[firsts])
    assert torch.equal(put_rows(g, rows, 9, 2), some)
    x = torch.randn(9, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows, most), (x,))


# torch.compile


@pytest.mark.parametrize("needs", [True, False])
def test_a_compiled_site_gives_the_same_gradients(implementation: str, needs: bool) -> None:
    """One graph, arenas changed in its backward, whether or not the input needs a gradient."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(*shape, generator=generator)
        for shape in ((9, 8), (12, 8), (12,), (2, 4, 8), (2, 10, 2))
    )
    scale, anchor = torch.tensor([0.5, 2.0]), torch.zeros((), requires_grad=True)
    tables = Segments.build([4, 5], [0, 1]).tables(CPU)

    def site(x: Tensor, grad_a: Tensor, grad_b: Tensor) -> Tensor:
        y, _ = torch.ops.fedsim.lora_linear(
            torch.tanh(x), weight, bias, anchor, a, b, grad_a, grad_b, scale, tables, [0, 8],
            [6, 4], 0,
        )  # fmt: skip
        return torch.sin(y)

    def run(f: Callable[..., Tensor]) -> list[Tensor | None]:
        arenas, leaf = [torch.ones_like(a), torch.ones_like(b)], x.clone().requires_grad_(needs)
        y = f(leaf, *arenas)
        y.square().sum().backward()
        return [y.detach(), *arenas, leaf.grad]

    torch._dynamo.reset()
    compiled = torch.compile(site, backend="aot_eager", fullgraph=True)
    for got, want in zip(run(compiled), run(site), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)
    with dispatch.use("reference"):
        assert not any(torch.equal(g, torch.ones_like(g)) for g in run(site)[1:3])
