"""The shared base: load, freeze, swap target linears, register packed attention, and check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.core import AdapterLayout
from fedsim.errors import ModelError, nearest
from fedsim.lora import MultiLoraLinear, Pass
from fedsim.weights import Weights
from fedsim_kernels.linear_xent import head_logits, linear_xent_ref
from fedsim_kernels.packed_attention import packed_attention_ref
from fedsim_kernels.segments import Segments

# Arguments that transformers hands to every attention function and that change nothing here:
# positions are already in q and k, no cache is kept, dropout is refused at load.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal",
             "num_items_in_batch", "position_embeddings"}  # fmt: skip
_DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout",
             "dropout")  # fmt: skip
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface -> packed attention; what it does not know raises."""
    unknown = {k: v for k, v in rest.items() if k not in _HARMLESS and v is not None}
    if segments is None or attention_mask is not None or unknown or dropout:
        raise ModelError(
            f"{type(module).__name__} called packed attention with "
            + (f"the unknown arguments {sorted(unknown)}" if unknown else
               f"dropout {dropout}" if dropout else
               "no segments" if segments is None else "a mask"),
            expected="packed segments and arguments that fedsim computes",
            remedy="This architecture is not supported.",
        )  # fmt: skip
    out = packed_attention_ref(
        query[0], key[0], value[0], segments,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window, softcap=softcap,
    )  # fmt: skip
    return out.transpose(0, 1)[None], None


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it in hardware, else fp32; fp32 under `flowertune`.

    On CPU that is AMX or AVX512-BF16: products of 2048 rows ran 2.4 times faster with the latter.
    """
    if config.run.protocol == "flowertune" or config.model.dtype == "float32":
        return torch.float32
    if config.model.dtype == "bfloat16" or device.type == "cuda":
        return torch.bfloat16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def target_linears(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linears that carry adapters, in the model's order.

    Args:
        targets: last parts of module names (`q_proj`), whole names, or `all-linear` for every
            linear but the head.

    Raises:
        ModelError: a target matches nothing, or something that is not a linear.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {n: m for n, m in model.named_modules()
               if isinstance(m, nn.Linear) and m is not head}  # fmt: skip
    if targets == ("all-linear",):
        return linears
    for target in targets:
        if not any(n == target or n.endswith(f".{target}") for n in linears):
            leaves = {n.rpartition(".")[2] for n in linears}
            raise ModelError(
                "adapter.targets", got=target, expected="the name of a linear of this model",
                remedy=nearest(target, leaves),
            )  # fmt: skip
    return {n: m for n, m in linears.items()
            if any(n == t or n.endswith(f".{t}") for t in targets)}  # fmt: skip


def check_config(hf: Any, max_length: int) -> None:
    """Refuse what would be computed differently from the stock model. Raises ModelError."""
    for name in _DROPOUTS:
        if getattr(hf, name, 0.0):
            raise ModelError(
                f"the model's {name}", got=getattr(hf, name), expected="0",
                remedy="Set it to 0 in the model's config.json.",
            )  # fmt: skip
    rope = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    kinds = [rope, *[v for v in rope.values() if isinstance(v, dict)]]
    whole = getattr(hf, "original_max_position_embeddings", None) or hf.max_position_embeddings
    for kind in kinds:
        # These choose their frequencies by the longest sequence of the whole pass, so one
        # client's long sequence would change another's numbers.
        limit = kind.get("original_max_position_embeddings") or whole
        if kind.get("rope_type") in ("longrope", "dynamic") and max_length > limit:
            raise ModelError(
                f"data.max_length with {kind['rope_type']} positions", got=max_length,
                expected=f"at most {limit}",
                remedy="Lower data.max_length: beyond it these positions depend on the pass.",
            )  # fmt: skip
    if getattr(hf, "logit_scale", None) not in (None, 1, 1.0):
        raise ModelError(
            "the model's logit_scale", got=hf.logit_scale, expected="none",
            remedy="This architecture is not supported.",
        )  # fmt: skip


def _round_trip(model: nn.Module, kind: str, double: bool) -> None:
    """4-bit quantise and dequantise every linear but the head, in place.

    The weights get exactly the values that a 4-bit base computes with; memory stays that of the
    computing dtype. bitsandbytes' own CPU product differs from these values by 2e-2.
    """
    import bitsandbytes.functional as bnb

    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            w = module.weight.data
            packed, state = bnb.quantize_4bit(
                w.contiguous(), quant_type=kind, compress_statistics=double
            )
            module.weight.data = bnb.dequantize_4bit(packed, state).to(w.dtype)


class Base:
    """A frozen causal LM that all clients share.

    Attributes:
        layout: where each target's factors lie in an adapter's row.
        precision: dtype and, when quantised, the 4-bit kind, for the record.
    """

    def __init__(self, model: Any, config: Config, targets: tuple[str, ...]) -> None:
        check_config(model.config, config.data.max_length)
        self.model = model.eval().requires_grad_(False)
        self.decoder = getattr(model, model.base_model_prefix)
        self.head = model.get_output_embeddings().weight
        self.device, self.dtype = self.head.device, self.head.dtype
        self.divide = float(getattr(model.config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        probe = torch.arange(8, device=self.device) * 7 % self.head.shape[0]
        with torch.no_grad():
            stock = model(probe[None], use_cache=False).logits[0].float()
        self._adapted: list[MultiLoraLinear] = []
        for number, (name, linear) in enumerate(target_linears(model, targets).items()):
            module = MultiLoraLinear(linear, name, number)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
            self._adapted.append(module)
        shapes = {m.name: (m.in_features, m.out_features) for m in self._adapted}
        self.layout = AdapterLayout.build(shapes, config.adapter.rank)
        model.set_attn_implementation("fedsim")
        self._check(probe, stock)
        if config.train.recompute:
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
            # Enabling also makes the embeddings require grad, which would bring back the
            # gradient below the first adapter.
            model.disable_input_require_grads()
            model.train()

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _check(self, probe: Tensor, stock: Tensor) -> None:
        """Eight tokens, as two packed sequences and one whole, must give the stock logits."""
        n = len(probe)
        with torch.no_grad():
            packed = torch.cat([probe, probe[:3]])
            positions = torch.cat([torch.arange(n), torch.arange(3)]).to(self.device)
            h = self._decode(packed, positions, Segments.build([n, 3], [0, 0]))
            ours = self.logits(h)
        want = torch.cat([stock, stock[:3]])
        error = (ours - want).abs().max() / want.abs().max()
        if not error <= _TOLERANCE[self.dtype]:
            raise ModelError(
                f"{type(self.model).__name__} gives other logits when packed than stock "
                f"transformers: relative difference {error:.1e}",
                expected=f"at most {_TOLERANCE[self.dtype]:.0e}",
                remedy="This architecture is not supported.",
            )

    def _decode(self, ids: Tensor, positions: Tensor, segments: Segments) -> Tensor:
        out = self.decoder(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, segments=segments
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def hidden(self, ids: Tensor, positions: Tensor, work: Pass) -> Tensor:
        """Last hidden states (T, D) of one packed pass under the pass's adapters."""
        # The modules keep the pass: recomputation in the backward meets them again.
        for module in self._adapted:
            module.work = work
        return self._decode(ids, positions, work.segments)

    def logits(self, hidden: Tensor) -> Tensor:
        """(L, D) -> (L, V) fp32, after the model's own scaling and soft-cap."""
        out: Tensor = head_logits(hidden, self.head, divide=self.divide, softcap=self.softcap)
        return out

    def loss(
        self, hidden: Tensor, targets: Tensor, slot: Tensor, weight: Tensor, slots: int
    ) -> Tensor:
        """(K,) weighted token loss of every slot."""
        out: Tensor = linear_xent_ref(
            hidden, self.head, targets, slot, weight, slots,
            divide=self.divide, softcap=self.softcap,
        )  # fmt: skip
        return out


def load(weights: Weights, config: Config, device: torch.device, targets: tuple[str, ...]) -> Base:
    """Load a Hugging Face causal LM from a folder and make it the shared base.

    Raises:
        ModelError: it cannot be loaded, or packed computation would differ from stock.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("fedsim", _attention)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            weights.path, dtype=compute_dtype(config, device), attn_implementation="eager"
        )
    except (OSError, ValueError, RuntimeError) as failure:
        raise ModelError(
            f"{weights.origin} cannot be loaded ({failure})",
            expected="a Hugging Face causal language model",
        ) from failure
    if config.model.quantisation != "none":
        _round_trip(model, config.model.quantisation, config.model.double_quantisation)
    return Base(model.to(device), config, targets)
