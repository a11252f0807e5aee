"""An empty pass."""

from __future__ import annotations

import numpy as np
import torch

from fedsim.batch import Packer
from fedsim.config import Config
from fedsim.lora import Dropout, Pass
from fedsim.model import Base


def idle(base: Base, config: Config, key: int) -> None:
    """Pass one row of an adapter of zeros forward and backward, and forget what comes out.

    It gathers the weights of a sharded base as every pass does, for the processes whose passes have
    clients.
    """
    train, p = config.train, config.adapter.dropout
    packer = Packer(train.rows_per_product)
    packer.chunk(0)
    packer.sequence(np.zeros(1, dtype=np.int64), 0)
    batch = packer.finish(base.device)
    row, gradient = torch.zeros(2, 1, base.layout.size, device=base.device)
    counters = torch.zeros(len(batch), 4, dtype=torch.int64, device=base.device)
    work = Pass(
        segments=batch.segments,
        factors=base.layout.site_views(row),
        grads=base.layout.site_views(gradient),
        scale=torch.zeros(1, device=base.device),
        anchor=base.anchor,
        tile=train.rows_per_product,
        dropout=Dropout(p, key, counters) if p else None,
        label_rows=batch.label_rows,
        label_segments=batch.label_segments,
        label_repeats=batch.label_repeats,
    )
    hidden = base.hidden(batch.input_ids, batch.position_ids, work)
    base.loss(hidden, batch, 1, work.tile).sum().backward()
