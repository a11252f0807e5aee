"""fedsim: federated fine-tuning of language models on one machine, many clients in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsim.config import Config

__version__ = "0.1.0"


def run(config: Config, *, resume: bool = False, fresh: bool = False) -> Path:
    """Simulate one run; returns its folder. See `fedsim.simulate.run`."""
    from fedsim import simulate

    return simulate.run(config, resume=resume, fresh=fresh)
