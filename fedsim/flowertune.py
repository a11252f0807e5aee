"""A FlowerTune app's folder -> fedsim's configuration.

Nothing of the app is executed. Its settings come from `[tool.flwr.app.config]`; what the official
apps write in code instead (LoRA and 4-bit arguments, the prompt's columns, the partitioner, the
strategy) is read from the syntax. Whatever cannot be honoured ends in one error that lists all.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import domains
from fedsim.config import read_toml
from fedsim.errors import ConfigError

ARGS = "train.training_arguments."
# What participants' code means by `all`.
LINEARS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def _targets(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value or ()
    return LINEARS if value == "all" else tuple(sorted(n.strip() for n in names if n.strip()))


def _positive(value: Any) -> Any:
    if not isinstance(value, int | float) or value <= 0:
        raise ValueError("expected a number above 0")
    return value


# The app's key (with `_` for `-`, without `static.`) -> fedsim's.
RENAMED = {
    "dataset.name": "data.train", "model.name": "model.name", "num_server_rounds": "server.rounds",
    "model.gradient_checkpointing": "train.recompute", "model.seq_length": "data.max_length",
    "model.lora.peft_lora_r": "adapter.rank", "model.lora.peft_lora_alpha": "adapter.alpha",
    "model.lora.peft_lora_dropout": "adapter.dropout", "model.lora.modules": "adapter.targets",
    "model.lora.peft_lora_target_modules": "adapter.targets",
    "model.lora.peft_target_modules": "adapter.targets", "model.lora.target_modules":
    "adapter.targets", "train.seq_length": "data.max_length", "seed": "run.seed",
    "train.save_every_round": "server.export_every", "train.learning_rate_max": "train.lr_max",
    "train.learning_rate_min": "train.lr_min", "strategy.fraction_fit": "server.fraction",
    "strategy.fraction_train": "server.fraction", ARGS + "seed": "run.seed",
    ARGS + "max_steps": "train.steps", ARGS + "per_device_train_batch_size": "train.batch",
    ARGS + "weight_decay": "train.weight_decay", ARGS + "max_grad_norm": "train.clip_norm",
    ARGS + "adam_beta1": "train.beta1", ARGS + "adam_beta2": "train.beta2",
    ARGS + "adam_epsilon": "train.eps",
}  # fmt: skip
CONVERT: dict[str, Callable[[Any], Any]] = {
    "adapter.targets": _targets,
    # A client that trains for epochs has max-steps = -1; Flower trains nobody at fraction 0;
    # transformers switches clipping off at 0.
    **dict.fromkeys(("train.steps", "server.fraction", "train.clip_norm"), _positive),
}
REQUIRED = ("model.name", "train.learning_rate_max", "train.learning_rate_min", "train.seq_length",
            ARGS + "max_steps", ARGS + "lr_scheduler_type", ARGS + "per_device_train_batch_size",
            "num_server_rounds", "dataset.name")  # fmt: skip

_FLOAT32 = ((False,), "protocol `flowertune` computes in float32; delete it")
_PLAIN = ((False,), "only plain LoRA is computed; set it to false")
_RULE = ((0, "fedavg"), "not the template's FedAvg; choose with `--set server.strategy=...`")
STRATEGY = ("strategy.name", "strategy.use_flexlora", "use_flexlora", "strategy.proximal_mu")
# Keys with values that can be honoured without a key of fedsim's -> (those values, reason).
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.quantization": ((4, 0), "only 4 bits are computed; set it to 4"),
    "model.lora.peft_use_dora": _PLAIN, "model.lora.use_dora": _PLAIN,
    "model.lora.use_rslora": _PLAIN, "model.lora.bias": (("none",), "no bias is trained"),
    "train.dynamic_data_seed": ((False,), "protocol `flowertune` trains on the same examples at"
                                " each visit; set it to false"),
    "train.validation_split_ratio": ((0,), "clients hold nothing back; delete it"),
    "strategy.fraction_evaluate": ((0,), "clients do not evaluate; set it to 0.0"),
    ARGS + "bf16": _FLOAT32, ARGS + "fp16": _FLOAT32, ARGS + "tf32": _FLOAT32,
    ARGS + "optim": (("adamw_torch", "adamw_torch_fused"), "AdamW of torch is computed; delete it"),
    ARGS + "lr_scheduler_type": (("constant",), "the learning rate is constant within a round and"
                                 ' a cosine over the rounds; set it to "constant"'),
    ARGS + "gradient_accumulation_steps": ((1,), "versions of transformers weigh micro-batches"
        " differently; set it to 1 and per-device-train-batch-size to the product"),
    **dict.fromkeys(STRATEGY, _RULE),
}  # fmt: skip
# Keys, or whole tables, that change no result -> why.
HARMLESS = {
    "model.attn": "one of several implementations of the same attention",
    "model.trust_remote_code": "code from a hub is never executed",
    "task.name": "compared with the dataset's domain",
    "train.validation_split_seed": "read only where a split is asked for, which is an error",
    ARGS + "learning_rate": "the app overwrites it in each round",
    ARGS + "num_train_epochs": "overridden by max-steps, which must be positive",
    ARGS + "gradient_checkpointing": "memory only; model.gradient-checkpointing decides",
    **dict.fromkeys((ARGS + "warmup_steps", ARGS + "warmup_ratio"), 'no part of "constant"'),
    **dict.fromkeys(("wandb", "use_wandb", "run_name", ARGS + "run_name", ARGS + "report_to",
                     ARGS + "logging_steps", ARGS + "logging_strategy"), "logging"),
    **dict.fromkeys((ARGS + "output_dir", ARGS + "save_steps", ARGS + "save_strategy",
                     ARGS + "save_total_limit"), "the trainer's own checkpoints in a visit"),
}  # fmt: skip
# Arguments in code -> (key of RENAMED or ONLY, or fedsim's key; default of peft, transformers).
LORA = {"r": ("adapter.rank", 8), "lora_alpha": ("adapter.alpha", 8),
        "lora_dropout": ("adapter.dropout", 0.0), "target_modules": ("adapter.targets", None),
        "use_dora": ("model.lora.use_dora", False), "bias": ("model.lora.bias", "none"),
        "use_rslora": ("model.lora.use_rslora", False)}  # fmt: skip
FOUR_BIT = {"bnb_4bit_quant_type": ("model.quantisation", "fp4"),
            "bnb_4bit_use_double_quant": ("model.double_quantisation", False)}  # fmt: skip
# Earlier ids of the sets that the official apps now take from `flwrlabs`.
OLDER = {
    "vicgalle/alpaca-gpt4": "flwrlabs/alpaca-gpt4",
    "FinGPT/fingpt-sentiment-train": "flwrlabs/fingpt-sentiment-train",
    "medalpaca/medical_meadow_medical_flashcards": "flwrlabs/medical-meadow-medical-flashcards",
    "lucasmccabe-lmi/CodeAlpaca-20k": "flwrlabs/code-alpaca-20k",
}
# The template's `llm_task` -> domains whose rows it formats as fedsim does.
TASKS = {"generalnlp": ("general",), "medical": ("medical",),
         "finance": ("finance", "coding"), "code": ("finance", "coding")}  # fmt: skip
_CONFIGURED = object()  # an argument that the code takes from a key of the configuration


@dataclass(frozen=True)
class App:
    """What an app's folder asks for."""

    name: str
    values: dict[str, Any]  # for fedsim.config.build
    ignored: tuple[str, ...]  # its Python files, none of which is executed


