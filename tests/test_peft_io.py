"""What is exported is what was trained: stock `peft` loads it and gives the packed logits.

LoRA, rsLoRA and DoRA, for separate and for fused projections, with all linears, some, and PEFT's
default targets: an adapter with random factors goes through `export`, `PeftModel.from_pretrained`,
its `save_pretrained` and `load`: PEFT's own names, logits to rounding, tensors and row to the bit.
Adapters that do not fit are errors that name the tensor, and an export that is cut short leaves
nothing that looks like one. About 4 s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsim import model, peft_io, weights
from fedsim.adapters import initial_row
from fedsim.config import Adapter, Config
from fedsim.core import AdapterLayout
from fedsim.errors import ModelError, RunError
from fedsim.lora import Pass
from fedsim_kernels.segments import Segments

LAYOUT = AdapterLayout.build({"a.q_proj": (7, 5), "a.v_proj": (7, 3)}, 4)
ADAPTER = Adapter(rank=4, alpha=8.0)


def random_row(layout: AdapterLayout, seed: int = 1) -> Tensor:
    """Every factor random, every gap zero."""
    row, generator = torch.zeros(1, layout.size), torch.Generator().manual_seed(seed)
    for piece in layout.pieces:
        layout.view(row, piece).normal_(generator=generator)
    return row[0] * 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "targets", "adapter"),
    [
        ("llama", ["all-linear"], {}), ("phi3", ["all-linear"], {}), ("llama", [], {}),
        ("llama", ["all-linear"], {"rslora": True}), ("llama", ["all-linear"], {"dora": True}),
        ("qwen2", ["v_proj", "q_proj"], {"dora": True, "rslora": True, "dropout": 0.3}),
        ("phi3", ["all-linear"], {"dora": True, "ranks": (2, 4)}),
        ("gemma2", ["down_proj", "model.layers.1.self_attn.k_proj"], {"ranks": (1, 4, 4)}),
    ],
)  # fmt: skip
def test_stock_peft_computes_what_we_do(
    settings: Callable[..., Config], tmp_path: Path, architecture: str, targets: list[str],
    adapter: dict[str, Any],
) -> None:  # fmt: skip
    """Its logits, on the modules that were trained, with the names that it writes itself."""
    from peft import PeftModel

    changes = {f"adapter__{key}": value for key, value in adapter.items()}
    config = settings(architecture, adapter__targets=targets, **changes)
    found = weights.find(config.model.name)
    chosen = config.adapter.targets or peft_io.default_targets(weights.model_type(found))
    base = model.load(found, config, torch.device("cpu"), chosen)
    row = random_row(base.layout)
    for piece in base.layout.pieces:
        if piece.kind == "mag":  # of the weights' own length, give or take a half
            base.layout.view(row[None], piece).add_(1)
            base.layout.view(row[None], piece).mul_(
                base.layout.view(base.magnitudes(row.clone())[None], piece)
            )
    peft_io.export(tmp_path / "adapter", row, base.layout, config.adapter, found.name)
    assert torch.equal(peft_io.load(tmp_path / "adapter", base.layout), row)

    lengths = [9, 4]
    ids = torch.randint(0, 384, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in lengths])
    scale = torch.tensor([config.adapter.scale()])
    segments = Segments.build(lengths, [0, 0])
    work = Pass(segments, base.layout.site_views(row[None]), None, scale, base.anchor)
    with torch.no_grad():
        ours = base.logits(base.hidden(ids, positions, work))
        stock = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).eval()
        plain = torch.cat([stock(part[None]).logits[0] for part in ids.split(lengths)])
        loaded = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
        theirs = torch.cat([loaded(part[None]).logits[0] for part in ids.split(lengths)])
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (plain - theirs).abs().max() > 1e-2 * theirs.abs().max()
    with_adapter = {n for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert with_adapter == set(base.layout.modules)
    loaded.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert torch.equal(peft_io.load(tmp_path / "theirs", base.layout), row)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == found.name


def test_it_comes_back_to_the_bit(tmp_path: Path) -> None:
    row = random_row(LAYOUT)
    peft_io.export(tmp_path / "new" / "a", row, LAYOUT, ADAPTER, "base")
    assert torch.equal(peft_io.load(tmp_path / "new" / "a", LAYOUT), row)
    other = random_row(LAYOUT, seed=2)
    peft_io.export(tmp_path / "new" / "a", other, LAYOUT, ADAPTER, "base")  # replaces it
    assert torch.equal(peft_io.load(tmp_path / "new" / "a", LAYOUT), other)


def test_a_fresh_adapter_changes_nothing() -> None:
    row = initial_row(LAYOUT, 7)[None]
    for a, b in LAYOUT.factors(row).values():
        assert not b.any() and 0 < a.abs().max() <= 7**-0.5


def test_a_smaller_rank_fills_the_first_rows(tmp_path: Path) -> None:
    small = AdapterLayout.build({"a.q_proj": (7, 5), "a.v_proj": (7, 3)}, 2)
    row = random_row(small)
    peft_io.export(tmp_path / "a", row, small, Adapter(rank=2), "base")
    got = LAYOUT.factors(peft_io.load(tmp_path / "a", LAYOUT)[None])
    for module, (a, b) in small.factors(row[None]).items():
        assert torch.equal(got[module][0][:, :2], a) and not got[module][0][:, 2:].any()
        assert torch.equal(got[module][1][..., :2], b) and not got[module][1][..., 2:].any()


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    """Magnitudes for LoRA, or another module: leaving them out would compute something else."""
    whole = AdapterLayout.build({"a.q_proj": (7, 5), "a.v_proj": (7, 3)}, 4, dora=True)
    peft_io.export(tmp_path / "a", random_row(whole), whole, ADAPTER, "base")
    with pytest.raises(ModelError, match=r"lora_magnitude_vector: got 2; expected only"):
        peft_io.load(tmp_path / "a", LAYOUT)
    peft_io.export(tmp_path / "b", random_row(LAYOUT), LAYOUT, ADAPTER, "base")
    with pytest.raises(
        ModelError, match=r"v_proj\.lora_A.*: got 2; expected only factors of linears"
    ):
        peft_io.load(tmp_path / "b", AdapterLayout.build({"a.q_proj": (7, 5)}, 4))
    with pytest.raises(ModelError, match=r"q_proj: got 'rank 4, LoRA'; expected .*DoRA"):
        peft_io.load(tmp_path / "b", whole)
    more = AdapterLayout.build({"a.q_proj": (7, 5), "a.v_proj": (7, 3), "a.k_proj": (7, 3)}, 4)
    with pytest.raises(ModelError, match=r"factors of a\.k_proj; expected some for every module"):
        peft_io.load(tmp_path / "b", more)


NAME = "base_model.model.a.v_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("A", lambda t: t[:, :-1]), ("B", lambda t: t[:-1]),
        ("A", lambda t: torch.cat([t, t])), ("B", lambda t: torch.cat([t, t], 1)),
        ("A", lambda t: t[0]), ("B", lambda t: None),
    ],
    ids=["in", "out", "rank of A", "rank of B", "axes", "missing"],
)  # fmt: skip
def test_an_adapter_that_does_not_fit(
    tmp_path: Path, kind: str, change: Callable[[Tensor], Tensor | None]
) -> None:
    peft_io.export(tmp_path / "a", random_row(LAYOUT), LAYOUT, ADAPTER, "base")
    file, name = tmp_path / "a" / "adapter_model.safetensors", NAME.format(kind)
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, file)
    with pytest.raises(
        ModelError, match=rf"{NAME.format('A')} and B.*expected \[\(4, 7\), \(3, 4\)\], as r and"
    ):
        peft_io.load(tmp_path / "a", LAYOUT)


def test_factors_of_another_rank_do_not_mix(tmp_path: Path) -> None:
    """A of one rank with B of another is no adapter, though each would fit."""
    peft_io.export(tmp_path / "a", random_row(LAYOUT), LAYOUT, ADAPTER, "base")
    file, name = tmp_path / "a" / "adapter_model.safetensors", NAME.format("A")
    tensors = load_file(file)
    tensors[name] = tensors[name][:2].contiguous()
    save_file(tensors, file)
    with pytest.raises(ModelError, match="v_proj"):
        peft_io.load(tmp_path / "a", LAYOUT)


@pytest.mark.parametrize("what", ["adapter_config.json", "adapter_model.safetensors", None])
def test_an_adapter_that_is_not_there(tmp_path: Path, what: str | None) -> None:
    if what is not None:
        peft_io.export(tmp_path / "a", random_row(LAYOUT), LAYOUT, ADAPTER, "base")
        (tmp_path / "a" / what).unlink()
    with pytest.raises(ModelError, match=str(tmp_path / "a")):
        peft_io.load(tmp_path / "a", LAYOUT)


def test_default_targets_are_pefts() -> None:
    assert set(peft_io.default_targets("llama")) == {"q_proj", "v_proj"}
    assert set(peft_io.default_targets("mistral")) == {"q_proj", "v_proj"}
    with pytest.raises(ModelError, match=r"got 'novel'.*module names.*all-linear"):
        peft_io.default_targets("novel")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("moment", ["mkdir", "save", "fsync", "replace"])
def test_an_export_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, there: bool
) -> None:
    """Nothing runs after a kill, so a KeyboardInterrupt that nobody catches stands for it."""
    folder, row = tmp_path / "round_00002", random_row(LAYOUT)
    if there:
        peft_io.export(folder, row, LAYOUT, ADAPTER, "base")

    def killed(*args: Any, **_: Any) -> None:
        if moment == "save":
            Path(args[0]).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        owner = peft_io if moment == "save" else os
        patched.setattr(owner, "write_atomic" if moment == "save" else moment, killed)
        with pytest.raises(KeyboardInterrupt):
            peft_io.export(folder, row * 2, LAYOUT, ADAPTER, "base")
    if folder.exists():
        assert torch.equal(peft_io.load(folder, LAYOUT), row)
    peft_io.export(folder, row * 2, LAYOUT, ADAPTER, "base")
    assert [p.name for p in tmp_path.iterdir()] == ["round_00002"]
    assert torch.equal(peft_io.load(folder, LAYOUT), row * 2)


def test_a_disk_error_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "adapters").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"adapters/round_1 cannot be written"):
        peft_io.export(tmp_path / "adapters" / "round_1", random_row(LAYOUT), LAYOUT, ADAPTER, "b")
