"""The certificate of a checkpoint: logits, KL and projections against the hooked model, with limits by dtype.

Knows: how the two are compared, and the limits. Does not know: how the export was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.edits.affine import Affine
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.evaluation.metrics import kl_divergence
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.models.sources import ModelSource, read_hf_config
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.sites import Site, sites_of
from interp_ablate.storage.safetensors_reader import Checkpoint
from interp_ablate.weights.plan_to_weights import WeightPlan

# dtype of the stored weights -> (max |logit difference|, max KL in nats, max projection difference
# as a share of the stream's norm). Half precision rounds every edited weight once: the limits say so.
LIMITS: dict[str, tuple[float, float, float]] = {
    "float64": (1e-3, 1e-6, 1e-5),
    "float32": (1e-3, 1e-6, 1e-5),
    "bfloat16": (1.0, 5e-2, 2e-2),
    "float16": (0.2, 5e-3, 5e-3),
}
# The default prompts: the comparison needs ordinary text, not a particular task.
PROBES = (
    "Hello, how are you today?",
    "Write two sentences about the sea.",
    "What is the sum of seven and five?",
    "Name three animals that live in a forest.",
    "Please book a table for four people tonight.",
    "Translate 'good morning' into Spanish.",
    "Why do leaves change colour in autumn?",
    "What time is it where I am?",
)


def plan_vectors(plan: Plan) -> Float[Tensor, "k d_model"]:
    """Unit vectors of everything a plan edits along."""
    if not len(plan):
        return torch.zeros(0, 0, dtype=torch.float64)
    vectors = torch.cat([edit.vectors for edit in plan])
    return torch.unique(vectors / vectors.norm(dim=1, keepdim=True), dim=0)


def _read(vectors: Tensor) -> Any:
    """A capture of projections on the vectors, and of the norm, at every position: [batch, pos, k + 1]."""

    def read(x: Tensor, batch: Any) -> Tensor:
        wide = x.double()
        along = wide @ vectors.T.to(wide) if len(vectors) else wide[..., :0]
        return torch.cat([along, wide.norm(dim=-1, keepdim=True)], -1)

    return read


def _observed_sites(plan: Plan, model: Model) -> list[Site]:
    """Every residual site; resid_post is read as the next resid_pre where the plan writes it there."""
    written = set(plan.sites)
    return [
        site
        for site in sites_of(model.residual_points, range(model.n_layers))
        if site.point != "resid_post" or Site(site.layer + 1, "resid_pre") not in written
    ]


def _largest(*values: float | Tensor) -> float:
    """The maximum, or NaN if there is one (Python's max forgets it); 0 for no values."""
    flat = [torch.as_tensor(value, dtype=torch.float64).flatten().cpu() for value in values]
    return float(torch.cat([*flat, torch.zeros(1, dtype=torch.float64)]).max())


def _observe(
    model: Model, rows: Sequence[Sequence[int]], vectors: Tensor, sites: Sequence[Site]
) -> list[tuple[Tensor, dict[Site, Tensor]]]:
    """Logits and projections at every position of each row, a row at a time: no padding, no sharing."""
    capture = dict.fromkeys(sites, _read(vectors))
    observed = []
    for row in rows:
        stream = model.stream([row], keep=len(row), capture=capture, batch_size=1)
        for _, logits, captured in stream:
            assert logits is not None
            observed.append((logits[0].float(), {s: x[0] for s, x in captured.items()}))
    return observed


def hooked_logits(model: Model, plan: Plan, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [pos, d_vocab] of each row under a plan as hooks, float32."""
    with model.applied(plan):
        return [model.logits([row], keep=len(row))[0].float() for row in rows]


@torch.no_grad()
def plain_logits(hf: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [pos, d_vocab] of each row in plain transformers (or PEFT), float32."""
    device = next(hf.parameters()).device
    return [hf(input_ids=torch.tensor([row], device=device)).logits[0].float() for row in rows]


def logit_distance(
    some: Sequence[Tensor], others: Sequence[Tensor], prefix: str = ""
) -> dict[str, float]:
    """The largest difference of two sets of logits, and the largest KL at any position; NaN if there is one."""
    gaps, kls = [], []
    for one, other in zip(some, others, strict=True):
        gaps.append((one - other).abs().max())
        kls.append(kl_divergence(one.double().log_softmax(-1), other.double().log_softmax(-1)))
    return {f"{prefix}max_abs_logit_difference": _largest(*gaps), f"{prefix}kl": _largest(*kls)}


def compare(
    model: Model,
    plan: Plan,
    other: Model,
    prompts: Sequence[PromptLike] = PROBES,
    *,
    unembed_map: Affine | None = None,
) -> dict[str, Any]:
    """The distance of `other` (without hooks) from `model` under `plan`, in numbers.

    Every position of every prompt counts. `residual_along_direction` is the largest difference of the
    two projections on the plan's vectors at any residual site, as a share of the stream's norm there.
    With `unembed_map` (an edited embedding that stays tied) the model's unembedding reads through it.
    """
    rows = model.encode_all(prompts)
    vectors, sites = plan_vectors(plan), _observed_sites(plan, model)
    with model.applied(plan), model.plans.unembedding_through(unembed_map):
        want = _observe(model, rows, vectors, sites)
    got = _observe(other, rows, vectors, sites)
    plain = _observe(model, rows, vectors, sites)
    apart = left = 0.0
    worst = ""
    for (_, want_sites), (_, got_sites) in zip(want, got):
        for site, hooked in want_sites.items():
            norm = hooked[:, -1:].clamp(min=1e-30)
            gap = _largest((hooked - got_sites[site])[:, :-1].abs() / norm)
            left = _largest(left, got_sites[site][:, :-1].abs() / norm)
            worst = worst if gap < apart else str(site)
            apart = _largest(apart, gap)
    hooked_logits, other_logits, plain_logits = (
        [logits for logits, _ in observed] for observed in (want, got, plain)
    )
    return {
        **logit_distance(hooked_logits, other_logits),
        "residual_along_direction": apart,
        "worst_site": worst,
        "largest_projection_left": left,
        "max_abs_logit_effect_of_plan": _largest(
            *((one - other).abs().max() for one, other in zip(hooked_logits, plain_logits))
        ),
        "prompts": len(rows),
        "positions": sum(map(len, rows)),
    }


def certify(
    model: Model,
    plan: Plan,
    folder: str | Path,
    *,
    prompts: Sequence[PromptLike] = PROBES,
    stored_dtype: str | None = None,
    unembed_map: Affine | None = None,
) -> dict[str, Any]:
    """Reload a folder in plain transformers and compare it with the model under the plan.

    Args:
        stored_dtype: the dtype of the folder's weights; the limits follow it. Default: the model's.
        unembed_map: what an edited embedding that stays tied does to the unembedding; the certificate
            then holds its cost, `cost_of_accept`: how far that is from the plan itself.

    Returns the certificate: the numbers of `compare`, the limits, and whether all hold.

    Raises:
        ExportError: a folder transformers cannot load with no option.
    """
    from transformers import AutoModelForCausalLM

    dtype = stored_dtype or str(model.dtype).removeprefix("torch.")
    try:
        # As a user would, with no option; then in the dtype that the hooked model runs in.
        reloaded: Any = AutoModelForCausalLM.from_pretrained(folder)
        reloaded = reloaded.to(model.device, model.dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"transformers cannot load the export {folder}: {error}") from error
    rows = model.encode_all(prompts)
    reloaded.eval()
    bare = plain_logits(reloaded, rows)
    other = from_hf(
        reloaded, model.tokenizer, source=ModelSource(str(folder), "folder", str(folder))
    )
    numbers = compare(model, plan, other, rows, unembed_map=unembed_map)
    # `compare` runs the export with hook points in it; this holds plain transformers to the same limit.
    with model.plans.unembedding_through(unembed_map):
        want = hooked_logits(model, plan, rows)
    gaps = [(one - other).abs().max() for one, other in zip(want, bare)]
    numbers["max_abs_logit_difference"] = _largest(numbers["max_abs_logit_difference"], *gaps)
    names = ("max_abs_logit_difference", "kl", "residual_along_direction")
    limits = dict(zip(names, LIMITS[dtype]))
    if unembed_map is not None:
        numbers["cost_of_accept"] = logit_distance(hooked_logits(model, plan, rows), want)
    failed = [name for name in names if not numbers[name] <= limits[name]]
    return {**numbers, "limits": limits, "dtype": dtype, "failed": failed, "passed": not failed}


def coarsest_dtype(checkpoint: Checkpoint, weights: WeightPlan) -> str:
    """The dtype that decides the limits: the coarsest of the edited tensors and of the config's own."""
    names = [name for name in weights.edits if name in checkpoint.tensors] or checkpoint.tensors
    dtypes = [checkpoint.describe(name)[0] for name in names]
    config = read_hf_config(checkpoint.folder)
    dtypes += [getattr(config, "dtype", None) or torch.float64]
    limited = [d for d in dtypes if str(d).removeprefix("torch.") in LIMITS]
    return str(max(limited, key=lambda d: torch.finfo(d).eps)).removeprefix("torch.")


def require_passed(certificate: dict[str, Any], what: str) -> None:
    """Raise for an artefact that is not the hooked model.

    Raises:
        ExportError: names every number beyond its limit.
    """
    if not certificate["passed"]:
        beyond = "; ".join(
            f"{name} {certificate[name]:.3g} (limit {certificate['limits'][name]:.3g})"
            for name in certificate["failed"]
        )
        raise ExportError(f"the {what} is not the hooked model: {beyond}. Nothing was left on disk")
