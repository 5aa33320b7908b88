"""`select`: a selection rule over a table of evaluations.

Knows: flags and what is printed. Does not know: how a rule chooses.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from interp_ablate.cli.options import NO_PLAN
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.settings import MAX_KL, RULE_NAMES, setting
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Select:
    """Which rule is applied to which table."""

    evaluations: str = setting(
        help="JSON (list of rows), JSONL or CSV; published names are known", positional=True
    )
    rule: str = setting(
        "arditi",
        "how one is chosen, as in `search`, by Arditi et al., or the whole front",
        choices=("arditi", *RULE_NAMES, "pareto"),
    )
    n_layers: int | None = setting(None, "layers of the model (rule arditi)")
    n_prompts: int | None = setting(
        None, "prompts that a rate is of (the other rules: ties and upper bounds)", least=1
    )
    max_kl: float = setting(MAX_KL, "first-token KL budget in nats")


add = adding(Select)


def run(args: Namespace) -> int:
    """Print the chosen row, or every row of the front, as JSON."""
    from interp_ablate.search import selection
    from interp_ablate.search.rules import RuleInput

    settings = settings_from(args, Select)
    frame = selection.read_evaluations(settings.evaluations)
    if settings.rule == "pareto":
        for row in selection.pareto_front(frame).to_dict("records"):
            print(json_text(row))
        return 0
    if settings.rule == "arditi":
        if settings.n_layers is None:
            raise RunError("--rule arditi needs --n-layers: how many layers the model has")
        choice = selection.arditi(frame, n_layers=settings.n_layers, max_kl=settings.max_kl)
    else:
        by = RuleInput(n=settings.n_prompts)
        choice = selection.choose_plan(frame, settings.rule, by, max_kl=settings.max_kl)
    print(json_text({**(choice.row or {}), "rule": choice.rule, **choice.limits()}))
    return 0 if choice.row is not None else NO_PLAN
