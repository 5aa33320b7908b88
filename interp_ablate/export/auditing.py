"""The audit of a folder: is it really another one under a plan and nothing else, tensor by tensor.

Knows: the value that every tensor, config field and file must have. Does not know: logits or hooks (`certification`
does), or who wrote the folder: anyone may audit what they were sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError, ModelError
from interp_ablate.export.checkpoint_files import published
from interp_ablate.export.mended_tokenizer import TOKENIZER, mended_tokenizer
from interp_ablate.export.model_card import CERTIFICATE
from interp_ablate.export.older_transformers import OLD_ROPE_FIELDS, ORIGINS, config_for_both
from interp_ablate.export.side_files import (
    BEHAVIOUR_FILES,
    TOKENIZER_CONFIG,
    may_be_weights,
    spelled_tokenizer,
)
from interp_ablate.export.source_folder import architecture_in, as_written, opened, weights_config
from interp_ablate.models.architectures import Architecture, is_tied
from interp_ablate.models.model import check_model
from interp_ablate.models.model_files import check_loadable
from interp_ablate.models.sources import read_hf_config
from interp_ablate.storage.incoming_files import incoming_bytes, incoming_json, incoming_object
from interp_ablate.storage.provenance import MANIFEST
from interp_ablate.storage.safetensors_reader import INDEX, Checkpoint
from interp_ablate.storage.strict_json import as_read_back
from interp_ablate.weights.plan_to_weights import Tied, WeightPlan, edited_tensor, weight_plan

# Files that an export writes itself, or that no program reads.
_MAY_DIFFER = ("README.md", "config.json", MANIFEST, CERTIFICATE, ".gitattributes")
# Files that loaders act on where they find them: code, settings, vocabularies, templates.
_ACTED_ON = (".json", ".jinja", ".model", ".py", ".txt")
_NOT_COMPARED = (*ORIGINS, "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class AuditSource:
    """The model that a folder is said to come from."""

    names: Collection[str]
    """Names of its tensors."""
    read: Callable[[str], Tensor]
    """Reads a tensor by name."""
    hf_config: Any
    entry: Architecture
    folder: Path | None = None
    """None for a model in memory, as is `checkpoint`."""
    checkpoint: Checkpoint | None = None

    @classmethod
    def of_folder(cls, folder: str | Path) -> AuditSource:
        """A local Hugging Face folder, read tensor by tensor.

        Raises:
            ExportError: no safetensors, malformed files, an architecture that cannot be edited exactly.
        """
        checkpoint = opened(folder)
        check_loadable(folder)
        config = weights_config(folder)
        return cls(
            checkpoint.tensors,
            checkpoint.read,
            config,
            architecture_in(checkpoint, config),
            checkpoint.folder,
            checkpoint,
        )

    @classmethod
    def of_model(cls, model: Any) -> AuditSource:
        """A model in memory: its own tensors, without the unembedding where it is the embedding."""
        check_model(model)
        state = model.hf_state_dict()
        if is_tied(model.hf_config):
            state.pop(model.architecture.unembed, None)
        state, entry = published(model, state)
        return cls(state, state.__getitem__, model.hf_config, entry)


@dataclass
class Audit:
    """The result of an audit: counts of tensors that are as they must be, and every problem."""

    tied: Tied | None
    weights: WeightPlan
    same: int = 0
    """Untouched tensors with equal bytes."""
    edited: int = 0
    """Edited tensors within rounding of the planned ones; `edited_bit_equal` of them exactly."""
    edited_bit_equal: int = 0
    added: int = 0
    problems: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True where there is no problem."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data for reports."""
        names = ("same", "edited", "edited_bit_equal", "added", "tied", "problems", "not_compared")
        return {**{name: getattr(self, name) for name in names}, "passed": self.passed}


