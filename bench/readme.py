"""Write the README's generated parts: the demo's output and the measured tables.

    python bench/readme.py [--demo TEXT_FILE]    rewrite the parts between the markers
    python bench/readme.py --check               exit 1 when the README is not what this would write

`--demo` keeps a captured terminal output in bench/results/demo.txt first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TITLES = {
    "flowertune": "FlowerTune, 5 clients x batch 16",
    "small_batch": "16 clients x batch 2",
    "flowertune_dropout": "FlowerTune with dropout 0.075",
}
EVALUATION = {
    "choice_vs_official": ("MMLU: times the official loop (fp4 base, fp32 compute)", ">= 5"),
    "choice_vs_bf16": (
        "MMLU: times the official loop as bitsandbytes runs it, rounding to bf16",
        "",
    ),
    "choice_vs_dense": ("MMLU: times the same loop on the same dense fp32 weights", ">= 2"),
    "choice_vs_official_prefix": ("MedMCQA: times the official loop", ">= 5"),
    "choice_vs_bf16_prefix": ("MedMCQA: times the same, rounding to bf16", ""),
    "choice_vs_dense_prefix": ("MedMCQA: times the same loop on dense fp32 weights", ">= 2"),
    "eight_adapters": ("eight adapters in one call, over eight calls", "<= 0.9"),
    "examples_per_second_choice": ("MMLU, examples/s", ""),
    "examples_per_second_sentiment": ("finance sentiment, examples/s", ""),
    "examples_per_second_code": ("HumanEval, examples/s, graded", ""),
    "vllm_one": ("coding: vLLM times transformers, one request at a time", ""),
    "vllm_many": ("coding: vLLM times transformers, 32 requests", ""),
}


RULES_SHOWN = (
    "fedavg", "fedadam", "scaffold", "median", "multi_krum", "flexlora", "flora", "hetlora",
)  # fmt: skip


def demo() -> str:
    """The captured output as a code block."""
    file = RESULTS / "demo.txt"
    return f"```\n{file.read_text(encoding='utf-8').rstrip()}\n```" if file.is_file() else ""


def _measured(name: str) -> dict[str, Any]:
    """A bench's record; empty where it has not been run."""
    file = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _machine(result: dict[str, Any]) -> str:
    """What a record was measured on."""
    machine = result["machine"]
    flags = ", ".join(machine["flags"]) or "no bf16 instructions"
    return f"{machine['cpu']}, {machine['threads']} threads, {flags}"


