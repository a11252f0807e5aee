"""What every operation owes its callers, whatever it computes.

Proved: torch's own checks of an operation pass (schema, autograd, fake form, tracing); a dtype,
shape or stride that does not fit is refused by name; the number of threads changes no bit. About 10
seconds on one thread.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fedsim_kernels import native
from fedsim_kernels.spec import CASES, draw
from tests.implementations import DTYPES, IMPLEMENTATIONS, ISAS, KERNELS, OPERATIONS, using
from tests.test_kernels import WIDE

Call = tuple[Any, tuple[Any, ...]]


def copy(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


class Recorder(TorchDispatchMode):
    """Keeps what the first call of each of our operations got."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fedsim":
            name = func._schema.name.partition("::")[2]
            kept = tree_map_only(Tensor, copy, args)
            if name.endswith("_backward"):  # nothing asks for second derivatives
                kept = tree_map_only(Tensor, Tensor.detach, kept)
            self.calls.setdefault(name, (func, kept))
        return func(*args, **(kwargs or {}))


@cache
def calls() -> dict[str, Call]:
    """An example of a call of each operation."""
    case = next(c for c in CASES if c.name == "prefix-chain")
    recorder = Recorder()
    with recorder:
        for kernel in KERNELS.values():
            kernel.run(case, kernel.inputs(case, torch.float32))
        # Those that stand inside another operation, or together with a frozen product.
        softmax = (draw(5, 11), torch.arange(5), draw(5, seed=1).exp(), 2.0, 3.0)
        torch.ops.fedsim.softmax_xent(*softmax)
        y, x, a, b, _, scale, grad_a, grad_b, _ = KERNELS["grouped_lora"].inputs(
            case, torch.float32
        )
        torch.ops.fedsim.lora_linear(
            x.requires_grad_(), draw(y.shape[1], x.shape[1]), None, torch.zeros(()), a, b, grad_a,
            grad_b, scale, case.segments.tables(x.device), [0], [y.shape[1]], 0,
        )  # fmt: skip
    return recorder.calls


@pytest.mark.parametrize("name", [*OPERATIONS, "lora_linear"])
def test_opcheck(name: str) -> None:
    operation, arguments = calls()[name]
    found = torch.library.opcheck(operation, tree_map_only(Tensor, copy, arguments))
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


# Of each argument: is another dtype ("d"), are elements that do not lie side by side ("s"), is one
# element less in the last dimension ("n") an error?
REFUSED: dict[str, dict[int, str]] = {
    "adamw": {0: "dsn", 1: "dsn", 2: "dsn", 3: "dsn", 4: "dn", 5: "n", 6: "dn", 7: "dn"},
    "dropout": {0: "ds", 1: "dsn"},
    "linear_xent": {0: "dn", 1: "dn", 2: "dn", 3: "dn"},
    "rms_norm": {0: "dsn", 1: "dn"},
    "rms_norm_backward": {0: "dsn", 1: "dsn", 2: "dn", 3: "dn"},
    "rotary": {0: "dsn", 1: "dsn", 2: "dsn", 3: "dsn"},
    "rotary_backward": {0: "dsn", 1: "dsn", 2: "dsn", 3: "dsn"},
    "softmax_xent": {0: "ds", 1: "dn", 2: "dn"},
    "swiglu": {0: "ds"},
    "swiglu_backward": {0: "dsn", 1: "dsn"},
    "weighted_rows": {0: "dn", 1: "dsn", 2: "dn", 3: "dn"},
}


def spoilt(x: Tensor, how: str) -> Tensor:
    x = x.detach()
    if how == "d":
        return x.to(torch.int32 if x.is_floating_point() else torch.float32)
    if how == "s":
        return x.mT.contiguous().mT
    return x[..., :-1].contiguous()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_does_not_fit(implementation: str, name: str) -> None:
    operation, arguments = calls()[name]
    arguments = tree_map_only(Tensor, Tensor.detach, arguments)
    if name == "adamw":
        arguments = (*arguments[:7], torch.ones_like(arguments[0][0]), *arguments[8:])
    with using(implementation):
        operation(*tree_map_only(Tensor, Tensor.clone, arguments))  # as it is, it fits
        for index, kinds in REFUSED[name].items():
            for how in kinds:
                bad = list(arguments)
                bad[index] = spoilt(arguments[index], how)
                with pytest.raises(ValueError, match=r"got .*; expected"):
                    operation(*bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({9: 0.5}, "beta1 0.9, beta2 0.5"), ({9: 1.0}, "beta2 1.0"), ({10: 0.0}, "eps 0.0"),
    ],
)  # fmt: skip
def test_adamw_refuses_what_has_no_bound(change: dict[int, float], message: str) -> None:
    operation, arguments = calls()["adamw"]
    with pytest.raises(ValueError, match=message):
        operation(*(change.get(i, x) for i, x in enumerate(arguments)))


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_dropout_refuses_impossible_probabilities(p: float) -> None:
    operation, arguments = calls()["dropout"]
    with pytest.raises(ValueError, match="expected 0 <= p < 1"):
        operation(*arguments[:-1], p)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, isa: str, name: str, dtype: torch.dtype
) -> None:
    """Sizes at which every kernel wakes its threads; products of libraries stay on one."""
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(native, "_threads", lambda n=threads: n)
        with using(isa):
            results.append(KERNELS[name].run(WIDE, KERNELS[name].inputs(WIDE, dtype)))
    for one, *more in zip(*results, strict=True):
        assert one.isfinite().all() and all(torch.equal(one, other) for other in more)


def test_threads_follow_torch() -> None:
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert native._threads() == n
    finally:
        torch.set_num_threads(before)
