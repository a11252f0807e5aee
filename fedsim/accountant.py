"""How much a run betrays: (epsilon, delta) of rounds of a Poisson-sampled Gaussian mechanism.

    eps(a) = 1/(a - 1) log sum_{j=0..a} C(a, j) (1 - q)^(a - j) q^j exp((j^2 - j) / (2 z^2))

is the Renyi divergence of order a of one round; rounds add up, and the best order is converted.
Adjacent are populations of which one has a client more. dp-accounting does all of it.

Papers: Mironov, arXiv:1702.07476; Mironov et al., arXiv:1908.10530; Canonne et al.,
arXiv:2004.00010.
"""

from __future__ import annotations

from fedsim.config import Config
from fedsim.errors import ConfigError


def spent(config: Config, rounds: int) -> float:
    """Epsilon of the first rounds of a run under privacy."""
    p = config.privacy
    assert p.noise is not None and p.delta is not None
    return epsilon(q=config.server.fraction, noise=p.noise, rounds=rounds, delta=p.delta)


def epsilon(*, q: float, noise: float, rounds: int, delta: float) -> float:
    """Of so many rounds, in each of which a client takes part with probability q.

    Args:
        noise: z, the standard deviation over what one client can change.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise ConfigError(
            "privacy.level needs the package dp-accounting",
            remedy="pip install 'fedsim-llm[privacy]'",
        ) from None
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(noise))
    accountant = rdp.RdpAccountant(orders=range(2, 256))
    return float(accountant.compose(event, rounds).get_epsilon(delta))
