"""Side by side: the same prompts under several plans, their answers and scores in one table, differences marked.

Knows: one batch where plans allow it, scores of every kind, the table. Does not know: which plan is better, or how anything
is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from interp_ablate.display import Html, html_of, html_table, marked_differences, shortened
from interp_ablate.edits.kinds import Edit
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.evaluation.metrics import Metric, answer_kl
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.installed_plans import as_plan
from interp_ablate.models.model import Model, check_model
from interp_ablate.models.thinking import Generation
from interp_ablate.prompts.prompt import PromptLike, text_of_prompt
from interp_ablate.scoring.exchange import TextScorer, required_arguments
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.settings import MAX_NEW_TOKENS

if TYPE_CHECKING:
    import pandas as pd

Score = TextScorer | ExpressionScorer | Metric | Callable[[str], float | None]
"""Something that scores answers: a text scorer, a metric of outputs, or a function of an answer's text."""
_NO_SCORES: Mapping[str, Score] = {}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Answers to the same prompts under several conditions, and their scores; a notebook shows the table."""

    prompts: tuple[PromptLike, ...]
    answers: Mapping[str, Sequence[Generation]]
    """Condition -> an answer a prompt. The first condition is the one that the others are compared with."""
    scores: Mapping[str, Mapping[str, Sequence[float | None]]]
    """Score -> condition -> a value a prompt; None where there is none."""

    def __repr__(self) -> str:
        return (
            f"Comparison({len(self.prompts)} prompts, conditions {', '.join(self.answers)}; "
            f"scores {', '.join(self.scores) or 'none'})"
        )

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the conditions, the reference first."""
        return tuple(self.answers)

    def to_frame(self) -> pd.DataFrame:
        """A row for each prompt and condition: index, prompt, condition, answer, finished, changed, a column a score.

        `changed` is True where the answer's tokens are not those of the first condition's.
        """
        import pandas as pd

        rows = []
        for i, prompt in enumerate(self.prompts):
            for name, answers in self.answers.items():
                rows.append(
                    {
                        "index": i,
                        "prompt": text_of_prompt(prompt),
                        "condition": name,
                        "answer": answers[i].text,
                        "finished": answers[i].finished,
                        "changed": answers[i].tokens != self.answers[self.conditions[0]][i].tokens,
                        **{score: values[name][i] for score, values in self.scores.items()},
                    }
                )
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self, *, changed_only: bool = False) -> Html:
        """A table with a row a prompt and a column a condition; words that the first condition's answer lacks are marked.

        `changed_only`: without the prompts that all conditions answer alike.
        """
        first = self.conditions[0]
        rows = []
        for i, prompt in enumerate(self.prompts):
            reference = self.answers[first][i]
            if changed_only and all(a[i].tokens == reference.tokens for a in self.answers.values()):
                continue
            cells: list[object] = [text_of_prompt(prompt)]
            for name, answers in self.answers.items():
                text = marked_differences(reference.text, answers[i].text)
                cut = "" if answers[i].finished else "…"
                cells.append(Html(f"{text}{cut}{self._scores_of(i, name)}"))
            rows.append(cells)
        n_changed = sum(
            any(a[i].tokens != self.answers[first][i].tokens for a in self.answers.values())
            for i in range(len(self.prompts))
        )
        caption = (
            f"{n_changed} of {len(self.prompts)} prompts are answered differently; marked: words that "
            f"“{first}” does not say there"
        )
        return html_table(("prompt", *self.answers), rows, caption=caption)

    def _scores_of(self, i: int, condition: str) -> str:
        values = [(score, values[condition][i]) for score, values in self.scores.items()]
        if not values:
            return ""
        shown = [
            f"{score} {'–' if value is None else format(value, '.3g')}" for score, value in values
        ]
        return f"<br><small>{html_of('; '.join(shown))}</small>"


def compare(
    model: Model,
    prompts: PromptLike | Sequence[PromptLike],
    conditions: Mapping[str, Plan | Edit | None],
    *,
    scores: Mapping[str, Score] = _NO_SCORES,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
) -> Comparison:
    """Answer the same prompts under several plans, all in one batch, and score the answers.

    Besides `scores` stands `kl_first_token`, the KL divergence in nats of each condition's distribution over the
    answer's first token from the first condition's. Where that one thinks first, both are read after its thought.

    Args:
        conditions: name -> plan, the reference first; None is the unedited model.
        scores: name -> an `ExpressionScorer`, another text scorer, a metric `(outputs, baseline) -> values`, or a
            function of an answer's text.

    Raises:
        RunError: no condition; a score that takes none of these.
        PlanError: a plan that does not fit the model.
        InterpAblateError: a text scorer, and prompts of token ids.
    """
    check_model(model)
    if not conditions:
        raise RunError('no condition to compare: give {"unedited": None, "ablated": plan}')
    plans = {name: None if plan is None else as_plan(plan) for name, plan in conditions.items()}
    reference, *others = plans
    outputs = {
        reference: ModelOutputs(
            model,
            prompts,
            plans[reference],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    }
    for name in others:
        outputs[name] = outputs[reference].fresh(plans[name])
    # a norm-preserving edit rescales what a whole weight reads, for all rows
    together = [name for name, plan in plans.items() if not _is_norm_preserving(plan)]
    if len(together) > 1:
        generate_outputs_together([outputs[name] for name in together])
    answers = {name: each.generations for name, each in outputs.items()}
    metrics: dict[str, Metric] = {"kl_first_token": answer_kl} | {
        name: as_metric(name, score) for name, score in scores.items()
    }
    values = {
        score: {name: _listed(metric(each, outputs[reference])) for name, each in outputs.items()}
        for score, metric in metrics.items()
    }
    return Comparison(outputs[reference].prompts, answers, values)


def as_metric(name: str, score: Score) -> Metric:
    """Anything that scores answers as a metric of outputs and a baseline's.

    Raises:
        RunError: it takes neither exchanges, nor outputs and a baseline, nor a text.
    """
    if isinstance(score, TextScorer) and not isinstance(score, ExpressionScorer):
        return lambda outputs, _: score(outputs.exchanges)
    if not callable(score):
        raise RunError(
            f"the score {name!r} is {shortened(repr(score))}: give a scorer, a metric "
            "(outputs, baseline) -> values, or a function of an answer's text"
        )
    if len(required_arguments(score)) == 2:
        return score  # type: ignore[return-value]
    return lambda outputs, _: [score(text) for text in outputs.texts]  # type: ignore[call-arg, arg-type, misc]


def _listed(values: Tensor | Sequence[float | None]) -> list[float | None]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _is_norm_preserving(plan: Plan | None) -> bool:
    return any(edit.norm_preserving for edit in plan or ())
