"""The base: which model, in which numbers, held in which form."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedsim.section import Section


class Model(Section):
    name: str = "smollm2-135m-instruct"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantisation: Literal["none", "fp4", "nf4", "int8"] = "none"
    double_quantisation: bool = False
    hold: Literal["auto", "packed", "dense"] = Field("auto", description="of a quantised base")
    sharding: Literal["auto", "none", "zero3"] = Field(
        "auto", description="zero3: each process holds a part; auto: where a GPU cannot hold all"
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="where a process keeps its part of a sharded base"
    )

    def misfit(self) -> str:
        """What cannot be, or ""."""
        if self.offload == "nvme":
            return (
                "model.offload: got nvme; expected none or cpu: parts that DeepSpeed swaps to NVMe "
                "have not been seen to finish a step"
            )
        if self.offload != "none" and self.sharding == "none":
            return (
                f"model.sharding: got none; expected zero3 or auto with model.offload = "
                f"{self.offload}, which is of a process's part"
            )
        if self.sharding == "zero3" and self.quantisation != "none":
            return (
                f"model.sharding: got zero3; expected none with model.quantisation = "
                f"{self.quantisation}: a base is held in few bits or in parts"
            )
        return ""
