"""Adapters of other tools are computed as stock peft computes them, or refused by name.

Every field of peft's LoRA configuration is tried with a value that is not neutral, and every other
method; then what people have: pickles, regular expressions, targets that match nothing, missing
keys, patterns, other versions. What is computed equals stock peft's own logits on a tiny model to
5e-6 of the largest (fp32 rounding there: 2e-7). About 20 s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as METHODS
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsim import adapter_file, config, model, peft_io, weights
from fedsim.errors import ModelError
from fedsim.evaluate.generation import Adapter
from fedsim.evaluate.loaded import load
from fedsim.evaluate.subjects import check
from fedsim.evaluate.targets import resolve
from fedsim_kernels.segments import Segments

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]
IDS = torch.arange(5, 21)
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"],
                         "task_type": "CAUSAL_LM"}  # fmt: skip
# One value each that is not what the field is set to by default, and that peft accepts.
OTHER: dict[str, Any] = {
    "task_type": "SEQ_CLS", "peft_type": "LOHA", "auto_mapping": {"base_model_class": "x"},
    "peft_version": "0.4.0", "base_model_name_or_path": "elsewhere/else", "revision": "v2",
    "inference_mode": True, "r": 3, "target_modules": "all-linear", "exclude_modules": ["q_proj"],
    "lora_alpha": 11, "lora_dropout": 0.3, "fan_in_fan_out": True, "bias": "all",
    "use_rslora": True, "modules_to_save": ["lm_head"], "init_lora_weights": "pissa",
    "layers_to_transform": [1], "layers_pattern": "layers", "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"down_proj": 17}, "megatron_config": {"a": 1}, "megatron_core": "other.core",
    "trainable_token_indices": [3], "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 1.0},
    "corda_config": {"corda_method": "ipm"}, "lora_ga_config": {"scale": "stable"},
    "use_dora": True, "velora_config": {"num_groups": 2}, "alora_invocation_tokens": [1, 2],
    "use_qalora": True, "qalora_group_size": 8, "monteclora_config": {"a": 1},
    "layer_replication": [[0, 2]], "runtime_config": {"ephemeral_gpu_offload": True},
    "lora_bias": True, "target_parameters": ["a.weight"], "use_bdlora": {"a": 1},
    "arrow_config": {"top_k": 2}, "kasa_config": {"beta": 1.0}, "ensure_weight_tying": True,
}  # fmt: skip
# Those that change which tensors there are or what they mean: made with peft itself.
MADE = {"r", "target_modules", "exclude_modules", "lora_alpha", "use_rslora", "layers_to_transform",
        "rank_pattern", "alpha_pattern", "use_dora", "lora_dropout", "fan_in_fan_out",
        "inference_mode"}  # fmt: skip


@pytest.fixture
def base(settings: Callable[..., config.Config]) -> Path:
    return Path(settings("llama").model.name)


def made(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter that stock peft has made and saved, with random factors."""
    torch.manual_seed(3)
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(lm, LoraConfig(**(PLAIN | changes)))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight += torch.randn_like(weight) * 0.1
    wrapped.save_pretrained(folder)
    return folder


def rewritten(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in found.items() if v != "gone"}))
    return folder


@torch.no_grad()
def theirs(base: Path, folder: Path | None) -> Tensor:
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lm = lm if folder is None else PeftModel.from_pretrained(lm, str(folder))
    return lm.eval()(IDS[None]).logits[0]


@torch.no_grad()
def ours(settings: Callable[..., config.Config], folder: Path) -> Tensor:
    """As `fedsim eval` computes it: checked, laid out, loaded, in one pass."""
    (target,) = resolve([str(folder)], settings("llama").model.name)
    found = weights.find(settings("llama").model.name)
    (checked,) = check(found, [target], based=True)
    chosen = settings(
        "llama", adapter__targets=list(checked.modules), adapter__rank=checked.rank,
        adapter__dora=checked.dora,
    )  # fmt: skip
    lm = model.load(found, chosen, torch.device("cpu"), checked.modules)
    loaded = load(lm, [Adapter("a", folder)], chosen.adapter)
    work = loaded.work(lm, Segments.build([len(IDS)], [0]))
    return lm.logits(lm.hidden(IDS, torch.arange(len(IDS)), work))


