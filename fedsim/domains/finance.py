"""Finance: the sentiment of a sentence of news. FinGPT -> FPB, FiQA, TFNS.

Sets: FinGPT/fingpt-sentiment-train; Malo et al., Financial PhraseBank, arXiv:1307.5336; FiQA 2018;
Twitter financial news sentiment.
"""

from __future__ import annotations

from fedsim.domains import DataSet, Domain, Example, Row, Task

LABELS = ("negative", "neutral", "positive")
QUESTION = (
    "What is the sentiment of this {kind}? "
    "Please choose an answer from {{negative/neutral/positive}}."
)


def pair(row: Row) -> tuple[str, str]:
    """Instruction and input joined by a space, as the leaderboard's finance app does."""
    return f"{row['instruction']} {row['input']}", str(row["output"])


def _example(text: str, gold: int, kind: str) -> Example:
    return Example(f"{QUESTION.format(kind=kind)} {text}", LABELS, gold)


def fpb(row: Row) -> Example:
    """Labels are stored as 0 negative, 1 neutral, 2 positive."""
    return _example(row["sentence"], int(row["label"]), "news")


def fiqa(row: Row) -> Example:
    """The score is cut at -0.1 and 0.1, as the leaderboard's evaluator cuts it."""
    score = float(row["sentiment_score"])
    gold = 0 if score < -0.1 else 1 if score < 0.1 else 2
    return _example(row["sentence"], gold, "tweet" if row["format"] == "post" else "news")


def tfns(row: Row) -> Example:
    """Labels are stored as 0 negative, 1 positive, 2 neutral."""
    return _example(row["text"], (0, 2, 1)[int(row["label"])], "tweet")


_COLUMNS = ("instruction", "input", "output")

DOMAIN = Domain(
    name="finance",
    train=(DataSet("fingpt_sentiment", "train", "flwrlabs/fingpt-sentiment-train"),),
    columns=_COLUMNS,
    pair=pair,
    clients=50,
    folder="finance",
    tasks={
        "fpb": Task(
            DataSet(
                "fpb", "test", "takala/financial_phrasebank", "sentences_50agree", prepare="quarter"
            ),
            fpb,
            ("sentence", "label"),
        ),
        "fiqa": Task(
            DataSet("fiqa", "test", "pauri32/fiqa-2018", prepare="quarter"),
            fiqa,
            ("sentence", "sentiment_score", "format"),
        ),
        "tfns": Task(
            DataSet("tfns", "validation", "zeroshot/twitter-financial-news-sentiment"),
            tfns,
            ("text", "label"),
        ),
    },
    embedded="fedsim.data.embedded.finance",
    embedded_tasks={
        "newswire": Task(DataSet("newswire", "test"), fpb, ("sentence", "label")),
    },
)
