"""`generate`: answers to prompts, with and without a plan.

Knows: flags and what is printed. Does not know: how answers are written.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from interp_ablate.cli.options import ModelSettings, chosen_in_run, load, tell
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Generate(ModelSettings):
    """Which prompts are answered, and under which plan."""

    prompts: tuple[str, ...] = setting(
        help="prompts, or @FILE of prompts (a prompt a line, or a table)",
        positional=True,
        nargs="+",
    )
    run: str | None = setting(None, "run folder: its model and chosen plan")
    plan: str | None = setting(None, "plan JSON")
    strength: str | None = setting(
        None,
        "the plan's strengths and coefficients times a number; or kl:X, the strength whose KL on --kl-prompts is X "
        "nats at quantile 0.9 (kl:X@Q: at quantile Q)",
        metavar="X",
    )
    kl_prompts: str = setting(
        "declining",
        "with --strength kl:X: harmless prompts (negative ones of a contrast set, or a file with a prompt a line)",
    )
    system: str | None = setting(None, "system prompt", empty=True)
    max_new_tokens: int = setting(64, "tokens of an answer, at most", least=1)
    json: bool = setting(False, "one JSON object a prompt")


add = adding(Generate)


def run(args: Namespace) -> int:
    """Print each prompt's answers."""
    from interp_ablate.edits.plan import Plan
    from interp_ablate.evaluation.calibration import KLStrength, strength_at_kl_quantile

    settings = settings_from(args, Generate)
    if settings.run:
        stored, selected = chosen_in_run(settings.run)
        settings = settings_from(args, Generate, under={**stored, "plan": selected})
    plan = Plan.load(settings.plan) if settings.plan else None
    strength, harmless = _strength(settings, plan)
    prompts = prompts_of(settings.prompts, settings.system)
    model = load(settings, settings.model)
    if isinstance(strength, KLStrength) and plan is not None:
        found = strength_at_kl_quantile(
            model, plan, harmless, kl=strength.kl, quantile=strength.quantile
        )
        plan = found.plan
        tell(args, str(found))
    elif plan is not None:
        plan = plan.times(strength) if strength != 1 else plan
    limit = settings.max_new_tokens
    conditions = {"baseline": model.generate(prompts, max_new_tokens=limit)}
    if plan is not None:
        with model.applied(plan):
            conditions["edited"] = model.generate(prompts, max_new_tokens=limit)
    for i, prompt in enumerate(prompts):
        written = {name: generations[i] for name, generations in conditions.items()}
        if settings.json:
            texts = {name: each.answer for name, each in written.items()}
            thoughts = {f"{name}_thought": g.thought for name, g in written.items() if g.thought}
            print(json_text({"prompt": prompt.text, **texts, **thoughts}, ensure_ascii=False))
            continue
        print(f"> {prompt.text}")
        for name, each in written.items():
            if each.thought:
                print(f"[{name}, thought] {each.thought}\n")
            answer = "(none: the thought did not end)" if each.answer is None else each.answer
            print(f"[{name}] {answer}\n")
    return 0


def _strength(settings: Generate, plan: Any) -> tuple[Any, Any]:
    """The strength that was asked for, and the prompts on which a KL is calibrated; refused before a model is loaded."""
    from interp_ablate.evaluation.calibration import KLStrength, harmless_prompts, read_strength

    if settings.strength is None:
        return 1.0, ()
    if plan is None:
        raise RunError("--strength is the plan's: give --plan or --run too")
    strength = read_strength(settings.strength)
    plan.times(1.0)  # a plan without strengths is refused here
    if not isinstance(strength, KLStrength):
        return strength, ()
    harmless = harmless_prompts(settings.kl_prompts)
    if settings.system is None:
        return strength, harmless
    # as the prompts that are answered: a system prompt of their own stays
    return strength, tuple(
        replace(each, system=settings.system) if each.system is None else each for each in harmless
    )


def prompts_of(arguments: Sequence[str], system: str | None) -> list[Any]:
    """The prompts that arguments give: each one itself, or those of a file (@FILE).

    Raises:
        InterpAblateError: a file that cannot be read.
    """
    from interp_ablate.prompts.prompt import Prompt
    from interp_ablate.prompts.readers import Reading, read_side

    how, prompts = Reading(system=system), []
    for argument in arguments:
        file = argument.startswith("@")
        prompts += read_side(argument[1:], how) if file else [Prompt(argument, system)]
    return prompts
