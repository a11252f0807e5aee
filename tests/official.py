"""The official FlowerTune evaluation, read line by line and written again as an oracle.

Independent of `fedsim.domains`: nothing of fedsim is imported, and every rule below was read in the
scripts themselves (flwrlabs/flower @ fdef7afb `benchmarks/flowertune-llm/evaluation`, and
yan-gao-GY/bigcode-evaluation-harness @ 3ff8ee00). Functions follow the scripts, so that each can be
held against its original; tables of data frames are lists here. Rows have the columns of the data
directory, which are the hub's, except MMLU's (`_mmlu_row`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """The arguments of the official `generate`; None: not given there."""

    batch: int
    max_new_tokens: str | None = None  # "gold": the tokens of the batch's first gold
    max_length: int | None = None  # prompt and answer together
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seconds: float = 0.0  # of one program
    build: float = 0.0  # of a compiler
    padding: bool = False  # tokenizer(..., padding=True), and the mask is given
    eos: bool = False  # eos_token_id=tokenizer.eos_token_id is given
    skip_special_tokens: bool = True
    process: bool = False  # the program is a process; its exit code alone is looked at


MCQ, BOOLEAN, SENTIMENT, CODE = "mcq", "boolean", "sentiment", "code"
KIND = {
    "mmlu_stem": MCQ, "mmlu_social_sciences": MCQ, "mmlu_humanities": MCQ,
    "medmcqa": MCQ, "medqa": MCQ, "careqa": MCQ, "pubmedqa": BOOLEAN,
    "fpb": SENTIMENT, "fiqa": SENTIMENT, "tfns": SENTIMENT,
    "humaneval": CODE, "mbpp": CODE, "multiple-js": CODE, "multiple-cpp": CODE,
}  # fmt: skip

ENTRANCE_EXAM = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying "
    "health, disease, patient care, and modes of therapy, answer the following multiple-choice "
    "question. Select one correct answer from A to D. Base your answer on the current and standard "
    "practices referenced in medical guidelines."
)
INSTRUCTIONS = {
    "mmlu": "Answer the following multiple choice question.",
    "pubmedqa": (
        "As an expert doctor in clinical science and medical knowledge, can you tell me if the "
        "following statement is correct? Answer yes, no, or maybe."
    ),
    "medqa": (
        "You are a medical doctor taking the US Medical Licensing Examination. You need to "
        "demonstrate your understanding of basic and clinical science, medical knowledge, and "
        "mechanisms underlying health, disease, patient care, and modes of therapy. Show your "
        "ability to apply the knowledge essential for medical practice. For the following "
        "multiple-choice question, select one correct answer from A to E. Base your answer on the "
        "current and standard practices referenced in medical guidelines."
    ),
    "medmcqa": ENTRANCE_EXAM,
    "careqa": ENTRANCE_EXAM,
}


# --- general NLP and medical: benchmarks.py, utils.py -------------------------------------------


def _mmlu_row(row: Row) -> dict[str, str]:
    """cais/mmlu's columns as lukaemon/mmlu's, which the script reads.

    That copy went through a CSV reader which takes the text None for a missing value: the script's
    saved prompts read `A. nan` there (7 options of the STEM test; no other text is concerned).
    """
    options = ["nan" if option == "None" else option for option in row["choices"]]
    out = dict(zip("ABCD", options, strict=True))
    return {"input": row["question"], "target": "ABCD"[row["answer"]], **out}


def _format_example(question: str, choices: Sequence[str]) -> str:
    if not question.endswith("?") and not question.endswith("."):
        question += "?"
    options = "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))
    return "Question: " + question + "\n\nOptions:\n" + options


def _letter(answer: int) -> str | None:
    return chr(ord("A") + answer) if answer in [0, 1, 2, 3] else None


def _post_process(task: str, row: Row) -> tuple[str, str | None]:
    """(prompt, gold) as the data set's columns hold them, before the chat marks."""
    name = "mmlu" if task.startswith("mmlu_") else task
    gold: str | None = None
    if name == "mmlu":
        row = _mmlu_row(row)
        body = _format_example(row["input"], [row["A"], row["B"], row["C"], row["D"]])
        gold = row["target"]
    elif name == "pubmedqa":
        context = "\n".join(row["CONTEXTS"])
        body, gold = f"{context}\n{row['QUESTION']}", row["final_decision"]
    elif name == "medqa":
        body = _format_example(row["question"], [o["value"] for o in row["options"]])
        gold = next(o["key"] for o in row["options"] if o["value"] == row["answer"])
    elif name == "medmcqa":
        options = [row["opa"], row["opb"], row["opc"], row["opd"]]
        body, gold = _format_example(row["question"], options), _letter(int(row["cop"]))
    else:
        options = [row["op1"], row["op2"], row["op3"], row["op4"]]
        body, gold = _format_example(row["question"], options), _letter(int(row["cop"]) - 1)
    return f"{INSTRUCTIONS[name]}\n{body}\nThe answer is:\n", gold


