"""A FlowerTune app's folder -> fedsim's configuration.

Nothing of the app is executed. Its settings come from `[tool.flwr.app.config]`; what apps write in
code instead (arguments of LoRA and of 4-bit loading, the prompt's columns, the partitioner, the
strategy) is read from its syntax. What cannot be honoured ends in one error that lists all of it.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import domains
from fedsim.config import read_toml
from fedsim.errors import ConfigError

ARGS, LORA, BITS = "train.training_arguments.", "LoraConfig.", "BitsAndBytesConfig."
# The app's keys (`_` for `-`, without `static.`), or arguments in its code -> fedsim's keys.
RENAMED = {
    "model.name": "model.name", "num_server_rounds": "server.rounds", "seed": "run.seed",
    "model.gradient_checkpointing": "train.recompute", "dataset.name": "data.train",
    "model.lora.peft_lora_r": "adapter.rank", LORA + "r": "adapter.rank",
    "model.lora.peft_lora_alpha": "adapter.alpha", LORA + "lora_alpha": "adapter.alpha",
    "model.lora.peft_lora_dropout": "adapter.dropout", LORA + "lora_dropout": "adapter.dropout",
    **dict.fromkeys((LORA + "target_modules", "model.lora.peft_lora_target_modules",
                     "model.lora.peft_target_modules", "model.lora.modules"), "adapter.targets"),
    BITS + "bnb_4bit_quant_type": "model.quantisation",
    BITS + "bnb_4bit_use_double_quant": "model.double_quantisation",
    "train.save_every_round": "server.export_every", "train.seq_length": "data.max_length",
    "train.learning_rate_max": "train.lr_max", "train.learning_rate_min": "train.lr_min",
    ARGS + "max_steps": "train.steps", ARGS + "per_device_train_batch_size": "train.batch",
    ARGS + "weight_decay": "train.weight_decay", ARGS + "max_grad_norm": "train.clip_norm",
    ARGS + "adam_beta1": "train.beta1", ARGS + "adam_beta2": "train.beta2",
    ARGS + "adam_epsilon": "train.eps", "model.seq_length": "data.max_length",
    "strategy.fraction_fit": "server.fraction", "strategy.fraction_train": "server.fraction",
    "task.name": "task", "reformat.llm_task": "task",
}  # fmt: skip
REQUIRED = ("model.name", "model.quantization", "train.learning_rate_max", "num_server_rounds",
            "train.learning_rate_min", "train.seq_length", ARGS + "max_steps", "dataset.name",
            ARGS + "lr_scheduler_type", ARGS + "per_device_train_batch_size",
            "strategy.fraction_train")  # fmt: skip
_FLOAT32 = ([False], "protocol `flowertune` computes in float32; delete it")
_PLAIN = ([False], "only plain LoRA is computed, no DoRA; set it to false")
_RULE = ([0, "fedavg"], "not the template's FedAvg; choose with `--set server.strategy=...`")
STRATEGY = ("strategy.name", "strategy.use_flexlora", "use_flexlora", "strategy.proximal_mu")
# Those with values that hold without a key of fedsim's -> (these values, why no other).
ONLY: dict[str, tuple[list[Any], str]] = {
    "model.quantization": ([0, 4], "only 4 bits are computed, or 0 for none"),
    "model.lora.peft_use_dora": _PLAIN, "model.lora.use_dora": _PLAIN, LORA + "use_dora": _PLAIN,
    LORA + "bias": (["none"], "no bias is trained"),
    "train.dynamic_data_seed": ([False], "a client sees the same examples at each visit under"
                                " protocol `flowertune`; set it to false"),
    "strategy.fraction_evaluate": ([0], "clients do not evaluate; set it to 0.0"),
    ARGS + "bf16": _FLOAT32, ARGS + "fp16": _FLOAT32, ARGS + "tf32": _FLOAT32,
    ARGS + "optim": (["adamw_torch", "adamw_torch_fused"], "torch's AdamW is computed; delete it"),
    ARGS + "lr_scheduler_type": (["constant"], "the learning rate is constant within a round and"
                                 ' a cosine over the rounds; set it to "constant"'),
    ARGS + "gradient_accumulation_steps": ([1], "versions of transformers weigh micro-batches"
        " differently; set it to 1 and per-device-train-batch-size to the product"),
    **dict.fromkeys(STRATEGY, _RULE),
}  # fmt: skip
# Those, or whole tables, that change no result -> why.
HARMLESS = {
    "model.attn": "an implementation of the same attention",
    "model.trust_remote_code": "code from a hub is never executed",
    LORA + "task_type": "only causal models are loaded",
    BITS + "load_in_4bit": "model.quantization decides", BITS + "load_in_8bit": "likewise",
    ARGS + "learning_rate": "the app overwrites it in each round",
    ARGS + "num_train_epochs": "overridden by max-steps, which must be positive",
    ARGS + "gradient_checkpointing": "memory only; model.gradient-checkpointing decides",
    ARGS + "warmup_steps": "no part of the constant schedule",
    **dict.fromkeys(("wandb", "use_wandb", "run_name", ARGS + "report_to", ARGS + "logging_steps"),
                    "logging"),
    **dict.fromkeys((ARGS + "output_dir", ARGS + "save_steps", ARGS + "save_strategy",
                     ARGS + "save_total_limit"), "the trainer's own checkpoints in a visit"),
}  # fmt: skip
# Arguments that the templates pass to FedAvg, and methods that they watch.
PASSED = {"fraction_fit", "fraction_train", "fraction_evaluate", "on_fit_config_fn", "evaluate_fn",
          "fit_metrics_aggregation_fn", "initial_parameters"}  # fmt: skip
WATCHED = {"__init__", "configure_fit", "aggregate_fit", "configure_train", "aggregate_train"}
# What peft and transformers take where the code says nothing.
DEFAULTS = {"LoraConfig": {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ()},
            "BitsAndBytesConfig": {"bnb_4bit_quant_type": "fp4"}, "reformat": {}}  # fmt: skip
# Earlier ids of the sets that the official apps now take from `flwrlabs`.
OLDER = {
    "vicgalle/alpaca-gpt4": "flwrlabs/alpaca-gpt4",
    "FinGPT/fingpt-sentiment-train": "flwrlabs/fingpt-sentiment-train",
    "medalpaca/medical_meadow_medical_flashcards": "flwrlabs/medical-meadow-medical-flashcards",
    "lucasmccabe-lmi/CodeAlpaca-20k": "flwrlabs/code-alpaca-20k",
}
# The template's `llm_task` -> domains whose rows it formats as fedsim does.
TASKS = {"generalnlp": ["general"], "medical": ["medical"],
         "finance": ["finance", "coding"], "code": ["finance", "coding"]}  # fmt: skip


@dataclass(frozen=True)
class App:
    """What an app's folder asks for."""

    name: str
    values: dict[str, Any]  # for fedsim.config.build
    ignored: tuple[str, ...]  # its Python files, none of which is executed


