"""Experiment: what each stage of a run does, from activations to the report.

Knows: the order of measurements, which split serves which of them, what goes into which file. Does not
know: how a stage is skipped or resumed (`pipeline` does), or any flag or terminal.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from interp_ablate.candidates import Candidate, Trial, screening
from interp_ablate.directions import (
    Direction,
    difference_in_means,
    estimate_directions,
    orthogonalized,
    random_direction,
)
from interp_ablate.edits import Ablate, Add, Erase, Plan
from interp_ablate.errors import DirectionError, RunError
from interp_ablate.estimators import comparison
from interp_ablate.executors import Executor, executor_of
from interp_ablate.expressions import (
    EXPRESSIONS,
    EXPRESSIONS_OF_CONTRAST,
    ExpressionScorer,
    read_expressions,
)
from interp_ablate.fit import N_KEPT, FitData, NothingToFit, fit_data, fit_edit
from interp_ablate.journal import Journal
from interp_ablate.pipeline import Configuration, Run, identity
from interp_ablate.scores import (
    Empty,
    Evidence,
    FirstTokenKL,
    Length,
    Repetition,
    TargetLogOdds,
    continuation_scores,
    find_target_tokens,
    generate_together,
)
from interp_ablate.selection import Choice, bootstrap_interval, constrained
from interp_ablate.sites import Site
from interp_ablate.sweep import (
    Bench,
    Source,
    bands,
    finalists,
    fitted,
    promising,
    run_trial,
    run_trials,
    screen,
    spread,
    to_frame,
)

MAIN_METHOD = "difference_in_means"
N_RANDOM_CONTROLS = 2
# Rounds of a fit: gradient steps, and how much a nat of KL weighs. First far enough, then ever cheaper.
FIT_ROUNDS = ((14, 120.0), (10, 160.0), (8, 160.0), (8, 160.0), (8, 160.0))
FIT_PROMPTS = 64  # a side
# Measures that are shares of prompts; the others are means of real numbers.
RATES = (
    "positive_empty_before",
    "positive_empty_after",
    "behaviour_before",
    "behaviour_after",
    "negative_before",
    "negative_after",
    "addition_after",
)
ADDITION_COEFFICIENTS = (1.0, 1.5, 2.0, 3.0)
# The smallest coefficient that reaches this rate on validation prompts is taken.
ADDITION_TARGET = 0.75


def do_collect(run: Run) -> None:
    """Activations of the training and validation prompts."""
    split, _ = run.split, run.model  # loading has its own progress
    for part in ("train", "validation"):
        prompts = getattr(split, part)
        total = len(prompts.positive) + len(prompts.negative)
        with run.step(f"collect {part}", total) as advance:
            run.activations(part, advance)


def do_directions(run: Run) -> None:
    """Directions of the training prompts, their separation on validation prompts, projections of both."""
    train, validation = run.activations("train"), run.activations("validation")
    source = json.dumps(
        {"model": run.model.fingerprint, "contrast": run.contrast_set.fingerprint}, sort_keys=True
    )
    directions = estimate_directions(train, validation, source=source)
    directions.save(run.out / "directions.safetensors")
    run.__dict__.pop("directions", None)
    main = directions.of(MAIN_METHOD)
    run.state["directions"] = {"count": len(main), "left_out": directions.left_out}
    none = [key for key in directions.left_out if not key.endswith("orthogonalized")]
    if none:
        run.note(
            f"{len(none)} of {len(main) + len(none)} sites have no direction and are left out: "
            + ", ".join(none)
        )
    best = most_separating(main)
    table = comparison(train, validation, best.site, best.position)
    run.write("estimators.csv", table.assign(site=str(best.site), position=best.position))
    run.write("projections.csv", _projections(run, main, train, validation))


def most_separating(directions: Iterable[Direction]) -> Direction:
    """The direction that best separates validation prompts."""
    measured = [item for item in directions if item.separation is not None]
    return max(measured, key=lambda item: item.separation.d_prime if item.separation else 0.0)


def _projections(run: Run, directions: Any, train: Any, validation: Any) -> pd.DataFrame:
    tables = []
    several = len(train.positions) > 1
    for split, activations in (("train", train), ("validation", validation)):
        part = getattr(run.split, split)
        texts = [prompt.text for prompt in (*part.positive, *part.negative)]
        labels = ["positive" if label else "negative" for label in activations.labels.tolist()]
        for item in directions:
            values = activations.at(item.site, item.position).double() @ item.vector
            table = pd.DataFrame(
                {
                    "layer": item.site.layer,
                    "point": item.site.point,
                    "split": split,
                    "label": labels,
                    "prompt": texts,
                    "projection": values.tolist(),
                }
            )
            tables.append(table.assign(position=item.position) if several else table)
    return pd.concat(tables, ignore_index=True)


def bench_of(run: Run) -> Bench:
    """The validation bench of a run, made once a process."""
    if "bench" not in run.shared:
        run.shared["bench"] = _make_bench(run)
    return run.shared["bench"]


def _make_bench(run: Run) -> Bench:
    """Target tokens found on training prompts, expressions by concept, baselines on validation."""
    c, split, model = run.configuration, run.split, run.model
    with run.step("baselines", 3) as advance:
        first = [
            Evidence(model, side[:FIT_PROMPTS]).first_logprobs
            for side in (split.train.positive, split.train.negative)
        ]
        advance(1)
        found = find_target_tokens(*first)
        run.state["target_tokens"] = [
            {"id": i, "text": model.tokenizer.decode([i]), "p_positive": p, "p_negative": q}
            for i, p, q in found
        ]
        bench = Bench(
            model,
            split.validation.positive,
            split.validation.negative,
            target=TargetLogOdds(tuple(i for i, _, _ in found)),
            expression=expression_scorer(run),
            new_tokens=c.new_tokens,
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


def do_sweep(run: Run) -> None:
    """Screen every direction, refine bands and a fitted edit, score the finalists' text; journalled."""
    journal = Journal(run.out / "trials.jsonl", identity(run))
    c = run.configuration
    with journal.open() as done, _executor(run) as executor:
        bench = bench_of(run)

        def trials_of(
            name: str, candidates: Sequence[Candidate], bench: Bench = bench
        ) -> list[Trial]:
            with run.step(name, len(candidates)) as advance:
                return run_trials(
                    bench,
                    run.directions,
                    candidates,
                    journal,
                    done,
                    fits=fits_of(run),
                    executor=executor,
                    on_trial=lambda _: advance(1),
                )

        screened = screen(
            bench,
            screening(run.directions.of(MAIN_METHOD)),
            lambda small, some: trials_of(
                f"screen, {len(small.positive.rows)} prompts", some, small
            ),
        )
        sources = promising(screened)
        trials = trials_of("bands of strengths", bands(sources, run.model.n_layers, seed=c.seed))
        for source in spread(sources):
            try:
                name = fit_of(run, source)
            except NothingToFit as error:
                run.note(str(error))
                break
            trials += trials_of(f"fitted, layer {source[0]}", fitted(source, name))
        trials += trials_of("finalists", finalists(trials, max_kl=c.max_kl))
    table = pd.concat([screened, to_frame(trials, bench)], ignore_index=True)
    run.write("trials.csv", table.assign(trial=range(len(table))))


