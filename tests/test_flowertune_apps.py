"""What real FlowerTune apps do beyond the official ones: honoured, noted, or refused with a reason.

Every rule has its counterpart that stays refused. What is noted reaches a run's folder and report.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedsim import report, simulate
from fedsim.config import Config, build
from fedsim.domains import spaced
from fedsim.errors import ModelError
from fedsim.flowertune import App, read_app
from fedsim.linears import target_linears
from fedsim.pretrained import compute_dtype
from tests.test_flowertune import CLIENT, DATASET, MODELS, app, config, lora, notes, problems

# transformers' own, when peft asks a model of its.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ARGS = "train.training-arguments."
BITS = "load_in_4bit=True"


def pinned(folder: Path, version: str) -> Path:
    """The app with its version of transformers."""
    file = folder / "pyproject.toml"
    named = f'name = "my app"\ndependencies = ["torch==2.4.0", "transformers{version}"]'
    file.write_text(file.read_text().replace('name = "my app"', named))
    return folder


# -- a step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["==4.46.0", "==4.50.3", "==5.1", ">=4.43.1", " @ git+x"])
def test_micro_batches_are_one_batch(tmp_path: Path, version: str) -> None:
    folder = pinned(app(tmp_path, {f"{ARGS}gradient-accumulation-steps": 2}), version)
    assert config(folder).train.batch == 32
    (note,) = notes(folder)
    assert "= 2: a step of 32 examples" in note and "4.46" in note


@pytest.mark.parametrize("version", ["4.39.3", "4.45.2"])
def test_micro_batches_of_equal_weight_are_not(tmp_path: Path, version: str) -> None:
    folder = pinned(app(tmp_path, {f"{ARGS}gradient-accumulation-steps": 4}), f"=={version}")
    (line,) = problems(folder)
    assert version in line and line.endswith("choose with --set train.batch=...")
    assert config(folder, "train.batch=64").train.batch == 16  # the assignment stands over it
    assert f"{ARGS}gradient-accumulation-steps = 4: answered by --set train.batch=64" in notes(
        folder, "train.batch=64"
    )


@pytest.mark.parametrize(
    ("keys", "schedule", "warmup"),
    [
        ({"lr-scheduler-type": "linear"}, "linear", 0),
        ({"lr-scheduler-type": "linear", "warmup_steps": 2}, "linear", 2),
        ({"lr-scheduler-type": "cosine", "warmup-ratio": 0.11}, "cosine", 2),
        ({"lr-scheduler-type": "cosine", "warmup-ratio": 0.5, "warmup-steps": 1}, "cosine", 1),
        ({"lr-scheduler-type": "inverse_sqrt", "warmup-steps": 0.2}, "inverse_sqrt", 2),
        ({"lr-scheduler-type": "constant_with_warmup", "warmup-steps": 3},
         "constant_with_warmup", 3),
        ({"lr-scheduler-type": "constant", "warmup-steps": 3}, "constant", 0),
        ({"lr-scheduler-type": "cosine_with_restarts"}, "cosine", 0),
    ],
)  # fmt: skip
def test_a_schedule_within_a_visit(
    tmp_path: Path, keys: dict[str, Any], schedule: str, warmup: int
) -> None:
    folder = app(tmp_path, {f"{ARGS}{key}": value for key, value in keys.items()})
    train = config(folder).train
    assert (train.schedule, train.warmup) == (schedule, warmup)
    said = {"constant": "no part of the constant", "cosine_with_restarts": "computed as cosine"}
    found, asked = notes(folder), said.get(keys["lr-scheduler-type"])
    assert len(found) == bool(asked) and (not asked or asked in found[0])


def test_optimisers_that_are_nearly_adamw(tmp_path: Path) -> None:
    for name in ("paged_adamw_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit"):
        (note,) = notes(app(tmp_path, {f"{ARGS}optim": name}))
        assert note.startswith(f'{ARGS}optim = "{name}": ') and "computed as AdamW" in note
        assert ("8 bits" in note) == name.endswith("8bit")


def test_arguments_that_code_gives_itself(tmp_path: Path) -> None:
    client = CLIENT.replace("**train_cfg.training_arguments", "{}**train_cfg.training_arguments")
    folder = app(tmp_path, client_app=client.format("weight_decay=STEP / 10, bf16=True, ")
                 .replace("\nclass", "\nSTEP = 2\nclass"))  # fmt: skip
    found = config(folder)
    assert (found.train.weight_decay, found.model.dtype) == (0.2, "bfloat16")
    (line,) = problems(app(tmp_path, client_app=client.format("max_steps=5, ")))
    assert "but" in line and "make them agree" in line and "--set train.steps=" in line
    alone = CLIENT.replace(
        "**train_cfg.training_arguments", "max_steps=5, lr_scheduler_type='linear'"
    )
    found = config(app(tmp_path, client_app=alone))
    assert (found.train.steps, found.train.schedule) == (5, "linear")


# -- numbers ---------------------------------------------------------------------------------------


def test_bf16_is_computed_and_said(tmp_path: Path) -> None:
    folder, cpu = app(tmp_path, {f"{ARGS}bf16": True}), torch.device("cpu")
    assert config(folder).model.dtype == "bfloat16"
    assert compute_dtype(config(folder), cpu) == torch.bfloat16
    (note,) = notes(folder)
    assert note.startswith(f"{ARGS}bf16 = true: computed with model.dtype = bfloat16")
    assert compute_dtype(config(app(tmp_path, {f"{ARGS}bf16": False})), cpu) == torch.float32
    assert notes(app(tmp_path, {f"{ARGS}bf16": False})) == ()
    chosen = notes(app(tmp_path, {f"{ARGS}bf16": True}), "model.dtype=float32")
    assert any("replaced by --set model.dtype=float32" in line for line in chosen)


def test_fp16_and_tf32_are_computed_in_float32_and_said(tmp_path: Path) -> None:
    for key, said in {"fp16": "computed in float32", "tf32": "not rounded to TF32"}.items():
        folder = app(tmp_path, {f"{ARGS}{key}": True})
        assert compute_dtype(config(folder), torch.device("cpu")) == torch.float32
        assert said in notes(folder)[0]
        assert notes(app(tmp_path, {f"{ARGS}{key}": False})) == ()


def test_the_numbers_that_four_bits_are_multiplied_in(tmp_path: Path) -> None:
    models = "import torch\n" + MODELS.replace(BITS, f"{BITS}, bnb_4bit_compute_dtype=DTYPE")
    for dtype, want in {"torch.bfloat16": "bfloat16", "torch.float32": "auto",
                        "'bfloat16'": "bfloat16"}.items():  # fmt: skip
        assert (
            config(app(tmp_path, models=models.replace("=DTYPE", f"={dtype}"))).model.dtype == want
        )
    (line,) = problems(app(tmp_path, models=models.replace("=DTYPE", "=torch.float16")))
    assert "torch.float16" in line and "--set model.dtype=" in line


# -- code that is followed -------------------------------------------------------------------------

FOLLOWED = {
    "a constant": ("DROPS = [0.1, 0.2]", "lora_dropout=DROPS[1]"),
    "a name in a function": ("", "lora_dropout=half / 5", "half = 2 / 2"),
    "a dict": ("OF = {'a': {'drop': 0.2}}", "lora_dropout=OF['a']['drop']"),
    "an f-string": ("OF = {'r32': 0.2}", "lora_dropout=OF[f'r{model_cfg.lora.peft_lora_r}']"),
    "a branch": ("", "lora_dropout=p", "p = 0.2\n    if 'qwen' in model_cfg.name.lower():\n"
                 "        p = 0.9"),
    "either": ("", "lora_dropout=p", "p = 0.2 if 'istral' in model_cfg.name else f()"),
    "a function": ("def drop(r):\n    if r > 8:\n        return 0.2\n    return 0.9",
                   "lora_dropout=drop(model_cfg.lora.peft_lora_r)"),
    "a parameter": ("def build(share):\n    return LoraConfig(r=32, lora_alpha=64, "
                    "lora_dropout=share)\nx = build(0.2)", "lora_dropout=0.2"),
    "getattr": ("", "lora_dropout=getattr(model_cfg.lora, 'drop', None) or 0.2"),
}  # fmt: skip


def followed(before: str, argument: str, inside: str = "pass") -> str:
    return (
        before + "\n" + lora(argument).replace("    return Lora", f"    {inside}\n    return Lora")
    )


@pytest.mark.parametrize("name", FOLLOWED)
def test_values_that_code_makes_of_constants(tmp_path: Path, name: str) -> None:
    assert config(app(tmp_path, models=followed(*FOLLOWED[name]))).adapter.dropout == 0.2


@pytest.mark.parametrize(
    ("before", "argument", "inside"),
    [
        ("", "lora_dropout=p", "for p in (0.1, 0.2): pass"),
        ("", "lora_dropout=p", "p = 0.1\n    if open('x'):\n        p = 0.2"),
        ("", "lora_dropout=p", "p = float(input())"),
        ("P = 0.1\ndef f():\n    global P\n    P = 0.3\n", "lora_dropout=p", "global P\n    p = P"),
        ("def drop(r):\n    return 0.1 if open(r) else 0.2", "lora_dropout=drop('x')", "pass"),
        ("def build(p):\n    return LoraConfig(r=32, lora_alpha=64, lora_dropout=p)\n"
         "x = build(0.2)\ny = build(0.3)", "lora_dropout=0.2", "pass"),
    ],
)  # fmt: skip
def test_values_that_only_running_would_tell(
    tmp_path: Path, before: str, argument: str, inside: str
) -> None:
    folder = app(tmp_path, models=followed(before, argument, inside))
    (line,) = problems(folder)
    assert "LoraConfig(lora_dropout)" in line and "--set adapter.dropout=" in line
    assert any("answered by --set adapter.dropout=0.3" in n
               for n in notes(folder, "adapter.dropout=0.3"))  # fmt: skip


def test_a_value_of_the_environment_is_its_default(tmp_path: Path) -> None:
    text = "import os\n" + DATASET.replace('"finance"', "os.environ.get('TASK', 'finance')")
    folder = app(tmp_path, dataset=text)
    assert config(folder).data.domain == "finance"
    assert notes(folder) == ("the environment: TASK: taken as not set",)


UNSLOTH = """
from unsloth import FastLanguageModel

