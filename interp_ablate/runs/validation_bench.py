"""The bench of a run: its validation prompts, scorers and first answers.

Knows: a run's validation split. Does not know: trials.
"""

from __future__ import annotations

from interp_ablate.evaluation.metrics import TargetLogOdds, find_target_tokens
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.runs.run_folder import Run
from interp_ablate.scoring.expression_lists import (
    DEFAULT_EXPRESSIONS,
    EXPRESSIONS_OF_CONTRAST,
)
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.scoring.expressions import expression_scorer as make_expression_scorer
from interp_ablate.search.bench import ValidationBench

FIT_PROMPTS = 64  # a side


def bench_of(run: Run) -> ValidationBench:
    """The validation bench of a run, made once a process."""
    if "bench" not in run.shared:
        run.shared["bench"] = _make_bench(run)
    return run.shared["bench"]


def _make_bench(run: Run) -> ValidationBench:
    """Target tokens found on training prompts, expressions by concept, baselines on validation."""
    c, split, model = run.configuration, run.split, run.model
    with run.step("baselines", 3) as advance:
        first = [
            ModelOutputs(model, side[:FIT_PROMPTS]).first_logprobs
            for side in (split.train.positive, split.train.negative)
        ]
        advance(1)
        found = find_target_tokens(*first)
        run.state["target_tokens"] = [
            {"id": i, "text": model.tokenizer.decode([i]), "p_positive": p, "p_negative": q}
            for i, p, q in found
        ]
        bench = ValidationBench(
            model,
            split.validation.positive,
            split.validation.negative,
            target=TargetLogOdds(tuple(i for i, _, _ in found)),
            expression=expression_scorer(run),
            max_new_tokens=c.max_new_tokens,
        )
        rate = float(bench.expression(bench.positive, bench.positive).mean())
        advance(1)
        bench.repetition  # noqa: B018  (computed here, under the progress bar)
        advance(1)
    if rate < 0.2:
        run.note(
            f"only {rate:.0%} of the positive validation prompts show the behaviour by the expressions "
            f"{bench.expression.expressions!r}: is this the right list (--expressions), and the right "
            "chat template?"
        )
    return bench


def expression_scorer(run: Run) -> ExpressionScorer:
    """The expressions that show the behaviour: those of `--expressions`, or the contrast set's own.

    Raises:
        InterpAblateError: a name that is no list, a file that cannot be read.
    """
    wanted, name = run.configuration.expressions, ""
    if wanted is None and run.configuration.contrast:
        name = run.contrast_set.name
    if wanted is None and name not in EXPRESSIONS_OF_CONTRAST:
        run.note(
            "no --expressions were given for these prompts: behaviour is scored by the built-in "
            f"list {DEFAULT_EXPRESSIONS!r}"
        )
    return make_expression_scorer(wanted, contrast=name)
