"""Every rule that ships trains real rounds on a tiny model, is killed, and ends at the same bits.

The kill is an exception in the middle of the second of three rounds: everything in memory is lost,
as for a process that dies (test_resume.py kills processes). The last adapter, the server's memory
and the rows that clients keep must be those of a run that was never stopped. The rule of
docs/write-a-strategy.md is one of them, taken from the page. About 40 s.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedsim import simulate, strategies
from fedsim.checkpoint import load_checkpoint
from fedsim.client_memory import DiskMemory
from fedsim.config import Config
from fedsim.core import ClientUpdates
from fedsim.train import Trainer

RULES = [name for name in strategies.known() if name != "local"]  # one round, nothing to go on with
PAGE = Path(__file__).resolve().parent.parent / "docs" / "write-a-strategy.md"


class Killed(Exception):
    pass


def state(folder: Path) -> dict[str, Tensor]:
    """Everything that a run has learnt."""
    saved = load_checkpoint(folder / "checkpoint")
    assert saved is not None and saved.server.round == 3
    server = saved.server
    out = {"row": server.row, **{f"memory.{k}": v for k, v in server.memory.items()}}
    out |= {f"base.{k}": v for k, v in server.base.items()}
    memory = DiskMemory(folder / "clients", len(server.row), saved.clients)
    for name in saved.clients:
        for client in memory.clients(name):
            row = memory.read(name, client)
            assert row is not None
            out[f"client {client}.{name}"] = row
    exported = load_file(folder / "adapters" / "round_00003" / "adapter_model.safetensors")
    return out | {f"adapter.{k}": v for k, v in exported.items()}


def killed_and_resumed(config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that dies behind the second update of its second round, and the rest of it."""
    plain = Trainer.train

    def dying(self: Trainer, plan: Any, *args: Any, **kwargs: Any) -> Iterator[ClientUpdates]:
        for n, update in enumerate(plain(self, plan, *args, **kwargs)):
            if plan.round == 2 and n == 2:
                raise Killed
            yield update

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", dying)
        with pytest.raises(Killed):
            simulate.run(config)
    return simulate.run(config, resume=True)


def configure(settings: Callable[..., Config], rule: str, name: str, **more: Any) -> Config:
    return settings(run__name=name, server__strategy=rule, evaluate__limit=2, **more)


@pytest.mark.parametrize("rule", RULES)
def test_a_killed_run_goes_on(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, rule: str, **more: Any
) -> None:
    whole = state(simulate.run(configure(settings, rule, "whole", **more)))
    resumed = state(killed_and_resumed(configure(settings, rule, "killed", **more), monkeypatch))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert all(torch.isfinite(value).all() for value in whole.values())


def test_a_run_over_a_corrected_base_goes_on(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    test_a_killed_run_goes_on(settings, monkeypatch, "fedavg", adapter__init="pissa")


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's code as the module that it names."""
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (module,) = re.findall(r"server\.strategy=(\S+)", text)
    file = tmp_path / f"{module.replace('.', '/')}.py"
    assert f"`{file.relative_to(tmp_path)}`" in text
    file.parent.mkdir()
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == module.split(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    return str(module)


def test_the_page_is_short_and_right(settings: Callable[..., Config], page: str) -> None:
    """A at 0.3 of the mean and B at the whole mean: FedAvg's first step, A's part times 0.3."""
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 60
    rows = {}
    for rule, options in (("fedavg", {}), (page, {"of_a": 1.0}), (page, {"of_a": 0.3})):
        name = f"{rule}-{options.get('of_a', 0)}".replace(".", "_")
        config = settings(run__name=name, server__strategy=rule, server__options=options,
                          server__rounds=1, evaluate__limit=0)  # fmt: skip
        rows[name] = load_checkpoint(simulate.run(config) / "checkpoint").server.row
    plain, same, less = rows.values()
    assert torch.equal(plain, same) and not torch.equal(plain, less)


def test_the_rule_of_the_page_goes_on(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    test_a_killed_run_goes_on(settings, monkeypatch, page)