def agrees(settings: Callable[..., config.Config], base: Path, folder: Path) -> None:
    want, bare = theirs(base, folder), theirs(base, None)
    size = want.abs().max()
    assert (ours(settings, folder) - want).abs().max() <= 5e-6 * size
    assert (bare - want).abs().max() > 1e-3 * size, "the adapter does nothing: no proof"


def test_every_field_has_a_value_to_try() -> None:
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    assert fields == set(OTHER), "a new field of peft: say here what it may be"
    said = adapter_file.COMPUTED | adapter_file.NEUTRAL | set(adapter_file.ONLY)
    assert said <= fields


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_field_is_computed_neutral_or_refused(
    settings: Callable[..., config.Config], base: Path, tmp_path: Path, name: str
) -> None:
    """Its value in the file either gives stock peft's numbers, or its name in an error."""
    value = OTHER[name]
    if name == "layers_pattern":
        folder = made(base, tmp_path / "a", layers_to_transform=[1], layers_pattern="layers")
    elif name in MADE:
        folder = made(base, tmp_path / "a", **{name: value})
    else:
        folder = rewritten(made(base, tmp_path / "a"), **{name: value})
    try:
        found = adapter_file.settings(folder)
    except ModelError as refused:
        assert name in str(refused) and name not in adapter_file.COMPUTED - {"peft_type"}
        assert name not in adapter_file.NEUTRAL
        return
    assert name in adapter_file.COMPUTED | adapter_file.NEUTRAL
    assert found is not None
    agrees(settings, base, folder)


@pytest.mark.parametrize(
    "init", [True, False, "gaussian", "eva", "orthogonal", "pissa", "pissa_niter_4", "olora",
             "corda", "loftq", "lora_ga", "mica"],
)  # fmt: skip
def test_how_factors_began(
    settings: Callable[..., config.Config], base: Path, tmp_path: Path, init: Any
) -> None:
    """Those that take from the base are refused, saved without conversion; others change nothing.
    What the reference itself says decides: it loads PiSSA's and OLoRA's over another base."""
    plain = made(base, tmp_path / "a")
    want = theirs(base, plain)
    folder = rewritten(plain, init_lora_weights=init)
    if init in adapter_file.ONLY["init_lora_weights"]:
        agrees(settings, base, folder)
        assert torch.equal(theirs(base, folder), want)
        return
    with pytest.raises(ModelError, match=f"init_lora_weights: got '{init}'.*save_pretrained"):
        adapter_file.settings(folder)
    if init in ("pissa", "olora"):
        assert (theirs(base, folder) - want).abs().max() > 0.01 * want.abs().max()


def test_converted_pissa_is_plain(
    settings: Callable[..., config.Config], base: Path, tmp_path: Path
) -> None:
    """The remedy is true: what peft has converted loads, and is what was trained."""
    torch.manual_seed(3)
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(lm, LoraConfig(**PLAIN, init_lora_weights="pissa"))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "begin")
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight += torch.randn_like(weight) * 0.1
        trained = wrapped.eval()(IDS[None]).logits[0]
    wrapped.save_pretrained(
        tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "begin")
    )
    agrees(settings, base, tmp_path / "end")
    assert (ours(settings, tmp_path / "end") - trained).abs().max() <= 1e-5 * trained.abs().max()


@pytest.mark.parametrize("method", sorted({str(m.value) for m in METHODS} - {"LORA"}))
def test_other_methods_are_refused(tmp_path: Path, method: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method, "r": 4}))
    with pytest.raises(ModelError, match=f"peft_type: got '{method}'; expected LORA"):
        adapter_file.settings(tmp_path)


