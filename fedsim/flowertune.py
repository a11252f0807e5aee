"""A FlowerTune app's folder -> fedsim's configuration.

Nothing of the app is executed. Its settings come from `[tool.flwr.app.config]`; what apps write in
code instead (LoRA and 4-bit arguments, prompt, partitioner, strategy) is read from its syntax.
What cannot be honoured ends in one error that lists all of it.
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
    "model.name": "model.name", "model.gradient_checkpointing": "train.recompute",
    "model.lora.peft_lora_r": "adapter.rank", LORA + "r": "adapter.rank", "seed": "run.seed",
    "model.lora.peft_lora_alpha": "adapter.alpha", LORA + "lora_alpha": "adapter.alpha",
    "model.lora.peft_lora_dropout": "adapter.dropout", LORA + "lora_dropout": "adapter.dropout",
    **dict.fromkeys((LORA + "target_modules", "model.lora.peft_lora_target_modules",
                     "model.lora.peft_target_modules", "model.lora.modules"), "adapter.targets"),
    BITS + "bnb_4bit_quant_type": "model.quantisation", "num_server_rounds": "server.rounds",
    BITS + "bnb_4bit_use_double_quant": "model.double_quantisation", "reformat.llm_task": "task",
    "dataset.name": "data.train", "train.save_every_round": "server.export_every",
    "train.seq_length": "data.max_length", ARGS + "adam_epsilon": "train.eps",
    "train.learning_rate_max": "train.lr_max", "train.learning_rate_min": "train.lr_min",
    ARGS + "max_steps": "train.steps", ARGS + "per_device_train_batch_size": "train.batch",
    ARGS + "weight_decay": "train.weight_decay", ARGS + "max_grad_norm": "train.clip_norm",
    ARGS + "adam_beta1": "train.beta1", ARGS + "adam_beta2": "train.beta2", "task.name": "task",
    "strategy.fraction_fit": "server.fraction", "strategy.fraction_train": "server.fraction",
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
    LORA + "bias": (["none"], "no bias is trained"), **dict.fromkeys(STRATEGY, _RULE),
    "strategy.proximal_mu": ([0], "delete it; choose with `--set server.strategy=...`"),
    "train.dynamic_data_seed": ([False], "every visit sees the same examples; set it to false"),
    "strategy.fraction_evaluate": ([0], "clients do not evaluate; set it to 0.0"),
    ARGS + "bf16": _FLOAT32, ARGS + "fp16": _FLOAT32, ARGS + "tf32": _FLOAT32,
    ARGS + "optim": (["adamw_torch", "adamw_torch_fused"], "torch's AdamW is computed; delete it"),
    ARGS + "lr_scheduler_type": (["constant"], 'a round has one learning rate; set "constant"'),
    # Whether each micro-batch or each token weighs the same depends on transformers' version.
    ARGS + "gradient_accumulation_steps": ([1], "set it to 1 and multiply the batch size by it"),
}  # fmt: skip
# Those, or whole tables, that change no result -> why.
HARMLESS = {
    "model.attn": "an implementation of the same attention",
    "model.trust_remote_code": "code from a hub is never executed",
    LORA + "task_type": "causal", BITS + "load_in_4bit": "model.quantization decides",
    ARGS + "num_train_epochs": "overridden by max-steps, which must be positive",
    ARGS + "gradient_checkpointing": "memory only; model.gradient-checkpointing decides",
    ARGS + "warmup_steps": "no part of the constant schedule", "run_name": "logging",
    **dict.fromkeys((ARGS + "output_dir", ARGS + "learning_rate"), "the app overwrites it"),
    **dict.fromkeys((ARGS + "save_steps", ARGS + "save_total_limit"), "checkpoints in a visit"),
    **dict.fromkeys(("wandb", "use_wandb", ARGS + "report_to", ARGS + "logging_steps"), "logging"),
}  # fmt: skip
# Arguments that the templates pass to FedAvg, and methods that they watch.
PASSED = {"fraction_fit", "fraction_train", "fraction_evaluate", "on_fit_config_fn", "evaluate_fn",
          "fit_metrics_aggregation_fn", "initial_parameters"}  # fmt: skip
WATCHED = {"__init__", "configure_fit", "aggregate_fit", "configure_train", "aggregate_train"}
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
    if target in ("train.steps", "server.fraction", "train.clip_norm") and value <= 0:
        raise ValueError("expected a number above 0")  # -1 steps are epochs; 0 switches off
    if target == "adapter.targets":
        if value == "all":  # in the code of those who have it: every linear of a Llama
            value = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
        names = value.split(",") if isinstance(value, str) else value or ()
        return tuple(sorted(name.strip() for name in names if name.strip()))
    return value


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        below = _flat(value) if isinstance(value, dict) else [("", value)]
        yield from ((f"{key}.{rest}" if rest else key, leaf) for rest, leaf in below)


def _passes_through(method: ast.stmt) -> bool:
    """Whether a method returns, untouched, what its one `super()` call of the same name does."""
    name = getattr(method, "name", "")
    lines = [line.strip() for line in ast.unparse(method).splitlines()]
    calls = [line for line in lines if "super()" in line]
    if name not in WATCHED or len(calls) != 1 or f"super().{name}(" not in calls[0]:
        return False
    if name == "__init__":
        return calls == ["super().__init__(**kwargs)"]
    result, _, call = calls[0].removeprefix("return ").rpartition(" = ")
    stored = [n.id for n in ast.walk(method)
              if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]  # fmt: skip
    once = all(stored.count(n) == 1 for n in re.findall(r"\w+", result))
    # Of a tuple, unparse writes the brackets in one place and not in the other.
    returned = {line[6:].strip(" ()") for line in lines if re.match(r"return\b", line)}
    return once and returned == {(result or call).strip(" ()")}


class _Reader:
    """Collects values for fedsim's keys, and every reason why the app cannot run as it is."""

    def __init__(self, config: Mapping[str, Any], code: Mapping[str, ast.Module]) -> None:
        self.keys = [(w.replace("-", "_").removeprefix("static."), w, v) for w, v in _flat(config)]
        self.given = {key: value for key, _, value in self.keys}
        self.nodes = [(f, tree, n) for f, tree in code.items() for n in ast.walk(tree)]
        self.calls = [(f, tree, n, ast.unparse(n.func)) for f, tree, n in self.nodes
                      if isinstance(n, ast.Call)]  # fmt: skip
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
            except (TypeError, ValueError) as why:
                self.problem(where, why)
            old, origin = self.found.setdefault(RENAMED[key], (value, where))
            if old != value:
                self.problem(where, f"but {origin}; make them agree")
        elif not {key, key.partition(".")[0]} & HARMLESS.keys():
            close = difflib.get_close_matches(key, [*RENAMED, *ONLY, *HARMLESS], 1)
            self.problem(where, f"unknown; {f'did you mean {close[0]}?' if close else 'delete it'}")

    def arguments(self, callee: str, defaults: Mapping[str, Any]) -> bool:
        """Take the arguments of every call of `callee`. False: there is no call."""
        # A call for 8 bits is a branch for another value of model.quantization.
        calls = [(f, t, n) for f, t, n, name in self.calls if name.split(".")[-1] == callee
                 and "load_in_8bit" not in ast.unparse(n)]  # fmt: skip
        for file, tree, call in calls:
            written = {f"{k.arg}": k.value for k in call.keywords}
            for name in sorted({*defaults, *written}):
                key, where = f"{callee}.{name}", f"{file}: {callee}({name})"
                if name not in written:
                    self.take(key, defaults[name], where)
                elif key not in HARMLESS:
                    self.argument(key, written[name], tree, where)
        return bool(calls)

    def argument(self, key: str, node: ast.expr, tree: ast.Module, where: str) -> None:
        """A literal, or else something that one of the app's keys for the same thing decides."""
        with suppress(ValueError, TypeError):
            return self.take(key, ast.literal_eval(node), where)
        plain = (ast.Name, ast.Attribute, ast.Call, ast.Constant, ast.expr_context)
        scope = ast.unparse(tree if isinstance(node, ast.Name) else node)
        decided = any(k.rpartition(".")[2] in scope for k in self.given if (
            "dora" in k if "dora" in key else RENAMED.get(k) == RENAMED.get(key, "")))  # fmt: skip
        if not decided or not all(isinstance(part, plain) for part in ast.walk(node)):
            self.problem(f"{where} = {ast.unparse(node)}", "not executed; write the value")

    def model(self) -> None:
        """What every app must say; LoRA and 4-bit arguments."""
        for key in REQUIRED:
            if key not in self.given and RENAMED.get(key) not in self.found:
                self.problem(key.replace("_", "-"), "missing; the official apps set it")
        lora = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ()}  # peft's
        if not self.arguments("LoraConfig", lora):
            self.problem("LoraConfig", "the app's code never calls it: an unknown adapter")
        four = self.given.get("model.quantization") == 4
        if four and not self.arguments("BitsAndBytesConfig", {"bnb_4bit_quant_type": "fp4"}):
            self.problem("BitsAndBytesConfig", "the app's code never calls it: unknown 4 bits")

    def data(self, nodes: int | None) -> None:
        """Domain, training set and clients; rows and parts as the domain has them."""
        self.arguments("reformat", {})
        task, asked = self.found.pop("task", ("generalnlp", "the app's prompt"))
        wanted, where = self.found.pop("data.train", ("", ""))
        for file, _, _, name in self.calls:
            if name.endswith("Partitioner") and not name.endswith("IidPartitioner"):
                self.problem(f"{file}: {name}", "the clients are IID; use IidPartitioner")
        sets = {s.hub: (d, s) for d in map(domains.load, domains.known()) for s in d.train if s.hub}
        hub = OLDER.get(str(wanted), str(wanted))
        if hub in sets:
            domain, chosen = sets[hub]
            self.found["data.domain"] = domain.name, where
            self.found["clients.number"] = (domain.clients if nodes is None else nodes, "")
            if chosen is not domain.train[0]:
                self.found["data.train"] = chosen.name, where
            if domain.name not in TASKS.get(str(task).replace("-", ""), []):
                # flwr 1.11 and 1.12 wrote "generalnlp" into every app.
                self.problem(asked, f"formats rows unlike domain {domain.name!r}; correct it")
        elif where:
            self.problem(where, f"in no domain; known: {', '.join(sorted([*sets, *OLDER]))}")

    def is_fedavg(self, name: str) -> bool:
        """Whether a name is the library's FedAvg, or a class that only watches it."""
        for _, _, node in self.nodes:
            if isinstance(node, ast.ClassDef) and node.name == name:
                body = node.body[bool(ast.get_docstring(node)) :]
                base = ast.unparse(node.bases[0]) if len(node.bases) == 1 else name
                return base != name and self.is_fedavg(base) and all(map(_passes_through, body))
        return name.endswith(".strategy.FedAvg") or any(
            a.name == "FedAvg" and name == (a.asname or a.name) for _, _, n in self.nodes
            if isinstance(n, ast.ImportFrom) and str(n.module).startswith("flwr.server")
            for a in n.names)  # fmt: skip

    def strategy(self) -> None:
        """The template's FedAvg, or one among several calls or in a variable, chosen by a key."""
        rules = []
        for file, _, call, name in self.calls:
            given = {f"{k.arg}" for k in call.keywords}
            if given & {"fraction_fit", "fraction_train"} and not name.endswith("__init__"):
                rules.append((f"{file}: {name}", self.is_fedavg(name) and given <= PASSED))
        keyed = self.given.keys() & STRATEGY[:3] and any(
            isinstance(n, ast.ClassDef) and self.is_fedavg(n.name) for _, _, n in self.nodes
        )
        for where, fedavg in rules or [("ServerApp", False)]:
            if not fedavg and not (keyed and (len(rules) > 1 or where.split()[-1].islower())):
                self.problem(where, _RULE[1])


