"""The shared base: load, freeze, swap target linears, register packed attention, and check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim import load_check, memory, verdicts
from fedsim.attention import attention
from fedsim.batch import PackedBatch
from fedsim.cache import Cache
from fedsim.config import Config
from fedsim.core import AdapterLayout
from fedsim.correction import Correction
from fedsim.errors import ModelError
from fedsim.fused import fuse_mlps, fuse_norms, fuse_rotary, shorten_last_layer, take_rows
from fedsim.linears import groups, inputs_of, linears, target_linears
from fedsim.lora import Pass, Site, SiteMember
from fedsim.pretrained import compute_dtype, stock, understood
from fedsim.quantised import holds
from fedsim.stock_rows import StockRows, sequences
from fedsim.weights import Weights
from fedsim_kernels.linear_xent import head_logits
from fedsim_kernels.segments import Segments

if TYPE_CHECKING:
    from fedsim.sharded import Shards

# Dropouts of heads that a causal language model does not have.
_ELSEWHERE = {"classifier_dropout", "summary_first_dropout"}


def check_config(hf: Any, max_length: int, what: str = "data.max_length") -> None:
    """Refuse what would be computed differently from the stock model in sequences of at most
    `max_length` tokens, which `what` names. Raises ModelError."""
    for name, value in hf.to_dict().items():
        # Whatever its name: recomputing layers puts the model in training mode, and draws anew.
        if "drop" in name and name not in _ELSEWHERE and isinstance(value, float) and value > 0:
            raise ModelError(
                f"the model's {name}", got=value, expected="0",
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
                f"{what} with {kind['rope_type']} positions", got=max_length,
                expected=f"at most {limit}",
                remedy=f"Lower {what}: beyond it these positions depend on the pass.",
            )  # fmt: skip
    if getattr(hf, "logit_scale", None) not in (None, 1, 1.0):
        raise ModelError(
            "the model's logit_scale", got=hf.logit_scale, expected="none",
            remedy="This architecture is not supported.",
        )  # fmt: skip


class Base:
    """A frozen causal LM that all clients share.

    Attributes:
        layout: where each target's factors lie in an adapter's row.
        sites: every linear but the head, grouped by the input that they read.
        shortened: behind the last attention only label rows go on.
        fused: how many norms, MLPs, attentions and last layers run as fused operations.
        correction: puts what a rule has added to the weights into them.
        shards: of the linears' weights, where they are spread over processes.
        differences: from stock transformers, the largest as fractions of their limits, if it was
            checked now.

    Args:
        text: sequences to check it with, or none.
    """

    def __init__(
        self, model: Any, config: Config, targets: tuple[str, ...],
        text: tuple[np.ndarray, ...] = (),
    ) -> None:  # fmt: skip
        check_config(model.config, config.data.max_length)
        self.model = model.eval().requires_grad_(False)
        self.decoder = getattr(model, model.base_model_prefix)
        self.head = model.get_output_embeddings().weight
        self.device, self.dtype = self.head.device, self.head.dtype
        self.divide = float(getattr(model.config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        with torch.no_grad(), load_check.refusing(model):
            with inputs_of(linears(model)) as seen:
                self.decoder(torch.arange(8, device=self.device)[None], use_cache=False)
            stock = StockRows(model, text) if text else None
        self._kept = memory.activations(model, targets, config, self.device, self.dtype)
        self._build(target_linears(model, targets), groups(linears(model), seen), config)
        self.correction = Correction(self.sites)
        self.errors: dict[str, float] = getattr(model, "quantisation_errors", {})
        self.shards: Shards | None = getattr(model, "shards", None)
        model.set_attn_implementation("fedsim")
        with load_check.refusing(model):
            self.differences = load_check.verify(self, stock) if stock else {}
        del stock, seen  # before free memory is looked at
        room = memory.room(config, self.device)
        self.recomputes = memory.recomputes(config, self._kept, room, self.device)
        if self.shards:  # all make the same passes
            self.recomputes = memory.agreed(self.recomputes)
            if config.adapter.dora:  # norms of the weights are gathered here, by all
                self.magnitudes(torch.zeros(self.layout.size, device=self.device))
        if self.recomputes:
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
            # Enabling also makes the embeddings require grad, which would bring back the
            # gradient below the first adapter.
            model.disable_input_require_grads()
            model.train()

    def _build(
        self, targets: dict[str, nn.Linear], groups: list[list[str]], config: Config
    ) -> None:
        """Put sites in the linears' places, lay the adapters out, fuse what is recognised."""
        numbers = {name: i for i, name in enumerate(targets)}
        every = linears(self.model)
        self.sites: list[Site] = []
        adapted: list[list[str]] = []
        owner: dict[str, Site] = {}
        for group in groups:
            site = Site({name: every[name] for name in group}, numbers)
            if site.adapted:
                site.index = len(adapted)
                adapted.append([m.name for m in site.adapted])
            for at, name in enumerate(group):
                parent, _, leaf = name.rpartition(".")
                member = SiteMember(site, at, every[name])
                setattr(self.model.get_submodule(parent), leaf, member)
                owner[name] = site
            self.sites.append(site)
        shapes = {n: (m.in_features, m.out_features) for n, m in targets.items()}
        self.layout = AdapterLayout.build(
            shapes, config.adapter.rank, sites=adapted, dora=config.adapter.dora
        )
        self.shortened = False
        if layers := getattr(self.decoder, "layers", None):
            last = f"{self.model.base_model_prefix}.layers.{len(layers) - 1}"
            self.shortened = shorten_last_layer(layers[-1], owner, last)
        self.fused = {
            "norms": fuse_norms(self.model), "mlps": fuse_mlps(self.model, owner),
            "rotary": fuse_rotary(self.model), "last_layer": int(self.shortened),
        }  # fmt: skip

    def limits(self, config: Config, rows: int) -> memory.Limits:
        """What trains at once, in the memory that is free now; `rows` of a slot are the rule's."""
        slot = memory.slot_bytes(config, self.layout.size, rows)
        room = memory.room(config, self.device)
        return memory.limits(config, self._kept, slot, room, self.device, recompute=self.recomputes)

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def held(self) -> dict[str, Any]:
        """How a base lies in memory that is quantised or sharded; its weights' relative errors."""
        if self.shards:
            return {"held": "sharded", **self.shards.record()}
        if not self.errors:
            return {}
        errors = list(self.errors.values())
        packed = any(site.dense is None for site in self.sites)
        error = {"mean": sum(errors) / len(errors), "largest": max(errors)}
        return {"held": "packed" if packed else "dense", "quantisation_error": error}

    @torch.no_grad()
    def magnitudes(self, row: Tensor) -> Tensor:
        """A row (P,) with DoRA's magnitudes at ||W||, where they start; unchanged without DoRA."""
        for site in self.sites:
            for m in site.adapted:
                if self.layout.has(m.name, "mag"):
                    norms = site.norms[m.column : m.column + m.width]
                    self.layout.view(row[None], self.layout.piece(m.name, "mag"))[0, 0] = norms
        return row

    def _decode(
        self, ids: Tensor, positions: Tensor, segments: Segments, cache: Cache | None = None
    ) -> Tensor:
        out = self.decoder(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, segments=segments,
            cache=cache,
        )  # fmt: skip
        hidden: Tensor = out.last_hidden_state.squeeze(0)
        return hidden

    def hidden(
        self, ids: Tensor, positions: Tensor, work: Pass, cache: Cache | None = None
    ) -> Tensor:
        """Last hidden states of one packed pass under the pass's adapters: (L, D) of its label
        rows where it names them, else (T, D). A cache takes part as it was told to."""
        # The sites keep the pass: recomputation in the backward meets it again.
        for site in self.sites:
            site.enter(work)
        hidden = self._decode(ids, positions, work.segments, cache)
        if work.label_rows is None or self.shortened:
            return hidden
        return take_rows(hidden, work.label_rows, work.label_repeats)

    def rest(self) -> None:
        """Leave the last pass; until then its rows and gradients stay in memory."""
        for site in self.sites:
            site.enter(None)

    def logits(self, hidden: Tensor) -> Tensor:
        """(L, D) -> (L, V) fp32, after the model's own scaling and soft-cap."""
        out: Tensor = head_logits(hidden, self.head, divide=self.divide, softcap=self.softcap)
        return out

    def loss(self, hidden: Tensor, batch: PackedBatch, slots: int, tile: int = 0) -> Tensor:
        """Weighted token loss of every slot, (K,) fp64, from the hidden states (L, D) of a
        batch's label rows."""
        nll, _ = torch.ops.fedsim.linear_xent(
            hidden, self.head, batch.targets, batch.label_weight, tile, self.divide,
            self.softcap or 0.0,
        )  # fmt: skip
        mine = torch.arange(slots, device=nll.device)[:, None] == batch.label_slot
        # In fp64 the sum of fp32 numbers is exact up to 29 binary orders of magnitude, so it does
        # not depend on what else shares the pass; masks select, because 0 x NaN is NaN.
        out: Tensor = torch.where(mine, nll.double(), 0.0).sum(1)
        return out


