"""Linear discriminant analysis and logistic regression.

Knows: the two directions that tell the sets apart best. Does not know: hooks or plans, or what a model writes.
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
import torch

from interp_ablate.directions.direction import Direction, PerPrompt
from interp_ablate.directions.mean_difference import (
    TIE_TOLERANCE,
    as_float64,
    check_spread,
    checked_means,
    signed_direction,
)
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

# Fits that stop before this gradient, or this many steps, are refused.
LOGISTIC_TOLERANCE, LOGISTIC_STEPS = 1e-8, 1000


def lda(
    positive: PerPrompt, negative: PerPrompt, site: Site, *, position: str = "-1", source: str = ""
) -> Direction:
    """Fisher's discriminant: the mean difference through the inverse covariance within the sets.

    A direction to read with: it weighs down what varies within the sets, and so tells them apart best,
    but it is not what the model writes; ablating it leaves most of the mean difference in place. The
    covariance is shrunk by Ledoit and Wolf's rule (scikit-learn, solver "lsqr", shrinkage "auto"), set by
    set on standardized dimensions, which makes it invertible with fewer prompts than dimensions.
    `norm` is the gap of the means along it. Time grows with the cube of d_model (5 s at 2048).
    Source: Fisher 1936; Ledoit and Wolf 2004, "A well-conditioned estimator".

    Raises:
        DirectionError: NaN, shapes that do not fit, no difference in means, fewer than two prompts a side,
            or no spread within the sets.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    means = checked_means(positive, negative, site, position)
    check_spread("lda", positive, negative, means)
    features, labels, scale = _standardized(positive, negative)
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features, labels)
    return signed_direction(torch.from_numpy(fitted.coef_[0] / scale), means, "lda", source)


def logistic(
    positive: PerPrompt,
    negative: PerPrompt,
    site: Site,
    *,
    position: str = "-1",
    source: str = "",
    C: float = 1.0,
) -> Direction:
    """Logistic regression on standardized dimensions, its coefficients mapped back to the stream.

    A direction to read with, as `lda`: how to tell the sets apart, not what the model writes. The penalty
    is |w|^2 / 2 beside C times the sum of the prompts' losses (scikit-learn; C 1 is its default), on
    dimensions of variance 1, so that a smaller C comes closer to the standardized mean difference.
    Fitted in the span of the prompts, which changes nothing but the time. `norm` as in `lda`.

    Raises:
        DirectionError: as `lda`; a C that is not positive and finite; a fit that did not converge.
    """
    from sklearn.linear_model import LogisticRegression

    if isinstance(C, bool) or not isinstance(C, Real) or not 0 < C < math.inf:
        raise DirectionError(f"C is a positive number, smaller for a stronger penalty; got {C!r}")
    means = checked_means(positive, negative, site, position)
    check_spread("logistic", positive, negative, means)
    features, labels, scale = _standardized(positive, negative)
    # An L2 penalty keeps the coefficients in the span of the rows: fit in at most n coordinates.
    left, lengths, axes = torch.linalg.svd(torch.from_numpy(features), full_matrices=False)
    spanned = lengths > TIE_TOLERANCE * lengths[0]
    inside, axes = (left * lengths)[:, spanned].numpy(), axes[spanned]
    model = LogisticRegression(
        C=float(C), solver="newton-cholesky", tol=LOGISTIC_TOLERANCE, max_iter=LOGISTIC_STEPS
    ).fit(inside, labels)
    if int(model.n_iter_[0]) >= LOGISTIC_STEPS:
        raise DirectionError(
            f"logistic at {site}[{position}] did not converge in {LOGISTIC_STEPS} steps with C={C:g}: "
            "give a smaller C (a stronger penalty)"
        )
    vector = torch.from_numpy(model.coef_[0]) @ axes / torch.from_numpy(scale)
    return signed_direction(vector, means, "logistic", source)


def _standardized(
    positive: PerPrompt, negative: PerPrompt
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All prompts with mean 0 and variance 1 in every dimension, their labels, and each dimension's scale.

    A direction of this space, divided by the scale, is a direction of the stream.
    """
    from sklearn.preprocessing import StandardScaler

    rows = torch.cat([as_float64(positive), as_float64(negative)]).numpy()
    scaler = StandardScaler()
    features = scaler.fit_transform(rows)
    return features, np.arange(len(rows)) < len(positive), scaler.scale_
