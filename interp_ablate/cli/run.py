"""`run`, its stages, `search` and `plot`: the commands over a run folder.

Knows: flags and what is printed. Does not know: how a stage works.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import model_flags
from interp_ablate.cli.progress_bars import ProgressBars
from interp_ablate.errors import RunError

STAGE_COMMANDS = {
    "collect": "collect activations of the training and validation prompts",
    "directions": "estimate directions and their separation",
    "sweep": "screen directions, refine plans, score the finalists",
}
NO_PLAN = 1  # exit status of a run in which no candidate passed the limits


def _contrast_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--contrast", help="bundled name, JSONL/CSV/parquet file, folder, or hf:NAME"
    )
    parser.add_argument("--positive", help="file of prompts in which the concept is present")
    parser.add_argument("--negative", help="file of prompts in which it is absent")
    parser.add_argument("--system", help="system prompt for every prompt without its own")


def _run_flags(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    _contrast_flags(parser)
    parser.add_argument("--expressions", help="built-in list, or a file with a phrase a line")
    parser.add_argument(
        "--sites", help="comma-separated points: resid_pre, resid_mid, resid_post, ..."
    )
    parser.add_argument("--layers", help="A-B, both included (default: all)")
    parser.add_argument(
        "--positions",
        help="comma-separated: -1, -2, ..., after_instruction (all of these), response_mean",
    )
    for name in ("n-train", "n-validation", "n-test", "seed", "max-new-tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--max-kl", type=float, help="first-token KL budget in nats (default 0.1)")
    parser.add_argument("--config", help="TOML file with the same settings; flags override it")
    parser.add_argument("--out", required=True, help="folder of the run")


def _executor_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor", choices=("local", "ray"), default="local", help="where trials are scored"
    )
    parser.add_argument("--workers", type=int, help="ray: how many, each with a model of its own")
    parser.add_argument("--cpus", type=float, help="ray: cores a worker (default 1)")
    parser.add_argument(
        "--gpus", type=float, help="ray: GPUs a worker (default 1 where there are any)"
    )
    parser.add_argument("--address", help="ray: of a running cluster; default: one on this machine")


def _search_command(commands: Any) -> None:
    search = commands.add_parser(
        "search", help="search plans for little behaviour at little KL, and test the best"
    )
    _run_flags(search)
    search.add_argument(
        "--minutes", type=float, default=10.0, help="for screening, fits and trials (default 10)"
    )
    search.add_argument("--trials", type=int, help="of the whole study, at most")
    search.add_argument(
        "--control", choices=("random", "shuffled"), help="the same search from such directions"
    )
    search.add_argument("--no-fits", action="store_true", help="no edit fitted by gradient")
    search.add_argument("--sampler", choices=("tpe", "random", "nsga2"), default="tpe")
    search.set_defaults(work=_search)


def _plot_command(commands: Any) -> None:
    plot = commands.add_parser("plot", help="draw every figure of a run folder, and its report")
    plot.add_argument("folder", help="run folder")
    plot.set_defaults(work=_plot)


# ---- what the commands do ------------------------------------------------------------------------


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Flags that were given, over the TOML file's settings."""
    found: dict[str, Any] = {}
    if args.config:
        found.update(_read_toml(args.config))
    names = (
        "model backend dtype device template trust_remote_code contrast positive negative system expressions layers "
        "n_train n_validation n_test seed max_new_tokens max_kl"
    )
    found.update({k: getattr(args, k) for k in names.split() if getattr(args, k) is not None})
    for name in ("sites", "positions"):
        if getattr(args, name) is not None:
            found[name] = [part.strip() for part in getattr(args, name).split(",") if part.strip()]
    return found


