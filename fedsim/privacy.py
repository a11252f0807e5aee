"""The section `privacy`: whose data the adapter must not betray, and by how much.

    client    differential privacy of whole clients (`release.py`): who took part, with all its
              data, is hidden in the adapter up to (epsilon, delta), which `fedsim plan` says

The guarantee is of what the server learns from sums, its adapter and its state. What a run writes
for the person who simulates, losses of clients, norms, the error of averaging, is not released.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from fedsim.section import Section

DEFAULTS: dict[str, Any] = {
    "adaptive": False, "quantile": 0.5, "clip_rate": 0.2, "delta": 1e-5,
}  # fmt: skip


class Privacy(Section):
    """Keys that the level does not use stay unset, and setting one is an error."""

    level: Literal["none", "client"] = Field(
        "none", description="client: differential privacy of whole clients"
    )
    noise: float | None = Field(
        None, gt=0, description="noise multiplier z: its standard deviation over the clip"
    )
    clip: float | None = Field(None, gt=0, description="largest norm of an update, C")
    adaptive: bool | None = Field(None, description="clip follows a quantile of the norms")
    quantile: float | None = Field(None, gt=0, lt=1, description="adaptive: share not clipped")
    clip_rate: float | None = Field(None, gt=0, description="adaptive: rate of the clip's change")
    delta: float | None = Field(None, gt=0, lt=1, description="of (epsilon, delta)")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("level") != "client":
            return values
        return {**DEFAULTS, **values}

    @property
    def on(self) -> bool:
        return self.level != "none"

    def misfit(self, number: int, expected: float, min_clients: int, secure: bool) -> str:
        """What does not go together, in the words of an error; or "".

        Args:
            number, expected: N and q N clients. min_clients: of a round. secure: aggregation.
        """
        if not self.on:
            given = [k for k in ("noise", "clip", *DEFAULTS) if getattr(self, k) is not None]
            if not given:
                return ""
            return f"privacy.{given[0]}: got a value; expected none with privacy.level = none"
        for key in ("noise", "clip"):
            if getattr(self, key) is None:
                return f"privacy.{key}: got nothing; expected a number with privacy.level = client"
        assert self.delta is not None and self.noise is not None
        if self.delta >= 1 / number:
            return (
                f"privacy.delta: got {self.delta}; expected less than 1 / clients.number "
                f"({1 / number:.2g}): publishing one client's data whole would satisfy it"
            )
        if min_clients > 1:
            return (
                f"server.min_clients: got {min_clients}; expected 1 with privacy.level = client: "
                "each client takes part by itself, and a round may be empty, or the accountant "
                "counts another sampling than takes place"
            )
        if secure:
            return (
                "channel.secure: got true; expected false with privacy.level = client: what fixed "
                "point rounds is not in the sensitivity, and the server adds the noise"
            )
        if self.adaptive and self.noise >= expected / 10:
            return (
                f"privacy.adaptive: got true with privacy.noise = {self.noise}; expected a noise "
                f"below {expected / 10:.3g}, twice the noise of counting who was "
                "clipped (server.fraction clients.number / 20), or nothing is left for the update"
            )
        return ""
