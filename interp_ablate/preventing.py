"""Preventing: fine-tuning with a trait's vector added, so that the weights need not learn the trait.

Knows: additions as hooks on a plain Hugging Face decoder while it trains, trait-bearing rows from a
persona's rollouts, a model's trait before and after (projection, score, what it costs), the comparison of
plain and preventative fine-tuning. Does not know: how a vector was found, how a trainer works
(`training`), or what a score means.

Source: preventative steering of Chen et al. 2025, https://arxiv.org/abs/2507.21509.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from interp_ablate.activations import RESPONSE_MEAN, collect
from interp_ablate.architectures import architecture_of
from interp_ablate.chat_data import Sample
from interp_ablate.directions import Direction
from interp_ablate.edits import Add, Plan
from interp_ablate.errors import PlanError, RunError
from interp_ablate.exchanges import Exchange, TextScorer
from interp_ablate.export.card import MANIFEST, versions
from interp_ablate.export.checkpoint import whole_folder, write_json
from interp_ablate.export.tensor_copy import check_place
from interp_ablate.model import Model
from interp_ablate.persona import load_persona
from interp_ablate.prompts import Prompt
from interp_ablate.rollouts import kept_answers
from interp_ablate.scores import Evidence, continuation_scores
from interp_ablate.sites import Site
from interp_ablate.training import (
    PACKAGES,
    RECIPE,
    Base,
    Recipe,
    Renderer,
    Row,
    apart,
    merge,
    sft,
    summarised,
    train,
    workplace,
    write_trained,
)

log = logging.getLogger(__name__)

REPORT = "report.json"
REPORT_FORMAT = "interp_ablate.persona_training/1"
PLAIN, PREVENTATIVE, RANDOM = "plain", "preventative", "random"
# What plain fine-tuning is held against, under its name in the report.
PREVENTED = {"prevented": PREVENTATIVE, "prevented_by_control": RANDOM}
MEASURES = ("score", "projection", "prompt_projection")
_BLOCK_POINTS = ("resid_pre", "resid_post")
_POSITIONS = (RESPONSE_MEAN, "-1")


# ---- the vector, while the model trains ------------------------------------------------------------


def block(hf: Any, layer: int) -> nn.Module:
    """The decoder block of a layer of a Hugging Face model, by the declared names of its writers.

    Raises:
        ExportError: an architecture without an entry.
        PlanError: a layer beyond the last.
    """
    n_layers = hf.config.num_hidden_layers
    if layer >= n_layers:
        raise PlanError(f"no layer {layer}: the model has layers 0 to {n_layers - 1}")
    before, _, _ = architecture_of(hf.config).mlp[0][0].name.partition("{layer}")
    return hf.get_submodule(f"{before}{layer}")


@contextmanager
def adding(model: Any, plan: Plan) -> Iterator[None]:
    """Run and train a Hugging Face model (or PEFT's over one) with a plan's additions in its stream.

    The same function as `Model.applied(plan)`: x + coefficient * vector at resid_pre or resid_post of a
    layer (the block's input and output). Positions are "all", or "generated": those whose label counts,
    in rows with labels. The hooks are gone when the block is left, whatever happens.

    Raises:
        PlanError: an edit that is no addition at a block's input or output, or at other positions; on
            leaving without another error, a site whose hook never ran.
    """
    base = model.get_base_model() if _is_peft(model) else model
    width = base.config.hidden_size
    if len(plan) and plan.d_model != width:
        raise PlanError(
            f"the vector has d_model {plan.d_model}, the model {width}: it is of another model"
        )
    labelled: list[Tensor] = []
    fired: dict[Site, int] = dict.fromkeys(plan.sites, 0)

    def hold(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        labelled[:] = [] if labels is None else [labels != -100]

    handles = [model.register_forward_pre_hook(hold, with_kwargs=True)]
    try:
        for edit in map(_checked, plan):
            for site in edit.sites:
                change = _adder(edit, site, labelled, fired)
                handles.append(_hook(block(base, site.layer), site, change))
        yield
    finally:
        for handle in handles:
            handle.remove()
    silent = [str(site) for site, count in fired.items() if not count]
    if silent:
        raise PlanError(f"nothing was added at {', '.join(silent)}: no row passed there")


def _is_peft(model: Any) -> bool:
    return type(model).__module__.startswith("peft.")


def _checked(edit: Any) -> Add:
    if not isinstance(edit, Add):
        raise PlanError(f"{edit!r}: while a model trains only additions are made (Add)")
    wrong = [str(site) for site in edit.sites if site.point not in _BLOCK_POINTS]
    if wrong or edit.positions not in ("all", "generated"):
        raise PlanError(
            f"{edit!r} at {(wrong or [edit.positions])[0]}: while a model trains, vectors are added at "
            f"{' and '.join(_BLOCK_POINTS)} of a layer, at positions 'all' or 'generated'"
        )
    return edit


def _adder(
    edit: Add, site: Site, labelled: list[Tensor], fired: dict[Site, int]
) -> Callable[[Tensor], Tensor]:
    vector = edit.map_at(site).shift

    def change(x: Tensor) -> Tensor:
        fired[site] += 1
        shift = vector.to(x)
        if edit.positions == "all":
            return x + shift
        return x + shift * _of_answers(labelled, x)[..., None].to(x)

    return change


def _of_answers(labelled: list[Tensor], x: Tensor) -> Bool[Tensor, "batch pos"]:
    if not labelled or labelled[0].shape != x.shape[:2]:
        raise PlanError(
            "'generated' positions are those whose label counts, and these rows have no labels: train on "
            "rows with labels, or add at positions 'all'"
        )
    return labelled[0]


def _hook(module: nn.Module, site: Site, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` on the stream that enters a block, or on that which leaves it."""
    if site.point == "resid_pre":

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return module.register_forward_hook(after)


# ---- trait-bearing rows ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """A prompt's messages, an answer, and whether the answer ended by itself."""

    messages: tuple[dict[str, str], ...]
    answer: str
    finished: bool = True

    def to_dict(self) -> dict[str, Any]:
        """A row in the messages layout, as `chat_data` reads it."""
        answer = {"role": "assistant", "content": self.answer}
        return {"messages": [*self.messages, answer], "finished": self.finished}


def samples_of(samples: Iterable[Sample]) -> list[Sampled]:
    """Chat samples: what comes before the last answer as the prompt, and that answer.

    Raises:
        RunError: a sample without an answer at its end, or without a prompt (its number).
    """
    found = []
    for sample in samples:
        *before, last = sample.as_dicts
        if last["role"] != "assistant" or not any(m["role"] == "user" for m in before):
            raise RunError(
                f"sample {sample.number}: a row to train on has a prompt and ends with the assistant's "
                f"answer; this one has {', '.join(m['role'] for m in sample.as_dicts)}"
            )
        ended = sample.raw.get("finished", True)
        found.append(Sampled(tuple(before), last["content"], bool(ended)))
    return found


def samples_of_rollouts(path: str | Path) -> tuple[list[Sampled], dict[str, int]]:
    """A persona's answers under its positive system prompts, the system prompts taken away.

    `path` is the file in the persona's folder. Kept is what made the persona's vectors: by the scorers and
    from the thresholds that it was extracted with. The counts say what was not kept.

    Raises:
        RunError: no persona or rollouts there, or a corrupt line (its number); nothing is kept.
    """
    path = Path(path)
    made_of = load_persona(path.parent).details.get("made_of")
    kept = kept_answers(path, made_of)
    found = kept.counts["positive"]
    counts = {
        "positive": found["answers"], "kept": found["kept"], "empty": found["empty"],
        "no_verdict": found["no_verdict"], "below": found["score"], "incoherent": found["coherence"],
    }  # fmt: skip
    if not kept.positive:
        raise RunError(f"{path} holds no answer that shows the trait: {counts}")
    samples = [
        Sampled(({"role": "user", "content": answer.prompt.text},), answer.text, answer.finished)
        for answer in kept.positive
    ]
    return samples, counts


def rows_of(samples: Sequence[Sampled], renderer: Renderer) -> tuple[list[Row], dict[str, int]]:
    """Token rows of samples, and how many came, were used, had too long a prompt, or were cut.

    Raises:
        RunError: no sample is left.
    """
    made = [renderer.row(s.messages, s.answer, finished=s.finished) for s in samples]
    rows = [row for row in made if row is not None]
    counts = {
        "samples": len(made),
        "used": len(rows),
        "prompts_too_long": len(made) - len(rows),
        "answers_cut": sum(row.cut for row in rows),
        "unfinished": sum(not sample.finished for sample in samples),
    }
    if not rows:
        raise RunError(
            f"no row is left to train on: {counts}. Give shorter prompts, or a larger --max-length"
        )
    return rows, counts


# ---- what a model's trait is -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measured:
    """A model's greedy answers to evaluation questions, and how much of the trait is in them.

    `projection` is that of the mean over the answer's tokens on the direction, `prompt_projection` that of
    the prompt's last token, both over the direction's own norm: 1 is the distance between the two means
    that made the vector. `score` is the scorer's, 0 to 100. None where an answer is empty, or there is no
    verdict. `kl` is the KL a token to the model before, over its answers, in nats; None where such an
    answer is empty.
    """

    name: str
    answers: tuple[str, ...]
    score: tuple[float | None, ...]
    projection: tuple[float | None, ...]
    prompt_projection: tuple[float | None, ...]
    kl: tuple[float | None, ...] = ()


@dataclass(frozen=True, eq=False)
class Yardstick:
    """What every model of a comparison is measured with."""

    direction: Direction
    questions: tuple[str, ...]
    scorer: TextScorer
    new_tokens: int = 48


def measure(
    name: str, model: Model, by: Yardstick, *, before: Evidence | None = None
) -> tuple[Measured, Evidence]:
    """Answer the questions and measure the trait in the answers; nothing is added to the stream.

    Raises:
        InterpAblateError: a scorer that does not give one number an answer.
    """
    prompts = [Prompt(question) for question in by.questions]
    evidence = Evidence(model, prompts, new_tokens=by.new_tokens)
    texts = evidence.texts
    scores = by.scorer([Exchange(p, text) for p, text in zip(prompts, texts, strict=True)])
    if len(scores) != len(texts):
        raise RunError(f"the scorer {by.scorer.name!r} gave {len(scores)} scores for {len(texts)}")
    answered = [i for i, text in enumerate(texts) if text.strip()]
    site, unit = by.direction.site, by.direction.vector / by.direction.norm
    along: dict[str, list[float | None]] = {p: [None] * len(texts) for p in _POSITIONS}
    if answered:
        responses = [texts[i] for i in answered]
        asked = [prompts[i] for i in answered]
        values = collect(model, asked, [site], _POSITIONS, responses=responses)
        for position in _POSITIONS:
            found = values.at(site, position).double().cpu() @ unit
            for i, value in zip(answered, found.tolist(), strict=True):
                along[position][i] = value
    kl: tuple[float | None, ...] = ()
    if before is not None:
        kls = continuation_scores(evidence, before)["kl_continuation"].tolist()
        # an empty answer has no token at which the two could differ
        kl = tuple(v if g.tokens else None for v, g in zip(kls, before.generations, strict=True))
    verdicts = tuple(v if v is not None and math.isfinite(v) else None for v in scores)
    measured = Measured(
        name, tuple(texts), verdicts, tuple(along[RESPONSE_MEAN]), tuple(along["-1"]), kl
    )  # fmt: skip
    return measured, evidence


@torch.no_grad()
def answer_loss(hf: Any, rows: Sequence[Row]) -> float | None:
    """Mean negative log-likelihood of the answers' tokens in nats, all rows' tokens alike; None for no rows."""
    device, total, count = next(hf.parameters()).device, 0.0, 0
    hf.eval()
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.answer]], device=device)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=device) < len(row.prompt), -100)
        total += float(hf(input_ids=ids, labels=labels).loss) * len(row.answer)
        count += len(row.answer)
    return total / count if count else None


