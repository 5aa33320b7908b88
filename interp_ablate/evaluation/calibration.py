"""Strengths calibrated to a KL: the strength at which a quantile of the KL on harmless prompts has a given value.

Knows: the search for a strength, measured KL. Does not know: which prompts are harmless, or what the plan is for.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from interp_ablate.edits.kinds import Edit
from interp_ablate.edits.plan import Plan
from interp_ablate.edits.rotation import Rotate
from interp_ablate.errors import InterpAblateError, NotFiniteError, PlanError
from interp_ablate.evaluation.metrics import first_token_kl
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.installed_plans import as_plan
from interp_ablate.models.model import Model, check_model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import Prompt, PromptLike
from interp_ablate.prompts.readers import bundled_names, is_one_side, read_side

logger = logging.getLogger(__name__)

WEAKEST, STRONGEST = 2.0**-10, 2.0**10  # strengths between which the KL must be reached
BEGIN = 2.0**-3
MOST_BISECTIONS = 20
NOISE = (
    0.02  # a KL that falls by less than this share, while the strength grows, is not called falling
)


@dataclass(frozen=True)
class Calibration:
    """A plan at the calibrated strength, and all that was measured on the way."""

    plan: Plan
    strength: float
    kl: float
    """The quantile of the KL at this strength, in nats: at most the one asked for."""
    wanted: float
    """The KL that was asked for, in nats."""
    quantile: float
    measured: tuple[tuple[float, float], ...]
    """Every strength that was measured with the quantile of its KL, by strength."""
    grows: bool
    """True if among these the KL never falls as the strength grows (by more than rounding)."""

    def __str__(self) -> str:
        return (
            f"strength {self.strength:.4g}: KL {self.kl:.4g} nats at quantile {self.quantile:g} "
            f"(asked for {self.wanted:g})"
        )


def strength_at_kl_quantile(
    model: Model,
    plans: Plan | Edit | Callable[[float], Plan],
    prompts: Sequence[PromptLike],
    *,
    kl: float,
    quantile: float = 0.9,
    tolerance: float = 0.02,
) -> Calibration:
    """The strength at which a quantile, over prompts, of the first-token KL from the unedited model is `kl`.

    Strengths are doubled from a weak one until the KL passes the value; the interval of that step is bisected, with
    the KL measured each time. That a KL grows with the strength is not assumed but checked: the crossing that is found
    is the weakest among those that doubling sees, and where a KL fell on the way the result says so
    (`grows`), with a warning. The strength returned has been measured, and its KL is at most `kl`.

    Args:
        plans: a plan, whose strengths and coefficients are multiplied; or a function from a strength to a plan.
        prompts: harmless ones, on which the model should stay as it is.
        kl: in nats, above 0.
        quantile: 0.5 calibrates the median prompt, 0.9 all but the worst tenth.
        tolerance: a KL from (1 - tolerance) * kl to kl ends the search.

    Raises:
        InterpAblateError: numbers out of range; a KL that no strength up to 1024 reaches, or that the weakest passes
            already; no prompts.
        PlanError: a plan that has no strength (a clamp, a rotation): give a function.
    """
    check_model(model)
    numbers_fit = 0 < kl < math.inf and 0 <= quantile <= 1 and 0 < tolerance < 1
    if not numbers_fit:
        raise InterpAblateError(
            f"a KL is above 0 and finite, a quantile from 0 to 1, a tolerance between 0 and 1; got kl={kl}, "
            f"quantile={quantile}, tolerance={tolerance}"
        )
    family = plans if callable(plans) else _scalable(plans).times
    baseline = ModelOutputs(model, prompts)
    family(BEGIN)  # what has no strength is refused before anything is measured
    measured: dict[float, float] = {}
    measure = _measuring(measured, baseline, family, quantile)
    baseline.first_logprobs  # noqa: B018 - an error of the unedited model is an error
    low, high = _crossing(measure, kl)
    for _ in range(MOST_BISECTIONS):
        if measure(low) >= (1 - tolerance) * kl:
            break
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) <= kl else (low, middle)
    points = tuple(sorted(measured.items()))
    grows = all(b[1] >= a[1] * (1 - NOISE) for a, b in itertools.pairwise(points))
    if not grows:
        logger.warning(
            "the KL does not grow with the strength everywhere (%s): the weakest strength that reaches %g nats is "
            "taken", ", ".join(f"{s:.3g}: {v:.3g}" for s, v in points), kl,
        )  # fmt: skip
    return Calibration(family(low), low, measure(low), kl, quantile, points, grows)


def _scalable(plan: Plan | Edit) -> Plan:
    """The plan, if its KL grows with its strength.

    Raises:
        PlanError: it has a rotation.
    """
    whole = as_plan(plan)
    turned = [edit for edit in whole if isinstance(getattr(edit, "edit", edit), Rotate)]
    if turned:
        raise PlanError(
            f"{turned[0]!r} turns by an angle, and its KL comes and goes with it: give a function from a strength "
            "to a plan, such as lambda s: Plan(Rotate(..., angle=90 * min(s, 1)))"
        )
    return whole


def _measuring(
    measured: dict[float, float],
    baseline: ModelOutputs,
    family: Callable[[float], Plan],
    quantile: float,
) -> Callable[[float], float]:
    """A function that measures the quantile of the KL at a strength, once, and keeps it in `measured`."""

    def measure(strength: float) -> float:
        if strength not in measured:
            try:
                values = first_token_kl(baseline.with_plan(family(strength)), baseline)
                measured[strength] = float(torch.quantile(values.double(), quantile))
            except NotFiniteError:  # so strong that nothing finite is left
                measured[strength] = math.inf
        return measured[strength]

    return measure


def _crossing(measure: Callable[[float], float], kl: float) -> tuple[float, float]:
    """Two strengths, one twice the other, of which the weaker has at most the KL, and the stronger more.

    Raises:
        InterpAblateError: there are none within the range.
    """
    strength = BEGIN
    while measure(strength) > kl:
        if strength <= WEAKEST:
            raise InterpAblateError(
                f"the KL is {measure(strength):.3g} nats at strength {strength:.3g} already, above {kl:g}: give a larger "
                "KL, or scale the plan down"
            )
        strength /= 2
    while measure(2 * strength) <= kl:
        strength *= 2
        if strength >= STRONGEST:
            raise InterpAblateError(
                f"the KL is {measure(strength):.3g} nats at strength {strength:g}, below {kl:g}: the plan does not reach "
                "it on these prompts. Give a smaller KL"
            )
    return strength, 2 * strength


@dataclass(frozen=True)
class KLStrength:
    """A strength that is given as a KL, as in `kl:0.05` or `kl:0.05@0.5`."""

    kl: float
    """In nats."""
    quantile: float = 0.9


def read_strength(text: str) -> float | KLStrength:
    """Read a strength of a command line: a number, or `kl:X` or `kl:X@Q` (a KL in nats, and its quantile over prompts).

    Raises:
        InterpAblateError: something else.
    """
    found = re.fullmatch(r"kl:([^@]+)(?:@(.+))?", text.strip())
    try:
        if not found:
            number = float(text)
            if math.isfinite(number):
                return number
        else:
            given = KLStrength(float(found[1]), float(found[2] or KLStrength.quantile))
            if 0 < given.kl < math.inf and 0 <= given.quantile <= 1:
                return given
    except ValueError:
        pass
    raise InterpAblateError(
        f"a strength is a number, or a KL in nats as kl:0.05, or with its quantile over prompts as kl:0.05@0.5; got "
        f"{text!r}"
    )


def harmless_prompts(spec: str | Path, *, seed: int = 0) -> tuple[Prompt, ...]:
    """Prompts on which a model should stay as it is.

    Of a bundled contrast set the negative prompts of its validation part, which make no direction and report nothing;
    of another contrast set all negative ones; or a file with a prompt a line.

    Raises:
        PromptError: nothing there, or something that cannot be read.
    """
    name, path = str(spec), Path(spec)
    if name not in bundled_names() and is_one_side(path):
        return tuple(read_side(path))
    contrast = ContrastSet.load(spec)
    return (contrast.split(seed=seed).validation if name in bundled_names() else contrast).negative
