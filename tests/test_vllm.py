"""The vLLM backend: its parent side against a script that speaks the protocol, then the real thing.

Proves that texts, order and stops are those of the other backends; that the bare base never shares
a batch with adapters; that a worker which fails, hangs, lies or is killed is an error that quotes
it and leaves no process and no file; and, with vLLM, that every request of a mixed batch gets the
tokens of stock transformers with its own adapter. Without vLLM 20 s; with it 80 s more.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fedsim import weights
from fedsim.config import Config, build
from fedsim.errors import ConfigError, DataError, FedSimError, ModelError, RunError
from fedsim.evaluate import vllm, vllm_worker
from fedsim.evaluate.generation import Adapter, Output, Request, Sampling
from fedsim.evaluate.vllm import VLLM
from fedsim.weights import Weights
from tests.conftest import require

# peft 0.21 reads a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
PYTHON = Path(__file__).parents[1] / vllm.PYTHON
GREEDY = Sampling()

# Continues a prompt with its own first tokens, last request first. $FAKE says how to misbehave.
FAKE = """
import json, os, shutil, subprocess, sys, time
how, seen = os.environ.get("FAKE"), os.environ["FAKE_SEEN"]
if how in ("hang", "die", "lie"):
    child = subprocess.Popen(["sleep", "600"], stdin=-3, stdout=-3, stderr=-3)
    print("child", child.pid, file=sys.stderr, flush=True)
if how == "absent":
    print("ModuleNotFoundError: no vllm", file=sys.stderr)
    sys.exit(3)
tell = lambda **message: print(json.dumps(message), flush=True)
tell(ready="fake")
for line in sys.stdin:
    batch = json.load(open(line.rstrip("\\n")))
    log = {"pid": os.getpid(), "settings": json.loads(sys.argv[1]), "env": dict(os.environ)}
    print(json.dumps(log | batch), file=open(seen, "a"))
    for i, adapter in enumerate(batch["adapters"]):
        if adapter and os.path.basename(adapter["folder"]) == "zero":
            shutil.copytree(adapter["folder"], seen + ".zero", dirs_exist_ok=True)
    if how == "hang":
        time.sleep(600)
    if how == "die":
        print("out of something", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if how == "fail":
        raise ValueError("max_model_len is too large")
    if how == "lie":
        print("INFO loading", flush=True)
    for r in reversed(batch["requests"][how == "less":]):
        tell(step=1)
        tell(index=r["index"], tokens=r["ids"][: r["max_new"]], end="length")
    tell(done=len(batch["requests"]))
"""


def configuration(name: str, **changes: Any) -> Config:
    values = {"model": {"name": name, "dtype": "float32"}, "adapter": {"rank": 16}}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        values.setdefault(section, {})[leaf] = value
    return build(values, "test")


def adapter_folder(folder: Path, rank: int, **config: Any) -> Path:
    """An adapter of one linear."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": rank, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    r, q = config.get("rank_pattern", {}).get("q_proj", rank), "base_model.model.m.q_proj.lora_"
    tensors = {f"{q}A.weight": torch.ones(r, 3), f"{q}B.weight": torch.ones(5, r)}
    if config.get("use_dora"):
        tensors[f"{q}magnitude_vector"] = torch.ones(5)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Fake:
    """The backend with the script in the worker's place, and what the script was given."""

    def __init__(self, model: Path, tokenizer: Any, seen: Path) -> None:
        self.model, self.tokenizer, self.seen = model, tokenizer, seen

    def backend(self, patience: float = 60.0, **changes: Any) -> VLLM:
        found = Weights(self.model, "test", "test")
        config = configuration(str(self.model), **changes)
        return VLLM(found, self.tokenizer, config, Path(sys.executable), patience=patience)

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.seen.read_text().splitlines()]