def load(
    weights: Weights, config: Config, device: torch.device, targets: tuple[str, ...],
    *, shard: bool = False, tokenizer: Any = None,
) -> Base:  # fmt: skip
    """Load a Hugging Face causal LM from a folder and make it the shared base.

    Args:
        tokenizer: the model's own, for a text to check the base with.
        shard: spread its linears over the processes, which all load it now.

    Raises:
        ModelError: it cannot be loaded, or packed computation would differ from stock.
    """
    with understood(weights):
        return _load(weights, config, device, targets, shard, tokenizer)


def _load(
    weights: Weights, config: Config, device: torch.device, targets: tuple[str, ...], shard: bool,
    tokenizer: Any,
) -> Base:  # fmt: skip
    from transformers import AttentionInterface

    AttentionInterface.register("fedsim", attention)
    dtype, pack = compute_dtype(config, device), False
    if shard:
        from fedsim import sharded  # DeepSpeed's part of fedsim, for those who ask for it

        found = sharded.read(weights, config, dtype, device)
    else:
        pack = weights.values is None and holds(weights.numbers, config, dtype, device)
        found = stock(weights, config, device, "eager", pack=pack)
    text = sequences(tokenizer, found.get_input_embeddings().num_embeddings)
    verdict = verdicts.place(
        weights, config, targets, device, dtype=dtype, shard=shard, pack=pack,
        text=[ids.tolist() for ids in text],
    )  # fmt: skip
    accepted = verdicts.known(verdict)
    if shard:  # all make the same passes
        accepted = memory.agreed(accepted)
    base = Base(found, config, targets, () if accepted else text)
    if not accepted:
        verdicts.keep(verdict, base.differences)
    memory.give_back()
    return base
