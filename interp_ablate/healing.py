"""Healing: an edited checkpoint trained on preferences (DPO) until it is close to the original again.

Knows: preferences from files and from two models' own answers, DPO over a LoRA that cannot undo the edit
(it sits on what reads the stream, or what it writes goes through the edit), what the edit cost and what is
left of the cost, the certificate, a configuration in axolotl's terms. Does not know: how a trainer works
(`training`), how the edit was found, other measures of a model (`evaluation`).

Sources: DPO, Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; recovery after such an edit by DPO,
Labonne 2024, https://huggingface.co/blog/mlabonne/abliteration; axolotl's keys,
https://docs.axolotl.ai/docs/config-reference.html and https://docs.axolotl.ai/docs/rlhf.html.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from interp_ablate.activations import collect
from interp_ablate.chat_data import Message, read_preferences
from interp_ablate.edits import Ablate, Clamp, Erase, Plan
from interp_ablate.errors import ExportError, PlanError, RunError
from interp_ablate.export.card import CERTIFICATE, MANIFEST, versions
from interp_ablate.export.checkpoint import whole_folder, write_json
from interp_ablate.export.tensor_copy import check_place
from interp_ablate.export.tensor_files import Checkpoint
from interp_ablate.expressions import ExpressionScorer
from interp_ablate.model import Model
from interp_ablate.prompts import ContrastSet, Prompt, normalised
from interp_ablate.scores import Evidence, continuation_scores, kl_divergence, repetition
from interp_ablate.sites import sites_of
from interp_ablate.training import (
    PACKAGES,
    RECIPE,
    Base,
    Recipe,
    Renderer,
    Row,
    Trained,
    Where,
    apart,
    common_arguments,
    lora_config,
    make_trainer,
    merge,
    quiet,
    require_extra,
    summarised,
    train,
    workplace,
    write_trained,
)
from interp_ablate.weights import WeightPlan, weight_plan

log = logging.getLogger(__name__)

Keep = Literal["readers", "projected", "free"]
REPORT, PREFERENCES, AXOLOTL = "heal.json", "preferences.jsonl", "axolotl.yaml"
REPORT_FORMAT = "interp_ablate.heal/1"
_WHERE: dict[str, Where] = {"readers": "readers", "projected": "all", "free": "all"}


@dataclass(frozen=True)
class Healing:
    """How preferences are learned, and how the edit is kept.

    Args:
        keep: "readers" trains only what reads the residual stream (queries, keys, values, gate and up
            projections): every tensor that the edit changed stays as it is, bit for bit. "projected" trains
            all linear layers, and at the end what the adapter writes to the stream goes through the edit,
            as if the original had been trained and edited then. "free" trains all and keeps nothing.
        beta: DPO's; the smaller, the further from the edited model. With the original's answers preferred
            to the edited model's, 1 is the value at which the loss is least for the original itself.
        sft_weight: of TRL's `sft` loss on the chosen answers, beside DPO's.
        kl_weight: of the KL a token (nats) to the original over the chosen answers; needs the original.

    Raises:
        RunError: a number that cannot be.
    """

    keep: Keep = "readers"
    beta: float = 0.1
    sft_weight: float = 0.0
    kl_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.keep not in get_args(Keep):
            raise RunError(f"keep={self.keep!r}: accepted are {', '.join(get_args(Keep))}")
        if not self.beta > 0 or self.sft_weight < 0 or self.kl_weight < 0:
            raise RunError(
                "beta is above 0, the weights of other losses from 0; got "
                f"{self.beta}, {self.sft_weight} and {self.kl_weight}"
            )


# For the original's answers against the edited model's: little preference, much KL (measured; docs/recovery.md).
OWN_ANSWERS: dict[str, Any] = {"beta": 0.1, "kl_weight": 10.0}


# ---- preferences -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """An answer, and whether it ended by itself (a limit of tokens cut it where not)."""

    text: str
    finished: bool = True


@dataclass(frozen=True)
class Pair:
    """A conversation open for an answer, the answer to prefer and the one not to."""

    messages: tuple[dict[str, str], ...]
    chosen: Said
    rejected: Said

    def to_dict(self) -> dict[str, Any]:
        """A row as TRL, axolotl (`chat_template.default`) and `read_pairs` take it."""

        def answer(said: Said) -> list[dict[str, str]]:
            return [{"role": "assistant", "content": said.text}]

        return {
            "prompt": list(self.messages),
            "chosen": answer(self.chosen),
            "rejected": answer(self.rejected),
            "finished": {"chosen": self.chosen.finished, "rejected": self.rejected.finished},
        }


def read_pairs(path: str | Path) -> list[Pair]:
    """The preferences of a file, each with one chosen and one rejected answer.

    Raises:
        ChatError: a file or row that cannot be used, with its line; two answers that say the same.
        RunError: an answer of several messages, with its row; no preferences at all.
    """
    found = []
    for row in read_preferences(path):
        sides = [_one_answer(side, path, row.number) for side in (row.chosen, row.rejected)]
        ended = row.raw.get("finished")
        ended = ended if isinstance(ended, Mapping) else {}
        messages = tuple({"role": m.role, "content": m.content} for m in row.prompt)
        chosen, rejected = (
            Said(text, bool(ended.get(name, True)))
            for name, text in zip(("chosen", "rejected"), sides)
        )
        found.append(Pair(messages, chosen, rejected))
    if not found:
        raise RunError(f"{path} holds no preference")
    return found


def _one_answer(side: Sequence[Message], path: str | Path, number: int) -> str:
    if len(side) != 1 or side[0].role != "assistant":
        raise RunError(
            f"{path}, row {number}: chosen and rejected are one answer of the assistant each; here one "
            f"is {', '.join(m.role for m in side)}. Put what comes before into the prompt"
        )
    return side[0].content


@dataclass(frozen=True)
class Answering:
    """How both models answer where their answers become preferences: sampled, `samples` a prompt.

    What is sampled depends on every one of these, `batch_size` too: prompts that are answered together.
    """

    new_tokens: int = 40
    samples: int = 1
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 32


def make_pairs(
    original: Model, edited: Model, prompts: Sequence[Prompt], how: Answering
) -> tuple[list[Pair], dict[str, int]]:
    """The original's answers preferred to the edited model's, and how many were of no use.

    Answers are sampled: samples of the original are what its KL is about, greedy answers are not. Two equal
    answers teach nothing and are left out, and so are blank ones.

    Raises:
        RunError: no pair is left.
    """
    asked = [prompt for prompt in prompts for _ in range(how.samples)]
    sides = [
        model.generate(
            asked,
            max_new_tokens=how.new_tokens,
            temperature=how.temperature,
            seed=how.seed,
            batch_size=how.batch_size,
        )
        for model in (original, edited)
    ]
    counts = {"answers": len(asked), "same": 0, "blank": 0, "used": 0}
    pairs = []
    for prompt, chosen, rejected in zip(asked, *sides, strict=True):
        if not chosen.text.strip() or not rejected.text.strip():
            counts["blank"] += 1
        elif chosen.text == rejected.text:
            counts["same"] += 1
        else:
            system = (
                () if prompt.system is None else ({"role": "system", "content": prompt.system},)
            )
            messages = (*system, {"role": "user", "content": prompt.text})
            said = (Said(g.text, g.finished) for g in (chosen, rejected))
            pairs.append(Pair(messages, *said))
    counts["used"] = len(pairs)
    if not pairs:
        raise RunError(
            f"the two models answer alike ({counts}): there is nothing to heal, or both are one model"
        )
    return pairs, counts


def without(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    """The prompts that are not among the held-out ones, and how many were."""
    gone = {normalised(prompt) for prompt in held_out}
    kept = [prompt for prompt in prompts if normalised(prompt) not in gone]
    if not kept:
        raise RunError("every prompt for preferences is held out for the report: give others")
    return kept, len(prompts) - len(kept)


def pair_rows(
    pairs: Sequence[Pair], renderer: Renderer
) -> tuple[list[tuple[Row, Row]], dict[str, int]]:
    """Tokens of both answers of every pair, and how many prompts were too long and answers cut.

    Raises:
        RunError: no pair is left.
    """
    rows, counts = [], {"pairs": len(pairs), "used": 0, "prompts_too_long": 0, "answers_cut": 0}
    for pair in pairs:
        both = [
            renderer.row(pair.messages, said.text, finished=said.finished)
            for said in (pair.chosen, pair.rejected)
        ]
        if both[0] is None or both[1] is None:
            counts["prompts_too_long"] += 1
            continue
        counts["answers_cut"] += both[0].cut + both[1].cut
        rows.append((both[0], both[1]))
    counts["used"] = len(rows)
    if not rows:
        raise RunError(
            f"no preference is left to train on: {counts}. Give a larger --max-length, or shorter prompts"
        )
    return rows, counts


# ---- the case --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """An edited checkpoint, the original it came from (where it is known), and the edit."""

    edited: Base
    original: Base | None = None
    plan: Plan | None = None

    @cached_property
    def edited_model(self) -> Model:
        """The edited model to ask and measure; the one that is trained stays as it is."""
        return self.edited.copy().model

    @cached_property
    def original_model(self) -> Model:
        """The original to ask and measure.

        Raises:
            RunError: it was not given.
        """
        if self.original is None:
            raise RunError("the original model is needed here: give --original MODEL")
        return self.original.copy().model

    @cached_property
    def weights(self) -> WeightPlan:
        """The edit, tensor by tensor.

        Raises:
            RunError: the checkpoint's manifest holds no plan.
            ExportError: see `weight_plan`.
        """
        if self.plan is None or not len(self.plan):
            raise RunError(
                "the checkpoint has no manifest with a plan, so what the edit is cannot be known: "
                "--keep readers or free"
            )
        state = self.edited.hf.state_dict()
        return weight_plan(
            self.plan, self.edited.hf.config, list(state), state.__getitem__, tied="untie"
        )


def read_plan(folder: str | Path) -> tuple[Plan | None, dict[str, Any]]:
    """The plan of an exported checkpoint and what its manifest says of its source; None without one.

    Raises:
        RunError: a manifest that cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None, {}
    try:
        manifest = json.loads(path.read_text())
        if manifest.get("kind") != "checkpoint":
            raise RunError(
                f"{path} is of a {manifest.get('kind')}; an exported checkpoint is healed"
            )
        plan = Plan.from_dict(manifest["plan"])
        source = dict(manifest["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"cannot read {path}: {error}. Export the checkpoint again") from error
    return (plan if len(plan) else None), source


# ---- training --------------------------------------------------------------------------------------


def dpo(
    case: Case,
    rows: Sequence[tuple[Row, Row]],
    work: Path,
    *,
    healing: Healing = Healing(),
    recipe: Recipe = RECIPE,
) -> Any:
    """TRL's DPOTrainer with a fresh adapter over the edited model; its reference is the model without it.

    Raises:
        RunError: TRL or PEFT is missing; a KL term without the original.
    """
    from datasets import Dataset

    _, trl = require_extra()
    if healing.kl_weight and case.original is None:
        raise RunError("--kl-weight needs the original model: give --original MODEL")
    data = Dataset.from_dict(
        {
            "prompt_ids": [list(chosen.prompt) for chosen, _ in rows],
            "chosen_ids": [list(chosen.answer) for chosen, _ in rows],
            "rejected_ids": [list(rejected.answer) for _, rejected in rows],
        }
    )
    losses = ["sigmoid", "sft"] if healing.sft_weight else ["sigmoid"]
    settings = {
        **common_arguments(case.edited, recipe, work),
        "beta": healing.beta,
        "loss_type": losses,
        "loss_weights": [1.0, healing.sft_weight][: len(losses)],
    }
    kind = quiet(trl.DPOTrainer)
    if healing.kl_weight and case.original is not None:
        kind = _with_kl(kind, case.original.hf, healing.kl_weight)
    return make_trainer(
        kind,
        trl.DPOConfig,
        case.edited,
        settings=settings,
        train_dataset=data,
        peft_config=lora_config(case.edited.hf, recipe, where=_WHERE[healing.keep]),
    )


def _with_kl(kind: Any, original: Any, weight: float) -> Any:
    """The trainer with weight * KL(original || model), a token of the chosen answers, in its loss."""

    class WithKL(kind):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any
        ) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, **rest)
            return loss + weight * _kl_to(original, model, inputs)

    return WithKL


