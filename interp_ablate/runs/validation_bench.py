"""The bench of a run: its scorer of the behaviour, target tokens and unedited answers.

Knows: how a bench is made of a split. Does not know: trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from interp_ablate.evaluation.metrics import TargetLogOdds, find_target_tokens
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet, Split
from interp_ablate.prompts.prompt import distinct
from interp_ablate.runs.configuration import Configuration
from interp_ablate.scoring.behaviour import Behaviour, ScoredBehaviour, behaviour_of
from interp_ablate.scoring.expression_lists import DEFAULT_EXPRESSIONS, EXPRESSIONS_OF_CONTRAST
from interp_ablate.scoring.expressions import expression_scorer
from interp_ablate.scoring.own_function import is_own_function
from interp_ablate.scoring.registry import make_scorer
from interp_ablate.search.bench import ValidationBench
from interp_ablate.settings import SPLIT_SIZES

FIT_PROMPTS = 64  # a side
DEFAULT_LIST = (
    "no --expressions were given for these prompts: behaviour is scored by the built-in "
    f"list {DEFAULT_EXPRESSIONS!r}"
)
LOW_RATE = 0.2
FEWEST_FINALISTS = (
    16  # prompts a side: fewer would choose worse among finalists than validation prompts do
)


def names_behaviour(c: Configuration, contrast: str) -> bool:
    """Whether anything says how the behaviour looks: expressions, a scorer, or a bundled set that has a list."""
    return (c.expressions or c.scorer) is not None or (
        bool(c.contrast) and contrast in EXPRESSIONS_OF_CONTRAST
    )


def behaviour_scorer(
    c: Configuration,
    contrast: str,
    *,
    cache: Path | None = None,
    endpoint: Mapping[str, Any] | None = None,
) -> Behaviour:
    """What scores the behaviour in answers.

    Args:
        contrast: the name of the set of prompts.
        cache, endpoint: of a judge, as for `make_scorer`.

    Raises:
        RunError: a scorer that cannot be made.
    """
    if c.scorer is not None:
        return behaviour_of(
            make_scorer(
                c.scorer, rubric=c.rubric, cache=cache, endpoint=endpoint, own_code=c.own_code
            )
        )
    return expression_scorer(c.expressions, contrast=contrast if c.contrast else "")


def behaviour_identity(c: Configuration, contrast: str, made_of: Mapping[str, Any]) -> Any:
    """What a rate of the behaviour depends on, made without a file of replies.

    A file of Python that nobody named in this call is not run: its identity is what the folder has of it.

    Raises:
        RunError: a scorer that cannot be made.
    """
    if c.scorer and is_own_function(c.scorer) and not c.own_code and "expressions" in made_of:
        return made_of["expressions"]
    return behaviour_scorer(c, contrast).identity


def split_of(contrast: ContrastSet, c: Configuration) -> Split:
    """The split of a run. Prompts that it leaves over compare the finalists, as many as validate at most."""
    sizes = {name: size or SPLIT_SIZES[name] for name, size in c.split_sizes.items()}
    available = min(len(distinct(side)) for side in (contrast.positive, contrast.negative))
    n = min(available - sum(sizes.values()), sizes["n_validation"])
    n_finalists = n if n >= FEWEST_FINALISTS else 0
    return contrast.split(**sizes, n_finalists=n_finalists, seed=c.seed)


def make_bench(
    model: Model,
    split: Any,
    expression: Behaviour,
    *,
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> tuple[ValidationBench, list[dict[str, Any]]]:
    """A bench over the validation prompts, and its target tokens, which training prompts tell; three steps."""
    target, records = target_of(model, split.train)
    advance(1)
    benches = [
        ValidationBench(
            model,
            part.positive,
            part.negative,
            target=target,
            expression=expression,
            max_new_tokens=max_new_tokens,
        )
        for part in (split.validation, split.finalists)
        if part is not None
    ]
    bench = benches[0]
    bench.finalists = benches[1] if benches[1:] else None
    advance(1)
    bench.repetition  # noqa: B018  (computed here, under the progress bar)
    advance(1)
    return bench, records


def target_of(model: Model, train: Any) -> tuple[TargetLogOdds, list[dict[str, Any]]]:
    """The first tokens that tell a split's training prompts apart, and what run.json keeps of them.

    Raises:
        InterpAblateError: the sets do not differ at the first token.
    """
    sides = (train.positive, train.negative)
    first = [ModelOutputs(model, side[:FIT_PROMPTS]).first_logprobs for side in sides]
    found = find_target_tokens(*first)
    return TargetLogOdds(tuple(token for token, _, _ in found)), [
        {"id": i, "text": model.decode([i]), "p_positive": p, "p_negative": q} for i, p, q in found
    ]


def base_rate_note(bench: ValidationBench) -> str | None:
    """What to ask oneself where the unedited model hardly shows the behaviour, or shows it everywhere."""
    rate, other = (
        float(bench.expression(side, side).mean()) for side in (bench.positive, bench.negative)
    )
    if isinstance(bench.expression, ScoredBehaviour):
        shown, give = bench.expression.name, "--scorer"
    else:
        listed, give = bench.expression.expressions, "--expressions"
        own = (listed,) if isinstance(listed, str) else [getattr(e, "text", e) for e in listed]
        shown = f"the expressions {', '.join(map(repr, own[:3]))}" + (
            ", ..." if len(own) > 3 else ""
        )
    if rate < LOW_RATE:
        return (
            f"only {rate:.0%} of the positive validation prompts show the behaviour by {shown}: is this the "
            f"right one ({give}), and the right chat template?"
        )
    if other >= rate:
        return (
            f"{other:.0%} of the negative validation prompts show the behaviour, and {rate:.0%} of the "
            f"positive ones: {shown} does not tell the two apart; give another ({give})"
        )
    return None
