"""Medical: question answering on Medical Meadow, asked with four exams.

Sets: Han et al., MedAlpaca, arXiv:2304.08247; PubMedQA, arXiv:1909.06146; MedMCQA,
arXiv:2203.14371; MedQA, arXiv:2009.13081; CareQA, arXiv:2502.06666. The official instructions are
Meditron's, arXiv:2311.16079.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr

from fedsim import extraction
from fedsim.domains import PROMPT, DataSet, Domain, Item, Row, Task, cell
from fedsim.forms import Quiz, chat, lettered, listed, number, official, ours, texts
from fedsim.tasks import CONVERTED

DECISIONS = ("yes", "no", "maybe")
CORRECT = (
    "As an expert doctor in clinical science and medical knowledge, can you tell me if the "
    "following statement is correct? Answer yes, no, or maybe."
)
LICENSING = (
    "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate "
    "your understanding of basic and clinical science, medical knowledge, and mechanisms "
    "underlying health, disease, patient care, and modes of therapy. Show your ability to apply "
    "the knowledge essential for medical practice. For the following multiple-choice question, "
    "select one correct answer from A to E. Base your answer on the current and standard practices "
    "referenced in medical guidelines."
)
ENTRANCE = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying "
    "health, disease, patient care, and modes of therapy, answer the following multiple-choice "
    "question. Select one correct answer from A to D. Base your answer on the current and standard "
    "practices referenced in medical guidelines."
)


def pair(row: Row) -> tuple[str, str]:
    """The constant `instruction` column is dropped; `input` is the instruction."""
    return cell(row, "input"), cell(row, "output")


def medmcqa(row: Row) -> Quiz:
    """`cop` counts from 0."""
    return Quiz(row["question"], tuple(row[f"op{k}"] for k in "abcd"), number(row["cop"], 4))


def careqa(row: Row) -> Quiz:
    """`cop` counts from 1."""
    options = tuple(row[f"op{k}"] for k in "1234")
    return Quiz(row["question"], options, number(row["cop"], 5) - 1)


def medqa(row: Row) -> Quiz:
    """The right option is the first with the answer's text, as the official script finds it.
    Options are a list of key and value, or one mapping."""
    given = row["options"]
    mapped = isinstance(given, Mapping)
    options = tuple(given.values()) if mapped else tuple(option["value"] for option in given)
    return Quiz(row["question"], options, options.index(row["answer"]))


def _statement(row: Row) -> tuple[str, str]:
    """Contexts and question, a line each; the decision. Raises ValueError if it is none."""
    gold, (question,) = row["final_decision"], texts(row["QUESTION"])
    if gold not in DECISIONS:
        raise ValueError(f"final_decision: got {repr(gold)}; expected yes, no or maybe")
    return "\n".join(listed(row["CONTEXTS"])) + f"\n{question}", gold


def _official_statement(row: Row) -> Item:
    text, gold = _statement(row)
    return Item(chat(CORRECT, text), gold, DECISIONS)


def _own_statement(row: Row) -> Item:
    text, gold = _statement(row)
    return Item(PROMPT.format(instruction=f"{text} Answer yes, no, or maybe."), gold, DECISIONS)


_PUBMEDQA = {
    "flowertune": official(_official_statement, boolean=True),
    "fedsim": ours(_own_statement, lambda _, out: extraction.leading(out, DECISIONS), 16),
}
_MEDMCQA = lettered(ENTRANCE, medmcqa)
_OPTIONS = ("question", "opa", "opb", "opc", "opd", "cop")
_MCQ = DataSet("medmcqa", "validation", "openlifescienceai/medmcqa")
_MEADOW = "medical_meadow_medical_flashcards"
_WIKIDOC = "medical_meadow_wikidoc_patient_information"
_MED_QA = "484a6c066fe8e75c83edea0c88b5169316714fcd"  # Parquet files, no loading script
_FOLD = ("pubmed_qa_labeled_fold0_source",)

DOMAIN = Domain(
    name="medical",
    train=(DataSet(_MEADOW, "train", "flwrlabs/medical-meadow-medical-flashcards"),
           DataSet(_WIKIDOC, "train", f"medalpaca/{_WIKIDOC}")),
    columns=("input", "output"),
    pairs={"flowertune": pair, "fedsim": pair},
    clients=20, folder="medical",
    tasks={
        "pubmedqa": Task(
            DataSet("pubmedqa", "test", "bigbio/pubmed_qa", _FOLD, CONVERTED),
            ("QUESTION", "CONTEXTS", "final_decision"), _PUBMEDQA,
        ),
        "medmcqa": Task(_MCQ, _OPTIONS, _MEDMCQA),
        "medqa": Task(
            DataSet("medqa", "test", "bigbio/med_qa", ("med_qa_en_4options_source",), _MED_QA),
            ("question", "options", "answer"), lettered(LICENSING, medqa),
        ),
        "careqa": Task(
            DataSet("careqa_en", "test", "HPAI-BSC/CareQA", ("CareQA_en",)),
            ("question", "op1", "op2", "op3", "op4", "cop"), lettered(ENTRANCE, careqa),
        ),
    },
    embedded="fedsim.data.embedded.medical",
    embedded_tasks={"clinic": Task(DataSet("clinic", "test"), _OPTIONS, _MEDMCQA)},
)  # fmt: skip