def _convert(target: str, value: Any) -> Any:
    if target in ("train.steps", "server.fraction", "train.clip_norm") and not (
        isinstance(value, int | float) and value > 0
    ):
        raise ValueError("expected a number above 0")  # -1 steps are epochs; 0 switches off
    if target == "task":
        return str(value).replace("-", "")
    if target == "adapter.targets":
        if value == "all":  # in the code of those who have it: every linear of a Llama
            value = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
        return tuple(sorted(map(str.strip, value.split(",") if isinstance(value, str) else value)))
    return value


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _passes_through(method: ast.stmt) -> bool:
    """Whether a method returns, untouched, what its one `super()` call of the same name does."""
    if not isinstance(method, ast.FunctionDef):
        return isinstance(method, ast.Expr)  # a docstring
    nodes, name = list(ast.walk(method)), f"super().{method.name}"
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == name]
    if len(calls) != 1 or method.name not in WATCHED:
        return False
    if method.name == "__init__":
        return ast.unparse(calls[0]) == "super().__init__(**kwargs)"
    bound = [n.targets[0] for n in nodes if isinstance(n, ast.Assign) and n.value is calls[0]]
    result = bound[0] if bound else calls[0]
    stored = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    once = all(stored.count(n.id) == 1 for n in ast.walk(result)
               if isinstance(n, ast.Name) and n.id in stored)  # fmt: skip
    return once and all(n.value is not None and ast.unparse(n.value) == ast.unparse(result)
                        for n in nodes if isinstance(n, ast.Return))  # fmt: skip