@pytest.fixture
def fake(
    tiny: Callable[[str], Path], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Fake:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(vllm, "SCRIPT", script)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("FAKE_SEEN", str(tmp_path / "seen"))
    return Fake(tiny("llama"), tokenizer, tmp_path / "seen")


@pytest.fixture
def small_copy(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """The tiny model with something else in its generation_config.json."""

    def make(**settings: Any) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(tiny("llama"), folder)
        (folder / "generation_config.json").write_text(json.dumps(settings))
        return folder

    return make


def nothing_left(tmp_path: Path) -> None:
    assert psutil.Process().children(recursive=True) == []
    assert list((tmp_path / "scratch").iterdir()) == []


# The parent's side.


def test_outputs_come_in_the_order_of_the_requests(fake: Fake, tmp_path: Path) -> None:
    folders = [adapter_folder(tmp_path / f"a{i}", 4) for i in range(3)]
    adapters = [Adapter(f"a{i}", folder) for i, folder in enumerate(folders)]
    requests = [Request(f"the market number {i} rose", i % 3, 2 + i) for i in range(7)]
    outputs = fake.backend().generate(requests, adapters, GREEDY)
    for request, output in zip(requests, outputs, strict=True):
        ids = fake.tokenizer(request.prompt)["input_ids"][: request.max_new]
        assert output == Output(fake.tokenizer.decode(ids), tuple(ids), "length")
    (seen,) = fake.log()
    assert [r["adapter"] for r in seen["requests"]] == [0, 0, 0, 1, 1, 2, 2]
    names = [Path(a["folder"]).name for a in seen["adapters"]]  # written anew, of one form
    assert names == ["adapter-0", "adapter-1", "adapter-2"]
    nothing_left(tmp_path)


def test_nothing_asked_starts_nothing(fake: Fake, tmp_path: Path) -> None:
    assert fake.backend().generate([], [Adapter("base")], GREEDY) == []
    assert not fake.seen.exists()


@pytest.mark.parametrize(
    ("prompt", "stop", "text", "end"),
    [("up\ndown; then", ("\n",), "up", "stop"), ("up\ndown; then", (";", "wn"), "up\ndo", "stop"),
     ("up<eos>down", ("zz",), "up", "eos"), ("; down", (";",), "", "stop")],
)  # fmt: skip
def test_the_text_is_our_own_decoding_cut_at_the_first_stop(
    fake: Fake, prompt: str, stop: tuple[str, ...], text: str, end: str
) -> None:
    """The stop that occurs first counts, not the first named; EOS ends a text and is not in it."""
    (output,) = fake.backend().generate([Request(prompt, 0, 99, stop)], [Adapter("b")], GREEDY)
    assert (output.text, output.end) == (text, end)
    assert fake.log()[0]["requests"][0]["stop"] == list(stop)


def test_what_is_decided_ends_a_text(fake: Fake) -> None:
    """Asked after vLLM has written it all: the text is that of a backend that asks in between."""
    request = Request("up, then down", 0, 99, decided=lambda text: "then" in text)
    (output,) = fake.backend().generate([request], [Adapter("b")], GREEDY)
    assert (output.text, output.end) == ("up, then", "decided")


def test_a_second_end_of_sequence_is_the_models_own(
    fake: Fake, small_copy: Callable[..., Path]
) -> None:
    """generation_config.json may name more than the tokenizer's."""
    (comma,) = fake.tokenizer(",")["input_ids"]
    fake.model = small_copy(eos_token_id=[0, comma])
    (output,) = fake.backend().generate([Request("up, then", 0, 99)], [Adapter("b")], GREEDY)
    assert (output.text, output.end, output.tokens[-1]) == ("up,", "eos", comma)


def test_a_prompt_without_tokens_is_refused(fake: Fake) -> None:
    with pytest.raises(DataError, match="at least one token"):
        fake.backend().generate([Request("", 0, 1)], [Adapter("b")], GREEDY)


def test_the_base_beside_adapters_is_an_adapter_of_zeros(fake: Fake, tmp_path: Path) -> None:
    """vLLM 0.32 on a CPU gives a request without adapter another request's adapter."""
    adapters = [Adapter("base"), Adapter("a", adapter_folder(tmp_path / "a", 4, lora_alpha=8)),
                Adapter("again"), Adapter("unused", adapter_folder(tmp_path / "u", 2))]  # fmt: skip
    fake.backend().generate([Request("x", i, 1) for i in (0, 1, 2)], adapters, GREEDY)
    given = fake.log()[0]["adapters"]
    assert [a and Path(a["folder"]).name for a in given] == ["zero", "adapter-1", "zero", None]
    zero = Path(f"{fake.seen}.zero")
    written = json.loads((zero / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 4)  # the scale, 2, is in B
    tensors = load_file(zero / "adapter_model.safetensors")
    assert {k: (v.shape, v.any()) for k, v in tensors.items()} == {
        f"base_model.model.m.q_proj.lora_{kind}.weight": (shape, False)
        for kind, shape in (("A", (4, 3)), ("B", (5, 4)))
    }  # fmt: skip


def test_the_base_alone_needs_no_adapter(fake: Fake, tmp_path: Path) -> None:
    adapters = [Adapter("a", adapter_folder(tmp_path / "a", 4)), Adapter("base")]
    fake.backend().generate([Request("x", 1, 1)] * 2, adapters, GREEDY)
    assert fake.log()[0]["adapters"] == [None, None]


def test_within_a_with_one_process_answers_every_call(fake: Fake, tmp_path: Path) -> None:
    """An adapter gets a new number in each call: vLLM would not read a known one again. A longer
    sequence than there is room for takes a new process."""
    adapters = [Adapter("a", adapter_folder(tmp_path / "a", 4))]
    with fake.backend() as backend:
        for _ in range(3):
            backend.generate([Request("x", 0, 1)], adapters, GREEDY)
        assert len(psutil.Process().children()) == 1
    nothing_left(tmp_path)
    backend.generate([Request("x", 0, 1)], adapters, GREEDY)
    nothing_left(tmp_path)
    log = fake.log()
    assert len({line["pid"] for line in log[:3]}) == 1 != len({line["pid"] for line in log})
    assert [line["adapters"][0]["id"] for line in log] == [1, 2, 3, 4]


def test_room_grows_up_to_the_models_context(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "ROOM", 64)
    prompt = "a" * 8
    length = len(fake.tokenizer(prompt)["input_ids"])
    with fake.backend() as backend:
        for need in (64, 65, 100, 300, 512):  # the tiny models end at 512
            backend.generate([Request(prompt, 0, need - length)], [Adapter("base")], GREEDY)
        with pytest.raises(ConfigError, match=r"got 513; expected at most 512"):
            backend.generate([Request(prompt, 0, 513 - length)], [Adapter("base")], GREEDY)
    log = fake.log()
    assert [line["settings"]["max_model_len"] for line in log] == [64, 128, 128, 512, 512]
    assert len({line["pid"] for line in log}) == 3
    nothing_left(tmp_path)


def test_every_request_samples_with_a_seed_of_its_own(fake: Fake) -> None:
    sampling = Sampling(0.7, 0.9, 40, seed=3)
    for seed in (3, 3, 4):
        requests = [Request("same", 0, 2)] * 5
        fake.backend().generate(requests, [Adapter("b")], Sampling(0.7, 0.9, 40, seed))
    first, again, other = ([r["seed"] for r in line["requests"]] for line in fake.log())
    assert first == again and len({*first, *other}) == 10
    assert all(0 <= seed < 1 << 63 for seed in first)
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 40}
    assert sampling.seed == 3 and fake.log()[0]["sampling"] == expected


def test_the_worker_is_offline_and_sees_nothing_of_this_environment(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    fake.backend(adapter__rank=9).generate([Request("x", 0, 1)], [Adapter("b")], GREEDY)
    (seen,) = fake.log()
    environment = seen["env"]
    assert "PYTHONPATH" not in environment and "TRITON_INTERPRET" not in environment
    assert environment["HF_HUB_OFFLINE"] == environment["DO_NOT_TRACK"] == "1"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"  # the user's own
    assert seen["settings"]["max_lora_rank"] == 16 and seen["settings"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("how", "says"),
    [("die", r"was ended by SIGKILL.*out of something"), ("hang", r"made no progress for 1.5 s"),
     ("fail", r"ended with status 1.*max_model_len is too large"),
     ("less", r"answered 1 of 2 requests"), ("lie", r"wrote b'INFO loading', which is no message")],
)  # fmt: skip
def test_a_worker_that_fails_is_an_error_and_leaves_nothing(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    """Nor does the process that it had started; and the next call begins afresh."""
    monkeypatch.setenv("FAKE", how)
    requests = [Request("x", 0, 1), Request("y", 0, 1)]
    with fake.backend(patience=1.5 if how == "hang" else 60.0) as backend:
        with pytest.raises(RunError, match=f"(?s){says}") as failure:
            backend.generate(requests, [Adapter("b")], GREEDY)
        if how in ("hang", "die", "lie"):
            child = int(str(failure.value).partition("child ")[2].split()[0])
            assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
        nothing_left(tmp_path)
        monkeypatch.delenv("FAKE")
        assert len(backend.generate(requests, [Adapter("b")], GREEDY)) == 2
    nothing_left(tmp_path)


def test_an_interpreter_without_vllm_is_an_error_with_the_remedy(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "absent")
    with pytest.raises(ModelError, match=r"(?s)make install-vllm.*no vllm"):
        fake.backend().generate([Request("x", 0, 1)], [Adapter("b")], GREEDY)
    nothing_left(tmp_path)


def test_no_interpreter_is_an_error_with_the_remedy(fake: Fake, tmp_path: Path) -> None:
    found = Weights(fake.model, "test", "test")
    with pytest.raises(ConfigError, match=r"none/python.*make install-vllm"):
        VLLM(found, fake.tokenizer, configuration("x"), Path("none/python"))
    backend = VLLM(found, fake.tokenizer, configuration("x"), fake.seen.parent / "fake.py")
    with pytest.raises(ModelError, match=r"cannot be run.*make install-vllm"):
        backend.generate([Request("x", 0, 1)], [Adapter("b")], GREEDY)
    nothing_left(tmp_path)


def test_a_padded_prompt_names_the_backend(fake: Fake) -> None:
    with pytest.raises(ConfigError, match=r"padded prompts with the vllm backend.*engine"):
        fake.backend().generate([Request("x", 0, 1, padded=9)], [Adapter("b")], GREEDY)


def test_ends_and_special_tokens_are_told(fake: Fake, small_copy: Callable[..., Path]) -> None:
    """Where only the tokenizer's own EOS ends a text the model's others are ignored."""
    (comma,) = fake.tokenizer(",")["input_ids"]
    fake.model = small_copy(eos_token_id=[0, comma])
    asked = [Request("up, then", 0, 99), Request("up, then", 0, 99, one_end=True),
             Request("up<eos>", 0, 99, special=True)]  # fmt: skip
    outputs = fake.backend().generate(asked, [Adapter("b")], GREEDY)
    assert [o.text for o in outputs] == ["up,", "up, then", "up<eos>"]
    told = fake.log()[0]["requests"]
    assert [(r["ends"], r["special"]) for r in told] == [([], False), ([0], False), ([], True)]
    assert [o.mended for o in outputs] == [None, "up,", "up"]


def test_likelihood_names_the_backend(fake: Fake) -> None:
    asked = [Request("x", 0, 1, choices=("a", "b"))]
    with pytest.raises(ConfigError, match=r"choices with the vllm backend.*engine"):
        fake.backend().generate(asked, [Adapter("b")], GREEDY)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"model__quantisation": "fp4"}, "model.quantisation with the vllm backend: got 'fp4'"),
     ({"adapter__rank": 600}, "adapter.rank with the vllm backend: got 600; expected at most 512")],
)  # fmt: skip
def test_what_vllm_cannot_do_is_refused_at_once(
    fake: Fake, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        fake.backend(**changes)


def test_adapters_that_vllm_cannot_load_are_refused(fake: Fake, tmp_path: Path) -> None:
    cases = {
        "a row": Adapter("a", row=torch.zeros(3)),
        "DoRA": Adapter("d", adapter_folder(tmp_path / "dora", 4, use_dora=True)),
        "rank 17": Adapter("r", adapter_folder(tmp_path / "rank", 17)),
        "rank 32": Adapter("p", adapter_folder(tmp_path / "p", 4, rank_pattern={"q_proj": 32})),
        "cannot be read": Adapter("n", tmp_path),
    }
    broken = adapter_folder(tmp_path / "broken", 4)
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    for says, adapter in cases.items():
        with pytest.raises(FedSimError, match=says):
            fake.backend().generate([Request("x", 0, 1)], [adapter], GREEDY)
    with pytest.raises(ModelError, match="safetensors cannot be read"):
        adapters = [Adapter("base"), Adapter("broken", broken)]
        fake.backend().generate([Request("x", i, 1) for i in (0, 1)], adapters, GREEDY)
    nothing_left(tmp_path)


# The worker's side, with what it uses of vLLM in vLLM's place.


class Engine:
    """Ends one request a step, in the order in which they were added."""

    def __init__(self, reasons: Sequence[tuple[str, Any]] = ()) -> None:
        self.added: list[tuple[str, Any, Any]] = []
        self.reasons = list(reasons)

    def add_request(self, name: str, prompt: Any, parameters: Any, *, lora_request: Any) -> None:
        self.added.append((name, prompt, lora_request))

    def has_unfinished_requests(self) -> bool:
        return bool(self.reasons)

    def step(self) -> list[Any]:
        end, reason = self.reasons.pop(0)
        got = types.SimpleNamespace(token_ids=(5, 6), finish_reason=end, stop_reason=reason)
        number = str(len(self.reasons))
        return [types.SimpleNamespace(finished=True, request_id=number, outputs=[got])]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("vllm", "vllm.lora", "vllm.lora.request")
    parts = {name: types.ModuleType(name) for name in names}
    parts["vllm"].SamplingParams = types.SimpleNamespace  # type: ignore[attr-defined]
    parts["vllm.lora.request"].LoRARequest = lambda *given: given  # type: ignore[attr-defined]
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("stub")
def test_the_worker_refuses_a_batch_that_mixes_base_and_adapters() -> None:
    request = {"index": 0, "ids": [1], "adapter": 0, "max_new": 1, "stop": [], "seed": 0,
               "ends": [], "special": False}  # fmt: skip
    batch = {"adapters": [{"id": 7, "folder": "f"}, None], "sampling": {}, "requests": [request]}
    engine = Engine()
    vllm_worker.add(engine, batch)
    assert engine.added == [("0", {"prompt_token_ids": [1]}, ("adapter-7", 7, "f"))]
    batch["requests"] = [request, {**request, "adapter": 1}]
    with pytest.raises(ValueError, match="another's adapter"):
        vllm_worker.add(engine, batch)
    assert len(engine.added) == 1


def test_the_worker_tells_why_a_text_ended() -> None:
    """`stop_reason` is the text that was met; the token, for a second EOS; None, for the first."""
    reasons = [("stop", "\n"), ("stop", 7), ("stop", None), ("length", None)]
    told = list(vllm_worker.outputs(Engine(reasons)))
    assert told == [
        {"index": 3 - i, "tokens": [5, 6], "end": end}
        for i, end in enumerate(["stop", "eos", "eos", "length"])
    ]


def test_the_worker_ends_when_the_parent_is_gone(
    stub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.modules["vllm"].__version__ = "0"  # type: ignore[attr-defined]
    monkeypatch.setattr(vllm_worker, "load", lambda settings: Engine())
    told: list[dict[str, Any]] = []
    vllm_worker.serve({}, lambda: "", told.append)
    assert told == [{"ready": "0"}]


# With vLLM.


def heads_of_32(folder: Path, tokenizer: Any) -> Path:
    """A Llama with the smallest heads that vLLM's attention knows on a CPU."""
    torch.manual_seed(3)
    small = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        ),
        dtype=torch.float32,
    )  # fmt: skip
    for p in small.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def peft_folder(model: Path, folder: Path, seed: int, spread: float, **config: Any) -> Path:
    """A random adapter as stock PEFT writes it; B has a standard deviation of `spread`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=spread)
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def stock(
    model: Path, tokenizer: Any, adapters: Sequence[Adapter], requests: Sequence[Request]
) -> list[tuple[int, ...]]:
    """Greedy tokens of transformers and PEFT, one prompt at a time."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    real = [a for a in adapters if a.folder]
    adapted = PeftModel.from_pretrained(base, real[0].folder, adapter_name=real[0].name)
    for a in real[1:]:
        adapted.load_adapter(a.folder, adapter_name=a.name)
    out = []
    for r in requests:
        inputs = tokenizer(r.prompt, return_tensors="pt")
        settings = {"max_new_tokens": r.max_new, "do_sample": False}
        if adapters[r.adapter].folder is None:
            with adapted.disable_adapter():
                ids = adapted.generate(**inputs, **settings)
        else:
            adapted.set_adapter(adapters[r.adapter].name)
            ids = adapted.generate(**inputs, **settings)
        out.append(tuple(ids[0, inputs["input_ids"].shape[1] :].tolist()))
    return out


