"""FlowerTune apps of every generation -> configuration; what cannot be honoured is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsim import domains
from fedsim.config import Config, build
from fedsim.errors import ConfigError
from fedsim.flowertune import App, is_app, read_app
from fedsim.flowertune.tables import FOLLOWED, HARMLESS, ONLY, RENAMED

# The keys of the official apps; values of flwr-1.29's finance app.
OFFICIAL: dict[str, Any] = {
    "model.name": "mistralai/Mistral-7B-v0.3",
    "model.quantization": 4,
    "model.gradient-checkpointing": True,
    "model.lora.peft-lora-r": 32,
    "model.lora.peft-lora-alpha": 64,
    "train.save-every-round": 5,
    "train.dynamic-data-seed": False,
    "train.learning-rate-max": 5e-5,
    "train.learning-rate-min": 1e-6,
    "train.seq-length": 512,
    "train.training-arguments.output-dir": "",
    "train.training-arguments.learning-rate": "",
    "train.training-arguments.per-device-train-batch-size": 16,
    "train.training-arguments.gradient-accumulation-steps": 1,
    "train.training-arguments.logging-steps": 10,
    "train.training-arguments.num-train-epochs": 3,
    "train.training-arguments.max-steps": 10,
    "train.training-arguments.save-steps": 1000,
    "train.training-arguments.save-total-limit": 10,
    "train.training-arguments.gradient-checkpointing": True,
    "train.training-arguments.lr-scheduler-type": "constant",
    "strategy.fraction-train": 0.1,
    "strategy.fraction-evaluate": 0.0,
    "num-server-rounds": 200,
    "static.dataset.name": "flwrlabs/fingpt-sentiment-train",
}
# domain: llm_task, clients, fraction, set of flwr <= 1.15, set of flwr >= 1.18
APPS = {
    "general": ("generalnlp", 20, 0.1, "vicgalle/alpaca-gpt4", "flwrlabs/alpaca-gpt4"),
    "finance": (
        "finance", 50, 0.1, "FinGPT/fingpt-sentiment-train", "flwrlabs/fingpt-sentiment-train",
    ),
    "medical": (
        "medical", 20, 0.1, "medalpaca/medical_meadow_medical_flashcards",
        "flwrlabs/medical-meadow-medical-flashcards",
    ),
    "coding": ("code", 10, 0.2, "lucasmccabe-lmi/CodeAlpaca-20k", "flwrlabs/code-alpaca-20k"),
}  # fmt: skip
OLD_STRATEGY = """
from flwr.server.strategy import FedAvg

class Watched(FedAvg):
    '''Counts bytes.'''

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.bytes = 0

    def configure_fit(self, server_round, parameters, client_manager):
        plan = super().configure_fit(server_round, parameters, client_manager)
        self.bytes += len(plan)
        return plan

    def aggregate_fit(self, server_round, results, failures):
        merged, metrics = super().aggregate_fit(server_round, results, failures)
        return merged, metrics
"""
NEW_STRATEGY = (
    OLD_STRATEGY.replace("flwr.server.", "flwr.serverapp.")
    .replace("configure_fit", "configure_train")
    .replace("aggregate_fit", "aggregate_train")
)
NEW_SERVER = """
from pkg.strategy import Watched
strategy = Watched(fraction_train=cfg.strategy.fraction_train, fraction_evaluate=0.0)
"""
OLD_SERVER = """
from .strategy import Watched

def server_fn(context):
    return Watched(fraction_fit=cfg.strategy.fraction_fit, on_fit_config_fn=f, evaluate_fn=g)
"""
MODELS = """
import math
from peft import LoraConfig, TaskType

def cosine_annealing(current_round, total_round, lrate_max=0.001, lrate_min=0.0):
    '''Falls.'''
    cos_inner = math.pi * current_round / total_round
    return lrate_min + 0.5 * (lrate_max - lrate_min) * (1 + math.cos(cos_inner))

