"""What a federated rule has added to the frozen weights, put into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedsim.lora import Site


def delta_of(base: Mapping[str, Tensor], module: str) -> Tensor | None:
    """(O, I) fp64 that `ServerState.base` adds to a module's weight, or None."""
    if (whole := base.get(f"{module}.W")) is not None:
        return whole.double()
    a, b = base.get(f"{module}.A"), base.get(f"{module}.B")
    return None if a is None or b is None else b.double() @ a.double()


def factors_of(base: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor] | None:
    """The same as exact factors A (R', I), B (O, R') fp32: those kept, or one of them is 1."""
    if (whole := base.get(f"{module}.W")) is not None:
        one = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
        o, i = whole.shape
        return (one, whole) if i <= o else (whole, one)
    a, b = base.get(f"{module}.A"), base.get(f"{module}.B")
    return None if a is None or b is None else (a, b)


class Correction:
    """Keeps the weights of corrected modules as they were loaded, beside those in use.

    Each time the sum W_0 + delta is formed anew in fp64 and rounded to the base's dtype once, so
    that rounding does not add up over rounds; that of a quantised base is rounded as its computing
    dtype is, not quantised again.

    Attributes:
        base: what is in the weights now.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self._parts = {
            m.name: (site, slice(m.column, m.column + m.width)) for site in sites
            for m in site.members
        }  # fmt: skip
        self._loaded: dict[str, Tensor] = {}
        self.base: Mapping[str, Tensor] = {}
        self._rounding = 0.0

    @torch.no_grad()
    def apply(self, base: Mapping[str, Tensor]) -> float:
        """Let the weights be W_0 + delta; modules that `base` does not name become W_0 again.

        Returns:
            ||rounded - exact|| / ||delta||, over all corrected modules; 0 without any.
        """
        if base is self.base:  # the round has left it as it was
            return self._rounding
        wanted = {key.rpartition(".")[0] for key in base}
        lost = whole = 0.0
        for module in sorted(wanted | self._loaded.keys()):
            site, span = self._parts[module]
            weight = site.open()[span]
            if module not in self._loaded:
                self._loaded[module] = weight.clone()
            loaded = self._loaded[module]
            delta = delta_of(base, module)
            if delta is None:
                weight.copy_(loaded)
                del self._loaded[module]
            else:
                exact = loaded.double() + delta.to(loaded.device)
                weight.copy_(exact)
                lost += float((weight.double() - exact).square().sum())
                whole += float(delta.square().sum())
            site.__dict__.pop("norms", None)  # DoRA's, of the weights as they were
        self.base, self._rounding = base, (lost / whole) ** 0.5 if whole else 0.0
        return self._rounding