@pytest.fixture(scope="module")
def small(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heads_of_32(tmp_path_factory.mktemp("small"), tokenizer)


@pytest.fixture(scope="module")
def adapters(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """The bare base among adapters of ranks 4 (2 in some modules), 8 and 16, one with rsLoRA."""
    root = tmp_path_factory.mktemp("adapters")
    settings: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear",
         "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        {"r": 16, "lora_alpha": 16, "target_modules": ["o_proj", "down_proj", "up_proj"]},
    ]  # fmt: skip
    made = [Adapter(f"a{i}", peft_folder(small, root / f"a{i}", i, 0.3, **s))
            for i, s in enumerate(settings)]  # fmt: skip
    return [made[0], Adapter("base"), *made[1:]]


@pytest.fixture(scope="module")
def warm(small: Path, tokenizer: Any) -> Iterator[VLLM]:
    """One process for the tests below, gone afterwards. It has three slots: the defect is that a
    request without adapter reads the last slot, and shows only where an adapter fills that one."""
    require("vllm", PYTHON.is_file(), "vLLM is not installed: `make install-vllm`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "SLOTS", 3)
        config = configuration(str(small))
        with VLLM(weights.find(str(small)), tokenizer, config, PYTHON) as backend:
            yield backend
    assert psutil.Process().children(recursive=True) == []


PROMPTS = ("the market rose", "profit of the company fell to EUR 3.4 million from EUR 5 million",
           "a", "sales were flat in the third quarter; ")  # fmt: skip


def test_every_request_of_a_mixed_batch_gets_its_own_adapter(
    warm: VLLM, small: Path, tokenizer: Any, adapters: list[Adapter]
) -> None:
    """And the base its own: the defect gave it the output of one of the adapters."""
    requests = [Request(p, a, 12) for p in PROMPTS for a in (1, 3, 0, 2)]
    outputs = warm.generate(requests, adapters, GREEDY)
    expected = stock(small, tokenizer, adapters, requests)
    assert [o.tokens for o in outputs] == expected
    assert all(len({*expected[i : i + 4]}) == 4 for i in range(0, len(expected), 4))
    for output in outputs:
        assert output.text == tokenizer.decode(output.tokens, skip_special_tokens=True)
        assert (output.end == "eos") == (output.tokens[-1] == tokenizer.eos_token_id)


def test_the_base_alone_is_right_after_adapters_were_loaded(
    warm: VLLM, small: Path, tokenizer: Any, adapters: list[Adapter]
) -> None:
    requests = [Request(p, 1, 12) for p in PROMPTS]
    outputs = warm.generate(requests, adapters, GREEDY)
    assert [o.tokens for o in outputs] == stock(small, tokenizer, adapters, requests)


def test_an_adapter_that_replaces_another_is_read_anew(
    warm: VLLM, small: Path, tokenizer: Any, adapters: list[Adapter], tmp_path: Path
) -> None:
    """Same name, same folder, other content, same process."""
    folder = tmp_path / "round"
    answers = []
    for source in (adapters[0], adapters[3]):
        assert source.folder is not None
        folder.mkdir(exist_ok=True)
        for file in source.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        given = [Adapter("round", folder)]
        requests = [Request(p, 0, 12) for p in PROMPTS]
        answers.append([o.tokens for o in warm.generate(requests, given, GREEDY)])
        assert answers[-1] == stock(small, tokenizer, given, requests)
    assert answers[0] != answers[1]


def test_a_stop_text_ends_a_text_early(warm: VLLM, adapters: list[Adapter], tokenizer: Any) -> None:
    """The stop is taken from what follows without it, across a boundary of tokens."""
    (whole,) = warm.generate([Request(PROMPTS[1], 2, 24)], adapters, GREEDY)
    stop = whole.text[6:9]
    (cut,) = warm.generate([Request(PROMPTS[1], 2, 24, (stop,))], adapters, GREEDY)
    at = whole.text.index(stop)
    assert (cut.text, cut.end) == (whole.text[:at], "stop")
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert len(cut.tokens) < len(whole.tokens)
    assert stop in tokenizer.decode(cut.tokens) and stop not in tokenizer.decode(cut.tokens[:-1])


def test_samples_depend_on_their_seed_alone(warm: VLLM, adapters: list[Adapter]) -> None:
    hot = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=5)
    requests = [Request(PROMPTS[0], 2, 8)] * 6
    first, again = (warm.generate(requests, adapters, hot) for _ in range(2))
    other = warm.generate(requests, adapters, Sampling(1.0, 0.95, 50, seed=6))
    assert first == again != other
    assert len({o.tokens for o in first}) > 1


def test_a_killed_process_is_an_error(warm: VLLM, adapters: list[Adapter]) -> None:
    warm.generate([Request("a", 1, 1)], adapters, GREEDY)
    (process,) = psutil.Process().children()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match="was ended by SIGKILL"):
        warm.generate([Request("a", 1, 1)], adapters, GREEDY)
    assert psutil.Process().children(recursive=True) == []