def get_model(model_cfg):
    if model_cfg.quantization == 4:
        bits = BitsAndBytesConfig(load_in_4bit=True)
    else:
        bits = BitsAndBytesConfig(load_in_8bit=True)
    return LoraConfig(
        r=model_cfg.lora.peft_lora_r,
        lora_alpha=model_cfg.lora.peft_lora_alpha,
        lora_dropout=0.075,
        task_type=TaskType.CAUSAL_LM,
    )
"""
DATASET = """
def formatting_prompts_func(example):
    mssg = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    )
    return [
        f"{mssg}\\n### Instruction:\\n{example['instruction'][i]}\\n"
        f"### Response: {example['response'][i]}" for i in range(9)
    ]

def get_formatting():
    return formatting_prompts_func

def load_data(n):
    part = IidPartitioner(num_partitions=n)
    return reformat(part, llm_task="finance")
"""
CLIENT = """
from .models import cosine_annealing

class Client:
    def __init__(self, train_cfg, num_rounds):
        self.train_cfg = train_cfg
        self.training_arguments = TrainingArguments(**train_cfg.training_arguments)

    def fit(self, parameters, config):
        lr = cosine_annealing(
            config["round"], 9, self.train_cfg.learning_rate_max, self.train_cfg.learning_rate_min
        )
        SFTTrainer(
            model=self.model, args=self.training_arguments, train_dataset=self.rows,
            max_seq_length=self.train_cfg.seq_length, formatting_func=self.format,
            data_collator=self.collator,
        )
