"""General NLP: instruction following on Alpaca-GPT4.

Set: Peng et al., Instruction tuning with GPT-4, arXiv:2304.03277.
"""

from __future__ import annotations

from fedsim.domains import DataSet, Domain, Row


def pair(row: Row) -> tuple[str, str]:
    """The `input` column is dropped, as the leaderboard's app drops it."""
    return str(row["instruction"]), str(row["output"])


DOMAIN = Domain(
    name="general",
    train=(DataSet("alpaca_gpt4", "train", "flwrlabs/alpaca-gpt4"),),
    columns=("instruction", "output"),
    pair=pair,
    clients=20,
    folder="general",
)
