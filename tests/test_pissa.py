"""PiSSA starts as the base model itself, trains, and leaves as an adapter of twice the rank.

Against stock PEFT: its own `pissa` initialisation takes the same part from each weight, and it
loads an export over the untouched base. About 6 s.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedsim import pissa, simulate
from fedsim.checkpoint import load_checkpoint
from fedsim.config import Config
from fedsim.world import load_world
from tests.lab import Lab, logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
IDS = torch.arange(7, 30)


def test_the_first_model_is_the_base(lab: Callable[..., Lab]) -> None:
    one = lab()
    scale, bare = one.config.adapter.scale(), torch.zeros_like(one.start)
    plain = logits(one.base, bare, scale, IDS)
    row, taken = pissa.split(one.base, one.start, scale)
    one.base.correction.apply(taken)
    less = logits(one.base, bare, scale, IDS)
    assert float((less - plain).abs().max()) > 1e-2
    assert float((logits(one.base, row, scale, IDS) - plain).abs().max()) <= 1e-5 * float(
        plain.abs().max()
    )


def test_it_takes_what_peft_takes(lab: Callable[..., Lab]) -> None:
    one = lab()
    adapter = one.config.adapter
    row, taken = pissa.split(one.base, one.start, adapter.scale())
    weights = {m.name: site.weight[m.column : m.column + m.width]
               for site in one.base.sites for m in site.members}  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(one.config.model.name, dtype=torch.float32)
    theirs = get_peft_model(stock, LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(one.base.layout.modules),
        init_lora_weights="pissa",
    ))  # fmt: skip
    modules = dict(theirs.base_model.model.named_modules())
    for name, (a, b) in one.base.layout.factors(row[None]).items():
        module = modules[name]
        want = (module.lora_B["default"].weight @ module.lora_A["default"].weight).detach()
        # PEFT decomposes in fp32: its subspace is off by rounding over the gap between the last
        # singular value that it takes and the first that it leaves.
        s = torch.linalg.svdvals(weights[name].double())
        bound = float(10 * 2.0**-24 * s[0] ** 2 / (s[adapter.rank - 1] - s[adapter.rank]))
        assert float((b[0] @ a[0] - want).abs().max()) <= bound <= 1e-3 * float(want.abs().max())
        gone = taken[f"{name}.B"] @ taken[f"{name}.A"]
        assert float((gone + adapter.scale() * want).abs().max()) <= adapter.scale() * bound


@pytest.mark.parametrize("rule", ["fedavg"])
def test_an_export_over_the_untouched_base(settings: Callable[..., Config], rule: str) -> None:
    config = settings(adapter__init="pissa", server__strategy=rule, evaluate__limit=2)
    folder = simulate.run(config)
    path = folder / "adapters" / "round_00003"
    ranks = json.loads((path / "adapter_config.json").read_text())["rank_pattern"]
    assert set(ranks.values()) == {2 * config.adapter.rank}
    stock = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    with torch.no_grad():
        plain = stock(IDS[None]).logits[0]
        want = PeftModel.from_pretrained(stock, str(path)).eval()(IDS[None]).logits[0]
    assert float((want - plain).abs().max()) > 1e-3
    saved = load_checkpoint(folder / "checkpoint")
    assert saved is not None
    world = load_world(config, 1)
    world.base.correction.apply(saved.server.base)
    got = logits(world.base, saved.server.row, config.adapter.scale(), IDS)
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