def get_model(model_cfg):
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=model_cfg.name, load_in_4bit=model_cfg.quantization == 4, dtype=None)
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_dropout=0, bias="none", use_rslora=True, random_state=3407,
        use_gradient_checkpointing="unsloth", loftq_config=None)
""" + MODELS[MODELS.index("def cosine") : MODELS.index("def get_model")].join(("import math\n", ""))


def test_unsloth_s_adapter(tmp_path: Path) -> None:
    """Its own defaults where the call says nothing; its 4 bits are nf4, doubly quantised."""
    folder = app(tmp_path, models=UNSLOTH)
    found = config(folder)
    assert (found.adapter.rank, found.adapter.alpha, found.adapter.rslora) == (16, 16.0, True)
    assert len(found.adapter.targets) == 7 and found.adapter.dropout == 0.0
    assert (found.model.quantisation, found.model.double_quantisation) == ("nf4", True)
    assert found.model.dtype == "bfloat16"
    assert any(note.startswith("unsloth's 4 bits: nf4") for note in notes(folder))
    (line,) = problems(app(tmp_path, models=UNSLOTH.replace('"none"', '"all"')))
    assert 'FastLanguageModel.get_peft_model(bias) = "all"' in line


# -- rows ------------------------------------------------------------------------------------------

REFORMAT = """
def formatting(dataset):
    '''Join.'''
    dataset["instruction"] = dataset["instruction"] + " " + dataset["input"]
    return dataset

