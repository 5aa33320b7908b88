"""The jackknife: the standard error of an estimate whose samples belong together in clusters.

Knows: estimates without one cluster each, sums over kinds of clusters. Does not know: what is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

MOST_PARTS = 500  # more clusters are left out several at a time

Statistic = Callable[[Bool[np.ndarray, " sample"]], float | None]


def jackknife_half_width(
    statistic: Statistic, clusters: Sequence[Sequence[Any] | np.ndarray], *, level: float = 0.95
) -> float | None:
    """Half the width of a statistic's interval, by leaving out one cluster at a time.

    Samples may be dependent through several kinds of clusters at once (a question's and a system prompt's
    answers): the variances add, which covers a little more often than asked. The quantile is Student's, with the
    degrees of freedom of the kind that has fewest clusters. Source: MacKinnon, Nielsen and Webb 2023,
    https://doi.org/10.1002/jae.2969; Cameron, Gelbach and Miller 2011, https://doi.org/10.1198/jbes.2010.07136.

    Args:
        statistic: the estimate from the samples that are kept; None where they give none.
        clusters: of every kind, the cluster of each sample.

    Returns None where a kind has one cluster, the rest without a cluster gives no estimate, or no cluster
    makes a difference.
    """
    from scipy.stats import t

    variance, fewest = 0.0, MOST_PARTS
    for kind in clusters:
        numbers: dict[Any, int] = {}
        parts = np.array([numbers.setdefault(each, len(numbers)) for each in kind]) % MOST_PARTS
        n_parts = int(parts.max()) + 1
        estimates = [statistic(parts != part) for part in range(n_parts)] if n_parts > 1 else []
        finite = [each for each in estimates if each is not None and math.isfinite(each)]
        if not finite or len(finite) < n_parts:
            return None
        variance += (n_parts - 1) * float(np.var(finite))
        fewest = min(fewest, n_parts)
    return float(t.ppf((1 + level) / 2, fewest - 1)) * math.sqrt(variance) or None
