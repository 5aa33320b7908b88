"""A task of the league: what every method is given, and how one chooses a layer on validation prompts.

Knows: activations, validation prompts, the clock. Does not know: any method, test prompts, or files.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from interp_ablate.activations.activations import Activations
from interp_ablate.directions.direction import PerPrompt, separation
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError
from interp_ablate.evaluation.metrics import UneditedAnswerLogProb, first_token_kl
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.league.fitted import Detector, FittedMethod
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.scoring.behaviour import Behaviour
from interp_ablate.search.derived_edits import strength_at_kl
from interp_ablate.sites import Point, Site

N_SITES = 5  # layers that a method without a rule of its own may try
LAYERS = (0.3, 0.9)  # of the depth, where they begin and end
POINT: Point = "resid_post"


@dataclass(eq=False)
class LeagueTask:
    """One behaviour, one split and one seed, as every method gets it."""

    model: Model
    behaviour: str
    """The name of the behaviour."""
    train: ContrastSet
    """The prompts that make a method's directions."""
    validation: ContrastSet
    """The prompts that a method may choose by."""
    activations: Activations
    """Of the training prompts, with labels: resid_post of every layer, at the last tokens of the prompt."""
    held_out: Activations
    """Of the validation prompts, at the same places."""
    scorer: Behaviour | None
    """What finds the behaviour in answers; None where the concept is in the prompts only."""
    seed: int
    """Of everything random in a method."""
    seconds: float
    """The budget of a method, from `begin` on."""
    max_kl: float
    """Removals are compared up to this KL, in nats."""
    max_new_tokens: int
    _began: float = field(default_factory=time.monotonic)

    def prepare(self) -> None:
        """Compute what every method reads of the unedited model, so that the first one does not pay for it."""
        for library in ("sklearn.discriminant_analysis", "sklearn.linear_model"):
            importlib.import_module(library)  # seconds, once a process
        if self.scorer is None:  # detection reads the activations alone
            return
        for outputs in (self.positive, self.negative):
            outputs.first_logprobs  # noqa: B018
            outputs.residual_cache  # noqa: B018
        self.scorer(self.positive, self.positive)

    def begin(self) -> None:
        """Start the clock of the next method."""
        self._began = time.monotonic()

    @property
    def seconds_left(self) -> float:
        """What is left of the budget; below 0 when it is spent."""
        return self.seconds - (time.monotonic() - self._began)

    def sides(self, site: Site, position: str = "-1") -> tuple[PerPrompt, PerPrompt]:
        """Training activations of the positive and of the negative prompts at a place."""
        values = self.activations.at(site, position)
        return values[self.labels], values[~self.labels]

    @property
    def labels(self) -> Bool[Tensor, " prompt"]:
        """Which training prompts are positive."""
        assert self.activations.labels is not None
        return self.activations.labels

    @property
    def sites(self) -> tuple[Site, ...]:
        """A few layers across the depth, those in the middle first: what a method without a rule of its own tries."""
        depth = self.model.n_layers - 1
        shares = [LAYERS[0] + (LAYERS[1] - LAYERS[0]) * i / (N_SITES - 1) for i in range(N_SITES)]
        layers = dict.fromkeys(round(share * depth) for share in shares)
        middle = sum(LAYERS) / 2 * depth
        return tuple(
            Site(layer, POINT) for layer in sorted(layers, key=lambda layer: abs(layer - middle))
        )

    @cached_property
    def positive(self) -> ModelOutputs:
        """The unedited model's outputs on the positive validation prompts."""
        return self.outputs(self.validation.positive)

    @cached_property
    def negative(self) -> ModelOutputs:
        """The unedited model's outputs on the negative validation prompts."""
        return self.outputs(self.validation.negative)

    def outputs(self, prompts: Sequence) -> ModelOutputs:  # type: ignore[type-arg]
        """The unedited model's outputs on some prompts."""
        return ModelOutputs(self.model, prompts, max_new_tokens=self.max_new_tokens)

    def kl(self, plan: Plan) -> float:
        """Mean first-token KL of the negative validation prompts under a plan, in nats."""
        return float(first_token_kl(self.negative.with_plan(plan), self.negative).mean())

    def merit(self, fitted: FittedMethod) -> float | None:
        """How good a fitted method is on the validation prompts, the higher the better; None where it has no merit.

        Where answers show the behaviour: how unlikely the removal at a third of the KL limit makes the first words of
        the unedited model's own answers. Else d' of the detector.
        """
        if self.scorer is None:
            detector = Detector.of(fitted.detection)
            scores = detector.score(self.held_out.at(detector.site, detector.position))
            assert self.held_out.labels is not None
            return separation(torch.as_tensor(scores).double(), self.held_out.labels).d_prime
        found = strength_at_kl(
            fitted.removal, self.max_kl / 3, self.kl, greatest=fitted.greatest_strength
        )
        if found is None:
            return None
        own_words = UneditedAnswerLogProb(self.scorer)
        return -float(own_words(self.positive.with_plan(found[0]), self.positive).mean())


def best_of_sites(task: LeagueTask, fit: Callable[[Site], FittedMethod]) -> FittedMethod:
    """The method fitted at the layer of the highest merit, of those that the budget lets it try.

    Raises:
        InterpAblateError: it could be fitted at none of them; the first reason.
    """
    best: tuple[float, FittedMethod] | None = None
    reasons: list[InterpAblateError] = []
    for site in task.sites:
        if best is not None and task.seconds_left <= 0:
            break
        try:
            fitted = fit(site)
            merit = task.merit(fitted)
        except InterpAblateError as error:
            reasons.append(error)
            continue
        if merit is not None and (best is None or merit > best[0]):
            best = merit, fitted
    if best is None:
        raise reasons[0] if reasons else InterpAblateError("no strength of its plans has a KL")
    return best[1]
