"""Reproducing: an export's tensors made again from its manifest, and what differs where they are others.

Knows: the manifest, the rebuilt folder, comparison byte by byte. Does not know: prompts, or how a plan was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.export.model_card import CERTIFICATE
from interp_ablate.models.load import load_model
from interp_ablate.models.sources import BUNDLED
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.provenance import MANIFEST, machine, versions, weight_digests
from interp_ablate.storage.safetensors_reader import INDEX, SINGLE, Checkpoint

KINDS = ("checkpoint",)


@dataclass(frozen=True)
class Reproduction:
    """What came of an export that was made again."""

    tensors: int
    """How many tensors both have, with the same bytes."""
    differ: tuple[dict[str, Any], ...] = ()
    """Tensors that are others: their names, how many of their elements, the largest difference."""
    files: dict[str, bool] = field(default_factory=dict)
    """Where the export's weights are gone: its files by name, and whether the new ones have their digests."""
    circumstances: tuple[str, ...] = ()
    """What differs in versions and machine; it explains bytes that differ, and is no fault by itself."""
    reasons: tuple[str, ...] = ()
    """Where the tensors differ: why, as far as the manifest tells."""

    @property
    def same(self) -> bool:
        """Whether every tensor has the same bytes."""
        return not self.differ and all(self.files.values()) and bool(self.tensors or self.files)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "same": self.same, "tensors": self.tensors, "differ": list(self.differ), "files": self.files,
            "circumstances": list(self.circumstances), "reasons": list(self.reasons),
        }  # fmt: skip


def read_manifest(export: str | Path) -> dict[str, Any]:
    """The manifest of an exported checkpoint: in a folder, or the file itself.

    Raises:
        ExportError: none of this package, or one of another kind of artefact.
    """
    path = Path(export)
    path = path / MANIFEST if path.is_dir() else path
    manifest = incoming_object(
        path, error=ExportError, fields=("format", "kind", "source", "plan", "versions")
    )
    if manifest["kind"] not in KINDS:
        raise ExportError(
            f"{path} is of a {manifest['kind']}: reproduce takes {', '.join(KINDS)}; export the checkpoint, or "
            "the artefact from its plan"
        )
    _check_form(manifest, path)
    return manifest


def _check_form(manifest: Mapping[str, Any], path: Path) -> None:
    """Refuse a manifest whose parts are not what an export writes."""
    source = manifest["source"]
    named = isinstance(source, Mapping) and all(
        isinstance(source.get(k), str) for k in ("name", "kind")
    )
    right = {
        "source": named and isinstance(source.get("path"), str | None),
        "plan": isinstance(manifest["plan"], Mapping),
        "versions": isinstance(manifest["versions"], Mapping),
        "run": isinstance(manifest.get("run"), Mapping | None),
        "unchanged": isinstance(manifest.get("unchanged"), list | None),
        "tied": isinstance(manifest.get("tied"), str | None),
    }
    wrong = [name for name, fine in right.items() if not fine]
    if wrong:
        raise ExportError(
            f"{path} is damaged: its {wrong[0]!r} is not what an export writes. Export the run or the plan again"
        )


def source_of(manifest: Mapping[str, Any], model: str | None = None) -> str:
    """The model that an export was made from, as a name that loads.

    Raises:
        ExportError: its manifest does not say; with what to give.
    """
    source = manifest["source"]
    name = model or (source["name"] if source["name"] in BUNDLED else source.get("path"))
    name = name or (source["name"] if source["kind"] == "hub" else None)
    if not name:
        raise ExportError(
            f"the manifest names {source['name']!r} ({source['kind']}), and no place of it: give --model"
        )
    return str(name)


def rebuild(manifest: Mapping[str, Any], plan: Plan | None, source: str, out: Path) -> None:
    """Write the checkpoint of a manifest again, with its own plan or another.

    A folder of safetensors is streamed, and no model loaded.

    Raises:
        ExportError, ModelError, PlanError: what an export raises.
    """
    plan = Plan.from_dict(manifest["plan"]) if plan is None else plan
    tied: Any = manifest.get("tied") or "untie"
    folder = Path(source)
    if len(plan) and any((folder / name).is_file() for name in (INDEX, SINGLE)):
        export_folder(folder, plan, out, tied=tied)
        return
    model = load_model(source, revision=manifest["source"].get("revision"))
    export_checkpoint(model, plan, out, tied=tied)