def audit(
    source: AuditSource, plan: Plan, folder: str | Path, *, tied: Tied | None = None
) -> Audit:
    """Compare a folder with what the plan makes of the source: tensors, config, tokenizer.

    An edited tensor must be the planned one within one unit in the last place of its dtype; every other
    must be the same bytes; none may be missing or new.

    Args:
        tied: what the folder's maker chose for a tied embedding; default: read from the folder.

    Raises:
        ExportError: a plan with no exact form for the source, files that cannot be read.
    """
    result = Checkpoint.open(folder)
    config = read_hf_config(folder)
    chosen = tied or _tied_choice(source, result, config)
    weights = weight_plan(
        plan,
        source.hf_config,
        source.names,
        source.read,
        tied=chosen,
        entry=source.entry,
        describe=source.checkpoint.describe if source.checkpoint else None,
    )
    if source.checkpoint is not None:
        written, weights = as_written(source.checkpoint, weights)
        source = replace(source, names=written.tensors, read=written.read, checkpoint=written)
    report = Audit(weights.tied, weights)
    expected = {*source.names, *weights.added}
    # a tied model may hold its unembedding or leave it out
    if is_tied(config):
        expected.discard(source.entry.unembed)
    for name in sorted(expected | set(result.tensors)):
        if name not in result.tensors:
            report.problems.append(f"{name} is missing")
        elif name not in expected and not _is_tied_copy(name, source, result, config):
            report.problems.append(f"{name} is not a tensor of the source, nor of the plan")
        elif name in expected:
            _check_tensor(report, name, source, result)
    report.problems += _config_problems(source.hf_config, config, weights)
    before = source.hf_config.to_diff_dict()
    if source.folder is not None:
        before = _read_config(source.folder)
    else:
        report.not_compared = ["tokenizer and generation config: the source is no folder"]
    report.problems += _json_problems(before, result.folder, compared=_comparable(config))
    report.problems += _file_problems(source.folder, result)
    if report.passed:  # what is as it must be loads, unless the source did not
        try:
            check_loadable(folder)
        except ModelError as error:
            report.problems.append(str(error))
    return report


def _tied_choice(source: AuditSource, result: Checkpoint, config: Any) -> Tied:
    """The maker's choice for a tied embedding, from the folder's manifest or else from its tensors."""
    manifest = result.folder / MANIFEST
    if manifest.is_file():
        choice: Any = incoming_object(manifest, error=ExportError).get("tied")
        if choice in get_args(Tied):
            return choice
    if not is_tied(config):
        return "untie"
    embed = source.entry.present(source.entry.embed, source.names)
    if embed in result.tensors and _same(source, result, embed):
        return "skip-embedding"
    return "accept"


def _is_tied_copy(name: str, source: AuditSource, result: Checkpoint, config: Any) -> bool:
    """True for an unembedding that a tied checkpoint stores beside the embedding, with equal values."""
    entry = source.entry
    embed = entry.present(entry.embed, result.tensors)
    if not is_tied(config) or name != entry.unembed or embed is None:
        return False
    return torch.equal(result.read(name), result.read(embed))


def _check_tensor(report: Audit, name: str, source: AuditSource, result: Checkpoint) -> None:
    weights = report.weights
    if name in weights.edits and weights.edits[name].changes:
        _check_edited(report, name, edited_tensor(source.read(name), weights.edits[name]), result)
        return
    if name not in weights.added:
        if _same(source, result, name):
            report.same += 1
        else:
            report.problems.append(f"{name} differs, though the plan does not touch it")
        return
    added, before = weights.added[name], len(report.problems)
    like = source.read(added.copy_of or added.beside)
    want = like if added.copy_of is not None else added.bias(like.shape[0], like.dtype)
    _check_edited(report, name, want, result)
    report.added += len(report.problems) == before


def _check_edited(report: Audit, name: str, want: Tensor, result: Checkpoint) -> None:
    got = result.read(name)
    if got.shape != want.shape or got.dtype != want.dtype:
        report.problems.append(
            f"{name} is {got.dtype} {tuple(got.shape)}; the plan makes it {want.dtype} {tuple(want.shape)}"
        )
        return
    is_edit = name in report.weights.edits
    if torch.equal(got, want):
        report.edited += is_edit
        report.edited_bit_equal += is_edit
        return
    apart = (got.double() - want.double()).abs()
    # one unit in the last place, and what another order of summing leaves where a value nearly cancels
    computed = torch.finfo(torch.float32 if want.element_size() < 4 else torch.float64)
    unit = torch.finfo(want.dtype).eps * want.double().abs() + torch.finfo(want.dtype).tiny
    unit += 64 * computed.eps * float(want.abs().max())
    outside = ~(apart <= unit)
    if bool(outside.any()):
        report.problems.append(
            f"{name} is not what the plan makes of it: {int(outside.sum())} of {outside.numel()} values "
            f"differ, by up to {float(apart.max()):.3g}"
        )
        return
    report.edited += is_edit