def _callee(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _argument(node: ast.expr, tree: ast.Module, leaves: set[str]) -> Any:
    """Literal value or default; _CONFIGURED where one of `leaves` gives it; else ValueError."""
    with suppress(ValueError, TypeError):
        return ast.literal_eval(node)
    scope: ast.AST = node
    if isinstance(node, ast.Name):
        assigned = [a.value for a in ast.walk(tree) if isinstance(a, ast.Assign)
                    and node.id in map(ast.unparse, a.targets)]  # fmt: skip
        if len(assigned) == 1:
            return _argument(assigned[0], tree, leaves)
        scope = tree
    plain = (ast.Name, ast.Attribute, ast.Call, ast.Constant, ast.expr_context)
    if all(isinstance(n, plain) for n in ast.walk(node)):
        words = {getattr(n, "attr", getattr(n, "value", "")) for n in ast.walk(scope)
                 if isinstance(n, ast.Attribute | ast.Constant)}  # fmt: skip
        if leaves & words:
            return _CONFIGURED
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and _callee(call) in ("get", "getattr"):
                with suppress(ValueError, TypeError):
                    return ast.literal_eval(call.args[-1])
    raise ValueError(f"{ast.unparse(node)} is computed by code, which is not executed; write the value")


def _passes_through(method: ast.FunctionDef) -> bool:
    """Whether it returns, untouched, what its one `super()` call of the same name does."""
    nodes = list(ast.walk(method))
    calls = [n for n in nodes if isinstance(n, ast.Call)
             and ast.unparse(n.func) == f"super().{method.name}"]  # fmt: skip
    if len(calls) != 1:
        return False
    if method.name == "__init__":
        return not calls[0].args and all(k.arg is None for k in calls[0].keywords)
    stored = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    results = [ast.unparse(calls[0])] + [
        ast.unparse(n.targets[0]) for n in nodes if isinstance(n, ast.Assign)
        and n.value is calls[0] and all(stored.count(t.id) == 1 for t in ast.walk(n.targets[0])
                                        if isinstance(t, ast.Name))
    ]  # fmt: skip
    returned = [ast.unparse(n.value) for n in nodes if isinstance(n, ast.Return) and n.value]
    return bool(returned) and set(returned) <= set(results)
