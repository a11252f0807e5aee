"""The section `privacy`: whose data the adapter must not betray, and by how much.

    client     differential privacy of whole clients (`release.py`): who took part, with all its
               data, is hidden in the adapter up to (epsilon, delta), which `fedsim plan` says
    example    of single examples (`dp_sgd.py`): each client trains privately by itself, and the
               server, too, learns no more of an example than that from all it ever gets

The guarantee is of what leaves: sums, the server's adapter and its state; or a client's updates.
What a run writes for the person who simulates, losses of clients, norms, the error of averaging, is
not released.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from fedsim.section import Section, with_defaults

if TYPE_CHECKING:
    from fedsim.config import Config

# What each level takes besides noise and clip, with its default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "client": {"adaptive": False, "quantile": 0.5, "clip_rate": 0.2, "delta": 1e-5},
    "example": {"delta": 1e-5},
}
KEYS = ("noise", "clip", *DEFAULTS["client"])


class Privacy(Section):
    """Keys that the level does not use stay unset, and setting one is an error."""

    level: Literal["none", "client", "example"] = Field(
        "none", description="whose data differential privacy hides: a whole client's, or an example"
    )
    noise: float | None = Field(
        None, gt=0, description="noise multiplier z: its standard deviation over the clip"
    )
    clip: float | None = Field(None, gt=0, description="largest norm, C, of an update or gradient")
    adaptive: bool | None = Field(None, description="client: clip follows a quantile of the norms")
    quantile: float | None = Field(None, gt=0, lt=1, description="adaptive: share not clipped")
    clip_rate: float | None = Field(None, gt=0, description="adaptive: rate of the clip's change")
    delta: float | None = Field(None, gt=0, lt=1, description="of (epsilon, delta)")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        return with_defaults(values, "level", DEFAULTS)

    @property
    def on(self) -> bool:
        return self.level != "none"

    @property
    def of_clients(self) -> bool:
        return self.level == "client"

    @property
    def of_examples(self) -> bool:
        return self.level == "example"

    def misfit(self, config: Config) -> str:
        """What does not go together, in the words of an error; or ""."""
        takes = ("noise", "clip", *DEFAULTS[self.level]) if self.on else ()
        for key in KEYS:
            if key not in takes and getattr(self, key) is not None:
                why = " (C would depend on single examples, unhidden)" * self.of_examples
                return (
                    f"privacy.{key}: got a value; expected none with privacy.level = {self.level}"
                    + why
                )
            if key in takes and getattr(self, key) is None:
                return f"privacy.{key}: got nothing; expected a number with privacy.level = " + (
                    self.level
                )
        if self.of_examples and config.run.protocol == "flowertune":
            return (
                "privacy.level: got example; expected none or client with run.protocol = "
                "flowertune: it trains the same examples at every visit, and the accountant counts "
                "new draws"
            )
        return self._misfit_of_clients(config) if self.of_clients else ""

    def _misfit_of_clients(self, config: Config) -> str:
        number, expected = config.clients.number, config.expected_clients
        min_clients, secure = config.server.min_clients, config.channel.secure
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
