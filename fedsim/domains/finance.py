"""Finance: the sentiment of a sentence of news. FinGPT -> FPB, FiQA, TFNS.

Sets: FinGPT/fingpt-sentiment-train; Malo et al., Financial PhraseBank, arXiv:1307.5336; FiQA 2018;
Twitter financial news sentiment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedsim import extraction
from fedsim.domains import PROMPT, Domain, joined, spaced
from fedsim.forms import number, ours, real, texts
from fedsim.tasks import CONVERTED, MENDED, DataSet, Form, Generation, Item, Row, Task

LABELS = ("negative", "neutral", "positive")
QUESTION = (
    "What is the sentiment of this {kind}? "
    "Please choose an answer from {{negative/neutral/positive}}."
)
Read = Callable[[Row], tuple[str, str, str]]  # row -> text, news or tweet, label


def fpb(row: Row) -> tuple[str, str, str]:
    """Labels are stored as 0 negative, 1 neutral, 2 positive."""
    return row["sentence"], "news", LABELS[number(row["label"], 3)]


def fiqa(row: Row) -> tuple[str, str, str]:
    """The score is cut at -0.1 and 0.1, as the leaderboard's evaluator cuts it."""
    score = real(row["sentiment_score"])
    label = LABELS[0 if score < -0.1 else 1 if score < 0.1 else 2]
    return row["sentence"], "tweet" if row["format"] == "post" else "news", label


def tfns(row: Row) -> tuple[str, str, str]:
    """Labels are stored as 0 negative, 1 positive, 2 neutral."""
    return row["text"], "tweet", LABELS[(0, 2, 1)[number(row["label"], 3)]]


def _official(read: Read) -> Form:
    """The official form (flowertune.md 2.2): prompt and answer have 512 tokens together, drawn as
    the model's own generation_config says.

    The official script decodes prompt and answer in one, special tokens left out, and looks between
    the first two `Answer: ` of that text; so does this, from the prompt's text and the answer's.
    Its batches are padded, and only the tokenizer's own EOS ends an answer; `MENDED` reads that of
    the unpadded prompt, up to the model's first end.
    """

    def item(row: Row) -> Item:
        text, kind, label = texts(*read(row))
        given = f"Input: {text}\n" if text else ""
        question = QUESTION.format(kind=kind)
        return Item(f"Instruction: {question}\n{given}{extraction.ANSWER}", label, LABELS)

    def grade(item: Item, output: str) -> dict[str, bool]:
        part, _ = extraction.official_part(item.prompt, output)
        hit = extraction.official_sentiment(part) == item.gold
        return {"official": hit, MENDED: hit}

    def decided(item: Item, output: str) -> bool:
        part, closed = extraction.official_part(item.prompt, output)
        return closed or extraction.official_sentiment(part) == "positive"

    generation = Generation(
        max_new=0, max_length=512, batch=32, temperature=None, padded=True, one_end=True
    )
    return Form(item, grade, ("official", MENDED), generation, decided)


def _ours(read: Read) -> Form:
    def item(row: Row) -> Item:
        text, kind, label = texts(*read(row))
        question = f"{QUESTION.format(kind=kind)} {text}"
        return Item(PROMPT.format(instruction=question), label, LABELS)

    return ours(item, lambda _, output: extraction.mention(output, LABELS), 16)


def _forms(read: Read) -> Mapping[str, Form]:
    return {"flowertune": _official(read), "fedsim": _ours(read)}


_FPB = _forms(fpb)
_HUB = "takala/financial_phrasebank"

DOMAIN = Domain(
    name="finance",
    train=(DataSet("fingpt_sentiment", "train", "flwrlabs/fingpt-sentiment-train"),),
    columns=("instruction", "output"),
    optional=("input",),
    pairs={"flowertune": spaced, "fedsim": joined},  # as the leaderboard's finance app joins them
    clients=50,
    folder="finance",
    tasks={
        "fpb": Task(
            DataSet("fpb", "test", _HUB, ("sentences_50agree",), CONVERTED, prepare="quarter"),
            ("sentence", "label"), _FPB,
        ),
        "fiqa": Task(
            DataSet("fiqa", "test", "pauri32/fiqa-2018", prepare="quarter"),
            ("sentence", "sentiment_score", "format"), _forms(fiqa),
        ),
        "tfns": Task(
            DataSet("tfns", "validation", "zeroshot/twitter-financial-news-sentiment"),
            ("text", "label"), _forms(tfns),
        ),
    },
    embedded="fedsim.data.embedded.finance",
    embedded_tasks={"newswire": Task(DataSet("newswire", "test"), ("sentence", "label"), _FPB)},
)  # fmt: skip