class _Reader:
    """Collects values for fedsim's keys, and every reason why the app cannot run as it is."""

    def __init__(self, config: Mapping[str, Any], code: Mapping[str, ast.Module]) -> None:
        self.keys = [(w.replace("-", "_").removeprefix("static."), w, v) for w, v in _flat(config)]
        self.given = {key: value for key, _, value in self.keys}
        self.nodes = [(f, tree, n) for f, tree in code.items() for n in ast.walk(tree)]
        self.found: dict[str, tuple[Any, str]] = {}
        self.problems: list[str] = []

    def problem(self, where: str, why: object) -> None:
        self.problems.append(f"{where}: {why}")

    def take(self, key: str, value: Any, where: str) -> None:
        """One of the app's keys, or an argument in its code."""
        where = f"{where} = {json.dumps(value, default=str)}"
        if key in ONLY:
            if value not in ONLY[key][0]:
                self.problem(where, ONLY[key][1])
        elif key in RENAMED:
            try:
                value = _convert(RENAMED[key], value)
            except ValueError as why:
                self.problem(where, why)
            old, origin = self.found.setdefault(RENAMED[key], (value, where))
            if old != value:
                self.problem(where, f"but {origin}; make them agree")
        elif not {key, key.partition(".")[0]} & HARMLESS.keys():
            close = difflib.get_close_matches(key, [*RENAMED, *ONLY, *HARMLESS], 1)
            self.problem(
                where, f"unknown; did you mean {close[0]}?" if close else "unknown; delete it"
            )

    def calls(self, name: str) -> list[tuple[str, ast.Module, ast.Call, str]]:
        """Calls whose name matches an expression: (file, its syntax, call, full name)."""
        calls = [
            (f, t, n, ast.unparse(n.func)) for f, t, n in self.nodes if isinstance(n, ast.Call)
        ]
        return [found for found in calls if re.fullmatch(rf"(.*\\.)?{name}", found[3])]

    def arguments(self, callee: str) -> bool:
        """Take the arguments of every call of `callee`. False: there is no call."""
        for file, tree, call, _ in self.calls(callee):
            written = {f"{k.arg}": k.value for k in call.keywords}
            for name in sorted({*DEFAULTS[callee], *written}):
                key, where = f"{callee}.{name}", f"{file}: {callee}({name})"
                if name not in written:
                    self.take(key, DEFAULTS[callee][name], where)
                elif key not in HARMLESS:
                    self.argument(key, written[name], tree, where)
        return bool(self.calls(callee))

    def argument(self, key: str, node: ast.expr, tree: ast.Module, where: str) -> None:
        """A literal, or else something that one of the app's keys for the same thing decides."""
        with suppress(ValueError, TypeError):
            return self.take(key, ast.literal_eval(node), where)
        text = ast.unparse(tree if isinstance(node, ast.Name) else node)
        keys = [k for k in self.given if RENAMED.get(k) == RENAMED.get(key)]
        plain = (ast.Name, ast.Attribute, ast.Call, ast.Constant, ast.expr_context)
        if not all(isinstance(part, plain) for part in ast.walk(node)) or not any(
            key.rpartition(".")[2] in text for key in keys
        ):
            self.problem(f"{where} = {ast.unparse(node)}", "computed by code, which is not executed;"
                         " write the value")  # fmt: skip