def _read_toml(path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read --config {path}: {error}") from error


def _open(args: argparse.Namespace) -> Any:
    """The run of --out: settings that are not given come from the folder, if it has a run."""
    from interp_ablate.runs.configuration import Configuration
    from interp_ablate.runs.run_folder import Run, read_run

    given = _settings(args)
    saved = read_run(args.out)
    if args.command != "run" and saved is not None:
        stored = {k: v for k, v in saved["configuration"].items() if k != "trust_remote_code"}
        given = {**stored, **given}
    configuration = Configuration.from_dict(given)
    run = Run(args.out, configuration, work=_work, listener=ProgressBars(quiet=args.quiet))
    if "executor" in args:
        names = ("workers", "cpus", "gpus", "address")
        run.shared["executor"] = {"name": args.executor, **{n: getattr(args, n) for n in names}}
        _check_executor(run.shared["executor"])
    return run


def _check_executor(settings: dict[str, Any]) -> None:
    given = [name for name, value in settings.items() if name != "name" and value is not None]
    if settings["name"] == "local" and given:
        raise RunError(f"--{given[0]} is a setting of --executor ray")


def _work(stage: str) -> Any:
    """What does a stage; imported when there is something to do."""
    from interp_ablate.runs.sweep_stage import WORK

    return WORK[stage]


def _run(args: argparse.Namespace) -> int:
    from interp_ablate.runs.run_folder import STAGES

    run = _open(args)
    worked = [run.stage(name) for name in STAGES]
    if not any(worked):
        _say(args, f"{run.out}: everything was done already")
    return _summary(run)


def _search(args: argparse.Namespace) -> int:
    from interp_ablate.runs.search_run import SearchSettings, run_search, summary

    run = _open(args)
    search = SearchSettings(args.minutes, args.trials, args.control, not args.no_fits, args.sampler)
    run_search(run, search)
    print(summary(run))
    selected = _selected(run)
    if selected["plan"] is None:
        return NO_PLAN
    print(f"chosen: trial {int(selected['trial']['number'])}; on the test split:")
    _print_test(selected["test"])
    print(f"plans of the front: {run.out / 'plans'}; export: interp-ablate export {run.out}")
    return 0


def _selected(run: Any) -> dict[str, Any]:
    """selected.json; where it holds no plan, what the limits removed is printed."""
    selected = json.loads((run.out / "selected.json").read_text(encoding="utf-8"))
    if selected["plan"] is None:
        limits = selected["limits"]
        removed = ", ".join(f"{k}: {v}" for k, v in limits["removed"].items())
        print(f"no candidate passed the limits ({removed}); {limits['relax']}")
    return selected


def _summary(run: Any) -> int:
    selected = _selected(run)
    if selected["plan"] is None:
        print(f"report: {run.out / 'report.html'}")
        return NO_PLAN
    test, trial = selected["test"], selected["trial"]
    certificate = json.loads((run.out / "export" / "certificate.json").read_text(encoding="utf-8"))
    site = f"blocks.{trial['layer']}.hook_{trial['point']}[{trial['position']}]"
    print(f"direction   {trial['method']} at {site}")
    _print_test(test)
    verdict = "passed" if certificate["passed"] else "FAILED"
    gap = certificate["max_abs_logit_difference"]
    print(f"export      {run.out / 'export'} (certificate {verdict}, logits within {gap:.1e})")
    print(f"report      {run.out / 'report.html'}")
    return 0


def _print_test(test: dict[str, Any]) -> None:
    for name, text in (
        ("behaviour_before", "positive prompts, unedited"),
        ("behaviour_after", "positive prompts, ablated"),
        ("negative_before", "negative prompts, unedited"),
        ("negative_after", "negative prompts, ablated"),
        ("addition_after", "negative prompts, added"),
        ("kl_first_token", "KL, first token (nats)"),
        ("kl_continuation", "KL a token over answers"),
    ):
        low, high = test["intervals"][name]
        print(f"{text:<28} {test[name]:6.3f}   [{low:.3f}, {high:.3f}]")
    for control in test["controls"]:
        rate, kl = control["behaviour_after"], control["kl_first_token"]
        print(f"control: {control['name']:<19} {rate:6.3f}   at KL {kl:.3f}")


def _stage(args: argparse.Namespace) -> int:
    run = _open(args)
    if not run.stage(args.command):
        _say(args, f"{run.out}: {args.command} was done already")
    return 0


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr)


def _plot(args: argparse.Namespace) -> int:
    from interp_ablate.plots.run_figures import save_figures
    from interp_ablate.runs.report import write_report
    from interp_ablate.runs.run_folder import read_run

    if read_run(args.folder) is None:
        raise RunError(
            f"{args.folder} holds no run: make one with `interp-ablate run --out {args.folder}`"
        )
    for path in [*save_figures(args.folder), write_report(args.folder)]:
        print(path)
    return 0