def _clean_answer(output: str) -> str:
    return output.encode("ascii", "ignore").decode("ascii")


def _clean_mcq_answer(output: str) -> str:
    output = _clean_answer(output)
    return output[0] if output else output


def _clean_boolean_answer(output: str) -> str:
    for twice, once in (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no")):
        if twice in output:
            output = output.replace(twice, once)
            break
    return _clean_answer(output)


def _format_answer(output_full: str, answer: str, answer_type: str) -> tuple[str, str]:
    """(prediction, gold) that the accuracy compares; both come in lower case."""
    output = output_full
    default = (output_full, answer)
    if "\n##" in output:
        output = output.split("\n##")[1].split("\n")[0].strip().lower()
    if "###" in answer:
        try:
            answer = answer.split("answer is:")[1].split("###")[0].strip()
        except IndexError:
            return default
    output = re.sub(r"[^a-zA-Z0-9]", " ", output).strip()
    output = re.sub(" +", " ", output)
    if answer_type == BOOLEAN:
        output = _clean_boolean_answer(output)
    elif answer_type == MCQ:
        output = _clean_mcq_answer(output)
    if output in ["a", "b", "c", "d", "e", "yes", "no"]:
        return output, answer
    return default


def written_back(prompts: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """The outputs that get graded: each is written to every row of the data set with its prompt."""
    column = dict(zip(prompts, outputs, strict=True))  # a later one overwrites an earlier one
    return [column[prompt] for prompt in prompts]


# --- finance: benchmarks.py, utils.py -----------------------------------------------------------


def _generate_label(value: float) -> str:
    return "negative" if value < -0.1 else "neutral" if value < 0.1 else "positive"


def _finance_row(task: str, row: Row) -> dict[str, str]:
    tag = "news"
    if task == "fpb":
        given, output = row["sentence"], {0: "negative", 1: "neutral", 2: "positive"}[row["label"]]
    elif task == "fiqa":
        given, output = row["sentence"], _generate_label(row["sentiment_score"])
        tag = "tweet" if row["format"] == "post" else "news"
    else:
        given, output = row["text"], {0: "negative", 1: "positive", 2: "neutral"}[row["label"]]
        tag = "tweet"
    instruction = (
        f"What is the sentiment of this {tag}? "
        "Please choose an answer from {negative/neutral/positive}."
    )
    return {"input": given, "output": output, "instruction": instruction}


def _context(example: Mapping[str, str]) -> str:
    context = f"Instruction: {example['instruction']}\n"
    if example.get("input"):
        context += f"Input: {example['input']}\n"
    return context + "Answer: "


def _out_text(sentence: str) -> str:
    parts = sentence.split("Answer: ")
    return parts[1] if len(parts) > 1 else "None"


def _change_target(x: str) -> str:
    if "positive" in x or "Positive" in x:
        return "positive"
    if "negative" in x or "Negative" in x:
        return "negative"
    return "neutral"


# --- code: bigcode_eval/base.py, tasks/{humaneval,mbpp,multiple}.py -------------------------------

_HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
_MBPP_STOP = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
# stop_tokens of the data set's first row, which the script takes for all of them
_JS_STOP = ("\nfunction ", "\n/*", "\n//", "\nconsole.log", "<file_sep>")
_CPP_STOP = ("\n}", "<file_sep>")


def _get_prompt(task: str, doc: Row) -> str:
    if task == "mbpp":
        return f'"""\n{doc["text"]}\n{doc["test_list"][0]}\n"""\n'
    prompt: str = doc["prompt"].strip()
    return prompt


def _get_reference(task: str, doc: Row) -> str:
    if task == "mbpp":
        return "\n".join(doc["test_list"])
    if task == "humaneval":
        return "\n" + doc["test"] + "\n" + f"check({doc['entry_point']})"
    tests: str = doc["tests"]
    return tests


def tokenizer_with_pad(tokenizer: Any) -> tuple[Any, int | None]:
    """finance/eval.py: the tokenizer, and what the embeddings are resized to, if they are."""
    if not tokenizer.pad_token or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        return tokenizer, len(tokenizer)
    return tokenizer, None


def position_ids(attention_mask: Any) -> Any:
    """transformers 4, generation/utils.py `prepare_inputs_for_generation`, at every step."""
    positions = attention_mask.long().cumsum(-1) - 1
    positions.masked_fill_(attention_mask == 0, 1)
    return positions


def stops(task: str, tokenizer: Any) -> list[str]:
    """generation.py: the task's own, and the tokenizer's EOS."""
    stop_words = list(generation(task).stop)
    if stop_words and tokenizer.eos_token:
        stop_words.append(tokenizer.eos_token)
    return stop_words


def end_of_function(task: str, tokenizer: Any, new_tokens: Sequence[int]) -> bool:
    """generation.py `EndOfFunctionCriteria`, of one sequence, behind its prompt."""
    (decoded,) = tokenizer.batch_decode([list(new_tokens)])
    return any(stop_string in decoded for stop_string in stops(task, tokenizer))


def code(task: str, doc: Row, tokenizer: Any, s: Sequence[int]) -> str:
    """utils.py `update_code_gens` and the task's `postprocess_generation`: the text that the tests
    are put behind, from the whole sequence of tokens."""
    assert tokenizer.eos_token in stops(task, tokenizer)  # the branch that the script takes then
    if s[0] == tokenizer.bos_token_id:
        s = s[1:]
    gen_code = tokenizer.decode(s, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    gen_code = gen_code[len("") :]  # args.prefix
    prompt = _get_prompt(task, doc)
    return prompt + _stop_at_stop_token(gen_code[len(prompt) :], stops(task, tokenizer))


def _stop_at_stop_token(decoded: str, stop_tokens: Sequence[str]) -> str:
    first = len(decoded)
    for token in stop_tokens:
        at = decoded.find(token)
        if at != -1 and at < first:
            first = at
    return decoded[:first]


# --- what the tests ask ---------------------------------------------------------------------------


def prompt(task: str, row: Row) -> str:
    """The whole text that the tokenizer gets."""
    if KIND[task] == SENTIMENT:
        return _context(_finance_row(task, row))
    if KIND[task] == CODE:
        return _get_prompt(task, row)
    return f"<|im_start|>question\n{_post_process(task, row)[0]}<|im_end|>\n<|im_start|>answer\n"


def gold(task: str, row: Row) -> str | None:
    """The right answer in the script's own writing; None where a program decides."""
    if KIND[task] == SENTIMENT:
        return _change_target(_finance_row(task, row)["output"])
    if KIND[task] == CODE:
        return None
    return _post_process(task, row)[1]


def generation(task: str) -> Call:
    """The official call: its arguments, and what the guide's command line sets."""
    if KIND[task] == SENTIMENT:
        return Call(batch=32, max_length=512, padding=True, eos=True)
    if KIND[task] in (MCQ, BOOLEAN):
        return Call(batch=16, max_new_tokens="gold", do_sample=False, temperature=1.0, top_p=1.0)
    stop, seconds = {
        "humaneval": (_HUMANEVAL_STOP, 3.0), "mbpp": (_MBPP_STOP, 3.0),
        "multiple-js": (_JS_STOP, 5.0), "multiple-cpp": (_CPP_STOP, 15.0),
    }[task]  # fmt: skip
    return Call(
        batch=1, max_length=2048 if task == "mbpp" else 1024, do_sample=True, temperature=0.2,
        top_p=0.95, top_k=0, stop=stop, seconds=seconds, build=15.0, skip_special_tokens=False,
        process=task in ("multiple-js", "multiple-cpp"),
    )  # fmt: skip


def grade(task: str, row: Row, output: str) -> bool:
    """Whether the continuation counts as right."""
    if KIND[task] == SENTIMENT:
        out = _out_text(prompt(task, row) + output)
        return _change_target(out) == gold(task, row)
    answer = gold(task, row)
    assert answer is not None
    prediction, right = _format_answer(output.lower(), answer.lower(), KIND[task])
    return prediction == right


def program(task: str, row: Row, output: str) -> str:
    """The program that decides: it passes when it ends by itself without an error."""
    generated = _get_prompt(task, row) + _stop_at_stop_token(output, generation(task).stop)
    return generated + "\n" + _get_reference(task, row)