@contextmanager
def _executor(run: Run) -> Iterator[Executor[Candidate, Trial] | None]:
    """Where trials are scored: here, or by the executor that `run.shared` asks for."""
    settings = dict(run.shared.get("executor") or {})
    if settings.pop("name", "local") == "local":
        yield None
        return
    make = functools.partial(make_worker, run.configuration.to_dict(), str(run.out.resolve()))
    with executor_of("ray", make, **settings) as executor:
        yield executor


def make_worker(configuration: dict[str, Any], out: str) -> Callable[[Candidate], Trial]:
    """What scores candidates in a process of its own, with a model of its own.

    It reads the run's folder (directions, activations, fitted edits), which must be there for every
    worker, and writes nothing into it.
    """
    run = Run(out, Configuration.from_dict(configuration), work=WORK.__getitem__)
    bench = bench_of(run)

    def work(candidate: Candidate) -> Trial:
        small = bench if candidate.prompts is None else bench.first(candidate.prompts)
        fits = fits_of(run) if candidate.fit is not None else None
        return run_trial(small, run.directions, candidate, fits)

    return work


def fits_of(run: Run) -> dict[str, Ablate | Erase]:
    """The edits fitted so far, by name."""
    found = {}
    for path in sorted((run.out / "fits").glob("*.json")):
        (edit,) = Plan.load(path)
        assert isinstance(edit, (Ablate, Erase))
        found[path.stem] = edit
    return found