def _same(source: AuditSource, result: Checkpoint, name: str) -> bool:
    """True where a tensor has the same bytes in both."""
    if source.checkpoint is None:
        first, second = source.read(name).detach().cpu().contiguous(), result.read(name)
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and _bytes_equal(first, second)
        )
    a, b = source.checkpoint.tensors[name], result.tensors[name]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    pairs: Iterator[tuple[Any, Any]] = zip(source.checkpoint.blocks(name), result.blocks(name))
    return all(_bytes_equal(x, y) for (_, x), (_, y) in pairs)


def _bytes_equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _config_problems(before: Any, after: Any, weights: WeightPlan) -> list[str]:
    want = {**_comparable(before), **weights.config}
    got = _comparable(after)
    stated = [getattr(config, "dtype", None) for config in (before, after)]
    if stated[0] is not None:  # a config made in memory says none
        want["dtype"], got["dtype"] = map(str, stated)
    return [
        f"config.json: {key} is {got.get(key)!r}; the plan makes it {want.get(key)!r}"
        for key in sorted(set(want) | set(got))
        if want.get(key) != got.get(key)
    ]


def _read_config(folder: Path) -> dict[str, Any]:
    return incoming_object(folder / "config.json", error=ExportError)


def _json_problems(before: dict[str, Any], folder: Path, *, compared: Collection[str]) -> list[str]:
    """Fields of config.json that the config class drops, and other programs or generation read."""
    after, spelled = _read_config(folder), config_for_both(before)
    problems = [
        f"config.json has {key} = {value!r}; the source's has {before.get(key)!r}"
        for key, value in after.items()
        if key not in compared
        and key not in _NOT_COMPARED
        and value not in (before.get(key), spelled.get(key))
    ]
    if after.get("torch_dtype", after.get("dtype")) != after.get("dtype", after.get("torch_dtype")):
        problems.append("config.json has a dtype and another torch_dtype")
    return problems


def _comparable(config: Any) -> dict[str, Any]:
    """A config as plain data, without what repeats its `rope_parameters` for older programs."""
    values = as_read_back(config.to_dict(), default=str)
    values["architectures"] = values.get("architectures") or [
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    ]
    return _without_repeats(values)


def _without_repeats(values: dict[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_parameters")
    repeated = OLD_ROPE_FIELDS if isinstance(rope, dict) else ()
    kept = {k: v for k, v in values.items() if k not in (*_NOT_COMPARED, *repeated)}
    for key, value in kept.items():
        if isinstance(value, dict):
            kept[key] = _without_repeats(value)
    if isinstance(rope, dict) and rope.get("type") == rope.get("rope_type"):
        kept["rope_parameters"] = {k: v for k, v in rope.items() if k != "type"}
    return kept


def _same_file(before: Path, after: Path) -> bool:
    """True for equal bytes, and for a tokenizer that is mended, or configured so that transformers 4 reads the same."""
    one, other = (incoming_bytes(path, error=ExportError) for path in (before, after))
    if one == other:
        return True
    if after.name == TOKENIZER:
        mended = mended_tokenizer(before.parent)
        return mended is not None and mended == incoming_json(
            after, error=ExportError, unique=False
        )
    if after.name != TOKENIZER_CONFIG:
        return False
    theirs, ours = (incoming_json(path, error=ExportError) for path in (before, after))
    return spelled_tokenizer(theirs, before.parent) == ours


def _file_problems(source: Path | None, result: Checkpoint) -> list[str]:
    """Files that are not the source's, and behaviour files that are missing.

    Weights other than the audited ones are refused wherever they lie: another loader would take them.
    Without a source folder (a model in memory) its own side files cannot be compared; what a loader would
    act on besides is still reported.
    """
    folder, problems = result.folder, []
    weights = {file.name for file in result.files} | {INDEX}
    ignored = {*_MAY_DIFFER, *weights, *(BEHAVIOUR_FILES if source is None else ())}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in ignored:
            continue
        before = source / name if source is not None else None
        if may_be_weights(path, name):
            problems.append(
                f"{name} may hold or name weights that nothing here checked, and programs load such files: "
                "take it out of the folder"
            )
        elif before is None or not before.is_file():
            if path.suffix in _ACTED_ON:
                problems.append(f"{name} is only in {folder}, and programs act on such files")
        elif not _same_file(before, path):
            problems.append(f"{name} differs from the source's")
    if source is not None:
        problems += [
            f"{name} is only in {source}"
            for name in BEHAVIOUR_FILES
            if (source / name).is_file() and not (folder / name).is_file()
        ]
    return problems
