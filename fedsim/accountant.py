"""How much a run betrays: (epsilon, delta) of rounds of a Poisson-sampled Gaussian mechanism.

    eps(a) = 1/(a - 1) log sum_{j=0..a} C(a, j) (1 - q)^(a - j) q^j exp((j^2 - j) / (2 z^2))

is the Renyi divergence of order a of one round; rounds add up, and the best order is converted.
Adjacent are populations of which one has a client more. dp-accounting does all of it. For examples
a local step of their client is such a round, q = min(1, batch / n), and the client of which most is
betrayed counts: who was sampled is known, so that only its own visits do.

Papers: Mironov, arXiv:1702.07476; Mironov et al., arXiv:1908.10530; Canonne et al.,
arXiv:2004.00010.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from fedsim.config import Config
from fedsim.core import Population
from fedsim.errors import ConfigError
from fedsim.plan import sampled

ORDERS = tuple(range(2, 256))


class Ledger:
    """Epsilon of a run's rounds under privacy, of clients or of examples.

    Raises:
        ConfigError: delta allows to publish an example whole.
    """

    def __init__(self, config: Config, population: Population, key: int) -> None:
        self._config, self._sizes, self._key = config, population.sizes, key
        self._visits, self._rounds = np.zeros(len(population), dtype=np.int64), 0
        p, most = config.privacy, int(self._sizes.max(initial=1))
        if p.of_examples and p.delta is not None and p.delta >= 1 / most:
            raise ConfigError(
                "privacy.delta", got=p.delta,
                expected=f"less than 1 / {most}, which is what a client holds: publishing one of "
                "its examples whole would satisfy it", remedy="Lower privacy.delta.",
            )  # fmt: skip

    def spent(self, rounds: int) -> float:
        """Epsilon of the first rounds: not fewer than at the last call."""
        p, train = self._config.privacy, self._config.train
        assert p.noise is not None and p.delta is not None
        if p.of_clients:
            q = self._config.server.fraction
            return epsilon(q=q, noise=p.noise, rounds=rounds, delta=p.delta)
        for round in range(self._rounds + 1, rounds + 1):
            ids, _ = sampled(self._config, len(self._visits), round, self._key)
            self._visits[ids] += 1
        self._rounds = rounds
        worst, steps = 0.0, 0
        # Epsilon grows with q, so with fewer examples, and with steps.
        for client in np.lexsort((-self._visits, self._sizes)):
            visits = int(self._visits[client])
            if visits * train.steps > steps:
                steps = visits * train.steps
                q = min(1.0, train.batch / int(self._sizes[client]))
                found = epsilon(q=q, noise=p.noise, rounds=steps, delta=p.delta)
                worst = max(worst, found)
        return worst


def epsilon(*, q: float, noise: float, rounds: int, delta: float) -> float:
    """Of so many rounds, in each of which a client takes part with probability q.

    Args:
        noise: z, the standard deviation over what one client can change.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    try:
        from dp_accounting import rdp
    except ImportError:
        raise ConfigError(
            "privacy.level needs the package dp-accounting",
            remedy="pip install 'fedsim-llm[privacy]'",
        ) from None
    return float(rdp.compute_epsilon(ORDERS, rounds * _once(q, noise), delta)[0])


@cache  # 0.2 s, and a run asks again after each round
def _once(q: float, noise: float) -> np.ndarray:
    """Renyi divergences of one round, of each order."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, rdp

    event = PoissonSampledDpEvent(q, GaussianDpEvent(noise))
    return np.asarray(rdp.RdpAccountant(ORDERS).compose(event).rdp)