def fit_of(run: Run, source: Source, *, start: Direction | None = None) -> str:
    """The name of the edit fitted from a direction on (or from `start`); fitted unless it is there already.

    Fitted on the training prompts in rounds. Each after the first adds what the model says under the
    edit so far: other words for the same behaviour, and loops.
    """
    layer, point, position = source
    site = Site(layer, point)  # type: ignore[arg-type]
    direction = start or run.directions[site, position, MAIN_METHOD]
    name = f"{layer}-{point}-{position}-{direction.fingerprint[:8]}"
    path = run.out / "fits" / f"{name}.json"
    if not path.exists():
        edit = _fit(run, direction)
        if not any(edit.amounts):
            raise NothingToFit(
                f"the fit from {direction.name} ended where it changes nothing: whatever makes the "
                "behaviour less likely costs more elsewhere"
            )
        Plan((edit,)).save(path)
    return name


def _fit(run: Run, direction: Direction) -> Ablate | Erase:
    model, train, scorer = run.model, run.split.train, bench_of(run).expression
    new_tokens = run.configuration.new_tokens
    positive, negative = train.positive[:FIT_PROMPTS], train.negative[:FIT_PROMPTS]
    name = f"layer {direction.site.layer}"
    if "fit_data" not in run.shared:
        with run.step("answers to training prompts", None):
            run.shared["fit_data"] = fit_data(
                Evidence(model, positive, new_tokens=new_tokens),
                Evidence(model, negative, new_tokens=N_KEPT),
                scorer,
            )

    data: FitData = run.shared["fit_data"]
    edit: Ablate | Erase | None = None
    for number, (steps, weight) in enumerate(FIT_ROUNDS, 1):
        if edit is not None:
            with run.step(f"answers under it, {name}", None):
                both = [
                    Evidence(model, side, Plan((edit,)), new_tokens=new_tokens)
                    for side in (positive, negative)
                ]
                generate_together(both)
                data = data.with_answers(both[0], scorer).with_loops(both)
        with run.step(f"fit, round {number}, {name}", steps) as advance:
            edit = fit_edit(
                model,
                direction,
                model.writers,
                data,
                kl_weight=weight,
                steps=steps,
                start=edit,
                on_step=lambda: advance(1),
            )
    assert edit is not None
    return edit


def do_evaluate(run: Run) -> None:
    """Choose on validation, then report once on the test split, beside controls treated the same way."""
    from interp_ablate.plots import read_trials

    c = run.configuration
    trials = read_trials(run.out / "trials.csv")
    finals = trials[trials["stage"] == "finalist"]
    bench = bench_of(run)
    choice = constrained(
        finals,
        max_kl=c.max_kl,
        at_most={
            "repetition": bench.repetition + 0.1,
            "empty": float(Empty()(bench.positive, bench.positive).mean()),
        },
        tolerance=0.5 / c.n_validation,
    )

    def plans(row: dict[str, Any]) -> tuple[Plan, Direction, list[tuple[str, Plan]]]:
        candidate, fits, writers = Candidate.from_row(row), fits_of(run), run.model.writers
        direction = run.directions[candidate.site, candidate.position, candidate.method]
        controls = [
            (name, candidate.control(other, writers, fits))
            for name, other in _controls(run, candidate)
        ]
        added = run.directions[candidate.site, candidate.position]
        return candidate.plan(direction, writers, fits), added, controls

    test_choice(run, choice, plans)


