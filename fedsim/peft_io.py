"""Adapters in PEFT's format: what stock `peft` loads is exactly what was trained."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from fedsim import adapter_file
from fedsim.adapter_file import Factors
from fedsim.checkpoint import write_atomic, write_failed
from fedsim.config import Adapter
from fedsim.core import AdapterLayout, Piece
from fedsim.correction import factors_of
from fedsim.errors import ModelError
from fedsim.linears import linears


def default_targets(model_type: str) -> tuple[str, ...]:
    """PEFT's default LoRA targets for an architecture. Raises ModelError when it has none."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    if model_type not in known:
        raise ModelError(
            "adapter.targets is empty, and PEFT has no default for model type",
            got=model_type,
            expected="module names",
            remedy='Set adapter.targets, for example ["all-linear"].',
        )
    return tuple(known[model_type])


def export(
    folder: Path, row: Tensor, layout: AdapterLayout, adapter: Adapter, base_model: str,
    base: Mapping[str, Tensor] | None = None, over: str | None = None,
) -> None:  # fmt: skip
    """Write one row as adapter_config.json + adapter_model.safetensors, whole or not at all.

    Args:
        row: (P,) fp32, of rank adapter.rank.
        base_model: what `peft` should name as the base.
        base: what a rule has added to the frozen weights (`ServerState.base`). It goes into the
            adapter, whose rank at those modules is larger by that of the correction.
        over: sha256 of the weights that it was trained over, kept in the file's metadata.
    """
    tensors, ranks, alphas = {}, {}, {}
    for piece in layout.pieces:
        values = layout.view(row[None].cpu(), piece)[0].contiguous()
        tensors[_key(piece)] = values[0] if piece.kind == "mag" else values
    for module in layout.modules:
        if (more := factors_of(base or {}, module)) is None:
            continue
        a, b = (_key(layout.piece(module, kind)) for kind in ("A", "B"))
        tensors[a] = torch.cat([tensors[a], more[0].cpu()])
        tensors[b] = torch.cat([tensors[b], more[1].cpu() / adapter.scale()], 1)
        rank = len(tensors[a])
        ranks[module], alphas[module] = rank, adapter.alpha_for(rank)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout,
        "bias": "none", "target_modules": list(layout.modules), "inference_mode": True,
        "fan_in_fan_out": False, "use_rslora": adapter.rslora, "use_dora": adapter.dora,
        "modules_to_save": None, "rank_pattern": ranks, "alpha_pattern": alphas,
    }  # fmt: skip
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        noted = {"format": "pt", **({adapter_file.OVER: over} if over else {})}
        write_atomic(partial / adapter_file.WEIGHTS, _ordered(save(tensors, metadata=noted)))
        shutil.rmtree(folder, ignore_errors=True)  # a killed round may have left its own
        partial.replace(folder)
    except OSError as failure:
        raise write_failed(folder, failure) from failure
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _key(piece: Piece) -> str:
    return adapter_file.key(piece.module, piece.kind)


def _ordered(content: bytes) -> bytes:
    """The same safetensors file with its header in one order: theirs has the metadata in a random
    one, and the same run would leave another file each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    head = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + content[end:]


def load(folder: Path, layout: AdapterLayout, onto: Tensor | None = None) -> Tensor:
    """Read an adapter into a row (P,) fp32; a lower rank leaves its tail zero.

    Args:
        onto: (P,) what modules have that the adapter leaves alone; without it, all must have some.

    Raises:
        ModelError: it is not computed (`adapter_file`), or does not fit the layout.
    """
    return _row(folder, layout, onto, _factors(folder, layout))


def load_scaled(folder: Path, layout: AdapterLayout, onto: Tensor) -> tuple[Tensor, float]:
    """The row (P,) of `load` and the scale that the adapter's own configuration gives it.

    A module whose rank or alpha is of a pattern has its own scale: it goes into that module's B.
    """
    found = _factors(folder, layout)
    row = _row(folder, layout, onto, found)
    usual = next(iter(found.values())).scale
    for module, own in found.items():
        if own.scale != usual:
            layout.view(row[None], layout.piece(module, "B")).mul_(own.scale / usual)
    return row, usual


def _factors(folder: Path, layout: AdapterLayout) -> dict[str, Factors]:
    shapes = {m: (layout.piece(m, "A").shape[1], layout.piece(m, "B").shape[0])
              for m in layout.modules}  # fmt: skip
    return adapter_file.factors(folder, shapes)


def _row(
    folder: Path, layout: AdapterLayout, onto: Tensor | None, found: Mapping[str, Factors]
) -> Tensor:
    row = torch.zeros(1, layout.size) if onto is None else onto.clone()[None]
    if onto is None and (bare := [m for m in layout.modules if m not in found]):
        raise ModelError(
            f"{folder}: factors of {bare[0]}", got=None, expected="some for every module",
            remedy="Set adapter.targets as it was when the adapter was made.",
        )  # fmt: skip
    for module, own in found.items():
        r, dora = len(own.a), layout.has(module, "mag")
        if r > layout.rank or dora != (own.mag is not None):
            raise ModelError(
                f"{folder}: {module}", got=f"rank {r}, {'LoRA' if own.mag is None else 'DoRA'}",
                expected=f"rank {layout.rank} or lower, {'DoRA' if dora else 'LoRA'}",
                remedy="Set adapter.rank and adapter.dora as they were when it was made.",
            )  # fmt: skip
        layout.view(row, layout.piece(module, "A"))[0, :r].copy_(own.a)
        layout.view(row, layout.piece(module, "B"))[0, :, :r].copy_(own.b)
        if own.mag is not None:
            layout.view(row, layout.piece(module, "mag"))[0, 0].copy_(own.mag)
    return row[0]


def write_plain(folder: Path, found: Mapping[str, Factors]) -> None:
    """Write factors as an adapter of one rank and scale 1, which every reader takes alike.

    Lower ranks are filled with zeros, and each module's scale goes into its B. Without DoRA.
    """
    rank = max(len(own.a) for own in found.values())
    tensors: dict[str, Tensor] = {}
    for module, own in found.items():
        more = rank - len(own.a)
        a, b = F.pad(own.a, (0, 0, 0, more)), F.pad(own.b * own.scale, (0, more))
        tensors |= {adapter_file.key(module, "A"): a.contiguous(),
                    adapter_file.key(module, "B"): b.contiguous()}  # fmt: skip
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
              "target_modules": list(found), "inference_mode": True}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / adapter_file.CONFIG).write_text(json.dumps(config) + "\n")
    write_atomic(folder / adapter_file.WEIGHTS, save(tensors, metadata={"format": "pt"}))


def attach(model: Any, folder: Path) -> Any:
    """A stock model under an adapter; its `unload` gives the bare model back.

    Raises:
        ModelError: it is not computed (`adapter_file`), or not of this model.
    """
    from peft import PeftModel

    every = {n: (m.in_features, m.out_features) for n, m in linears(model).items()}
    adapter_file.factors(folder, every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft advises was decided there
        return PeftModel.from_pretrained(model, str(folder)).eval()
