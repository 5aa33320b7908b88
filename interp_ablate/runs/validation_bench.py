"""The bench of a run: its validation prompts, scorers and first answers.

Knows: a run's validation split. Does not know: trials.
"""

from __future__ import annotations

from pathlib import Path

from interp_ablate.errors import RunError
from interp_ablate.evaluation.metrics import TargetLogOdds, find_target_tokens
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.runs.run_folder import Run
from interp_ablate.scoring.expression_lists import (
    EXPRESSIONS,
    EXPRESSIONS_OF_CONTRAST,
    read_expressions,
)
from interp_ablate.scoring.expressions import ExpressionScorer
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
    """The expressions that say that the behaviour is there.

    `--expressions` is a built-in list's name or a file (see `read_expressions`); by default the bundled
    sets have theirs, and other prompts are scored as declining (which is noted).

    Raises:
        RunError: a file that cannot be read, a name that is no list.
    """
    wanted = run.configuration.expressions
    if wanted is None:
        name = run.contrast_set.name if run.configuration.contrast else ""
        if name not in EXPRESSIONS_OF_CONTRAST:
            run.note(
                "no --expressions were given for these prompts: behaviour is scored by the built-in "
                "list 'declining'"
            )
        return ExpressionScorer(EXPRESSIONS_OF_CONTRAST.get(name, "declining"))
    if wanted in EXPRESSIONS:
        return ExpressionScorer(wanted)
    if not Path(wanted).is_file():
        raise RunError(
            f"--expressions {wanted!r} is neither a built-in list ({', '.join(EXPRESSIONS)}) nor a "
            "readable file"
        )
    return ExpressionScorer(read_expressions(wanted))