def test_choice(
    run: Run,
    choice: Choice,
    plans: Callable[[dict[str, Any]], tuple[Plan, Direction, list[tuple[str, Plan]]]],
    **more: Any,
) -> None:
    """Test what was chosen, if anything was: selected.json (with `more`) and generations.jsonl.

    Args:
        plans: from the chosen row to its plan, the direction to add, and control plans by name.
    """
    selected: dict[str, Any] = {
        "rule": choice.rule,
        "limits": choice.limits(),
        "plan": None,
        **more,
    }
    generations: list[dict[str, Any]] = []
    run.state["no_plan"] = choice.row is None
    if choice.row is None:
        run.note(f"no candidate passed the limits: {choice.removed}; {choice.relax}")
    else:
        plan, direction, controls = plans(choice.row)
        addition = _addition_plan(run, direction)
        test, generations = _test_plan(run, plan, addition, controls)
        selected |= {"plan": plan.to_dict(), "addition_plan": addition.to_dict()}
        selected |= {"trial": choice.trial, "test": test}
    run.write("generations.jsonl", generations)
    run.write("selected.json", selected)


def _addition_plan(run: Run, direction: Direction) -> Plan:
    """Addition at the direction's own site, with the smallest coefficient that induces the behaviour."""
    bench = bench_of(run)
    best, best_rate = ADDITION_COEFFICIENTS[0], -1.0
    with run.step("addition coefficient", len(ADDITION_COEFFICIENTS)) as advance:
        for coefficient in ADDITION_COEFFICIENTS:
            plan = Plan((Add(direction, direction.site, coefficient=coefficient),))
            rate = float(bench.expression(bench.negative.under(plan), bench.negative).mean())
            advance(1)
            if rate > best_rate:
                best, best_rate = coefficient, rate
            if rate >= ADDITION_TARGET:
                break
    return Plan((Add(direction, direction.site, coefficient=best),))