def reformat(dataset, llm_task):
    dataset = dataset.rename_column("output", "response")
    if llm_task in ["finance", "code"]:
        dataset = dataset.map(formatting, remove_columns=["input"])
    if llm_task == "medical":
        dataset = dataset.remove_columns(["instruction"])
        dataset = dataset.rename_column("input", "instruction")
    return dataset
"""
SETS = {"general": "flwrlabs/alpaca-gpt4", "finance": "flwrlabs/fingpt-sentiment-train",
        "medical": "flwrlabs/medical-meadow-medical-flashcards"}  # fmt: skip


@pytest.mark.parametrize(
    ("domain", "task", "rows"),
    [("finance", "finance", "domain"), ("finance", "code", "domain"),
     ("medical", "medical", "domain"), ("general", "anything", "domain"),
     ("general", "code", "joined"), ("medical", "code", "joined"),
     ("general", "medical", None), ("finance", "anything", None), ("medical", "anything", None)],
)  # fmt: skip
def test_what_becomes_of_rows_is_read_from_the_code(
    tmp_path: Path, domain: str, task: str, rows: str | None
) -> None:
    text = REFORMAT + DATASET.replace('"finance"', f'"{task}"')
    folder = app(tmp_path, {"static.dataset.name": SETS[domain]}, dataset=text)
    if rows is None:
        (line,) = problems(folder)
        assert "formats rows unlike domain" in line and line.endswith("--set data.rows=domain")
        assert len(notes(folder, "data.rows=domain")) == 1
        return
    assert config(folder).data.rows == rows
    assert len(notes(folder)) == (rows == "joined")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('" " + dataset["input"]', '"\\n" + dataset["input"]'),
        ("    return dataset\n\ndef", "    return None\n\ndef"),
        ('dataset = dataset.rename_column("output"',
         'dataset = dataset.filter(f).rename_column("output"'),
        ('["finance", "code"]:', '["finance"]:\n        dataset = dataset.shuffle(seed=1)'),
    ],
)  # fmt: skip
def test_rows_that_are_changed_otherwise_are_refused(tmp_path: Path, old: str, new: str) -> None:
    assert old in REFORMAT
    (line,) = problems(app(tmp_path, dataset=REFORMAT.replace(old, new, 1) + DATASET))
    assert "formats rows unlike" in line


def test_columns_that_are_only_renamed_change_nothing(tmp_path: Path) -> None:
    text = """