def _cell(found: dict[str, float] | None) -> str:
    if not found:
        return ""
    if found["n"] == 1:
        return f"{found['median']:.2f}"
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def clients() -> str:
    """Rounds of fedsim against stock PEFT, from clients.json."""
    if not (result := _measured("clients")):
        return ""
    lines = [
        "| whole round, real tokens | tokens/s | x B0 | x B0 default | x B1 |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["settings"].items():
        for arm, ratios in row["ratios"].items():
            title = TITLES[name] + (", shared prefix" if arm.endswith("shared_prefix") else "")
            cells = [_cell(ratios.get(key)) for key in ("vs_b0", "vs_b0_default", "vs_b1")]
            speed = row["arms"][arm]["tokens_per_second"]
            lines.append(f"| {title} | {speed:,.0f} | {' | '.join(cells)} |")
    first = next(iter(result["settings"].values()))
    steps, repeats, b0 = first["steps"], len(first["arms"]["engine"]["seconds"]), first["b0"]
    return "\n".join([
        *lines, "",
        f"SmolLM2-135M-Instruct ({result['engine_dtype']}), rank 32 on q_proj and v_proj, FinGPT "
        f"sentiment, {steps} local steps, medians of {repeats} paired repeats with their range; "
        f"{_machine(result)}. "
        f"**B0** is stock transformers and PEFT, one client after another, padded, in its fastest "
        f"setting ({b0}); **B0 default** is what `from_pretrained` gives; **B1** is this engine "
        "with one client in a pass and no shared prefix. Written by `make bench`.",
    ])  # fmt: skip


def engine() -> str:
    """What the engine's steps cost, from engine.json."""
    if not (result := _measured("engine")):
        return ""
    lines = ["| of the engine | measured | target | stretch |", "|---|---|---|---|"]
    for f in result["figures"].values():
        bound = "at least" if f["more"] else "at most"
        lines.append(
            f"| {f['title']} | {_three(f['value'])} ({_three(f['low'])} to {_three(f['high'])}) "
            f"| {bound} {f['target']:g} | {f['stretch']:g} |"
        )
    return "\n".join([
        *lines, "",
        f"SmolLM2-135M-Instruct, rank 16 on every linear, embedded examples; every arm in "
        f"{result['dtype']}; medians of paired repeats of one run with their range; "
        f"{_machine(result)}. `bench/bench_engine.py` says "
        "what each figure is.",
    ])  # fmt: skip


def evaluation() -> str:
    """Answers a second, from eval.json."""
    if not (result := _measured("eval")):
        return ""
    lines = ["| evaluation, protocol flowertune | measured | target |", "|---|---|---|"]
    for key, f in result["figures"].items():
        title, target = EVALUATION[key]
        spread = "" if f["n"] == 1 else f" ({_three(f['low'])} to {_three(f['high'])})"
        lines.append(f"| {title} | {_three(f['value'])}{spread} | {target} |")
    return "\n".join([
        *lines, "",
        f"SmolLM2-135M-Instruct in {result['dtype']} under a rank-16 adapter on every linear; "
        f"{_machine(result)}; answers equal before anything is timed. `bench/bench_eval.py` says "
        "what each figure is.",
    ])  # fmt: skip


def domains() -> str:
    """What federated training did in each domain, from domains.json."""
    if not (result := _measured("domains")):
        return ""
    lines = [
        "| domain | task, metric | n | zero-shot | federated (each seed) | change, 95 % "
        "| majority | above it, 95 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        seeds = ", ".join(f"{100 * s:.1f}" for s in r["seeds"])
        known, above = "", ""
        if r["majority"] is not None:
            known = f"{100 * r['majority']:.1f}"
            above = f"{100 * r['above_low']:+.1f} to {100 * r['above_high']:+.1f}"
        lines.append(
            f"| {r['domain']} | {r['task']}, {r['metric']} | {r['n']} | {100 * r['before']:.1f} "
            f"| {100 * r['after']:.1f} ({seeds}) "
            f"| {100 * r['low']:+.1f} to {100 * r['high']:+.1f} | {known} | {above} |"
        )
    rounds = "; ".join(
        f"{name}: {w[0]} rounds of {w[1]} clients, {w[2]} steps of {w[3]}"
        for name, w in result["work"].items()
    )
    return "\n".join([
        *lines, "",
        "SmolLM2-135M-Instruct, protocol fedsim, the real training and test sets (subsets, n "
        f"shown), {result['seeds']} seeds; intervals are paired over questions. {rounds}. "
        f"`bench/domains.py` took {result['seconds'] / 60:.0f} minutes on {_machine(result)}.",
    ])  # fmt: skip


def aggregation() -> str:
    """What rules cost the server, from aggregation.json."""
    if not (result := _measured("aggregation")):
        return ""
    last = result["counts"][-1]
    summary, rules = result["summary"], result["rules"]
    shown = [name for name in RULES_SHOWN if name in rules]
    columns = [f"{count:,} clients" for count in result["counts"]]
    lines = [
        f"| aggregating updates of {next(iter(rules.values()))['numbers']:,} numbers | "
        + " | ".join(columns) + " |", "|---|" + "---|" * len(columns),
    ]  # fmt: skip
    for name in shown:
        cells = []
        for count in result["counts"]:
            f = rules[name][str(count)]
            cells.append(f"{f['needs_gib']:.0f} GiB needed" if "needs_gib" in f else
                         f"{_three(f['seconds'])} s, {f['extra_mib']:,.0f} MiB")  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    extra = summary[f"streaming_extra_mb_{last}_clients"]
    return "\n".join([
        *lines, "",
        f"Seconds and memory beside the server's state; rules that only add up take at most "
        f"{extra:,.0f} MiB for {last:,} clients. FlexLoRA on a module 4,096 wide, 10 clients of "
        f"rank 16, is {summary['flexlora_qr_speedup']:,.0f} times faster by QR than by the dense "
        f"product and its SVD (target 50), {summary['flexlora_max_rel_error']:.0e} from the best "
        f"of its rank. {_machine(result)}. `bench/bench_aggregation.py` prints every rule.",
    ])  # fmt: skip


def workers() -> str:
    """What a second process gives and costs, from workers.json."""
    if not (result := _measured("workers")):
        return ""
    lines = [
        "| whole rounds | s a round | memory, MiB | private | mapped |",
        "|---|---|---|---|---|",
    ]
    for name, used in result["memory_mib"].items():
        seconds = sorted(result["seconds"][name])
        processes, threads = name.split(" x ")
        lines.append(
            f"| {processes} process{'es' * (processes != '1')} x {threads} "
            f"thread{'s' * (threads != '1')} | {_three(seconds[len(seconds) // 2])} | "
            + " | ".join(f"{used[k]:,.0f}" for k in ("Pss", "Pss_Anon", "Pss_File")) + " |"
        )  # fmt: skip
    gain, extra = result["efficiency_2"], result["summary"]["extra_process_mb_over_base_mb"]
    return "\n".join([
        *lines, "",
        f"Two processes of one thread over one of two: {_cell(gain)} (target 0.9). The second "
        f"adds {extra:.2f} of the base's {result['base_mib']:,.0f} MiB, with its own Python, "
        "activations and slots (proportional set size); the base is one mapped file. "
        f"SmolLM2-135M-Instruct, 12 clients of FinGPT sentiment; {_machine(result)}. "
        "`bench/bench_workers.py`.",
    ])  # fmt: skip


def sharded() -> str:
    """A base that no process holds whole, from sharded.json."""
    if not (result := _measured("sharded")):
        return ""
    lines = [
        "| base of 1.07 billion fp32 weights | s a round | s to the first round's end | "
        "largest peak of a process, MiB |",
        "|---|---|---|---|",
    ]
    for how, name in (("zero3", "in parts (ZeRO-3)"), ("none", "whole, one mapped file")):
        arm = result["arms"][how]
        seconds = sorted(arm["round_s"])
        lines.append(
            f"| {name} | {_three(seconds[len(seconds) // 2])} | {arm['first_s']:,.0f} | "
            f"{max(arm['peak_mib']):,.0f} |"
        )
    return "\n".join([
        *lines, "",
        f"Four processes of one thread; the weights are {result['weights_mib']:,.0f} MiB, of which "
        f"the largest process in parts peaks at {result['summary']['peak_over_weights']:.2f} "
        f"(resident, with Python, slots and activations). It takes "
        f"{_cell(result['sharded_over_whole'])} times as long. {_machine(result)}. "
        "`bench/bench_sharded.py`.",
    ])  # fmt: skip


def _three(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def render(text: str) -> str:
    """The README with its generated parts renewed."""
    parts = {"demo": demo, "bench": clients, "engine": engine, "eval": evaluation,
             "aggregation": aggregation, "workers": workers,
             "sharded": sharded, "domains": domains}  # fmt: skip
    for name, make in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.demo:
        RESULTS.mkdir(exist_ok=True)
        captured = arguments.demo.read_text(encoding="utf-8")
        (RESULTS / "demo.txt").write_text(captured, encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if arguments.check:
        sys.exit("README.md is not up to date: run bench/readme.py" if render(text) != text else 0)
    readme.write_text(render(text), encoding="utf-8")


if __name__ == "__main__":
    main()
