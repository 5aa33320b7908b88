"""The certificate of a checkpoint: logits, KL and projections against the hooked model, with limits by dtype.

Knows: how the two are compared, and the limits. Does not know: how the export was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.edits.affine import Affine
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.evaluation.metrics import kl_divergence
from interp_ablate.jobs.bars import quiet_libraries, waiting
from interp_ablate.models.anatomy import find_blocks
from interp_ablate.models.hf_classes import from_folder, widened
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model, check_model
from interp_ablate.models.module_calls import stream_argument, stream_of
from interp_ablate.models.sources import ModelSource, read_hf_config
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.sites import Site, sites_of
from interp_ablate.storage.safetensors_reader import Checkpoint
from interp_ablate.weights.plan_to_weights import WeightPlan
from interp_ablate.weights.weight_form import require_weight_form

# The coarser dtype of stored weights and arithmetic -> limits: the largest logit difference, in steps of
# the dtype at the largest logit; KL in nats; projection difference as a share of the stream's norm; share of
# the edit that may be missed at a site. Half precision rounds every edited weight and every activation.
LIMITS: dict[str, tuple[float, float, float, float]] = {
    "float64": (256, 1e-6, 1e-5, 1e-2),
    "float32": (256, 1e-6, 1e-5, 1e-2),
    "bfloat16": (12, 0.15, 2e-2, 0.25),
    "float16": (12, 5e-3, 5e-3, 0.25),
}
# Nothing may be left at a block's input or output, in plain transformers, along what was ablated everywhere.
LEFT = "left_along_ablated_direction"
_NAMES = ("max_abs_logit_difference", "kl", "residual_along_direction", "share_of_edit_missed")
SKIPPED = "cost_of_skipped_embedding"
# An edit can be told from rounding where it moves the projection by this many steps of the dtype. Rounding alone
# moves it by up to 6 (SmolLM2-135M in bfloat16, from one site to the next of 46): 8 are a quarter of an edit of 32.
STEPS_TO_SEE_AN_EDIT = 32
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
        wide = x.detach().cpu().double()
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
            observed.append((logits[0].float().cpu(), {s: x[0] for s, x in captured.items()}))
    return observed


@contextmanager
def _projections_at(
    model: Model, sites: Sequence[Site], vectors: Tensor
) -> Iterator[dict[Site, list[Tensor]]]:
    """Projections at sites, one entry a forward pass (one more for every further projection that writes there).

    Before plans that are applied inside the block write, and after those that are applied around it.
    """
    before: dict[Site, list[Tensor]] = {site: [] for site in sites}
    read, handles = _read(vectors), []

    def reader(site: Site) -> Any:
        def hook(module: Any, args: Any, x: Tensor) -> None:
            before[site].append(read(x.reshape(-1, x.shape[-1]), None))  # of one row

        return hook

    try:
        for site in sites:
            handles.append(model.hook_point(site).register_forward_hook(reader(site)))
        yield before
    finally:
        for handle in handles:
            handle.remove()


def _edit_missed(
    plan: Plan,
    vectors: Tensor,
    d_model: int,
    eps: float,
    before: dict[Site, list[Tensor]],
    want: dict[Site, list[Tensor]],
    got: dict[Site, list[Tensor]],
) -> dict[str, Any]:
    """The part of the edit that an export lacks, at the edited sites where it can be told from rounding.

    At a site, along the vectors of its edits: |export - hooked| / |hooked before the edit - hooked after
    it|, root mean squares over all positions. 1: the site was not edited; 0.5: edited at half strength.
    """
    shares, n_edited = [0.0], 0
    for site in before:
        here = torch.cat([edit.vectors for edit in plan if site in edit.sites])
        here = here / here.norm(dim=1, keepdim=True)
        columns = ((vectors @ here.T).abs() > 1 - 1e-12).any(1).nonzero()[:, 0]
        edited = torch.cat(want[site])
        after, norms = edited[:, columns], edited[:, -1]
        edit = (torch.cat(before[site])[:, columns] - after).square().mean().sqrt()
        missed = (torch.cat(got[site])[:, columns] - after).square().mean().sqrt()
        step = eps * norms.square().mean().sqrt() / math.sqrt(d_model)
        n_edited += bool(edit > 0)
        if edit > STEPS_TO_SEE_AN_EDIT * step or not bool(missed.isfinite()):
            shares.append(float(missed / edit))
    return {
        "share_of_edit_missed": _largest(*shares),
        "edited_sites": n_edited,
        "edited_sites_told_from_rounding": len(shares) - 1,
    }


def hooked_logits(model: Model, plan: Plan, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [pos, d_vocab] of each row under a plan as hooks, float32."""
    with model.applied(plan):
        return [model.logits([row], keep=len(row))[0].float().cpu() for row in rows]


