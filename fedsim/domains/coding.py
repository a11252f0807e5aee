"""Coding: instruction following on Code Alpaca (Chaudhary, 2023)."""

from __future__ import annotations

from fedsim.domains import DataSet, Domain, Row


def pair(row: Row) -> tuple[str, str]:
    """Instruction and input joined by a space, as the leaderboard's code app does."""
    return f"{row['instruction']} {row['input']}", str(row["output"])


DOMAIN = Domain(
    name="coding",
    train=(DataSet("codealpaca", "train", "flwrlabs/code-alpaca-20k"),),
    columns=("instruction", "input", "output"),
    pair=pair,
    clients=10,
    folder="code",
)