def _kl_to(original: Any, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean KL(original || model) over the tokens of the chosen answers, with a gradient for the model."""
    chosen = len(inputs["input_ids"]) // 2  # chosen rows come first
    width = int(inputs["attention_mask"][:chosen].sum(1).max())
    given = {name: inputs[name][:chosen, :width] for name in ("input_ids", "attention_mask")}
    places = inputs["completion_mask"][:chosen, 1:width].bool()
    with torch.no_grad():
        want = original(**given, use_cache=False).logits[:, :-1][places].float().log_softmax(-1)
    got = model(**given, use_cache=False).logits[:, :-1][places].float().log_softmax(-1)
    return (want.exp() * (want - got)).sum(-1).mean()


@torch.no_grad()
def project(peft_model: Any, weights: WeightPlan) -> int:
    """Put what an adapter writes to the stream through the edit, in place; how many modules it was.

    With W = M W0 the edited weight of a writer and B A its adapter, B becomes M B: the merged weight is
    M (W0 + B A), the edit of the trained original.

    Raises:
        PlanError: a norm-preserving edit, which is no linear map of the weight.
    """
    kept = [name for name, edit in weights.edits.items() if edit.keeps_norm]
    if kept:
        raise PlanError(
            f"{kept[0]} was edited with its norms preserved, which is no linear map: --keep readers"
        )
    changed = 0
    parameters = dict(peft_model.named_parameters())
    for name, edit in weights.edits.items():
        module = name.rpartition(".")[0]
        found = parameters.get(f"base_model.model.{module}.lora_B.default.weight")
        if found is None or edit.layout not in ("linear", "conv1d"):
            continue
        wide = found.detach().double().cpu()
        found.copy_(edit.affine.linear(wide.T).T.to(found))
        changed += 1
    return changed


# ---- what the edit cost ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Prompts that neither made the edit nor the preferences: requests and answerable ones."""

    requests: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
    expression: ExpressionScorer
    new_tokens: int = 32
    source: str = ""

    @classmethod
    def of(
        cls,
        contrast: ContrastSet,
        expression: ExpressionScorer,
        *,
        n_test: int = 32,
        seed: int = 0,
    ) -> HeldOut:
        """The test part of a contrast set's split: positive prompts as requests, negative ones as benign.

        `seed` is the split's: that of the run that made the edit, whose test part made nothing of it.

        Raises:
            PromptError: too few prompts.
        """
        test = contrast.split(1, 1, n_test, seed=seed).test
        return cls(test.positive, test.negative, expression, source=test.source)


def costs(
    model: Model, by: HeldOut, baseline: Evidence | None = None
) -> tuple[dict[str, list[float | None]], Evidence]:
    """What a model does on held-out prompts, a value a prompt; the KL is to the baseline's model, in nats.

    `behaviour` and `behaviour_benign`: 1 where the answer expresses the behaviour. `kl_first_token`, and
    `kl_continuation`: a token, over the baseline's own greedy answers, None where such an answer is empty.
    `repetition`: of benign answers.
    """
    requests = Evidence(model, by.requests, new_tokens=by.new_tokens)
    benign = Evidence(model, by.benign, new_tokens=by.new_tokens)
    found: dict[str, list[float | None]] = {
        "behaviour": by.expression.score_texts(requests.texts).tolist(),
        "behaviour_benign": by.expression.score_texts(benign.texts).tolist(),
        "repetition": [repetition(g.tokens) for g in benign.generations],
    }
    if baseline is not None:
        first = kl_divergence(baseline.first_logprobs, benign.first_logprobs)
        found["kl_first_token"] = first.tolist()
        along = continuation_scores(benign, baseline)["kl_continuation"].tolist()
        # an empty answer has no token at which the two could differ
        found["kl_continuation"] = [
            v if g.tokens else None for v, g in zip(along, baseline.generations, strict=True)
        ]
    return found, benign


def along_plan(model: Model, plan: Plan, prompts: Sequence[Prompt]) -> dict[str, float]:
    """How much of the stream lies along what a plan removes: |x . v| / |x| at the last prompt token.

    v is what an ablation, clamp or erasure reads. The mean over prompts at resid_post of every layer, and of
    these the mean and the largest; empty for a plan that only adds.
    """
    reads = [edit.vectors[-1:] if isinstance(edit, Erase) else edit.vectors for edit in plan
             if isinstance(edit, (Ablate, Clamp, Erase))]  # fmt: skip
    if not reads:
        return {}
    vectors = torch.cat(reads)
    vectors = torch.unique(vectors / vectors.norm(dim=1, keepdim=True), dim=0)
    sites = sites_of(("resid_post",), range(model.n_layers))
    values = collect(model, list(prompts), sites, (-1,)).values[:, 0].double().cpu()
    share = (values @ vectors.T).norm(dim=-1) / values.norm(dim=-1).clamp(min=1e-30)
    by_layer = share.mean(0)
    return {"mean": float(by_layer.mean()), "largest": float(by_layer.max())}


_RATES = ("behaviour", "behaviour_benign")


def _measured(found: Mapping[str, list[float | None]]) -> dict[str, Any]:
    return {name: summarised(v, proportion=name in _RATES) for name, v in found.items()}


# ---- all of it -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Treatment:
    """What is learned and how: preferences, settings, numbers; what is measured before and after.

    `qlora`: the configuration for axolotl loads the checkpoint in 4 bits (the training here never does).
    """

    pairs: Sequence[Pair]
    healing: Healing = Healing()
    recipe: Recipe = RECIPE
    held_out: HeldOut | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    qlora: bool = False


def heal(
    case: Case,
    treatment: Treatment,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train an adapter on preferences over an edited checkpoint, merge it, certify it, measure it.

    `out` is a checkpoint that plain transformers loads, with `adapter/`, the preferences, a configuration for
    axolotl, the certificate, the card and the report; it is whole or not there. Killed, the same call goes on
    from the last checkpoint. `case.edited` is the merged model afterwards.

    Returns the report.

    Raises:
        RunError, ExportError, PlanError: nothing to train on; a loss that is not finite; tensors of the edit
            that changed although they must not; a certificate that fails. Nothing is left at `out` then.
    """
    renderer = Renderer(case.edited.tokenizer, case.edited.template, treatment.recipe.max_length)
    rows, counts = pair_rows(treatment.pairs, renderer)
    # read before the training: afterwards the model in memory is another one
    weights = case.weights if case.plan or treatment.healing.keep == "projected" else None
    settings = _settings(case, treatment)
    check_place(out, overwrite=overwrite, source=case.edited.source.path)
    with (  # checkpoints go last, when the result is in its place
        workplace(out, _identity(case, settings, rows)) as work,
        whole_folder(out, overwrite=overwrite, source=case.edited.source) as place,
    ):
        before = _before(case, treatment.held_out)
        learned = _learn(case, treatment, rows, work, on_step)
        plan = case.plan.to_dict() if case.plan else None
        what = {"for": "recovery", **settings, "plan_of_source": plan}
        certificate = write_trained(learned.trained, place, what)
        kept = edit_kept(case.edited, weights, place, must=treatment.healing.keep == "readers")
        report = {
            "format": REPORT_FORMAT,
            **settings,
            "preferences": {**counts, **treatment.details},
            "steps": [_step(entry) for entry in learned.logged],
            "edit": {**kept, "modules_projected": learned.projected},
            "adapter": certificate["adapter"],
            **_after(case, learned.trained.base.model, treatment.held_out, before),
            "versions": versions(*PACKAGES),
        }
        _write(place, report, treatment, case, certificate)
    return report


def _settings(case: Case, treatment: Treatment) -> dict[str, Any]:
    return {
        "source": case.edited.source.to_dict(),
        "original": case.original.source.to_dict() if case.original else None,
        "healing": asdict(treatment.healing),
        "recipe": treatment.recipe.to_dict(),
    }


def _identity(
    case: Case, settings: Mapping[str, Any], rows: Sequence[tuple[Row, Row]]
) -> dict[str, Any]:
    """What checkpoints of an interrupted run belong to; weights may change under the same name."""
    return {
        **settings,
        "weights": [base.fingerprint for base in (case.edited, case.original) if base],
        "rows": [[a.prompt, a.answer, b.answer] for a, b in rows],
    }


@dataclass(frozen=True, eq=False)
class _Learned:
    """A merged model, what its training logged, and how many modules were put through the edit."""

    trained: Trained
    logged: list[dict[str, float]]
    projected: int


def _learn(
    case: Case,
    treatment: Treatment,
    rows: Sequence[tuple[Row, Row]],
    work: Path,
    on_step: Callable[[int], None] | None,
) -> _Learned:
    healing = treatment.healing
    weights = case.weights if healing.keep == "projected" else None
    trainer = dpo(case, rows, work, healing=healing, recipe=treatment.recipe)
    logged = train(trainer, work, on_step=on_step)
    projected = project(trainer.model, weights) if weights is not None else 0
    return _Learned(merge(case.edited, trainer.model), logged, projected)


@dataclass(eq=False)
class _Before:
    found: dict[str, dict[str, Any]]
    raw: dict[str, dict[str, list[float | None]]]
    baseline: Evidence | None = None


def _before(case: Case, by: HeldOut | None) -> _Before:
    """The original's and the edited model's numbers."""
    before = _Before({}, {})
    if by is None:
        return before
    if case.original is not None:
        before.raw["original"], before.baseline = costs(case.original_model, by)
    before.raw["edited"], _ = costs(case.edited_model, by, before.baseline)
    for name, values in before.raw.items():
        model = case.original_model if name == "original" else case.edited_model
        before.found[name] = _measured(values)
        if case.plan is not None:
            before.found[name]["along_plan"] = along_plan(model, case.plan, by.requests)
    return before


def _after(case: Case, healed: Model, by: HeldOut | None, before: _Before) -> dict[str, Any]:
    """What was measured of all three, and how far healed is from edited, prompt by prompt."""
    if by is None:
        return {"measured": None}
    raw, _ = costs(healed, by, before.baseline)
    found = {**before.found, "healed": _measured(raw)}
    if case.plan is not None:
        found["healed"]["along_plan"] = along_plan(healed, case.plan, by.requests)
    edited = before.raw["edited"]
    changes = {name: apart(values, edited[name]) for name, values in raw.items()}
    told = {"source": by.source, "new_tokens": by.new_tokens, "expressions": by.expression.identity}
    return {"measured": found, "healed_minus_edited": changes, "held_out": told}


def _step(entry: Mapping[str, Any]) -> dict[str, float]:
    names = ("step", "loss", "rewards/accuracies", "rewards/margins")
    return {name: round(float(entry[name]), 6) for name in names if name in entry}


def edit_kept(
    edited: Base, weights: WeightPlan | None, folder: str | Path, *, must: bool
) -> dict[str, Any]:
    """How many of the tensors that the edit changed are the same bytes after the training.

    Raises:
        ExportError: `must`, and one is not.
    """
    origin = Path(edited.source.path or "")
    if weights is None or edited.source.kind != "folder":
        return {"tensors": None, "unchanged": None}
    before, after = Checkpoint.open(origin), Checkpoint.open(folder)
    names = [name for name in weights.edits if name in before.tensors]
    changed = [n for n in names if not torch.equal(before.read(n), after.read(n))]
    if changed and must:
        raise ExportError(
            f"{len(changed)} tensors of the edit changed in training, such as {changed[0]}: this is a "
            "fault of this package; nothing was left on disk"
        )
    return {"tensors": len(names), "unchanged": len(names) - len(changed)}


# ---- what is written -------------------------------------------------------------------------------


def axolotl_config(
    base_model: str, treatment: Treatment, *, targets: Sequence[str]
) -> dict[str, Any]:
    """The same training in axolotl's terms, for several GPUs.

    A KL term has no key there; `projected` is done by `interp-ablate` after the training only.
    """
    healing, recipe = treatment.healing, treatment.recipe
    config: dict[str, Any] = {
        "base_model": base_model,
        "model_type": "AutoModelForCausalLM",
        "tokenizer_type": "AutoTokenizer",
        "rl": "dpo",
        "rl_beta": healing.beta,
        "chat_template": "tokenizer_default",
        "datasets": [
            {
                "path": PREFERENCES,
                "ds_type": "json",
                "split": "train",
                "type": "chat_template.default",
                "field_messages": "prompt",
            }
        ],
        "val_set_size": 0.0,
        **_axolotl_lora(recipe, targets, treatment.qlora),
        "sequence_len": recipe.max_length,
        "sample_packing": False,
        "micro_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": recipe.steps,
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "learning_rate": recipe.learning_rate,
        "warmup_steps": max(1, recipe.steps // 10),
        "weight_decay": 0.0,
        "bf16": "auto",
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "seed": recipe.seed,
        "output_dir": "./axolotl-out",
    }
    if healing.sft_weight:
        config["dpo_loss_type"] = ["sigmoid", "sft"]
        config["dpo_loss_weights"] = [1.0, healing.sft_weight]
    return config


def _axolotl_lora(recipe: Recipe, targets: Sequence[str], quantized: bool) -> dict[str, Any]:
    return {
        "adapter": "qlora" if quantized else "lora",
        "load_in_4bit": quantized,
        "load_in_8bit": False,
        "lora_r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(targets),
        "peft_use_rslora": recipe.rslora,
    }


def _axolotl_text(config: Mapping[str, Any], healing: Healing) -> str:
    import yaml

    lines = [
        "# The recovery of this checkpoint in axolotl's terms, for several GPUs:",
        "#     cd into this folder; axolotl train axolotl.yaml",
        "# base_model is the edited checkpoint; max_steps and the learning rate are those of this folder's",
        "# own small training: for a large model raise the one and lower the other (5e-6 is usual for DPO).",
        "# Answers that a limit of new tokens cut are whole answers to axolotl: make them longer there.",
    ]
    if healing.kl_weight:
        lines.append("# The KL term of the training here has no key in axolotl.")
    if healing.keep == "projected":
        lines.append(
            "# lora_target_modules has writers of the edit too: the edit is not kept by axolotl."
        )
    return "\n".join(lines) + "\n" + yaml.safe_dump(dict(config), sort_keys=False)


def _write(
    place: Path,
    report: Mapping[str, Any],
    treatment: Treatment,
    case: Case,
    certificate: Mapping[str, Any],
) -> None:
    rows = (json.dumps(pair.to_dict(), ensure_ascii=False) for pair in treatment.pairs)
    (place / PREFERENCES).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    adapter = json.loads((place / "adapter" / "adapter_config.json").read_text())
    config = axolotl_config(
        case.edited.source.path or case.edited.source.name,
        treatment,
        targets=sorted(adapter["target_modules"]),
    )
    (place / AXOLOTL).write_text(_axolotl_text(config, treatment.healing), encoding="utf-8")
    write_json(place / REPORT, report)
    write_json(place / CERTIFICATE, certificate)
    card = (place / "README.md").read_text(encoding="utf-8")
    (place / "README.md").write_text(f"{card}\n{_card(report)}", encoding="utf-8")


def _card(report: Mapping[str, Any]) -> str:
    """What the model card says of the recovery."""
    healing, recipe = report["healing"], report["recipe"]
    keeping = {
        "readers": "the adapter sat on what reads the residual stream: the edit's tensors are unchanged",
        "projected": "what the adapter wrote to the residual stream went through the edit at the end",
        "free": "nothing kept the adapter from undoing the edit",
    }[healing["keep"]]
    lines = [
        "## Recovery after the edit",
        "",
        f"Trained on {report['preferences']['used']} preferences with TRL's DPOTrainer and a LoRA of rank "
        f"{recipe['rank']}, {recipe['steps']} steps of {recipe['batch_size']}, beta {healing['beta']}, "
        f"weights of SFT {healing['sft_weight']} and KL {healing['kl_weight']}; {keeping}. "
        "The edit itself is that of the checkpoint this one came from.",
    ]
    if report["measured"]:
        names = list(report["measured"])
        lines += ["", "| held-out prompts | " + " | ".join(names) + " |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for row in ("behaviour", "behaviour_benign", "kl_first_token", "kl_continuation"):
            cells = [_cell(report["measured"][name].get(row)) for name in names]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    if value["mean"] is None:
        return "no value"
    low, high = value["interval"]
    return f"{value['mean']:.3g} ({low:.3g} to {high:.3g})"