def compare(
    manifest: Mapping[str, Any], export: str | Path, again: Path, plan: Plan | None = None
) -> Reproduction:
    """The tensors of an export against those of the folder that was made again, byte by byte.

    An export of which only the manifest and certificate are left is compared by its files' digests.

    Args:
        plan: the one that a run, made again, chose; None for the manifest's.

    Raises:
        ExportError: weights that cannot be read; neither weights nor digests.
    """
    circumstances = tuple(_circumstances(manifest))
    folder = Path(export) if Path(export).is_dir() else Path(export).parent
    if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        files = _by_digest(folder, again)
        reasons = () if all(files.values()) else tuple(_reasons(manifest, [], circumstances, plan))
        return Reproduction(0, (), files, circumstances, reasons)
    there, now = Checkpoint.open(folder), Checkpoint.open(again)
    equal, differ = 0, []
    for name in sorted({*there.tensors, *now.tensors}):
        difference = _difference(name, there, now)
        equal += difference is None
        differ += [] if difference is None else [difference]
    reasons = tuple(_reasons(manifest, differ, circumstances, plan)) if differ else ()
    return Reproduction(equal, tuple(differ), {}, circumstances, reasons)


def _by_digest(folder: Path, again: Path) -> dict[str, bool]:
    path = folder / CERTIFICATE
    digests = incoming_object(path, error=ExportError).get("files") if path.is_file() else None
    if not digests:
        raise ExportError(
            f"{folder} has neither weights nor digests of them ({CERTIFICATE}): there is nothing to compare with"
        )
    now = weight_digests(again)
    return {name: now.get(name) == digest for name, digest in digests.items()}


def _difference(name: str, there: Checkpoint, now: Checkpoint) -> dict[str, Any] | None:
    """What differs in one tensor; None for the same bytes."""
    if name not in now.tensors or name not in there.tensors:
        return {"name": name, "only": "there" if name in there.tensors else "now"}
    (dtype, shape), other = there.describe(name), now.describe(name)
    if (dtype, shape) != other:
        return {
            "name": name,
            "there": f"{dtype} {list(shape)}",
            "now": f"{other[0]} {list(other[1])}",
        }
    elements, largest, total = 0, 0.0, 0
    for (_, a), (_, b) in zip(there.blocks(name), now.blocks(name), strict=True):
        total += a.numel()
        unequal = _bytes(a) != _bytes(b)
        if unequal.any():
            elements += int(unequal.any(-1).sum())
            largest = max(largest, float((a.double() - b.double()).abs().nan_to_num().max()))
    if not elements:
        return None
    return {"name": name, "elements": elements, "of": total, "largest_difference": largest}


def _bytes(x: Tensor) -> Tensor:
    """The bytes of each element, a row each."""
    return x.contiguous().flatten()[:, None].view(torch.uint8)


def _circumstances(manifest: Mapping[str, Any]) -> list[str]:
    """Versions, and of a run the machine, that are others than when the export was made."""
    pairs = [(manifest["versions"], versions())]
    if isinstance(manifest.get("run"), Mapping):
        pairs.append((manifest["run"].get("machine") or {}, machine()))
    return [
        f"{name}: {before.get(name, 'none')} there, {now.get(name, 'none')} now"
        for before, now in pairs
        for name in {**before, **now}
        if before and before.get(name) != now.get(name)
    ]


def _reasons(
    manifest: Mapping[str, Any],
    differ: list[dict[str, Any]],
    circumstances: tuple[str, ...],
    plan: Plan | None,
) -> list[str]:
    """Why tensors differ, as far as it can be told."""
    if plan is not None and plan.to_dict() != Plan.from_dict(manifest["plan"]).to_dict():
        also = (
            "; other versions or another machine (circumstances) may be why"
            if circumstances
            else ""
        )
        return [f"the run, made again, chose another plan than the manifest's{also}"]
    unchanged = set(manifest.get("unchanged") or ())
    untouched = [each["name"] for each in differ if each["name"] in unchanged]
    if untouched:
        return [
            f"{len(untouched)} tensors that the plan leaves alone differ, {untouched[0]} among them: the source, or "
            "the export, has other weights than it had"
        ]
    if circumstances:
        return [
            "other versions or another machine (circumstances): the last bits of the edit may differ"
        ]
    return ["the source's weights that the plan edits, or the export's, are others than they were"]
