"""Frozen weights held in 8 or 4 bits.

    fp4, nf4: bitsandbytes' codes in blocks of 64, with `double` their scales in 8 bits as well
    int8:     w = code absmax / 127, one absmax a row

Weights are dequantised explicitly (`room.py`). bitsandbytes' own product is not used: on the CPU it
differs from that of these values by 2e-2.

Papers: Dettmers et al., QLoRA, arXiv:2305.14314 and LLM.int8(), arXiv:2208.07339.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.linears import linears
from fedsim.memory import free_bytes
from fedsim.room import Room, replace

if TYPE_CHECKING:
    from fedsim.config import Config


class Packed:
    """A weight (O, I).

    Attributes:
        shape: (O, I). dtype: what it is made whole in.
        error: ||held - w|| / ||w||.
    """

    def __init__(self, weight: Tensor, kind: str, double: bool) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        weight = weight.contiguous()
        if kind == "int8":
            self._scale = weight.float().abs().amax(1, keepdim=True) / 127
            self._codes = (weight.float() / self._scale.clamp(min=1e-30)).round().to(torch.int8)
            self._state = None
        else:
            import bitsandbytes.functional as bnb

            # Flat: with AVX-512 bitsandbytes 0.50 is wrong where a block ends amid a row.
            self._codes, self._state = bnb.quantize_4bit(
                weight.view(1, -1), quant_type=kind, compress_statistics=double
            )
        whole = torch.empty_like(weight)
        self.into(whole)
        size = weight.float().norm().clamp(min=1e-30)
        self.error = float((whole.float() - weight.float()).norm() / size)

    def into(self, out: Tensor) -> None:
        """Write the weight to (O, I)."""
        if self._state is None:
            torch.mul(self._codes, self._scale, out=out)
            return
        import bitsandbytes.functional as bnb

        if out.is_cuda:
            bnb.dequantize_4bit(self._codes, self._state, out=out.view(1, -1))
        else:  # bitsandbytes 0.50 writes to a given tensor on GPUs only
            out.view(1, -1).copy_(bnb.dequantize_4bit(self._codes, self._state))

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        if self._state is None:
            return self._codes.nbytes + self._scale.nbytes
        scales = [self._state.absmax]
        if self._state.nested:
            scales.append(self._state.state2.absmax)
        return int(self._codes.nbytes + sum(s.nbytes for s in scales))


def bytes_each(config: Config) -> float:
    """Of a weight in the linears of a quantised base that is held in its bits."""
    if config.model.quantisation == "int8":
        return 1.0
    return 0.5 + (1 if config.model.double_quantisation else 4) / 64


def holds(numbers: int, config: Config, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a quantised base is held in its bits: as configured, or, with `auto`, where it would
    else take more than half of the memory that is free. Whole weights are faster: an evaluation
    that writes token by token would make all of them whole for every token.

    Args:
        numbers: weights of the base.
    """
    if config.model.quantisation == "none" or config.model.hold != "auto":
        return config.model.quantisation != "none" and config.model.hold == "packed"
    return numbers * dtype.itemsize > free_bytes(device) // 2


def quantise(
    model: nn.Module, kind: str, double: bool, dtype: torch.dtype, device: torch.device,
    *, pack: bool,
) -> dict[str, float]:  # fmt: skip
    """Quantise every linear but the head, in place, and move all parameters to dtype and device.

    Args:
        pack: hold the codes; else weights with their values.

    Returns:
        Relative error by module.
    """
    if kind == "int8" and double:
        raise ConfigError(
            "model.double_quantisation", got=True, expected="false with int8, whose scales are few",
            remedy="Leave it out.",
        )  # fmt: skip
    room, errors = Room(), {}
    stored = next(iter(linears(model).values())).weight.dtype
    for name, linear in linears(model).items():
        packed = Packed(linear.weight.data.to(device, dtype), kind, double)
        errors[name] = packed.error
        if not pack:
            whole = torch.empty(packed.shape, dtype=dtype, device=device)
            packed.into(whole)
            linear.weight.data = whole
            continue
        replace(model, name, packed, room)
    for p in model.parameters():  # buffers, as rotary frequencies, keep their own precision
        if p.dtype == stored:  # and so does what transformers loads in fp32 always
            p.data = p.data.to(device, dtype)
    model.to(device)
    return errors
