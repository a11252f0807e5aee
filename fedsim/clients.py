"""The section `clients`: how many there are, and how the examples are dealt out to them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fedsim.section import Section, with_defaults

# What each partition takes besides number and labels, with its default.
OPTIONS: dict[str, dict[str, Any]] = {
    "iid": {},
    "power": {"skew": 1.0},
    "exponential": {"skew": 1.0},
    "lognormal": {"skew": 1.0, "min_size": 1},
    "dirichlet": {"alpha": 0.5, "min_size": 1},
    "pathological": {"classes": 2},
    "shards": {"shards": 2},
    "natural": {},
}
BY_LABEL = ("dirichlet", "pathological", "shards", "natural")


class Clients(Section):
    """Keys that the chosen partition does not take stay unset, and setting one is an error."""

    number: int = Field(20, ge=1, lt=1 << 28)
    partition: Literal[
        "iid", "power", "exponential", "lognormal", "dirichlet", "pathological", "shards", "natural"
    ] = Field("iid", description="iid; by size: power to lognormal; by label: dirichlet to natural")
    min_size: int = Field(1, ge=1, description="fewest examples of a client")
    by: str | None = Field(None, description="by label: the column that holds the labels")
    clusters: int | None = Field(
        None, ge=2, description="by label, instead of a column: clusters of the prompts"
    )
    alpha: float | None = Field(
        None, ge=1e-3, description="dirichlet: the smaller, the fewer labels a client; or 0.5"
    )
    classes: int | None = Field(None, ge=1, description="pathological: labels of a client; or 2")
    shards: int | None = Field(None, ge=1, description="shards: those of a client; or 2")
    skew: float | None = Field(
        None, ge=0, description="sizes as c^skew, e^(skew c), or lognormal with that sigma; or 1"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        return with_defaults(values, "partition", OPTIONS)

    @property
    def options(self) -> dict[str, Any]:
        """What the chosen partition takes, by name."""
        return {key: getattr(self, key) for key in OPTIONS[self.partition]}

    def misfit(self) -> str:
        """The first key that does not go with the partition, in the words of an error; or ""."""
        for key in ("alpha", "classes", "shards", "skew"):
            value, takers = getattr(self, key), [p for p in OPTIONS if key in OPTIONS[p]]
            if (value is not None) != (self.partition in takers):
                return (
                    f"clients.{key}: got {value}; expected only, and then, with "
                    f"clients.partition = {' or '.join(takers)}, which is {self.partition}"
                )
        given = [k for k in ("by", "clusters") if getattr(self, k) is not None]
        if len(given) == (self.partition in BY_LABEL):
            return ""
        got = " and ".join(f"clients.{k}" for k in given) or "neither"
        if self.partition in BY_LABEL:
            expected = "either clients.by, a column, or clients.clusters, a number"
        else:
            expected = f"neither: clients.partition = {self.partition} looks at no labels"
        return f"clients.by, clients.clusters: got {got}; expected {expected}"
