"""General NLP: instruction following on Alpaca-GPT4, asked with MMLU.

Sets: Peng et al., Instruction tuning with GPT-4, arXiv:2304.03277; Hendrycks et al., MMLU,
arXiv:2009.03300. The official script reads lukaemon/mmlu, which has a loading script that datasets
no longer runs; cais/mmlu has the same questions as Parquet files.
"""

from __future__ import annotations

from typing import Any

from fedsim.domains import DataSet, Domain, Row, Task, cell, joined
from fedsim.forms import Quiz, lettered, listed, number

SUBJECTS = {
    "stem": (
        "abstract_algebra anatomy astronomy college_biology college_chemistry "
        "college_computer_science college_mathematics college_physics computer_security "
        "conceptual_physics electrical_engineering elementary_mathematics high_school_biology "
        "high_school_chemistry high_school_computer_science high_school_mathematics "
        "high_school_physics high_school_statistics machine_learning"
    ),
    "social_sciences": (
        "econometrics high_school_geography high_school_government_and_politics "
        "high_school_macroeconomics high_school_microeconomics high_school_psychology "
        "human_sexuality professional_psychology public_relations security_studies sociology "
        "us_foreign_policy"
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history "
        "high_school_world_history international_law jurisprudence logical_fallacies "
        "moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"
    ),
}


def pair(row: Row) -> tuple[str, str]:
    """The `input` column is dropped, as the leaderboard's app drops it."""
    return cell(row, "instruction"), cell(row, "output")


def dolly(row: Row) -> dict[str, Any]:
    """Dolly's columns under Alpaca's names."""
    names = {"instruction": "instruction", "context": "input", "response": "output"}
    return dict(row) | {name: row.get(stored) for stored, name in names.items()}


def stored(row: Row) -> dict[str, Any]:
    """lukaemon/mmlu's columns (input, A to D, target), where a copy has them, under cais/mmlu's."""
    if "target" not in row:
        return dict(row)
    options, gold = [row.get(letter) for letter in "ABCD"], str(row["target"])
    answer = "ABCD".index(gold) if gold in tuple("ABCD") else None
    return {"question": row.get("input"), "choices": options, "answer": answer}


def mmlu(row: Row) -> Quiz:
    """question, choices, answer (0 to 3)."""
    options = listed(row["choices"])
    return Quiz(row["question"], options, number(row["answer"], len(options)))


def through_csv(row: Row) -> Quiz:
    """As the official script sees it: the CSV reader of its copy takes the text None for a missing
    value, so that seven options of the STEM test read nan."""
    quiz = mmlu(row)
    options = tuple("nan" if option == "None" else option for option in quiz.options)
    return Quiz(quiz.question, options, quiz.gold)


_FORMS = lettered("Answer the following multiple choice question.", mmlu, through_csv)
_COLUMNS = ("question", "choices", "answer")


def _task(category: str) -> Task:
    configs = tuple(SUBJECTS[category].split())
    data = DataSet(f"mmlu_{category}", "test", "cais/mmlu", configs, read=stored)
    return Task(data, _COLUMNS, _FORMS)


DOMAIN = Domain(
    name="general",
    train=(
        DataSet("alpaca_gpt4", "train", "flwrlabs/alpaca-gpt4"),
        DataSet("alpaca", "train", "tatsu-lab/alpaca"),
        DataSet("dolly", "train", "databricks/databricks-dolly-15k", read=dolly),
    ),
    columns=("instruction", "output"),
    optional=("input",),
    pairs={"flowertune": pair, "fedsim": joined},
    clients=20,
    folder="general",
    tasks={f"mmlu_{category}": _task(category) for category in SUBJECTS},
    embedded="fedsim.data.embedded.general",
    embedded_tasks={"facts": Task(DataSet("facts", "test"), _COLUMNS, _FORMS)},
)
