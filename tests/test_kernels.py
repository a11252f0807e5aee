"""Every hot operation against its definition in float64.

Proved of each file of kernels/ that has a KERNEL, in plain PyTorch and in C++ for every instruction
set of this processor: outputs and gradients lie within the one tolerance rule, in fp32 and bf16,
over one list of cases; wrong arithmetic does not; and a sick slot changes no bit of another's
results. About 15 seconds on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsim_kernels import linear_xent, native
from fedsim_kernels.spec import CASES, Case, KernelSpec, errors
from tests.conftest import require
from tests.implementations import IMPLEMENTATIONS, ISAS, KERNELS, dtypes, using

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Whole vectors in every inner loop, and more than one piece of work for every thread.
WIDE = Case("wide", (70, 40, 31), (0, 0, 2), features=(256, 200), heads=(6, 2, 32))


def test_every_kernel_is_found() -> None:
    """A file cannot lose its KERNEL unnoticed, nor a KERNEL one of its operations."""
    assert set(KERNELS) == {
        "adamw", "dropout", "grouped_lora", "linear_xent", "packed_attention", "reduce",
        "rms_norm", "rotary", "swiglu",
    }  # fmt: skip
    names = map(str, torch._C._dispatch_get_all_op_names())
    defined = {n.removeprefix("fedsim::") for n in names if n.startswith("fedsim::")}
    listed = {name for kernel in KERNELS.values() for name in kernel.operations}
    assert defined == listed | {"lora_linear"}  # grouped_lora together with its frozen product


def worst(kernel: KernelSpec, case: Case, dtype: torch.dtype = torch.float32) -> float:
    return max(map(max, errors(kernel, case, dtype)))


@pytest.mark.parametrize(
    ("kernel", "case", "dtype"),
    [
        pytest.param(kernel, case, dtype, id=f"{kernel.name}-{case.name}-{str(dtype)[6:]}")
        for kernel in KERNELS.values()
        for case in (*kernel.cases, WIDE)
        for dtype in dtypes(kernel)
    ],
)
@each_implementation
def test_follows_its_definition(
    monkeypatch: pytest.MonkeyPatch, implementation: str, kernel: KernelSpec, case: Case,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    monkeypatch.setattr(linear_xent, "CHUNK", 4)  # cases lie on both sides of a chunk's edge
    with using(implementation):
        assert worst(kernel, case, dtype) <= 1


# Wrong arithmetic breaks the rule: what a call of C++ gets is changed on its way

Change = Callable[[list[Any]], None]


def scaled(index: int, by: float) -> Change:
    def change(arguments: list[Any]) -> None:
        arguments[index] = arguments[index] * by

    return change


def swapped(i: int, j: int) -> Change:
    def change(arguments: list[Any]) -> None:
        arguments[i], arguments[j] = arguments[j], arguments[i]

    return change


def became(index: int, value: Callable[[Any], Any]) -> Change:
    def change(arguments: list[Any]) -> None:
        arguments[index] = value(arguments[index])

    return change


MUTANTS: list[tuple[str, str, str, Change]] = [
    ("grouped_lora", "a wrong scale", "grouped_lora_f32", scaled(5, 1.001)),
    ("grouped_lora", "gradients of another scale", "grouped_lora_backward_f32", scaled(6, 1.001)),
    ("packed_attention", "a wrong scale", "packed_attention_f32", scaled(-3, 1.001)),
    ("rms_norm", "another eps", "rms_norm_f32", scaled(4, 10.0)),
    ("rms_norm", "gradients of another weight", "rms_norm_backward_f32", scaled(2, 1.001)),
    ("rotary", "sine for cosine", "rotary_f32", swapped(2, 3)),
    ("rotary", "halves of the sine swapped", "rotary_backward_f32",
     became(3, lambda s: s.roll(s.shape[1] // 2, 1))),
    ("swiglu", "gate for up", "swiglu_f32", became(0, lambda y: y.roll(y.shape[1] // 2, 1))),
    ("linear_xent", "every label counts alike", "softmax_xent_f32", became(2, torch.ones_like)),
    ("linear_xent", "no soft-cap", "softmax_xent_f32", became(5, lambda _: 0.0)),
    ("dropout", "the mask of another module", "dropout_f32", became(4, lambda m: m + 1)),
    ("adamw", "corrections swapped", "adamw_update", swapped(7, 8)),
    ("adamw", "no weight decay", "adamw_update", became(13, lambda _: 0.0)),
    ("reduce", "not from the start row", "weighted_rows", became(2, lambda _: None)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "function", "change"),
    [pytest.param(n, f, change, id=f"{n}: {what}") for n, what, f, change in MUTANTS],
)
def test_wrong_arithmetic_breaks_the_rule(
    monkeypatch: pytest.MonkeyPatch, name: str, function: str, change: Change
) -> None:
    require("native", bool(ISAS), "the C++ kernels are not built")
    right, called = native.call, []

    def call(name: str, *arguments: Any) -> None:
        given = list(arguments)
        if name == function:
            change(given)
            called.append(given)  # what was changed must outlive the call
        right(name, *given)

    case = next(c for c in CASES if c.name == "softcap")
    with using(ISAS[0]):
        assert worst(KERNELS[name], case) <= 1
        monkeypatch.setattr(native, "call", call)
        assert worst(KERNELS[name], case) > 1
    assert called


def test_wrong_results_are_never_right() -> None:
    """The rule itself: NaN and another shape are errors without measure."""
    kernel, case = KERNELS["swiglu"], CASES[0]

    def run(change: Callable[[Any], Any]) -> list[tuple[float, float]]:
        def changed(case: Case, inputs: Any) -> Any:
            out, grad = kernel.run(case, inputs)
            return change(out), grad

        spoilt = KernelSpec(
            "spoilt", kernel.operations, kernel.inputs, changed, kernel.formula, kernel.work
        )
        return errors(spoilt, case, torch.float32)

    def with_nan(x: torch.Tensor) -> torch.Tensor:
        x[0, 0] = float("nan")
        return x

    for change in (with_nan, lambda x: x[:-1]):
        assert run(change)[0] == (float("inf"), float("inf"))
        assert max(run(change)[1]) <= 1


# A sick slot stays alone. Of each input and output: does it have an entry for each packed row
# ("r"), for each slot ("s"), or is it shared ("-")? `reduce` sums over slots: test_rows.py.

PARTS = {
    "grouped_lora": ("rrssrsssr", "rssr"), "packed_attention": ("rrrr", "rrrr"),
    "linear_xent": ("r--rr", "rr"), "rms_norm": ("r-r", "rrr"), "rotary": ("rr--rr", "rrrr"),
    "swiglu": ("rr", "rr"), "dropout": ("r-r", "rr"), "adamw": ("ssss----", "ssss"),
}  # fmt: skip


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"reduce"}))
@each_implementation
def test_poison_stays_in_its_slot(implementation: str, name: str, poison: float) -> None:
    """Everything of one slot is poisoned; no bit of another's results changes."""
    kernel = KERNELS[name]
    for case in (c for c in kernel.cases if len(set(c.slots)) > 1):
        sick = case.slots[-1]
        where = {"r": case.slot_of_row() == sick, "s": torch.arange(len(case.ranks)) == sick}
        inputs = kernel.inputs(case, torch.float32)
        with using(implementation):
            before = kernel.run(case, inputs)
            for x, part in zip(inputs, PARTS[name][0], strict=True):
                if part in where:
                    x[where[part]] = poison
            after = kernel.run(case, inputs)
        masks = [where[part] for part in PARTS[name][1]]
        poisoned = [x[mask] for x, mask in zip(after, masks, strict=True)]
        assert not all(x.isfinite().all() for x in poisoned), case.name  # it was read
        for old, new, mask in zip(before, after, masks, strict=True):
            assert torch.equal(old[~mask], new[~mask]), case.name