def _test_plan(
    run: Run, plan: Plan, addition: Plan, control_plans: Sequence[tuple[str, Plan]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything that is reported of the test split, and the texts behind it."""
    model, test, c = run.model, run.split.test, run.configuration
    scorer = bench_of(run).expression

    with run.step("test split", 7 + len(control_plans)) as advance:
        sides = {"positive": test.positive, "negative": test.negative}
        base_p, base_n = (
            Evidence(model, prompts, new_tokens=c.new_tokens) for prompts in sides.values()
        )
        new_p, new_n, added = base_p.under(plan), base_n.under(plan), base_n.under(addition)
        generate_together([base_p, base_n, new_p, new_n, added])
        values: dict[str, torch.Tensor] = {}
        for name, here, base in (
            ("behaviour_before", base_p, base_p),
            ("behaviour_after", new_p, base_p),
            ("negative_before", base_n, base_n),
            ("negative_after", new_n, base_n),
            ("addition_after", added, base_n),
        ):
            values[name] = scorer(here, base)
            advance(1)
        values["kl_first_token"] = FirstTokenKL()(new_n, base_n)
        values |= continuation_scores(new_n, base_n)
        advance(1)
        for name, here in (("before", base_p), ("after", new_p)):
            values[f"positive_repetition_{name}"] = Repetition()(here, base_p)
            values[f"positive_empty_{name}"] = Empty()(here, base_p)
        for name, here in (("before", base_n), ("after", new_n)):
            values[f"repetition_{name}"] = Repetition()(here, base_n)
            values[f"length_{name}"] = Length()(here, base_n)
        advance(1)
        controls = []
        for name, control in control_plans:
            controls.append(_control(run, name, control, base_p, base_n))
            advance(1)
    result: dict[str, Any] = {name: float(value.double().mean()) for name, value in values.items()}
    result["intervals"] = {
        name: list(
            bootstrap_interval(value.double().numpy(), seed=c.seed, proportion=name in RATES)
        )
        for name, value in values.items()
    }
    result["n"] = {side: len(prompts) for side, prompts in sides.items()}
    result["controls"] = controls
    result["how"] = _how(run)
    texts = [("baseline", "positive", base_p), ("ablated", "positive", new_p)]
    texts += [
        ("baseline", "negative", base_n),
        ("ablated", "negative", new_n),
        ("added", "negative", added),
    ]
    return result, [
        row for name, side, e in texts for row in _texts(name, side, sides[side], e, scorer)
    ]


def _how(run: Run) -> dict[str, str]:
    """How the numbers of the test split were measured, for the model card."""
    c = run.configuration
    splits = (run.split.train, run.split.validation, run.split.test)
    counts = [f"{len(part.positive)} + {len(part.negative)}" for part in splits]
    return {
        "contrast set": run.split.train.name,
        "train, validation, test prompts": ", ".join(counts),
        "decoding": f"greedy, {c.new_tokens} new tokens",
        "behaviour": "share of answers in which a listed expression is found",
        "intervals": "95%, bootstrap over prompts",
    }


def _texts(
    condition: str, side: str, prompts: Sequence[Any], evidence: Evidence, scorer: ExpressionScorer
) -> list[dict[str, Any]]:
    rows = []
    for prompt, text in zip(prompts, evidence.texts):
        matches = scorer.matches(text)
        rows.append(
            {
                "label": side,
                "prompt": prompt.text,
                "condition": condition,
                "text": text,
                "expressed": scorer.outcome(text) == "expressed",
                "matches": [match.expression for match in matches],
            }
        )
    return rows


def _controls(run: Run, candidate: Candidate) -> list[tuple[str, Direction]]:
    """Random directions of equal norm, and the direction of shuffled labels, for the chosen plan."""
    site, position = candidate.site, candidate.position
    direction = run.directions[site, position, candidate.method]
    seed = run.configuration.seed
    found = random_controls(run, direction)
    train = run.activations("train")
    values, labels = train.at(site, position), train.labels
    generator = torch.Generator().manual_seed(seed)
    shuffled = labels[torch.randperm(len(labels), generator=generator)]
    null = difference_in_means(
        values[shuffled], values[~shuffled], site, position=position, method="shuffled_labels"
    )
    if null is not None:
        try:
            if candidate.method != MAIN_METHOD:
                null = orthogonalized(null, values[~shuffled].double().mean(0))
            found.append(("shuffled labels", null))
        except DirectionError as error:
            run.note(f"no shuffled-labels control: {error}")
    return found


def random_controls(run: Run, like: Direction) -> list[tuple[str, Direction]]:
    """Random directions of equal norm, by name; the same ones for one seed."""
    seeds = [1000 * run.configuration.seed + i for i in range(N_RANDOM_CONTROLS)]
    return [(f"random {i}", random_direction(like, seed=seed)) for i, seed in enumerate(seeds)]


def _control(
    run: Run, name: str, plan: Plan, base_positive: Evidence, base_negative: Evidence
) -> dict[str, Any]:
    on_positive, on_negative = base_positive.under(plan), base_negative.under(plan)
    rates = bench_of(run).expression(on_positive, base_positive).double()
    return {
        "name": name,
        "behaviour_after": float(rates.mean()),
        "interval": list(bootstrap_interval(rates.numpy(), proportion=True)),
        "kl_first_token": float(FirstTokenKL()(on_negative, base_negative).mean()),
    }


def do_export(run: Run) -> None:
    """The chosen plan as a certified checkpoint in export/."""
    from interp_ablate.export.checkpoint import export_checkpoint

    selected = json.loads((run.out / "selected.json").read_text())
    if selected["plan"] is None:
        return
    prompts = [*run.split.test.positive[:4], *run.split.test.negative[:4]]
    with run.step("export and verify", None):
        export_checkpoint(
            run.model,
            Plan.from_dict(selected["plan"]),
            run.out / "export",
            prompts=prompts,
            report=selected["test"],
            overwrite=True,
        )


def do_plot(run: Run) -> None:
    """Every figure that the folder has data for."""
    from interp_ablate.plots import save_figures

    with run.step("figures", None):
        save_figures(run.out)


def do_report(run: Run) -> None:
    """report.html."""
    from interp_ablate.report import write_report

    write_report(run.out)


WORK: dict[str, Callable[[Run], None]] = {
    "collect": do_collect,
    "directions": do_directions,
    "sweep": do_sweep,
    "evaluate": do_evaluate,
    "export": do_export,
    "plot": do_plot,
    "report": do_report,
}