def reformat(dataset, llm_task):
    if "context" in dataset.column_names:
        dataset = dataset.rename_column("context", "input")
    return dataset
"""
    keys = {"static.dataset.name": "databricks/databricks-dolly-15k"}
    assert config(app(tmp_path, keys, dataset=text + DATASET)).data.train == "dolly"
    (line,) = problems(app(tmp_path, keys, dataset=text.replace('"input"', '"response"') + DATASET))
    assert "rename_column('context', 'response'): formats rows unlike" in line


def test_joined_rows_have_a_space_even_without_input() -> None:
    row = {"instruction": "Say", "input": "", "output": "x"}
    assert spaced(row) == ("Say ", "x")


@pytest.mark.parametrize(
    ("old", "new"),
    [("### Response: ", "### Answer: "), ("{mssg}", "<|im_start|>user"),
     ("['response'][i]}\"", "['response'][i]}</s>\""), ("{mssg}\\n", "{mssg}\\n\\n"),
     ("['response'][i]}\"", "['response'][i]}\" + tokenizer.eos_token"),
     ("['response'][i]}\"", "['response'][i]}{eos}\"")],
)  # fmt: skip
def test_another_prompt_is_refused(tmp_path: Path, old: str, new: str) -> None:
    assert old in DATASET
    (line,) = problems(app(tmp_path, dataset=DATASET.replace(old, new, 1)))
    assert line.startswith("pkg/dataset.py: formatting_prompts_func: trains another text")


def test_a_text_that_is_changed_behind_its_f_string_is_refused(tmp_path: Path) -> None:
    """The template's, in the template's loop; then with a token more."""
    text = DATASET.replace(
        "return [", "out = []\n    for i in range(9):\n        text = ("
    ).replace(" for i in range(9)\n    ]", "\n        )\n        out.append(text)\n    return out")
    assert notes(app(tmp_path, dataset=text)) == ()
    for more in ("text + tokenizer.eos_token", "text.strip()"):
        (line,) = problems(app(tmp_path, dataset=text.replace("append(text)", f"append({more})")))
        assert "trains another text" in line
    added = text.replace("        out.append", "        text += '</s>'\n        out.append")
    assert "trains another text" in problems(app(tmp_path, dataset=added))[0]


def test_a_prompt_by_the_model_s_name(tmp_path: Path) -> None:
    """Only the branch that the configuration takes counts."""
    other = """
def formatting_prompts_func_qwen(example):
    return [f"<|im_start|>{example['instruction']}{example['response']}" for _ in range(2)]