# Grouped LoRA writes where it must not only by mistake


@each_implementation
def test_grouped_lora_touches_only_what_trains(implementation: str) -> None:
    """Idle slots and ranks beyond a client's own keep their gradients to the bit."""
    kernel = KERNELS["grouped_lora"]
    for case in kernel.cases:
        inputs = kernel.inputs(case, torch.float32)
        with using(implementation):
            _, grad_a, grad_b, _ = kernel.run(case, inputs)
        r, n = max(case.ranks), len(case.widths) or 1
        for slot, rank in enumerate(case.ranks):
            used = rank if slot in case.slots else 0
            for m in range(n):
                rest = slice(m * r + used, (m + 1) * r)
                assert torch.equal(grad_a[slot, rest], inputs[6][slot, rest]), case.name
            assert torch.equal(grad_b[slot, :, used:], inputs[7][slot, :, used:]), case.name


@each_implementation
def test_grouped_lora_without_dx(implementation: str) -> None:
    """Below the first adapter nothing learns: the other gradients keep their bits."""
    kernel, case = KERNELS["grouped_lora"], CASES[3]
    inputs = kernel.inputs(case, torch.float32)
    y, x, a, b, g, scale, grad_a, grad_b, _ = inputs
    columns = ([0], [case.features[1]])
    with using(implementation):
        want = kernel.run(case, inputs)
        tables = case.segments.tables(y.device)
        h = torch.ops.fedsim.grouped_lora(y, x, a, b, scale, tables, *columns)
        torch.ops.fedsim.grouped_lora_backward(
            g, x, h, a, b, scale, grad_a, grad_b, None, tables, *columns
        )
    assert torch.equal(grad_a, want[1]) and torch.equal(grad_b, want[2])