REAL: dict[str, dict[str, Any]] = {
    "regex": {"target_modules": r".*\.(?:self_attn|mlp)\.(?:q_proj|down_proj)"},
    "some match nothing": {"target_modules": ["down_proj", "o_proj", "gate_up_proj", "qkv_proj"]},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "patterns": {"target_modules": "all-linear",
                 "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
                 "alpha_pattern": {".*_proj": 16, "layers.0.mlp.down_proj": 3}},
    "qualified": {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2},
                  "alpha_pattern": {"model.layers.1.mlp.down_proj": 32, "^q_proj": 99}},
    "rslora alpha": {"use_rslora": True, "alpha_pattern": {"down_proj": 3}},
    "dora rank": {"use_dora": True, "rank_pattern": {"q_proj": 2}},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_settings_that_people_have(
    settings: Callable[..., config.Config], base: Path, tmp_path: Path, name: str
) -> None:
    agrees(settings, base, made(base, tmp_path / "a", **REAL[name]))


def test_a_pickle_of_an_older_version(
    settings: Callable[..., config.Config], base: Path, tmp_path: Path
) -> None:
    """What peft 0.6 wrote: torch.save of the tensors, few keys, some that are gone since."""
    folder = made(base, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    kept = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 4, "lora_alpha": 6,
            "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM",
            "enable_lora": None, "merge_weights": False}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    agrees(settings, base, folder)
    half = rewritten(folder, r="gone", lora_alpha="gone", rank_pattern={"proj": 4, ".*_proj": 4})
    agrees(settings, base, half)  # peft's own alpha is 8


def test_a_pickle_that_runs_code_is_refused(base: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    folder = made(base, tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin cannot be read"):
        adapter_file.tensors(folder)
    assert not (tmp_path / "ran").exists()


def test_half_precision_factors_are_stock_pefts(
    settings: Callable[..., config.Config], base: Path, tmp_path: Path
) -> None:
    folder = made(base, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    half = {k: t.to(torch.bfloat16) for k, t in tensors.items()}
    save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    agrees(settings, base, folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target_modules": None}, "target_modules, None, names no modules"),
        ({"target_modules": 5}, "names no modules"), ({"rank_pattern": {"(": 4}}, "missing \\)"),
        ({"exclude_modules": 5}, "names or a regular expression"), ({"r": 2.5}, "numbers above 0"),
        ({"lora_alpha": float("inf")}, "numbers above 0"), ({"kasa_config": {}}, "kasa_config"),
        ({"use_bdlora": {}}, "use_bdlora"), ({"trainable_token_indices": []}, "trainable_token"),
        ({"target_modules": ["nothing"]}, "some linear of this base"),
        ({"target_modules": "*q_proj"}, "a regular expression"),
        ({"target_modules": ["q_proj"]}, "tensors such as .*down_proj"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, r"v_proj.*got \[None, None\]"),
        ({"r": 8}, r"got \[\(4, 32\), \(32, 4\)\]; expected \[\(8, 32\), \(32, 8\)\]"),
        ({"r": "many"}, "numbers above 0"), ({"lora_alpha": 0}, "numbers above 0"),
        ({"rank_pattern": {"q_proj": -1}}, "numbers above 0"),
        ({"a_new_setting": 3}, "a_new_setting.*no setting of the installed peft"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
    base: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = rewritten(made(base, tmp_path / "a"), **change)
    with pytest.raises(ModelError, match=says):
        check(weights.find(str(base)), resolve([str(folder)], str(base)), based=True)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 5000, "\x00"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        adapter_file.settings(tmp_path)


@pytest.mark.parametrize(
    "name", ["plain", "patterns", "rslora alpha", "regex", "some match nothing"]
)
def test_the_plain_form_is_the_same_adapter(base: Path, tmp_path: Path, name: str) -> None:
    """What is written for vLLM: one rank, scale 1, names; stock peft reads the same from it."""
    folder = made(base, tmp_path / "a", **REAL.get(name, {}))
    found = adapter_file.factors(folder, adapter_file.shapes(adapter_file.tensors(folder)))
    peft_io.write_plain(tmp_path / "plain", found)
    want = theirs(base, folder)
    got = theirs(base, tmp_path / "plain")
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    written = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] and isinstance(written["target_modules"], list)


def test_the_reference_backend_refuses_the_same(base: Path, tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    folder = rewritten(made(base, tmp_path / "a"), init_lora_weights="pissa")
    with pytest.raises(ModelError, match="init_lora_weights"):
        peft_io.attach(lm, folder)
    assert not any("lora" in n for n, _ in lm.named_modules())