"""


def app(
    folder: Path, keys: dict[str, Any] | None = None, drop: tuple[str, ...] = (),
    tail: str = "", **code: str,
) -> Path:  # fmt: skip
    """Write an app: the official one with some keys changed, some dropped, some code replaced."""
    rows = {k: v for k, v in (OFFICIAL | (keys or {})).items() if k not in drop}
    lines = [f"{key} = {json.dumps(value)}" for key, value in rows.items()]
    files = {"server_app": NEW_SERVER, "strategy": NEW_STRATEGY, "models": MODELS,
             "dataset": DATASET, "client_app": CLIENT, "__init__": ""}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "pkg").mkdir(exist_ok=True)
    for name, text in (files | code).items():
        (folder / "pkg" / f"{name}.py").write_text(text)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "my app"\n[tool.flwr.app.config]\n' + "\n".join(lines) + "\n" + tail
    )
    return folder


def federations(clients: int) -> str:
    return (
        '[tool.flwr.federations]\ndefault = "local"\n'
        f"[tool.flwr.federations.local]\noptions.num-supernodes = {clients}\n"
        "options.backend.client-resources.num-cpus = 6\n"
        '[tool.flwr.federations.remote]\naddress = "example.org:9093"\n'
    )


def config(folder: Path, *assignments: str) -> Config:
    return build(read_app(folder, assignments).values, str(folder))


def expected(domain: str, fraction: float, clients: int) -> Config:
    values: dict[str, Any] = {
        "run": {"name": "my-app", "seed": 42, "protocol": "flowertune"},
        "model": {"name": "mistralai/Mistral-7B-v0.3", "quantisation": "fp4"},
        "adapter": {"rank": 32, "alpha": 64, "dropout": 0.075, "targets": ()},
        "data": {"domain": domain, "source": "hub", "max_length": 512},
        "clients": {"number": clients},
        "server": {"strategy": "fedavg", "rounds": 200, "fraction": fraction, "min_clients": 2,
                   "export_every": 5},
        "train": {"steps": 10, "batch": 16, "lr_max": 5e-5, "lr_min": 1e-6, "recompute": True},
    }  # fmt: skip
    return build(values, "expected")


def problems(folder: Path, *assignments: str) -> list[str]:
    """The lines of the one error."""
    with pytest.raises(ConfigError) as caught:
        read_app(folder, assignments)
    text, _, end = str(caught.value).rpartition("\n")
    assert end == "Each line says how to correct it."
    return text.split("\n  - ")[1:]


def notes(folder: Path, *assignments: str) -> tuple[str, ...]:
    return read_app(folder, assignments).notes


@pytest.mark.parametrize("domain", APPS)
def test_a_current_app_needs_no_change(tmp_path: Path, domain: str) -> None:
    task, clients, fraction, _, hub = APPS[domain]
    keys = {"static.dataset.name": hub, "strategy.fraction-train": fraction}
    folder = app(tmp_path, keys, dataset=DATASET.replace('"finance"', f'"{task}"'))
    assert config(folder) == expected(domain, fraction, clients)
    assert notes(folder) == ()
    assert config(folder).per_round == {50: 5}.get(clients, 2)


@pytest.mark.parametrize("domain", APPS)
def test_an_app_of_2024_needs_no_change(tmp_path: Path, domain: str) -> None:
    task, clients, fraction, old, _ = APPS[domain]
    keys = {"static.dataset.name": old, "strategy.fraction-fit": fraction}
    folder = app(
        tmp_path, keys, drop=("strategy.fraction-train", "train.dynamic-data-seed"),
        tail=federations(clients), strategy=OLD_STRATEGY, server_app=OLD_SERVER,
        dataset=DATASET.replace('"finance"', f'"{task}"'),
    )  # fmt: skip
    assert config(folder) == expected(domain, fraction, clients)


def test_every_official_key_has_a_target_a_rule_or_a_reason() -> None:
    for written in OFFICIAL:
        key = written.replace("-", "_").removeprefix("static.")
        tables = [key in table for table in (RENAMED, ONLY, HARMLESS)]
        rules = key.startswith(FOLLOWED) or key.endswith("gradient_accumulation_steps")
        assert sum([*tables, rules]) == 1, key
    assert all(HARMLESS.values())


def test_every_target_is_a_key_of_the_configuration() -> None:
    from fedsim.config import KEYS

    asked = {target for _, target, _ in ONLY.values() if target}
    assert {*RENAMED.values(), *asked} <= set(KEYS)


def test_the_generic_example_has_no_static_table_and_a_plain_fedavg(tmp_path: Path) -> None:
    folder = app(
        tmp_path, {"dataset.name": "vicgalle/alpaca-gpt4"}, drop=("static.dataset.name",),
        server_app="import flwr as fl\ns = fl.server.strategy.FedAvg(fraction_fit=0.1)",
        dataset=DATASET[: DATASET.index("def load_data")] + "x = IidPartitioner(9)",
    )  # fmt: skip
    assert config(folder) == expected("general", 0.1, 20)


def test_spellings_of_a_key_are_one(tmp_path: Path) -> None:
    moved = ("model.lora.peft-lora-r", "train.training-arguments.max-steps",
             "train.training-arguments.weight-decay", "static.dataset.name")  # fmt: skip
    tail = (
        "[tool.flwr.app.config.static.dataset]\nname = 'flwrlabs/fingpt-sentiment-train'\n"
        "[tool.flwr.app.config.'model.lora']\npeft_lora_r = 8\n"
        "[tool.flwr.app.config.'train.training-arguments']\nmax_steps = 3\nweight_decay = 0.01\n"
    )
    found = config(app(tmp_path, drop=moved, tail=tail))
    assert (found.adapter.rank, found.train.steps, found.train.weight_decay) == (8, 3, 0.01)
    assert found.data.domain == "finance"


def test_values_of_the_app_reach_the_configuration(tmp_path: Path) -> None:
    keys = {
        "model.quantization": 0, "model.gradient-checkpointing": False, "seed": 7,
        "train.training-arguments.max-grad-norm": 0.5,
        "train.training-arguments.adam-beta1": 0.8,
        "train.training-arguments.adam-beta2": 0.99,
        "train.training-arguments.adam-epsilon": 1e-6,
        "static.dataset.name": "medalpaca/medical_meadow_wikidoc_patient_information",
        "train.training-arguments.optim": "adamw_torch", "use-wandb": True, "wandb.project": "x",
        "train.training-arguments.warmup_steps": 2, "model.attn": "flash_attention_2",
    }  # fmt: skip
    found = config(app(tmp_path, keys, dataset=DATASET.replace("finance", "medical")))
    assert (found.model.quantisation, found.train.recompute, found.run.seed) == ("none", "never", 7)
    assert (found.train.clip_norm, found.train.eps) == (0.5, 1e-6)
    assert (found.train.beta1, found.train.beta2) == (0.8, 0.99)
    assert found.data.domain == "medical"
    assert found.data.train == "medical_meadow_wikidoc_patient_information"


@pytest.mark.parametrize("number", [None, 20])
def test_clients_are_the_default_federation_s_or_the_domain_s(
    tmp_path: Path, number: int | None
) -> None:
    folder = app(tmp_path, tail=federations(number) if number else "")
    assert config(folder).clients.number == (number or 50)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.quantization", 8),
        ("train.dynamic-data-seed", True),
        ("train.training-arguments.gradient-accumulation-steps", 0),
        ("train.training-arguments.gradient-accumulation-steps", "2"),
        ("train.training-arguments.lr-scheduler-type", "polynomial"),
        ("train.training-arguments.lr-scheduler-type", "reduce_lr_on_plateau"),
        ("train.training-arguments.max-steps", -1),
        ("train.training-arguments.max-steps", "10"),
        ("train.training-arguments.max-grad-norm", 0.0),
        ("train.training-arguments.optim", "adafactor"),
        ("train.training-arguments.optim", "lion_8bit"),
        ("train.training-arguments.label-smoothing-factor", 0.1),
        ("strategy.fraction-train", 0.0),
        ("static.dataset.name", "nobody/nothing"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(tmp_path: Path, key: str, value: Any) -> None:
    lines = problems(app(tmp_path, {key: value}))
    assert len(lines) == 1
    assert f"{key} = {json.dumps(value)}: " in lines[0]


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    keys = {"train.training-arguments.optim": "sgd", "train.training-arguments.max-stepz": 4}
    lines = problems(
        app(tmp_path, keys, drop=("train.seq-length",), models=MODELS.replace("0.075", "f() * 2"))
    )
    assert len(lines) == 5
    assert any("max-stepz = 4: unknown" in line and "training_arguments.max_steps" in line
               for line in lines)  # fmt: skip
    assert any(line.startswith("train.seq-length: missing") for line in lines)
    assert any("SFTTrainer(max_seq_length)" in line for line in lines)
    assert any("LoraConfig(lora_dropout) = f() * 2" in line for line in lines)


@pytest.mark.parametrize(
    "key",
    ["model.name", "model.quantization", "train.learning-rate-max", "train.learning-rate-min",
     "train.seq-length", "train.training-arguments.max-steps",
     "train.training-arguments.lr-scheduler-type", "strategy.fraction-train",
     "train.training-arguments.per-device-train-batch-size", "num-server-rounds"],
)  # fmt: skip
def test_a_key_without_which_the_app_would_not_run_is_missed(tmp_path: Path, key: str) -> None:
    (line,) = [p for p in problems(app(tmp_path, drop=(key,))) if ": missing" in p]
    assert line.startswith(f"{key}:")


def test_an_unknown_set_lists_the_known_ones(tmp_path: Path) -> None:
    (line,) = problems(app(tmp_path, {"static.dataset.name": "nobody/nothing"}))
    known = {hub for _, _, _, *both in APPS.values() for hub in both}
    assert all(hub in line for hub in known)
    assert known >= {domains.load(d).train[0].hub for d in domains.known()}


def test_the_prompt_of_another_domain_is_an_error(tmp_path: Path) -> None:
    """The apps of flwr 1.11 and 1.12 all format as the general one."""
    (line,) = problems(app(tmp_path, dataset=DATASET.replace("finance", "generalnlp")))
    assert 'reformat(llm_task) = "generalnlp"' in line and "'finance'" in line
    assert config(app(tmp_path, dataset=DATASET.replace("finance", "code")))
    (line,) = problems(app(tmp_path, dataset=DATASET[: DATASET.index("def load_data")]))
    assert line.startswith("the app's prompt")
    computed = DATASET.replace('"finance"', "os.environ['TASK']")
    assert "os.environ['TASK']" in problems(app(tmp_path, dataset=computed))[0]
    asked = DATASET.replace('"finance"', "cfg.task.name")
    assert problems(app(tmp_path, {"task.name": "medical"}, dataset=asked))
    assert config(app(tmp_path, {"task.name": "finance"}, dataset=asked)).data.domain == "finance"
    assert notes(app(tmp_path, {"task.name": "medical"})) == (
        'task.name = "medical": not read by the app\'s own code',
    )


def test_clients_that_are_not_iid_are_an_error(tmp_path: Path) -> None:
    (line,) = problems(app(tmp_path, dataset=DATASET.replace("Iid", "Dirichlet")))
    assert "DirichletPartitioner" in line


# -- what models.py decides ------------------------------------------------------------------------


def lora(text: str) -> str:
    return MODELS.replace("lora_dropout=0.075", text)


def test_arguments_in_code_are_mapped(tmp_path: Path) -> None:
    text = "lora_dropout=0.1, bias='none', use_dora=False, target_modules=['v_proj', 'q_proj']"
    adapter = config(app(tmp_path, models=lora(text))).adapter
    assert (adapter.dropout, adapter.targets) == (0.1, ("q_proj?", "v_proj?"))
    assert config(app(tmp_path, models=lora("bias='none'"))).adapter.dropout == 0.0
    bits = "load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True"
    model = config(app(tmp_path, models=MODELS.replace("load_in_4bit=True", bits))).model
    assert (model.quantisation, model.double_quantisation) == ("nf4", True)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("model.lora.modules", "v_proj, q_proj", "model_cfg.lora.modules.split(',')"),
        ("model.lora.peft_lora_target_modules", ["q_proj", "v_proj"], "chosen"),
        ("model.lora.peft-target-modules", "q_proj,v_proj", "NAMES"),
    ],
)
def test_target_modules_in_the_configuration(
    tmp_path: Path, key: str, value: Any, text: str
) -> None:
    models = (
        "chosen = [m.strip() for m in cfg.lora.peft_lora_target_modules if m]\n"
        "NAMES = cfg.model.lora.get('peft_target_modules', '').split(',')\n"
    ) + lora(f"target_modules={text}")
    found = config(app(tmp_path, {key: value}, models=models))
    assert found.adapter.targets == ("q_proj?", "v_proj?")
    assert notes(app(tmp_path, {key: value})) == (
        f"{key} = {json.dumps(value)}: not read by the app's own code",
    )


def test_dropout_from_the_configuration(tmp_path: Path) -> None:
    models = lora("lora_dropout=model_cfg.lora.get('peft_lora_dropout', 0.1)")
    keys = {"model.lora.peft-lora-dropout": 0.2}
    assert config(app(tmp_path, keys, models=models)).adapter.dropout == 0.2
    assert config(app(tmp_path, models=models)).adapter.dropout == 0.1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("use_dora=flag", "use_dora) = flag"),
        ("use_dora=cfg.lora.nothing", "use_dora) = cfg.lora.nothing"),
        ("init_lora_weights='gaussian'", 'init_lora_weights) = "gaussian"'),
        ("rank_pattern={'q_proj': 4}", 'rank_pattern) = {"q_proj": 4}'),
        ("target_modules='.*q_proj'", 'target_modules) = ".*q_proj"'),
        ("alpha_scheme=2", "alpha_scheme) = 2"),
        ("bias='all'", 'bias) = "all"'),
        ("target_modules=choose()", "target_modules) = choose()"),
        ("**more", "LoraConfig(None) = more"),
    ],
)
def test_arguments_in_code_that_cannot_be_honoured(tmp_path: Path, text: str, named: str) -> None:
    (line,) = problems(app(tmp_path, models=lora(text)))
    assert line.startswith("pkg/models.py") and named in line


@pytest.mark.parametrize(("argument", "key"), [("use_dora", "dora"), ("use_rslora", "rslora")])
def test_dora_and_rslora_in_code_or_by_the_configuration(
    tmp_path: Path, argument: str, key: str
) -> None:
    for value in (True, False):
        found = config(app(tmp_path, models=lora(f"{argument}={value}"))).adapter
        assert getattr(found, key) is value
        models = lora(f"{argument}=bool(getattr(model_cfg.lora, 'peft_{argument}', False))")
        found = config(app(tmp_path, {f"model.lora.peft-{argument}": value}, models=models)).adapter
        assert getattr(found, key) is value
    assert getattr(config(app(tmp_path, models=models)).adapter, key) is False


def test_what_code_says_stands_over_a_key_that_it_never_reads(tmp_path: Path) -> None:
    folder = app(tmp_path, models=MODELS.replace("model_cfg.lora.peft_lora_r", "16"))
    assert config(folder).adapter.rank == 16
    assert notes(folder) == ("model.lora.peft-lora-r = 32: not read by the app's own code",)
    folder = app(tmp_path, models=MODELS.replace("peft_lora_r", "peft_lora_r * 2"))
    assert config(folder).adapter.rank == 64


def test_an_adapter_or_four_bits_that_cannot_be_seen(tmp_path: Path) -> None:
    starts = [line.split(":")[0] for line in problems(app(tmp_path, models="x = 1"))]
    assert {"LoraConfig", "BitsAndBytesConfig"} <= set(starts)
    text = MODELS.replace("load_in_4bit=True", "load_in_4bit=True, bnb_4bit_compute_dtype=x.bf16")
    assert "bnb_4bit_compute_dtype" in problems(app(tmp_path, models=text))[0]


# -- strategies ------------------------------------------------------------------------------------


def rule(text: str, name: str = "Watched") -> dict[str, str]:
    return {"strategy": text, "server_app": NEW_SERVER.replace("Watched", name)}


@pytest.mark.parametrize(
    "code",
    [
        rule(NEW_STRATEGY.replace("FedAvg", "FedAdam")),
        rule(NEW_STRATEGY + "    def extra(self):\n        return 1\n"),
        rule(NEW_STRATEGY.replace("return merged", "merged = flex(merged)\n        return merged")),
        rule(NEW_STRATEGY.replace("return merged, metrics", "return flex(merged), metrics")),
        rule(NEW_STRATEGY.replace("**kwargs)\n        self", "min_train_nodes=4)\n        self")),
        rule(NEW_STRATEGY.replace("(**kwargs)\n        self", "(fraction_train=1)\n        self")),
        rule(NEW_STRATEGY + "    def summary(self):\n        return super().summary()\n"),
        rule("from flwr.serverapp.strategy import FedAvg\nclass FedAvg(FedAvg): x = 1", "FedAvg"),
        rule("", "Unknown"),
        {"server_app": "from flwr.serverapp.strategy import FedAdam as Watched\n"
         "s = Watched(fraction_train=0.1)", "strategy": ""},
        {"server_app": NEW_SERVER.replace("0.0", "0.0, min_train_nodes=4")},
        {"server_app": NEW_SERVER.replace("= Watched", "= strategy_cls")},
        {"server_app": NEW_SERVER.replace("fraction_train=", "share=")},
    ],
)  # fmt: skip
def test_a_rule_of_the_app_s_own_asks_for_a_choice(tmp_path: Path, code: dict[str, str]) -> None:
    (line,) = problems(app(tmp_path, **code))
    assert "--set server.strategy=" in line
    imported = read_app(app(tmp_path, **code), ["server.strategy=krum"])
    assert imported.values["server"]["strategy"] == "fedavg"  # which the assignment stands over
    assert any("answered by --set server.strategy=krum" in note for note in imported.notes)


OTHER = NEW_STRATEGY + "class Own(FedAvg):\n    def merge(self):\n        return 1\n"
HEAD = "from flwr.serverapp import ServerApp\nfrom pkg.strategy import Own, Watched\n"
CALL = "(fraction_train=cfg.strategy.fraction_train)\n"
SERVERS = {
    "use-flexlora": HEAD + "chosen = Own if cfg.get('use-flexlora', False) else Watched\n"
    "strategy = chosen" + CALL,
    "use_flexlora": HEAD + "if context.run_config['use_flexlora']:\n    strategy = Own" + CALL
    + "else:\n    strategy = Watched" + CALL,
    "strategy.name": HEAD + "rules = {'fedavg': Watched, 'own': Own}\ntry:\n"
    "    chosen = rules[cfg.strategy.name]\nexcept KeyError:\n    raise ValueError(1)\n"
    "strategy = chosen" + CALL,
}  # fmt: skip


@pytest.mark.parametrize("key", SERVERS)
def test_the_configuration_decides_between_several_rules(tmp_path: Path, key: str) -> None:
    plain, own = ("fedavg", "own") if key == "strategy.name" else (False, True)
    folder = app(tmp_path, {key: plain}, server_app=SERVERS[key], strategy=OTHER)
    assert config(folder).server.strategy == "fedavg" and notes(folder) == ()
    (line,) = problems(app(tmp_path, {key: own}, server_app=SERVERS[key], strategy=OTHER))
    assert line.startswith("pkg/server_app.py: Own: not FedAvg")


def test_strategy_keys_that_no_code_reads_are_noted(tmp_path: Path) -> None:
    keys = {"strategy.name": "fedadam", "strategy.use-flexlora": True, "strategy.proximal-mu": 0.1}
    assert notes(app(tmp_path, keys)) == tuple(
        f"{key} = {json.dumps(value)}: not read by the app's own code"
        for key, value in keys.items()
    )


PROX = {
    "strategy": OLD_STRATEGY.replace("FedAvg", "FedProx"),
    "server_app": OLD_SERVER.replace("f, ", "f, proximal_mu=cfg.strategy.proximal_mu, "),
}


def test_fedprox_whose_clients_add_no_term_is_fedavg(tmp_path: Path) -> None:
    """flwr's FedProx averages as FedAvg does, and tells clients a mu that this client ignores."""
    keys = {"strategy.proximal-mu": 0.05, "strategy.fraction-fit": 0.1}
    drop = ("strategy.fraction-train", "train.dynamic-data-seed")
    folder = app(tmp_path, keys, drop, **PROX)
    assert config(folder).server.strategy == "fedavg"
    (note,) = notes(folder)
    assert "FedProx" in note and "computed as FedAvg" in note
    for term in (
        "config['proximal_mu']",
        "self.train_cfg.proximal_mu",
        "config.get('proximal-mu')",
    ):
        client = CLIENT + f"        loss = {term} * norm\n"
        (line,) = problems(app(tmp_path, keys, drop, client_app=client, **PROX))
        assert line.startswith("pkg/server_app.py: Watched: not FedAvg")
    chosen = notes(folder, "server.strategy=fedprox")
    assert (
        "strategy.proximal_mu = 0.05: not used: a rule's own options are server.options" in chosen
    )


