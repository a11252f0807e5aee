"""A frozen base of which each process holds a part, by DeepSpeed's ZeRO-3.

Of the weight of every linear but the head each of n processes keeps 1/n, on its device or in the
memory of the CPU. It is gathered (`room.py`) in the forward and in the backward of a pass, once for
all clients whose tokens fill it; embeddings, norms and head stay whole. Adapters, their gradients
and moments know nothing of this: they are no parameters of the model.

A weight is gathered by all processes at once. Those that train make equally many passes, empty ones
where they have no clients left (`Trainer.idle`); when the leader works alone, it asks the others.

Paper: Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedsim import launch, memory, rehearsal, strategies
from fedsim.config import Config
from fedsim.core import AdapterLayout
from fedsim.errors import ConfigError, ModelError, RunError
from fedsim.linears import linears, target_linears
from fedsim.mapped import own_generation
from fedsim.memory import out_of_memory
from fedsim.pretrained import outline
from fedsim.room import Room, replace
from fedsim.weights import Weights


class Shards:
    """Those of a base, in its linears' order.

    Args:
        offload: keep this process's parts in the memory of the CPU.

    Attributes:
        asking: the others wait to be asked for a shard's number; else they gather when this process
            does.
        own: bytes of this process's parts.
    """

    def __init__(self, group: Any, *, offload: bool) -> None:
        self.group, self.offload = group, offload
        self.every: list[Shard] = []
        self.asking = False

    @property
    def own(self) -> int:
        return sum(shard.own for shard in self.every)

    def record(self) -> dict[str, Any]:
        """For environment.json."""
        return {"shards": len(self.every), "shard_bytes": self.own}

    def lend(self, number: int) -> None:
        """Take part in what the leader has asked for."""
        with self.every[number].gathered():
            pass


class Shard:
    """A weight (O, I), of which this process keeps a part.

    Args:
        weight: whole in process 0; elsewhere its values do not count.

    Attributes:
        shape, dtype, device: of the whole weight. own: bytes of this process's part.
    """

    def __init__(self, weight: Tensor, shards: Shards) -> None:
        import deepspeed

        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        holder = nn.ParameterDict({"weight": nn.Parameter(weight, requires_grad=False)})
        deepspeed.zero.Init(
            module=holder, data_parallel_group=shards.group, mem_efficient_linear=False,
            remote_device="cpu" if shards.offload else None,
            pin_memory=shards.offload and weight.is_cuda,  # of an efficient copy to the GPU
        )  # fmt: skip
        self._parameter: Any = holder["weight"]
        self._shards, self._number = shards, len(shards.every)
        self.own = self._parameter.ds_tensor.nbytes
        shards.every.append(self)

    def into(self, out: Tensor) -> None:
        """Write the weight to (O, I). Raises RunError where a process is gone."""
        with self.gathered() as whole:
            out.copy_(whole)

    @contextmanager
    def gathered(self) -> Iterator[Tensor]:
        """The weight, in all processes."""
        import deepspeed

        try:
            if self._shards.asking:
                dist.broadcast_object_list([self._number], src=0)
            with deepspeed.zero.GatheredParameters(self._parameter):
                yield self._parameter.data
        except RuntimeError as failure:  # how gloo reports a lost peer
            if out_of_memory(failure):
                raise
            raise RunError(
                f"a weight of the sharded base cannot be gathered ({failure})",
                remedy="A process may be gone: go on with --resume, on several processes.",
            ) from failure


def wanted(
    config: Config, found: Weights, targets: tuple[str, ...], dtype: torch.dtype,
    device: torch.device,
) -> bool:  # fmt: skip
    """Whether the base is sharded: as configured, or, with `auto`, where a GPU could not train one
    client beside a whole one. On one CPU the processes share a whole one in any case.

    Raises:
        ConfigError: there is one process only, or the rule or PiSSA changes the base.
    """
    how = config.model.sharding
    if how == "auto":
        can = device.type == "cuda" and launch.size() > 1 and config.model.quantisation == "none"
        how = "zero3" if can and not _fits(config, found, targets, dtype, device) else "none"
    if how == "none":
        return False
    if launch.size() == 1:
        raise ConfigError(
            "model.sharding = zero3", got="one process", expected="several, to share the base",
            remedy="Add --devices, or start it with torchrun.",
        )  # fmt: skip
    rule, init = config.server.strategy, config.adapter.init
    if strategies.load(rule, config.server.options).joins or init == "pissa":
        raise ConfigError(
            "a sharded base", got=f"server.strategy = {rule}, adapter.init = {init}",
            expected="neither a rule nor adapters that change the base",
            remedy='Change them, or set model.sharding = "none" where the base fits a device.',
        )  # fmt: skip
    return True


def _fits(
    config: Config, found: Weights, targets: tuple[str, ...], dtype: torch.dtype,
    device: torch.device,
) -> bool:  # fmt: skip
    model = outline(found)
    kept = memory.activations(model, targets, config, device, dtype)
    adapted = target_linears(model, targets)
    shapes = {n: (m.in_features, m.out_features) for n, m in adapted.items()}
    layout = AdapterLayout.build(shapes, config.adapter.rank, dora=config.adapter.dora)
    rule = strategies.load(config.server.strategy, config.server.options)
    slot = memory.slot_bytes(config, layout.size, rehearsal.rows_kept(rule, config.most_clients))
    room = memory.room(config, device) - found.numbers * dtype.itemsize
    return memory.fits(config, kept, slot, room)


def _group(device: torch.device) -> Any:
    """The processes, to gather weights only: beside them rows of clients are on their way.

    Raises:
        ModelError: DeepSpeed is not installed.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor", FutureWarning)
    try:
        import deepspeed
    except ImportError as failure:
        raise ModelError(
            "a base can be sharded only with DeepSpeed", remedy="Install fedsim-llm[deepspeed]."
        ) from failure
    # Else it is compiled at its first use, for two minutes: an all-reduce that nothing here uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    return dist.new_group(backend=backend, timeout=launch.LONGEST)


def read(weights: Weights, config: Config, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' causal LM with its linears' weights in shards: one at a time is whole.

    Raises:
        ModelError: DeepSpeed is not installed, or the folder has no safetensors of this model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    group = _group(device)
    hf, entries = AutoConfig.from_pretrained(weights.path), weights.entries
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(hf, dtype=dtype)
    spread = {f"{name}.weight" for name in linears(empty)}

    def refuse(missing: set[str]) -> None:
        if missing:
            raise ModelError(
                f"{weights.origin} cannot be loaded in shards: it lacks {min(missing)}",
                expected="safetensors files with the model's own names of weights",
                remedy='Set model.sharding = "none".',
            )

    refuse(spread - entries.keys())

    def tensor(name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(entries[name]["file"], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found.to(dtype=dtype if found.is_floating_point() else found.dtype, copy=True)

    # What is spread is nothing but a shape here.
    values = {n: torch.zeros((), dtype=dtype).expand(v.shape) if n in spread else tensor(n)
              for n, v in empty.state_dict().items() if n in entries}  # fmt: skip
    model, report = type(empty).from_pretrained(
        None, config=hf, state_dict=values, dtype=dtype, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    refuse({*report["missing_keys"]})
    own_generation(model, weights)
    shards, room = Shards(group, offload=config.model.offload == "cpu"), Room()
    for name, linear in linears(model).items():
        whole = torch.empty(linear.weight.shape, dtype=dtype, device=device)
        if launch.rank() == 0:
            whole.copy_(tensor(f"{name}.weight"))
        replace(model, name, Shard(whole, shards), room)
    model.shards = shards
    return model.to(device)
