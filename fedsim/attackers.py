"""The section `attack`: how many clients mean harm, and what they do (`attack.py`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fedsim.section import Section


class Attack(Section):
    kind: Literal["none", "sign_flip", "scale", "gaussian", "a_little", "label_flip"] = Field(
        "none", description="what hostile clients do to their updates, or to their answers"
    )
    fraction: float = Field(0.0, ge=0, le=1, description="of all clients, that attack")
    options: Annotated[dict[str, Any], Field(strict=False)] = Field(
        {}, description="of the attack, by name; see fedsim/attack.py"
    )

    @property
    def on_updates(self) -> bool:
        """Whether it changes what clients send, not what they train on."""
        return self.kind not in ("none", "label_flip")

    def misfit(self) -> str:
        """What does not go together, in the words of an error; or ""."""
        if (self.kind == "none") == (self.fraction == 0):
            return ""
        return (
            f"attack.kind, attack.fraction: got {self.kind}, {self.fraction}; expected a kind and "
            "a fraction above 0, or none and 0"
        )
