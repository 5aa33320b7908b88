"""`run`: all stages, into one folder; and what the other commands over a run folder share with it.

Knows: flags and what is printed. Does not know: how a stage works.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import (
    NO_PLAN,
    JudgeSettings,
    judge_settings,
    rubric_of,
    tell,
    tell_spent,
)
from interp_ablate.cli.progress_bars import ProgressBars
from interp_ablate.cli.settings import adding, given_flags, read_toml, settings_from
from interp_ablate.errors import RunError
from interp_ablate.runs.configuration import Configuration
from interp_ablate.settings import setting
from interp_ablate.storage.incoming_files import incoming_object

TEST_ROWS = {
    "behaviour_before": "positive prompts, unedited",
    "behaviour_after": "positive prompts, ablated",
    "negative_before": "negative prompts, unedited",
    "negative_after": "negative prompts, ablated",
    "addition_after": "negative prompts, added",
    "kl_first_token": "KL, first token (nats)",
    "kl_continuation": "KL a token over answers",
}


@dataclass(frozen=True)
class RunFolder:
    """Where a run is, and a file with its settings."""

    out: str = setting(help="folder of the run")
    config: str | None = setting(None, "TOML file with the same settings; flags override it")


@dataclass(frozen=True)
class ExecutorSettings:
    """Where trials are scored.

    Raises:
        RunError: a setting of Ray without Ray.
    """

    executor: str = setting("local", "where trials are scored", choices=("local", "ray"))
    workers: int | None = setting(None, "ray: how many, each with a model of its own")
    cpus: float | None = setting(None, "ray: cores a worker (default 1)")
    gpus: float | None = setting(None, "ray: GPUs a worker (default 1 where there are any)")
    address: str | None = setting(None, "ray: of a running cluster; default: one on this machine")

    def __post_init__(self) -> None:
        of_ray = [k for k, v in asdict(self).items() if k != "executor" and v is not None]
        if self.executor == "local" and of_ray:
            raise RunError(f"--{of_ray[0]} is a setting of --executor ray")


add = adding(Configuration, RunFolder, ExecutorSettings, JudgeSettings)


def run(args: Namespace) -> int:
    """Do every stage that is not done yet, and print the chosen plan's numbers."""
    from interp_ablate.runs.concept import is_concept
    from interp_ablate.runs.stages import do_all

    opened = open_run(args, settings_from(args, ExecutorSettings))
    with telling_spent(args, opened):
        if not do_all(opened):
            tell(args, f"{opened.out}: everything was done already")
    return _print_concept(opened) if is_concept(opened) else _print_summary(opened)


@contextmanager
def telling_spent(args: Namespace, opened: Any) -> Iterator[None]:
    """Says at the end of the block what a judge cost, however it ends."""
    try:
        yield
    finally:
        if (opened.configuration.scorer or "").startswith("judge:"):
            tell_spent(args, opened.expression)


def _print_concept(opened: Any) -> int:
    """What a run of a concept found; status 1 where a behaviour was asked for and no answer shows it."""
    attribution = opened.state.get("attribution")
    print(
        "concept     no plan was chosen and nothing exported; why, and what would make it a behaviour:"
    )
    for note in opened.state["notes"]:
        if "a run of a concept" in note:
            print(f"            {note}")
    if attribution:
        print(
            f"direction   {attribution['direction']} (separates best; attribution.csv says what writes it)"
        )
    print(f"report      {opened.out / 'report.html'}")
    return NO_PLAN if opened.state.get("no_behaviour") else 0


def open_run(args: Namespace, executor: ExecutorSettings | None = None) -> Any:
    """The run of --out. Settings that are not given come from --config, or else from the folder's run."""
    from interp_ablate.runs.run_folder import Run, read_run
    from interp_ablate.storage.atomic_files import check_folder

    place = settings_from(args, RunFolder)
    settings = read_toml(place.config, Configuration) if place.config else {}
    settings |= given_flags(args, Configuration)
    settings["own_code"] = settings.get("scorer") is not None
    settings["rubric"] = rubric_of(settings.get("rubric"))
    saved = read_run(place.out)
    if args.command != "run" and saved is not None:
        given = {name: value for name, value in settings.items() if value is not None}
        settings = {**Configuration.stored_in(saved), **given}
    configuration = Configuration.from_dict(settings)
    check_folder(Path(place.out))
    listener = ProgressBars(quiet=args.quiet)
    ray = _ray_settings(executor)
    if ray is not None and (configuration.scorer or "").startswith("judge:"):
        raise RunError("a judge's replies are kept by one process: leave --executor ray out")
    return Run(place.out, configuration, ray=ray, listener=listener, endpoint=judge_settings(args))


def _ray_settings(executor: ExecutorSettings | None) -> Any:
    """The workers asked for; None where trials are scored in this process."""
    from interp_ablate.jobs.ray_executor import RaySettings

    if executor is None or executor.executor == "local":
        return None
    values = {k: v for k, v in asdict(executor).items() if k != "executor" and v is not None}
    return RaySettings(**values)


def selection_of(opened: Any) -> dict[str, Any]:
    """selected.json; where it holds no plan, what the limits removed is printed."""
    from interp_ablate.runs.nearest_plans import nearest_text
    from interp_ablate.runs.run_folder import read_selected

    selected = read_selected(opened.out)
    if selected["plan"] is None:
        limits = selected["limits"]
        removed = ", ".join(f"{k}: {v}" for k, v in limits["removed"].items())
        print(f"no candidate passed the limits ({removed}); {limits['relax']}")
        print(nearest_text(opened.out, selected.get("nearest", [])))
    return selected


def print_test(test: dict[str, Any]) -> None:
    """The chosen plan's numbers on the test split, and its controls'."""
    for name, text in TEST_ROWS.items():
        ends = test["intervals"][name]
        span = "[{:.3f}, {:.3f}]".format(*ends) if ends else ""
        print(f"{text:<28} {test[name]:6.3f}   {span}".rstrip())
    for control in test["controls"]:
        rate, kl = control["behaviour_after"], control["kl_first_token"]
        print(f"control: {control['name']:<26} {rate:6.3f}   at KL {kl:.3f}")


def _print_summary(opened: Any) -> int:
    selected = selection_of(opened)
    if selected["plan"] is None:
        print(f"report: {opened.out / 'report.html'}")
        return NO_PLAN
    trial = selected["trial"]
    certificate = incoming_object(
        opened.out / "export" / "certificate.json", fields=("passed", "max_abs_logit_difference")
    )
    site = f"blocks.{trial['layer']}.hook_{trial['point']}[{trial['position']}]"
    print(f"direction   {trial['method']} at {site}")
    print_test(selected["test"])
    verdict = "passed" if certificate["passed"] else "FAILED"
    gap = certificate["max_abs_logit_difference"]
    print(f"export      {opened.out / 'export'} (certificate {verdict}, logits within {gap:.1e})")
    print(f"report      {opened.out / 'report.html'}")
    return 0
