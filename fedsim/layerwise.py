"""A model's decoder layers, called one by one, with inputs of one's own and in fp32 if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.errors import ModelError
from fedsim.lora import Site, SiteMember
from fedsim.room import HeldLinear, Room

_PLACES = ("layer_idx", "layer_number", "training")


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder's layers. Raises ModelError where they are not one list."""
    count = model.config.get_text_config().num_hidden_layers
    for module in getattr(model, model.base_model_prefix).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ModelError(
        f"{type(model).__name__} has no list of {count} layers",
        remedy="This architecture is not supported.",
    )


def few_of(layers: Sequence[nn.Module], most: int, weights: int) -> list[int]:
    """Numbers of all layers; where they are more, or have more weights together, of the first, the
    last, one of each kind and, evenly spaced, as many others as there is room for."""
    sizes = [sum(_weights(m) for m in layer.modules()) for layer in layers]
    if len(layers) <= most and sum(sizes) <= weights:
        return list(range(len(layers)))
    kinds: dict[str, int] = {}
    for number, layer in enumerate(layers):
        kinds.setdefault(_kind(layer), number)
    take = {*kinds.values(), len(layers) - 1}
    more = int((weights - sum(sizes[i] for i in take)) / max(sizes))
    more = max(0, min(more, most - len(take)))
    return sorted(take | {int(i) for i in np.linspace(0, len(layers) - 1, more + 2)[1:-1]})


def _weights(module: nn.Module) -> int:
    """Number of a module's own weights."""
    held = module.held.shape.numel() if isinstance(module, HeldLinear) else 0
    return held + sum(p.numel() for p in module._parameters.values() if p is not None)


def _kind(layer: nn.Module) -> str:
    """Modules of a layer and their settings: layers of one kind differ in their weights only."""

    def settings(module: nn.Module) -> list[tuple[str, object]]:
        return [(k, v) for k, v in sorted(module.__dict__.items())
                if k not in _PLACES and isinstance(v, str | int | float | None)]  # fmt: skip

    return str([(n, type(m).__name__, settings(m)) for n, m in layer.named_modules()])


def sites_of(layer: nn.Module) -> set[Site]:
    """Sites of a layer's linears."""
    return {m.__dict__["site"] for m in layer.modules() if isinstance(m, SiteMember)}


def input_of(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """(T, D) that a layer is called with."""
    found: Tensor = named["hidden_states"] if "hidden_states" in named else arguments[0]
    return found.squeeze(0)


def rows_of(output: Any) -> Tensor:
    """(T, D) that a layer gives."""
    found: Tensor = (output[0] if isinstance(output, tuple) else output).squeeze(0)
    return found


def relative(rows: Tensor, exact: Tensor) -> Tensor:
    """||row - exact|| / ||exact|| of rows (T, D), (T,) fp32."""
    size = exact.float().norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    found: Tensor = (rows.float() - exact.float()).norm(dim=1) / size
    return found


@dataclass(frozen=True)
class Call:
    """How a decoder calls a layer: its input (T, D), and what else it hands over."""

    hidden: Tensor
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output (T, D) for another input."""
        return rows_of(layer(hidden[None], *self.arguments, **self.named))


@contextmanager
def stubs(
    layers: Sequence[nn.Module], last: Tensor | None = None, *, outputs: int = 0
) -> Iterator[list[Call]]:
    """Let layers compute nothing: each notes its call and hands its input on, the last one instead
    `last` (T, D) if given; as the first of a tuple of `outputs`, or alone where they are 0."""
    calls: list[Call] = []

    def stub(number: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **named: Any) -> Any:
            hidden = input_of(arguments, named)
            named.pop("hidden_states", None)
            calls.append(Call(hidden, arguments[1:], named))
            given = (hidden if last is None or number < len(layers) - 1 else last)[None]
            return (given, *[None] * (outputs - 1)) if outputs else given

        return forward

    own = [layer.__dict__.get("forward") for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.forward = stub(number)
        yield calls
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextmanager
def rounding(layer: nn.Module) -> Iterator[None]:
    """Round to bf16 what the layer, and each module without children in it, gives."""

    def to_bf16(module: nn.Module, arguments: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        if first.is_floating_point():
            first = first.bfloat16().to(first.dtype)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    hooks = [m.register_forward_hook(to_bf16) for m in layer.modules()
             if m is layer or not any(True for _ in m.children())]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Wide(Room):
    """A room whose weights are fp32."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def whole(self, parts: Sequence[Any]) -> Tensor:
        return self._room.whole(parts).float()


@contextmanager
def in_fp32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the weights of these modules, not of their children, in fp32; of linears also those that
    are joined in a site, or held in another form."""
    with ExitStack() as undo:

        def let(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for module in modules:
            own: Iterable[nn.Parameter | None] = module._parameters.values()
            if isinstance(module, SiteMember):
                site = module.__dict__["site"]
                own = (site.bias,)
                if site.dense is None or site.dense.dtype != torch.float32:
                    let(site, "dense", site.weight.to(torch.float32, copy=True))
            elif isinstance(module, HeldLinear):
                let(module, "room", _Wide(module.room))
            for p in own:
                if p is not None and p.is_floating_point() and p.dtype != torch.float32:
                    let(p, "data", p.data.float())
        yield


@contextmanager
def around_in_fp32(model: Any, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Hold all but the layers in fp32: embeddings, what the decoder derives from them, as
    positions, and its last norm. Tables of embeddings stay; what is read from them is converted."""
    inside = {id(m) for layer in layers for m in layer.modules()}
    inside |= {id(m) for m in model.modules() if isinstance(m, nn.Embedding)}
    inside.add(id(model.get_output_embeddings()))
    table = model.get_input_embeddings()
    hook = table.register_forward_hook(lambda _, arguments, out: out.float())
    try:
        with in_fp32(m for m in model.modules() if id(m) not in inside):
            yield
    finally:
        hook.remove()