def is_app(path: Path) -> bool:
    """Whether a folder holds a Flower app: its pyproject.toml has `[tool.flwr.app.config]`."""
    file = path / "pyproject.toml"
    tool = read_toml(file).get("tool", {}) if file.is_file() else {}
    return "config" in tool.get("flwr", {}).get("app", {})


def read_app(path: Path, *, strategy: str | None = None) -> App:
    """Read an app; `strategy`, if any, replaces its own. Raises ConfigError that lists all."""
    if not is_app(path):
        raise ConfigError("app", got=str(path), expected="a folder with [tool.flwr.app.config]")
    document = read_toml(path / "pyproject.toml")
    flwr = document["tool"]["flwr"]
    files = {f.relative_to(path).as_posix(): f for f in sorted(path.rglob("*.py"))}
    files = {n: f for n, f in files.items() if not re.search(r"(^|/)(\.|site-packages/)", n)}
    # Scripts outside the app's package, such as an evaluation, do not train.
    homes = {f.parent for f in files.values() if f.name == "server_app.py"} or {path}
    try:
        code = {n: ast.parse(f.read_bytes(), n) for n, f in files.items() if homes & {*f.parents}}
    except (SyntaxError, ValueError) as failure:
        raise ConfigError(f"{path}: the app's code is not Python: {failure}") from None
    reader = _Reader(flwr["app"]["config"], code)
    # A user's FedProx has its own mu: the app's would be lost without a word.
    replaced = STRATEGY[: 3 if "prox" in strategy else 4] if strategy else ()
    for key, written, value in reader.keys:
        if key not in replaced:
            reader.take(key, value, written)
    reader.model()
    federations = dict(_flat(flwr.get("federations", {})))
    reader.data(federations.get(f"{federations.get('default')}.options.num-supernodes"))
    if strategy is None:
        reader.strategy()
    if reader.problems:
        what = f"{path} asks for what fedsim cannot honour:\n  - " + "\n  - ".join(reader.problems)
        raise ConfigError(what, remedy="Each line says how to correct it.")
    name = re.sub(r"[^\w.-]+", "-", document.get("project", {}).get("name", "app")).strip(".-")
    values: dict[str, dict[str, Any]] = {
        "run": {"seed": 42, "name": name, "protocol": "flowertune"}, "data": {"source": "hub"},
        "server": {"strategy": strategy or "fedavg", "min_clients": 2},
    }  # fmt: skip
    for target, (value, _) in reader.found.items():
        section, _, leaf = target.partition(".")
        values.setdefault(section, {})[leaf] = value
    return App(name, values, tuple(files))
