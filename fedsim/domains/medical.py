"""Medical: question answering on Medical Meadow.

Set: Han et al., MedAlpaca, arXiv:2304.08247.
"""

from __future__ import annotations

from fedsim.domains import DataSet, Domain, Row


def pair(row: Row) -> tuple[str, str]:
    """The constant `instruction` column is dropped; `input` is the instruction."""
    return str(row["input"]), str(row["output"])


DOMAIN = Domain(
    name="medical",
    train=(
        DataSet(
            "medical_meadow_medical_flashcards",
            "train",
            "flwrlabs/medical-meadow-medical-flashcards",
        ),
        DataSet(
            "medical_meadow_wikidoc_patient_information",
            "train",
            "medalpaca/medical_meadow_wikidoc_patient_information",
        ),
    ),
    columns=("input", "output"),
    pair=pair,
    clients=20,
    folder="medical",
)
