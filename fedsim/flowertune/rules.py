"""The rules for an app: what its keys and its code must say together, one method each."""

from __future__ import annotations

import ast
import math
from contextlib import suppress
from typing import Any

from fedsim.flowertune.reader import Found, shown
from fedsim.flowertune.rows import RowRules, code_of
from fedsim.flowertune.server import ServerRules
from fedsim.flowertune.settings import Unread
from fedsim.flowertune.syntax import Scope
from fedsim.flowertune.tables import (
    ARGS,
    BFLOAT16,
    BITS,
    COSINE,
    LORA,
    ONE_MEAN,
    PEFT,
    RENAMED,
    REQUIRED,
    UNSLOTH,
)

UNSLOTH_CALL = "FastLanguageModel.get_peft_model"


class Rules(RowRules, ServerRules):
    """The rules, on top of what reads keys and arguments."""

    def check(self, nodes: int | None, transformers: tuple[int, ...] | None) -> None:
        """All of them.

        Args:
            nodes: clients that the app asks for.
            transformers: the version that it pins.
        """
        self.all_keys()
        self.arguments("TrainingArguments", ARGS, {})
        self.arguments("SFTConfig", ARGS, {})
        self.required()
        self.adapter()
        self.bits()
        self.dtype()
        self.step(transformers)
        self.schedule()
        self.data(nodes)
        self.prompt()
        self.trainer()
        self.rate()
        self.strategy()
        if names := sorted(self.reading.environment):
            self.note("the environment", f"{', '.join(names)}: taken as not set")

    def required(self) -> None:
        """What every app must say."""
        for key in REQUIRED:
            if key not in self.given and RENAMED.get(key) not in self.found:
                target = {"model.quantization": "model.quantisation"}.get(key, RENAMED.get(key, ""))
                self.problem(key.replace("_", "-"), "missing; the official apps set it", target)

    def adapter(self) -> None:
        """What PEFT or unsloth is told of LoRA."""
        peft = self.arguments("LoraConfig", LORA, PEFT)
        if not (self.arguments(UNSLOTH_CALL, LORA, UNSLOTH) or peft):
            self.problem("LoraConfig", "the app's code never calls it: an unknown adapter")

    def bits(self) -> None:
        """How a base of 4 bits is quantised."""
        if self.given.get("model.quantization") != 4:
            return
        if any(name.endswith("FastLanguageModel.from_pretrained") for _, name, _, _ in self.calls):
            where = "unsloth's 4 bits"
            self.keep("model.quantisation", Found("nf4", where))
            self.keep("model.double_quantisation", Found(True, where))
            self.note(where, "nf4, double quantisation and bfloat16, as unsloth chooses on a GPU")
            self.keep("model.dtype", Found("bfloat16", where))
        elif not self.arguments("BitsAndBytesConfig", BITS, {"bnb_4bit_quant_type": "fp4"}):
            self.problem("BitsAndBytesConfig", "the app's code never calls it: unknown 4 bits",
                         "model.quantisation")  # fmt: skip

    def _bf16(self, value: Any, where: str) -> None:
        if value:
            self.keep("model.dtype", Found("bfloat16", where))
            self.note(where, BFLOAT16)

    def dtype(self) -> None:
        """The numbers in which 4-bit weights are multiplied, where code says so."""
        for file, name, call, scope in self.calls:
            for k in call.keywords if name.endswith("BitsAndBytesConfig") else []:
                if k.arg == "bnb_4bit_compute_dtype":
                    where = f"{file}: BitsAndBytesConfig({k.arg}) = {ast.unparse(k.value)}"
                    kind = self.torch_dtype(k.value, scope)
                    if kind == "bfloat16":
                        self._bf16(True, where)
                    elif kind != "float32":
                        self.problem(where, "torch.bfloat16 and torch.float32 are computed",
                                     "model.dtype")  # fmt: skip

    def torch_dtype(self, node: ast.expr, scope: Scope) -> str:
        """torch.bfloat16, or "bfloat16" -> bfloat16; "" where it cannot be read."""
        with suppress(Unread):
            return str(getattr(value := self.reading.value(node, scope), "last", value))
        return ""

    # -- a step ------------------------------------------------------------------------------------

    def step(self, transformers: tuple[int, ...] | None) -> None:
        """Micro-batches whose gradients are added up are one batch."""
        key = ARGS + "gradient_accumulation_steps"
        n, batch = self.given.get(key, 1), self.found.get("train.batch")
        if n == 1 or batch is None:
            return
        where = f"{key.replace('_', '-')} = {shown(n)}"
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            self.problem(where, "expected a whole number above 0", "train.batch")
        elif transformers is not None and transformers < ONE_MEAN:
            pinned = ".".join(map(str, transformers))
            self.problem(
                where, f"transformers {pinned} gives each micro-batch the same weight, fedsim each "
                "token of a step (as transformers from 4.46 on); set it to 1", "train.batch",
            )  # fmt: skip
        else:
            rows = batch.value * n
            self.found["train.batch"] = Found(rows, f"{batch.where}, {where}")
            self.note(where, f"a step of {rows} examples: the mean over all their answer tokens, "
                      "as transformers takes it from 4.46 on")  # fmt: skip

    def _gradient_accumulation_steps(self, value: Any, where: str) -> None:
        """`step` looks at it, when the batch is known."""

    _warmup_steps = _warmup_ratio = _gradient_accumulation_steps

    def schedule(self) -> None:
        """Warmup, where the schedule has one."""
        steps = self.number(ARGS + "warmup_steps", 0)
        ratio = self.number(ARGS + "warmup_ratio", 0) if steps < 1 else 0.0
        ratio = ratio or (steps if steps < 1 else 0.0)
        kind, visit = self.found.get("train.schedule"), self.found.get("train.steps")
        if not (steps or ratio) or kind is None or visit is None:
            return
        warmup = math.ceil(visit.value * ratio) if ratio else int(steps)
        where = f"{ARGS.replace('_', '-')}warmup = {ratio or int(steps):g}"
        if kind.value == "constant":
            self.note(where, "no part of the constant schedule")
        else:
            self.found["train.warmup"] = Found(warmup, where)

    def rate(self) -> None:
        """A round's learning rate is the template's."""
        for node, file, _ in self.flow.functions.get("cosine_annealing", []):
            if code_of(node) != COSINE:
                self.problem(f"{file}: cosine_annealing", "not the template's; restore it")
        calls = [c for c in self.calls if c[1].rpartition(".")[2] == "cosine_annealing"]
        for file, _, call, scope in calls:
            for key, rate in zip(("train.learning_rate_max", "train.learning_rate_min"),
                                 call.args[2:], strict=False):  # fmt: skip
                self.argument(key, rate, scope, f"{file}: cosine_annealing")
        if not calls and "SFTTrainer" in self.callees():
            self.problem("a round's learning rate", "the code never calls the template's "
                         "cosine_annealing; call it", "train.lr_max")  # fmt: skip