@pytest.mark.slow
def test_a_real_model_answers_as_stock_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2, fp32: two adapters and the base in one batch."""
    monkeypatch.delenv("FEDSIM_CACHE")
    require("vllm", PYTHON.is_file(), "vLLM is not installed: `make install-vllm`")
    try:
        found = weights.find("smollm2-135m-instruct")
    except ModelError as absent:
        require("model", False, str(absent))
        raise
    tokenizer = weights.tokenizer(found)
    shared = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16}
    adapters = [Adapter("base")] + [
        Adapter(f"r{r}", peft_folder(found.path, tmp_path / f"r{r}", r, 0.1, r=r, **shared))
        for r in (8, 16)
    ]
    prompts = (
        "The capital of France is",
        "Question: what is 2 + 3?\nAnswer:",
        "def fibonacci(n):\n",
        "What is the sentiment of: profit fell to EUR 3 mn?\n",
    )
    requests = [Request(p, a, 24) for p in prompts for a in (1, 0, 2)]
    config = configuration("smollm2-135m-instruct")
    outputs = VLLM(found, tokenizer, config, PYTHON).generate(requests, adapters, GREEDY)
    expected = stock(found.path, tokenizer, adapters, requests)
    assert [o.tokens for o in outputs] == expected
    assert len({tuple(expected[i::3]) for i in range(3)}) == 3