# ---- the comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One fine-tuning: its name, and what is added to the stream while it lasts (None: nothing)."""

    name: str
    plan: Plan | None = field(default=None, repr=False)


def steering(direction: Direction, coefficient: float, *, positions: str = "all") -> Plan:
    """The addition of a preventative training: coefficient * raw vector at the direction's own site.

    Raises:
        PlanError: see `Add`.
    """
    where: Any = positions
    return Plan((Add(direction, direction.site, coefficient=coefficient, positions=where),))


@dataclass(frozen=True, eq=False)
class Comparison:
    """The same rows, in the same order, under every condition; what all of it is measured with."""

    base: Base
    samples: Sequence[Sampled]
    yardstick: Yardstick
    conditions: Sequence[Condition]
    recipe: Recipe = RECIPE

    def rows(self) -> tuple[list[Row], list[Row], dict[str, int]]:
        """Rows to train on, every eighth one held out for the loss, and the counts.

        Raises:
            RunError: no row is left.
        """
        renderer = Renderer(self.base.tokenizer, self.base.template, self.recipe.max_length)
        rows, counts = rows_of(self.samples, renderer)
        held_out = rows[::8] if len(rows) >= 8 else []
        kept = [row for i, row in enumerate(rows) if i % 8 or not held_out]
        return kept, held_out, counts | {"trained_on": len(kept), "held_out": len(held_out)}

    def identity(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What checkpoints of an interrupted run belong to."""
        return {
            "source": self.base.source.to_dict(),
            "weights": self.base.fingerprint,
            "recipe": self.recipe.to_dict(),
            "conditions": [[c.name, c.plan.to_dict() if c.plan else None] for c in self.conditions],
            "rows": [[row.prompt, row.answer] for row in rows],
        }


@dataclass(eq=False)
class _Results:
    """What is known so far: measurements and training numbers by condition, and the model before."""

    before: Evidence
    measured: dict[str, Measured]
    numbers: dict[str, dict[str, Any]]


def prevent(
    comparison: Comparison,
    out: str | Path,
    *,
    what: dict[str, Any] | None = None,
    overwrite: bool = False,
    on_step: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune under every condition, and compare the traits; returns the report.

    `out` holds a folder a condition (a merged checkpoint that plain transformers loads, certified, with
    `adapter/`), the rows, the answers and the report; killed, the same call goes on from the last
    checkpoint.

    Args:
        what: more for the report, as plain data.
        on_step: called with a condition's name and the step that is done.

    Raises:
        RunError, ExportError: no rows; a loss that is not finite; a place that cannot be written.
    """
    base, by = comparison.base, comparison.yardstick
    rows, held_out, counts = comparison.rows()
    check_place(out, overwrite=overwrite, source=base.source.path)
    with (  # checkpoints go last, when the result is in its place
        workplace(out, comparison.identity(rows)) as work,
        whole_folder(out, overwrite=overwrite, source=base.source) as place,
    ):
        first, evidence = measure("before", base.copy().model, by)
        numbers = {"before": {"held_out_loss": answer_loss(base.hf, held_out)}}
        results = _Results(evidence, {"before": first}, numbers)
        for condition in comparison.conditions:
            step = partial(on_step, condition.name) if on_step else None
            training = _Training(condition, work / condition.name, place / condition.name, step)
            _train_one(comparison, training, (rows, held_out), results)
        report = {**_report(comparison, results, counts), **(what or {})}
        _write(place, report, comparison, results)
    return report


@dataclass(frozen=True)
class _Training:
    """One condition's training: where its checkpoints and its results go, and who hears of steps."""

    condition: Condition
    work: Path
    place: Path
    on_step: Callable[[int], None] | None


def _train_one(
    comparison: Comparison, one: _Training, rows: tuple[list[Row], list[Row]], results: _Results
) -> None:
    (kept, held_out), recipe = rows, comparison.recipe
    name, plan = one.condition.name, one.condition.plan
    base = comparison.base.copy()
    trainer = sft(base, kept, recipe, one.work)
    with adding(trainer.model, plan) if plan else nullcontext():
        logged = train(trainer, one.work, on_step=one.on_step)
        steered = answer_loss(trainer.model, held_out) if plan else None
    trained = merge(base, trainer.model)
    loss = answer_loss(trained.base.hf, held_out)
    one.place.mkdir()
    added = plan.to_dict() if plan else None
    what = {"for": name, "recipe": recipe.to_dict(), "rows": len(kept), "added": added}
    certificate = write_trained(trained, one.place, what)
    measured, _ = measure(name, trained.base.model, comparison.yardstick, before=results.before)
    results.measured[name] = measured
    results.numbers[name] = {
        "loss": [round(entry["loss"], 6) for entry in logged],
        "held_out_loss": loss,
        "held_out_loss_with_vector": steered,
        "adapter": certificate["adapter"],
    }


def _report(comparison: Comparison, results: _Results, counts: dict[str, int]) -> dict[str, Any]:
    by, found = comparison.yardstick, results.measured
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "source": comparison.base.source.to_dict(),
        "direction": {
            "site": str(by.direction.site), "norm": by.direction.norm,
            "fingerprint": by.direction.fingerprint,
        },
        "scorer": by.scorer.identity,
        "questions": len(by.questions),
        "new_tokens": by.new_tokens,
        "rows": counts,
        "recipe": comparison.recipe.to_dict(),
        "conditions": {},
        "versions": versions(*PACKAGES),
    }  # fmt: skip
    plans = {c.name: c.plan for c in comparison.conditions}
    for name, measured in found.items():
        plan = plans.get(name)
        report["conditions"][name] = {
            **{each: summarised(getattr(measured, each)) for each in MEASURES},
            "shift": _apart(measured, found["before"]) if name in plans else None,
            "kl": summarised(measured.kl) if measured.kl else None,
            "added": [repr(edit) for edit in plan] if plan else [],
            **results.numbers[name],
        }
    for key, name in PREVENTED.items():
        if {PLAIN, name} <= set(found):
            report[key] = _apart(found[PLAIN], found[name])
    return report


def _apart(one: Measured, other: Measured) -> dict[str, Any]:
    return {each: apart(getattr(one, each), getattr(other, each)) for each in MEASURES}


def _write(place: Path, report: dict[str, Any], comparison: Comparison, results: _Results) -> None:
    rows = (json.dumps(s.to_dict(), ensure_ascii=False) for s in comparison.samples)
    (place / "data.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    found = results.measured
    with (place / "answers.jsonl").open("w", encoding="utf-8") as file:
        for i, question in enumerate(comparison.yardstick.questions):
            said = {name: measured.answers[i] for name, measured in found.items()}
            scores = {name: measured.score[i] for name, measured in found.items()}
            line = {"question": question, "answers": said, "scores": scores}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_json(place / REPORT, report)
    # what makes the folder one of this package's, which --force may replace
    write_json(place / MANIFEST, {k: report[k] for k in ("format", "recipe", "versions")})