def choose(model_name):
    if "qwen" in model_name.lower():
        return formatting_prompts_func_qwen
    return formatting_prompts_func

chosen = choose(cfg.model.name)
"""
    assert notes(app(tmp_path, dataset=DATASET + other)) == ()
    (line,) = problems(app(tmp_path, {"model.name": "Qwen/Qwen2.5-7B"}, dataset=DATASET + other))
    assert "formatting_prompts_func_qwen: trains another text" in line


OTHER_PROMPTS = {
    "another name": "def to_text(row):\n    return f\"{row['instruction']} {row['response']}\"\n",
    "a method of str": "def formatting_prompts(row):\n"
    "    return 'Q {} A {}'.format(row['instruction'], row['response'])\n",
    "a chat template": "def to_text(row):\n    return tokenizer.apply_chat_template(row)\n",
}


@pytest.mark.parametrize("name", OTHER_PROMPTS)
def test_a_prompt_that_is_not_found_is_refused_until_it_is_chosen(
    tmp_path: Path, name: str
) -> None:
    used = "\nx = [formatting_prompts]\n" if "method" in name else "\nx = [to_text]\n"
    text = OTHER_PROMPTS[name] + DATASET[DATASET.index("def load_data") :]
    folder = app(tmp_path, dataset=text + used)
    (line,) = problems(folder)
    assert line.endswith("or choose with --set data.rows=domain")
    assert "trains another text" in line or line.startswith("the app's prompt: no function makes")
    assert any("answered by" in note for note in notes(folder, "data.rows=domain"))


def test_an_app_of_which_neither_prompt_nor_trainer_is_seen(tmp_path: Path) -> None:
    without = DATASET[DATASET.index("def load_data") :]
    assert "the app's prompt: not found in its code; the template's is computed" in notes(
        app(tmp_path, dataset=without, client_app="app = ClientApp()\n")
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("SFTTrainer(", "ProxTrainer(", "a trainer of its own"),
        ("            data_collator=self.collator,\n", "", "every token is trained"),
        (
            "self.collator",
            "DataCollatorForLanguageModeling(t, mlm=False)",
            "every token is trained",
        ),
        ("self.collator", "self.collator, packing=True", "SFTTrainer(packing) = true"),
        ("self.collator", "self.collator, neftune_noise_alpha=5", "unknown"),
        ("cosine_annealing(\n", "linear_decay(\n", "never calls the template's cosine_annealing"),
    ],
)
def test_another_loss_or_rate_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in CLIENT
    (line,) = problems(app(tmp_path, client_app=CLIENT.replace(old, new)))
    assert said in line


def test_another_fall_of_the_rate_is_refused(tmp_path: Path) -> None:
    (line,) = problems(app(tmp_path, models=MODELS.replace("0.5 *", "0.25 *")))
    assert line.startswith("pkg/models.py: cosine_annealing: not the template's")


# -- keys that nobody reads ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "code", "read"),
    [
        ("model.seq-length", "", False),  # of train_cfg.seq_length
        ("evaluation.enable-mmlu", "", False),
        ("train.validation-split-ratio", "", False),
        ("train.validation-split-ratio", "x = cfg.train.validation_split_ratio\n", True),
        ("train.validation-split-ratio", "x = run_config['train.validation-split-ratio']\n", True),
        ("train.validation-split-ratio", "x = g(**cfg.train)\n", True),
        ("train.validation-split-ratio", "x = dict(cfg).items()\n", True),
        ("train.validation-split-ratio", "x = getattr(train_cfg, name)\n", True),
        ("train.validation-split-ratio", "x = g(**cfg.model)\n", False),
        ("train.validation-split-ratio", "'''About validation_split_ratio.'''\n", False),
        ("model.seq-length", "x = model_cfg.seq_length\n", True),
    ],
)
def test_unknown_keys_that_no_code_reads_are_noted(
    tmp_path: Path, key: str, code: str, read: bool
) -> None:
    folder = app(tmp_path, {key: 7}, client_app=code + CLIENT)
    if not read:
        (note,) = notes(folder)
        assert note.startswith(f"{key} = 7: not read by the app's own code")
        return
    (line,) = problems(folder)
    assert line.startswith(f"{key} = 7: unknown, and the app's code reads it")


def test_a_script_beside_the_package_may_read_a_key(tmp_path: Path) -> None:
    folder = app(tmp_path, {"train.twist": 7})
    assert notes(folder)
    (folder / "tune.py").write_text("twist = 1\n")
    assert problems(folder)


# -- what the user sets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "given"),
    [
        ("train.steps=5", {"keys": {f"{ARGS}max-steps": -1}}),
        ("train.schedule=linear", {"keys": {f"{ARGS}lr-scheduler-type": "polynomial"}}),
        ("model.quantisation=nf4", {"keys": {"model.quantization": 8}}),
        ("data.domain=finance", {"keys": {"static.dataset.name": "nobody/nothing"}}),
        ("adapter.targets=['q_proj']", {"models": lora("target_modules=choose()")}),
        ("adapter.dora=true", {"models": lora("use_dora=flag")}),
        ("clients.partition=iid", {"dataset": DATASET.replace("Iid", "Dirichlet")}),
        ("data.rows=domain", {"dataset": DATASET.replace("finance", "medical")}),
        ("data.max_length=64", {"drop": ("train.seq-length",)}),
    ],
)
def test_set_answers_the_lines_of_its_key(
    tmp_path: Path, assignment: str, given: dict[str, Any]
) -> None:
    folder = app(tmp_path, **given)
    key = assignment.partition("=")[0]
    lines = problems(folder)
    assert lines and all(f"--set {key}=" in line for line in lines)
    imported = read_app(folder, [assignment])
    answered = [n for n in imported.notes if n.endswith(f"answered by --set {assignment}")]
    assert len(answered) == len(lines)
    assert problems(folder, "run.seed=3") == lines  # another key answers nothing


def test_what_is_replaced_is_noted(tmp_path: Path) -> None:
    folder = app(tmp_path)
    given = ["model.name=x", "train.steps=3", "train.batch=16", "run.out=y"]
    assert notes(folder, *given) == (
        'model.name = "mistralai/Mistral-7B-v0.3": replaced by --set model.name=x',
        f"{ARGS}max-steps = 10: replaced by --set train.steps=3",
    )


# -- targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [["down_proj", "gate_up_proj", "o_proj", "qkv_proj"], ["q_proj", "v_proj"], ["none", "o_proj"]],
)
def test_targets_that_fit_nothing_are_left_out_as_peft_leaves_them(
    tiny: Callable[..., Path], tmp_path: Path, targets: list[str]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = config(app(tmp_path, models=lora(f"target_modules={targets}"))).adapter.targets
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    ours = set(target_linears(model, found))
    peft = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    adapted = {n.removeprefix("base_model.model.") for n, m in peft.named_modules()
               if hasattr(m, "lora_A") and isinstance(m, nn.Module)}  # fmt: skip
    assert ours == adapted and ours


def test_targets_of_which_none_fits(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    for targets in (("qkv_proj?", "x?"), ("q_proj?", "qkv_proj"), ("q_proj?", "embed_tokens?")):
        with pytest.raises(ModelError, match=r"adapter\.targets"):
            target_linears(model, targets)


# -- the record ------------------------------------------------------------------------------------


def test_notes_are_kept_with_the_run(settings: Callable[..., Config], tmp_path: Path) -> None:
    """In environment.json and report.html; and a schedule, DoRA and joined rows run."""
    imported = App("an-app", {}, ("pkg/x.py",), ("a <b> = 1: computed otherwise",))
    changes = {"server__rounds": 1, "adapter__dora": True, "train__schedule": "linear",
               "train__warmup": 1, "data__rows": "joined", "evaluate__limit": 2}  # fmt: skip
    folder = simulate.run(settings(**changes), app=imported)
    kept = json.loads((folder / "environment.json").read_text())["app"]
    assert kept == {"name": "an-app", "not_executed": ["pkg/x.py"], "notes": [*imported.notes]}
    page = report.write(folder).read_text()
    assert "a &lt;b&gt; = 1: computed otherwise" in page
    plain = simulate.run(settings(**changes, run__name="plain"))
    assert "app" not in json.loads((plain / "environment.json").read_text())
    assert "Not the app" not in report.write(plain).read_text()
    assert build({"data": {"rows": "joined"}}, "x").data.rows == "joined"
