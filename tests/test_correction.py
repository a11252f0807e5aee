"""What a rule adds to the base is in its weights, in every pass, in the export, and comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsim import correction, peft_io
from fedsim.correction import delta_of, factors_of
from fedsim.model import Base
from tests.lab import Lab, logits

IDS = torch.arange(7, 30)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def changes(base: Base) -> dict[str, Tensor]:
    """Factors of one module of a site of three, dense deltas of a wide and of a tall one."""
    make = torch.Generator().manual_seed(4)
    layer = "model.layers.0"
    shapes = {m.name: (m.width, s.weight.shape[1]) for s in base.sites for m in s.members}
    o, i = shapes[f"{layer}.self_attn.k_proj"]
    out = {f"{layer}.self_attn.k_proj.A": 0.1 * torch.randn(3, i, generator=make),
           f"{layer}.self_attn.k_proj.B": 0.1 * torch.randn(o, 3, generator=make)}  # fmt: skip
    for name in ("mlp.up_proj", "mlp.down_proj"):
        shape = shapes[f"{layer}.{name}"]
        out[f"{layer}.{name}.W"] = 0.05 * torch.randn(shape, generator=make)
    return out


@pytest.mark.parametrize("dora", [False, True])
def test_in_the_base_and_in_the_export(lab: Callable[..., Lab], tmp_path: Path, dora: bool) -> None:
    one = lab(adapter__targets=("all-linear",), adapter__dora=dora)
    base, adapter = one.base, one.config.adapter
    before = {s: s.weight.clone() for s in base.sites}
    plain, added = logits(base, one.start, adapter.scale(), IDS), changes(base)
    assert base.correction.apply(added) <= 1e-6
    changed = logits(base, one.start, adapter.scale(), IDS)
    assert float((changed - plain).abs().max()) > 1e-2

    peft_io.export(tmp_path / "a", one.start, base.layout, adapter, "tiny", added)
    stock = AutoModelForCausalLM.from_pretrained(one.config.model.name, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, str(tmp_path / "a")).eval()
    with torch.no_grad():
        want = stock(IDS[None]).logits[0]
    assert float((changed - want).abs().max()) <= 1e-5 * float(want.abs().max())

    base.correction.apply({})
    assert all(torch.equal(s.weight, w) for s, w in before.items())
    assert torch.equal(logits(base, one.start, adapter.scale(), IDS), plain)


def test_rounding_does_not_add_up(lab: Callable[..., Lab]) -> None:
    """The hundredth correction is rounded once: the same bits as if it had been the first."""
    base, added = lab(adapter__targets=("all-linear",)).base, {}
    for n in range(1, 101):
        added = {k: v * n / 100 for k, v in changes(base).items()}
        base.correction.apply(added)
    last = [s.weight.clone() for s in base.sites]
    base.correction.apply({})
    base.correction.apply(added)
    assert all(torch.equal(a, s.weight) for a, s in zip(last, base.sites, strict=True))


def test_an_unchanged_correction_is_not_formed_again(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = lab(adapter__targets=("all-linear",)).base
    added = changes(base)
    lost = base.correction.apply(added)
    formed: list[str] = []
    monkeypatch.setattr(correction, "delta_of", lambda base, module: formed.append(module))
    assert base.correction.apply(added) == lost > 0 and not formed


def test_factors_are_the_delta(lab: Callable[..., Lab]) -> None:
    base = lab(adapter__targets=("all-linear",)).base
    added = changes(base)
    for module in {k.rpartition(".")[0] for k in added}:
        pair, delta = factors_of(added, module), delta_of(added, module)
        assert pair is not None and delta is not None
        assert torch.equal(pair[1].double() @ pair[0].double(), delta)
    assert factors_of(added, "other") is None and delta_of(added, "other") is None