@torch.no_grad()
def plain_logits(hf: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [pos, d_vocab] of each row in plain transformers (or PEFT), float32."""
    device = next(hf.parameters()).device
    return [
        hf(input_ids=torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows
    ]


@torch.no_grad()
def plain_passes(
    hf: Any, rows: Sequence[Sequence[int]], vectors: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Logits of each row in plain transformers, and projections of its stream: [block + 1, pos, k + 1].

    The stream is read by forward hooks on the model's own blocks: what enters each, and what leaves the
    last one. The last projection is its norm.
    """
    device, read, seen = next(hf.parameters()).device, _read(vectors), []

    def run(row: Sequence[int]) -> Any:
        return hf(input_ids=torch.tensor([row], device=device))

    def enters(module: Any, args: Any, kwargs: Any) -> None:
        key = stream_argument(args, kwargs)
        seen.append(read(args[key] if isinstance(key, int) else kwargs[key], None)[0])

    def leaves(module: Any, args: Any, output: Any) -> None:
        seen.append(read(stream_of(output), None)[0])

    _, blocks, _ = find_blocks(hf, lambda: run(rows[0]))
    handles = [block.register_forward_pre_hook(enters, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(leaves))
    passes = []
    try:
        for row in rows:
            logits = run(row).logits[0].float().cpu()
            passes.append((logits, torch.stack(seen)))
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return passes


def removed_vectors(plan: Plan, model: Model) -> Float[Tensor, "k d_model"]:
    """Unit vectors along which a plan is said to leave nothing: it is one ablation, or erasure to 0, at all writers."""
    nothing = torch.zeros(0, model.d_model if len(plan) else 0, dtype=torch.float64)
    if len(plan) != 1 or not {*model.writers} <= {*plan.sites}:
        return nothing
    (edit,) = plan
    if isinstance(edit, AffineEdit) and edit.is_projection and not edit.shift.any():
        return _kept_out(edit) if edit.positions == "all" else nothing
    if edit.positions != "all" or not isinstance(edit, (Ablate, Erase)) or {*edit.amounts} != {1.0}:
        return nothing
    if isinstance(edit, Ablate):
        return edit.vectors
    return nothing if any(edit.values) else edit.vectors[1:] / edit.vectors[1:].norm(dim=1)


def _kept_out(edit: AffineEdit) -> Float[Tensor, "k d_model"]:
    """The unit rows of `read` along which the map leaves nothing: read_j . write_i is -1 for i = j and 0 for others."""
    products = edit.write @ edit.read.T
    gone = (products + torch.eye(len(products), dtype=products.dtype)).abs().amax(0) < 1e-6
    rows = edit.read[gone]
    return rows / rows.norm(dim=1, keepdim=True)


def logit_distance(
    some: Sequence[Tensor], others: Sequence[Tensor], prefix: str = ""
) -> dict[str, float]:
    """The largest difference of two sets of logits, and the largest KL at any position; NaN if there is one."""
    gaps, kls = [], []
    for one, other in zip(some, others, strict=True):
        gaps.append((one - other).abs().max())
        kls.append(kl_divergence(one.double().log_softmax(-1), other.double().log_softmax(-1)))
    return {f"{prefix}max_abs_logit_difference": _largest(*gaps), f"{prefix}kl": _largest(*kls)}


def _stream_distance(
    want: Sequence[Mapping[Site, Tensor]],
    got: Sequence[Mapping[Site, Tensor]],
    sites: Sequence[Site],
) -> dict[str, Any]:
    """The largest difference of projections at the sites and where it is, and the largest that `got` has."""
    apart, left, worst = 0.0, 0.0, ""
    for hooked, reloaded in zip(want, got):
        for site in sites:
            norm = hooked[site][:, -1:].clamp(min=1e-30)
            gap = _largest((hooked[site] - reloaded[site])[:, :-1].abs() / norm)
            left = _largest(left, reloaded[site][:, :-1].abs() / norm)
            worst = worst if gap < apart else str(site)
            apart = _largest(apart, gap)
    return {
        "residual_along_direction": apart, "worst_site": worst, "largest_projection_left": left,
    }  # fmt: skip


def compare(
    model: Model,
    plan: Plan,
    other: Model,
    prompts: Sequence[PromptLike] = PROBES,
    *,
    unembed_map: Affine | None = None,
    streams: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """The distance of `other` (without hooks) from `model` under `plan`, in numbers.

    Every position of every prompt counts. `residual_along_direction` is the largest difference of the
    two projections on the plan's vectors at any residual site, as a share of the stream's norm there.
    With `streams` (see `plain_passes`) they are the projections of `other` at the blocks' inputs and outputs.
    With `unembed_map` (an edited embedding that stays tied) the model's unembedding reads through it.
    """
    rows = model.encode_all(prompts)
    vectors, sites = plan_vectors(plan), _observed_sites(plan, model)
    edited = [
        site for site in plan.sites if site.point != "resid_mid"
    ]  # which is no hook of its own
    with (
        _projections_at(model, edited, vectors) as before,
        model.applied(plan),
        model.plans.unembedding_through(unembed_map),
        _projections_at(model, edited, vectors) as after,
    ):
        want = _observe(model, rows, vectors, sites)
    with _projections_at(other, edited, vectors) as exported:
        got = _observe(other, rows, vectors, sites)
    for (_, got_sites), stream in zip(got, streams or ()):
        for site in got_sites:
            if site.point in ("resid_pre", "resid_post"):
                got_sites[site] = stream[site.layer + (site.point == "resid_post")]
    plain = _observe(model, rows, vectors, ())
    want_logits, other_logits, bare_logits = (
        [logits for logits, _ in observed] for observed in (want, got, plain)
    )
    eps = max(torch.finfo(model.dtype).eps, torch.finfo(other.dtype).eps)
    return {
        **logit_distance(want_logits, other_logits),
        **_stream_distance([x for _, x in want], [x for _, x in got], sites),
        **_edit_missed(plan, vectors, model.d_model, eps, before, after, exported),
        "max_abs_logit_effect_of_plan": _largest(
            *((one - other).abs().max() for one, other in zip(want_logits, bare_logits))
        ),
        "max_abs_logit": _largest(*(logits.abs().max() for logits in want_logits)),
        "prompts": len(rows),
        "positions": sum(map(len, rows)),
    }


def in_blocks(hf: Any, device: torch.device) -> Any:
    """A model of plain transformers, on the CPU, that computes on a device: each block is there only while it runs.

    The rest (embedding, last norm, unembedding) stays there. So a model is compared with its export in the
    memory of one of them and a block.
    """
    if device.type == "cpu":
        return hf
    kinds = hf._no_split_modules or ()
    blocks = [part for part in hf.modules() if type(part).__name__ in kinds]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: module.to(device) and None)
        block.register_forward_hook(lambda module, args, output: module.to("cpu") and None)
    inside = {part for block in blocks for part in block.modules()}
    for part in hf.modules():
        if part not in inside:
            part._apply(lambda tensor: tensor.to(device), recurse=False)
    hf.tie_weights()
    return hf


@quiet_libraries()
def load_in_blocks(folder: str | Path, device: torch.device, **options: Any) -> Any:
    """A folder in plain transformers, computing on a device (`in_blocks`).

    Raises:
        ExportError: a folder transformers cannot load with these options.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        hf: Any = from_folder(folder, config, **options)
    except Exception as error:  # somebody else's program over a folder
        raise ExportError(f"transformers cannot load the export {folder}: {error}") from error
    hf = widened(hf, options["dtype"]) if "dtype" in options else hf
    return in_blocks(hf.eval().requires_grad_(False), device)


@waiting("certificate")
def certify(
    model: Model,
    plan: Plan,
    folder: str | Path,
    *,
    prompts: Sequence[PromptLike] = PROBES,
    stored_dtype: str | None = None,
    unembed_map: Affine | None = None,
    asked: Plan | None = None,
) -> dict[str, Any]:
    """Reload a folder in plain transformers and compare it with the model under the plan.

    The folder is loaded in the dtype that the hooked model computes in (`dtype=`: buffers such as rotary
    frequencies stay as they are). A comparison that could not tell an unedited folder from the export,
    because the plan's edit drowns in the dtype's rounding at every site, does not pass.

    Args:
        stored_dtype: the dtype of the folder's weights. Default: the model's. The limits follow the
            coarser of it and the model's.
        unembed_map: what an edited embedding that stays tied does to the unembedding; the certificate
            then holds its cost, `cost_of_accept`: how far that is from the plan itself.
        asked: the plan that was asked for where an embedding was left out of it; the certificate then holds
            `cost_of_skipped_embedding`: how far `plan` is from it.

    Returns the certificate: the numbers of `compare`, the limits, and whether all hold.

    Raises:
        ExportError: a folder transformers cannot load with no option; a plan that no weights can hold.
    """
    check_model(model)
    require_weight_form(plan)
    computed = str(model.dtype).removeprefix("torch.")
    stored = stored_dtype or computed
    reloaded = load_in_blocks(folder, model.device, dtype=model.dtype)
    rows = model.encode_all(prompts)
    removed, k = removed_vectors(plan, model), len(plan_vectors(plan))
    bare = plain_passes(reloaded, rows, torch.cat([plan_vectors(plan), removed]))
    other = from_hf(
        reloaded,
        model.tokenizer,
        source=ModelSource(str(folder), "folder", str(folder)),
        backend="hf" if model.backend == "hf" else "bridge",
    )
    streams = [torch.cat([x[..., :k], x[..., -1:]], -1) for _, x in bare]
    numbers = compare(model, plan, other, rows, unembed_map=unembed_map, streams=streams)
    # `compare` runs the export with hook points in it; this holds plain transformers to the same limit.
    with model.plans.unembedding_through(unembed_map):
        want = hooked_logits(model, plan, rows)
    gaps = [(one - other).abs().max() for one, (other, _) in zip(want, bare)]
    numbers["max_abs_logit_difference"] = _largest(numbers["max_abs_logit_difference"], *gaps)
    dtype = max(stored, computed, key=_eps)
    limits = limits_for(dtype, numbers["max_abs_logit"])
    if len(removed):
        shares = [x[..., k:-1].abs() / x[..., -1:].clamp(min=1e-30) for _, x in bare]
        numbers[LEFT], limits[LEFT] = _largest(*shares), LIMITS[dtype][2]
    if unembed_map is not None:
        numbers["cost_of_accept"] = logit_distance(hooked_logits(model, plan, rows), want)
    if asked is not None:
        numbers[SKIPPED] = logit_distance(hooked_logits(model, asked, rows), want)
    return verdict(numbers, limits, dtype, stored=stored, computed=computed)


def verdict(
    numbers: Mapping[str, Any],
    limits: Mapping[str, float],
    dtype: str,
    *,
    stored: str,
    computed: str,
) -> dict[str, Any]:
    """A certificate: numbers, limits, and the names of those beyond, or of the one by which nothing was tested."""
    failed = [name for name in limits if not numbers[name] <= limits[name]]
    if numbers["edited_sites"] and not numbers["edited_sites_told_from_rounding"]:
        failed.append("edited_sites_told_from_rounding")
    compared = {"stored": stored, "hooked": computed, "reloaded": computed}
    outcome = {"failed": failed, "passed": not failed}
    return {**numbers, "limits": limits, "dtype": dtype, "compared": compared, **outcome}


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


def limits_for(dtype: str, largest_logit: float) -> dict[str, float]:
    """The limits of a comparison in a dtype; that of logits grows with their size.

    (float64 models compute rotary tables and some norms in float32: their step is float32's.)
    """
    steps, *others = LIMITS[dtype]
    step = max(_eps(dtype), _eps("float32")) * max(largest_logit, 4.0)
    return dict(zip(_NAMES, (steps * step, *others)))


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
    if "edited_sites_told_from_rounding" in certificate["failed"]:
        raise ExportError(
            f"nothing can be said about the {what}: at each of the {certificate['edited_sites']} edited "
            f"sites the plan's edit drowns in the rounding of {certificate['dtype']}. Load the model with "
            "--dtype float32, or edit with a larger strength. Nothing was left on disk"
        )
    if not certificate["passed"]:
        beyond = "; ".join(
            f"{name} {certificate[name]:.3g} (limit {limit:.3g})"
            for name, limit in certificate["limits"].items()
            if name in certificate["failed"]
        )
        raise ExportError(f"the {what} is not the hooked model: {beyond}. Nothing was left on disk")
