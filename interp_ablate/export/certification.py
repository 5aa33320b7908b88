"""Verify: is an exported checkpoint the hooked model? Measured, against limits that follow the dtype.

Knows: how the two are compared (logits, KL, projections at every residual site) and the limits.
Does not know: how the export was made.
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
# Used where nothing else is given: the comparison needs ordinary text, not a particular task.
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
    """Capture: projections on the vectors, and the norm, at every position: [batch, pos, k + 1]."""

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
    found = []
    for row in rows:
        stream = model.stream([row], keep=len(row), capture=capture, batch_size=1)
        for _, logits, captured in stream:
            assert logits is not None
            found.append((logits[0].float(), {s: x[0] for s, x in captured.items()}))
    return found


def compare(
    model: Model,
    plan: Plan,
    other: Model,
    prompts: Sequence[PromptLike] = PROBES,
    *,
    unembed_map: Affine | None = None,
) -> dict[str, Any]:
    """Numbers that say how far `other` (unedited hooks) is from `model` under `plan`.

    Every position of every prompt counts. `residual_along_direction` is the largest difference of the
    two projections on the plan's vectors at any residual site, as a share of the stream's norm there.
    With `unembed_map` (an edited embedding that stays tied) the model's unembedding reads through it.
    """
    rows = model.encode_all(prompts)
    vectors, sites = plan_vectors(plan), _observed_sites(plan, model)
    with model.applied(plan), model.unembedding_through(unembed_map):
        want = _observe(model, rows, vectors, sites)
    got = _observe(other, rows, vectors, sites)
    plain = _observe(model, rows, vectors, sites)
    difference = kl = apart = left = effect = 0.0
    worst = ""
    for (want_logits, want_sites), (got_logits, got_sites), (plain_logits, _) in zip(
        want, got, plain
    ):
        difference = _largest(difference, (want_logits - got_logits).abs())
        effect = _largest(effect, (want_logits - plain_logits).abs())
        pair = (want_logits.double().log_softmax(-1), got_logits.double().log_softmax(-1))
        kl = _largest(kl, kl_divergence(*pair))
        for site, hooked in want_sites.items():
            norm = hooked[:, -1:].clamp(min=1e-30)
            gap = _largest((hooked - got_sites[site])[:, :-1].abs() / norm)
            left = _largest(left, got_sites[site][:, :-1].abs() / norm)
            worst = worst if gap < apart else str(site)
            apart = _largest(apart, gap)
    return {
        "max_abs_logit_difference": difference,
        "kl": kl,
        "residual_along_direction": apart,
        "worst_site": worst,
        "largest_projection_left": left,
        "max_abs_logit_effect_of_plan": effect,
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
    with torch.no_grad():
        bare = [
            reloaded(torch.tensor([row], device=model.device)).logits[0].float() for row in rows
        ]
    other = from_hf(
        reloaded, model.tokenizer, source=ModelSource(str(folder), "folder", str(folder))
    )
    numbers = compare(model, plan, other, rows, unembed_map=unembed_map)
    # `compare` runs the export with hook points in it; this holds plain transformers to the same limit.
    with model.applied(plan), model.unembedding_through(unembed_map):
        for row, logits in zip(rows, bare):
            want = model.logits([row], keep=len(row))[0].float()
            gap = (want - logits).abs()
            numbers["max_abs_logit_difference"] = _largest(numbers["max_abs_logit_difference"], gap)
    names = ("max_abs_logit_difference", "kl", "residual_along_direction")
    limits = dict(zip(names, LIMITS[dtype]))
    if unembed_map is not None:
        numbers["cost_of_accept"] = _cost_of_accept(model, plan, rows, unembed_map)
    failed = [name for name in names if not numbers[name] <= limits[name]]
    return {**numbers, "limits": limits, "dtype": dtype, "failed": failed, "passed": not failed}


def coarsest_dtype(checkpoint: Checkpoint, weights: WeightPlan) -> str:
    """The dtype that decides the limits: the coarsest of what was edited, or that the config loads in."""
    names = [name for name in weights.edits if name in checkpoint.tensors] or checkpoint.tensors
    dtypes = [checkpoint.describe(name)[0] for name in names]
    config = read_hf_config(checkpoint.folder)
    dtypes += [getattr(config, "dtype", None) or torch.float64]
    known = [d for d in dtypes if str(d).removeprefix("torch.") in LIMITS]
    return str(max(known, key=lambda d: torch.finfo(d).eps)).removeprefix("torch.")


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


def _cost_of_accept(
    model: Model, plan: Plan, rows: Sequence[Sequence[int]], unembed_map: Affine
) -> dict[str, float]:
    """How far the plan with a tied unembedding is from the plan itself."""
    difference = kl = 0.0
    with model.applied(plan):
        for row in rows:
            own = model.logits([row], keep=len(row))[0].double()
            with model.unembedding_through(unembed_map):
                tied = model.logits([row], keep=len(row))[0].double()
            difference = _largest(difference, (own - tied).abs())
            kl = _largest(kl, kl_divergence(own.log_softmax(-1), tied.log_softmax(-1)))
    return {"max_abs_logit_difference": difference, "kl": kl}
