"""The keys of a learning rate that changes within a visit."""

from __future__ import annotations

from pydantic import Field

from fedsim.schedule import Kind
from fedsim.section import Section


class Scheduled(Section):
    """Keys of a section whose learning rate may change within a visit."""

    schedule: Kind = Field(
        "constant", description="of the learning rate within a visit, as transformers has it"
    )
    warmup: int = Field(0, ge=0, description="steps of a visit in which the rate rises from 0")

    def misfit(self) -> str:
        """What cannot be, or ""."""
        if self.warmup and self.schedule == "constant":
            return (
                f"train.warmup: got {self.warmup}; expected 0 with train.schedule = constant, "
                "which has no warmup; constant_with_warmup has"
            )
        return ""