# -- the folder ------------------------------------------------------------------------------------


def test_files_that_are_not_executed_are_listed(tmp_path: Path) -> None:
    folder = app(tmp_path)
    for place in (".venv/lib", "env/site-packages/x", "evaluation"):
        (folder / place).mkdir(parents=True)
        (folder / place / "tune.py").write_text("LoraConfig(r=1, bias=9)\nraise SystemExit")
    imported: App = read_app(folder)
    assert imported.ignored == (
        "evaluation/tune.py", "pkg/__init__.py", "pkg/client_app.py", "pkg/dataset.py",
        "pkg/models.py", "pkg/server_app.py", "pkg/strategy.py",
    )  # fmt: skip


def test_code_without_a_server_app_file_is_read_too(tmp_path: Path) -> None:
    folder = app(tmp_path)
    (folder / "pkg" / "server_app.py").rename(folder / "pkg" / "app.py")
    assert config(folder) == expected("finance", 0.1, 50)


def test_what_an_app_is(tmp_path: Path) -> None:
    assert not is_app(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app]\npublisher = 'x'\n")
    assert not is_app(tmp_path)
    with pytest.raises(ConfigError, match=r"tool\.flwr\.app\.config"):
        read_app(tmp_path)
    assert is_app(app(tmp_path))


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.py"):
        read_app(app(tmp_path, models="def ("))
    (tmp_path / "pyproject.toml").write_text("name = {{ cookiecutter }}")
    with pytest.raises(ConfigError, match="not valid TOML"):
        is_app(tmp_path)
