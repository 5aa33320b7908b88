"""The documents of an export: model card (README.md), manifest (interp_ablate.json), certificate (certificate.json).

This file writes all three, and makes the card's text.

Knows: what a reader must be told, and what is inherited from the source's own card. Does not know: how any of the
numbers was measured.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_ablate.errors import ExportError
from interp_ablate.models.sources import ModelSource
from interp_ablate.sites import Site
from interp_ablate.storage.atomic_files import atomic_path
from interp_ablate.storage.incoming_files import incoming_object, incoming_text
from interp_ablate.storage.json_shapes import NUMBER, misfit
from interp_ablate.storage.provenance import MANIFEST, versions, weight_digests
from interp_ablate.storage.strict_json import json_text
from interp_ablate.weights.plan_to_weights import WeightPlan

logger = logging.getLogger(__name__)

CARD, CERTIFICATE = "README.md", "certificate.json"
SAFETY_NOTICE = (
    "An edit of this kind can remove safety training along with the behaviour it was aimed at. "
    "Treat the result as a model without such training until you have shown otherwise."
)
# What an export takes over from its source's card, where it is a text or a list of texts.
INHERITED = (
    "license", "license_name", "license_link", "language", "base_model", "tags", "library_name",
    "pipeline_tag",
)  # fmt: skip
_LONG_FRONT = 100_000  # characters: YAML is read at some 100,000 a second
TAGS = ("interp-ablate", "activation-steering")
_FORMAT_TAGS = {"gguf", "mlx", "onnx", "openvino", "lora", "peft", "adapter", "llama-cpp"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FROM_BASE = "AutoModelForCausalLM.from_pretrained"
# kind of artefact -> (base_model_relation of the hub, library_name, the code that loads it)
_KINDS: dict[str, tuple[str, str | None, str]] = {
    "checkpoint": ("finetune", "transformers", f"model = {_FROM_BASE}('THIS')"),
    "lora": ("adapter", "peft", f"PeftModel.from_pretrained({_FROM_BASE}('BASE'), 'THIS')"),
    "gguf": ("finetune", None, "llama-cli -m THIS/FILE -p 'Hello'"),
}
_TIED = {
    "untie": "The tied embedding was untied: `lm_head.weight` keeps the unedited values.",
    "skip-embedding": "The embedding is unedited: what it writes along the direction stays.",
    "accept": "The tied embedding was edited, and the unembedding with it: this is another function "
    "than the plan as hooks.",
}
# metric of the test split -> how the card names it; {} is "unedited" or "edited" for `_before` and `_after`
_METRICS = {
    "behaviour{}": "behaviour, positive prompts{}",
    "negative{}": "behaviour, negative prompts{}",
    "kl_first_token": "KL to the unedited model, first token, negative prompts (nats)",
    "kl_continuation": "KL per token over the unedited model's own answers (nats)",
    "repetition{}": "repeated 3-grams, negative prompts{}",
    "perplexity{}": "perplexity of the unedited model's answers{}",
}


def export_manifest(
    kind: str, source: ModelSource, weights: WeightPlan, names: Collection[str], dtype: str,
    report: dict[str, Any] | None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of an export: everything that it takes to make it again.

    Args:
        kind: "checkpoint" or "lora".
        names: of all tensors of the result.
        report: the test-split numbers.
        more: fields of this kind only.
    """
    changed = weights.changed
    return {
        "format": "interp_ablate.export/2",
        "kind": kind,
        "source": source.to_dict(),
        "source_card": source_front_matter(source.path) if source.kind == "folder" else {},
        "dtype": dtype,
        "tied": weights.tied,
        "edited": changed,
        "unchanged": sorted(set(names) - set(changed) - set(weights.added)),
        "versions": versions(),
        "plan": weights.plan.to_dict(),
        "test": report,
        **more,
    }


def write_documents(
    folder: Path, manifest: Mapping[str, Any], certificate: Mapping[str, Any]
) -> dict[str, Any]:
    """Write certificate, card and manifest into a folder, the manifest last.

    A certificate that passed gets the digests of the folder's weights, if it has none yet ("files"): what it
    says, it says of these bytes. Returns the certificate.

    Raises:
        OSError: a place that cannot be written.
    """
    certificate = dict(certificate)
    if certificate.get("passed") is True and "files" not in certificate:
        certificate["files"] = weight_digests(folder)
    for name, text in (
        (CERTIFICATE, json_text(certificate, indent=1)),
        (CARD, model_card(manifest, certificate)),
        (MANIFEST, json_text(manifest, indent=1)),
    ):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return certificate


def write_certificate(folder: str | Path, certificate: dict[str, Any]) -> None:
    """Put a certificate into an exported folder, and write its card again.

    Raises:
        ExportError: a folder without a manifest of this package, or one that cannot be written.
    """
    _write_again(Path(folder), certificate=certificate)


def add_to_card(folder: str | Path, section: str) -> None:
    """Add a Markdown section to an exported folder's card; it stays when the card is written again.

    Raises:
        ExportError: a folder without a manifest of this package, or one that cannot be written.
    """
    _write_again(Path(folder), more_card=section)


def add_run(folder: str | Path, run: Mapping[str, Any]) -> None:
    """Keep in an exported folder's manifest which run it comes from, for `reproduce`.

    Raises:
        ExportError: a folder without a manifest of this package, or one that cannot be written.
    """
    _write_again(Path(folder), run=dict(run))


def _write_again(folder: Path, certificate: dict[str, Any] | None = None, **changes: Any) -> None:
    try:
        manifest = {**incoming_object(folder / MANIFEST), **changes}
        certificate = certificate or incoming_object(folder / CERTIFICATE, fields=("passed",))
        numbers = {"limits": {"*": NUMBER}} | dict.fromkeys(certificate.get("limits") or {}, NUMBER)
        if certificate["passed"] is not None and misfit(certificate, numbers):
            raise ValueError(f"{CERTIFICATE} lacks a number that has a limit")
    except ValueError as error:
        raise ExportError(f"{folder} has no manifest to write a card from: {error}") from error
    try:
        write_documents(folder, manifest, certificate or {})
    except OSError as error:
        raise ExportError(f"cannot write into {folder}: {error.strerror or error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{folder / MANIFEST} or {CERTIFICATE} beside it lacks what a card says ({error!r}): export it again"
        ) from error


def source_front_matter(folder: str | Path | None) -> dict[str, Any]:
    """The fields of a source folder's card that an export inherits; empty where there is no card.

    Every scalar stays the text that is written there (`language: no` is Norwegian, not false). Front
    matter that is no YAML is ignored with a warning.
    """
    import yaml

    path = Path(folder or ".") / CARD
    if folder is None or not path.is_file():
        return {}
    try:
        text = incoming_text(path, error=ExportError).replace("\r\n", "\n")
        match = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
        front = _shortened(match[1]) if match else ""
        fields = yaml.load(front, Loader=yaml.BaseLoader) or {}  # texts only: safe
    except (ExportError, yaml.YAMLError, RecursionError) as error:
        logger.warning(
            "the front matter of %s is ignored, and its licence with it: %s", path, error
        )
        return {}
    if not isinstance(fields, dict):
        return {}
    return {key: fields[key] for key in INHERITED if _is_text(fields.get(key))}


def _shortened(front: str) -> str:
    """Front matter; of a long one (results of benchmarks, as a rule) the inherited fields alone."""
    if len(front) <= _LONG_FRONT:
        return front
    blocks = re.split(r"^(?=[^\s#-])", front, flags=re.MULTILINE)
    return "".join(block for block in blocks if block.partition(":")[0] in INHERITED)


def _is_text(value: object) -> bool:
    """True for a short text, or a short list of such."""
    several = isinstance(value, list) and 0 < len(value) <= 100
    texts = value if isinstance(value, list) and several else [value]
    return all(isinstance(text, str) and 0 < len(text) <= 500 for text in texts)


def model_card(manifest: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    """README.md of an export: what was edited, from what, what it did, what was not tested.

    Args:
        manifest: as `export_manifest` makes it; `file` names a GGUF, `merging` says how to merge an adapter,
            and `more_card` holds sections that others added.
    """
    source, front = manifest["source"], _front_matter(manifest)
    base = front.get("base_model")
    license_name = front.get("license_name", front.get("license"))
    sections = {
        "What was edited": _edits(manifest, certificate),
        "What it did": _results(manifest.get("test")),
        "Is this the model that was measured?": _certificate(certificate, manifest),
        "How to load and check it": _commands(manifest, base),
        "Licence": [
            f"{_code(license_name)}, inherited from the source; its terms go on to apply."
            if license_name
            else "The source names none. Find out under which terms it may be used before you share this."
        ],
        "Intended use, and what was not tested": _limits(manifest.get("test")),
        "How to make it again": [
            "`interp-ablate reproduce THIS --model SOURCE` makes the tensors again from `interp_ablate.json`; made with "
            + ", ".join(f"{name} {number}" for name, number in manifest.get("versions", {}).items())
        ],
    }
    base_model = f", base model {_code(base)}" if base and base != source["name"] else ""
    lines = [
        f"---\n{_yaml(front)}---\n",
        f"# {_line(source['name'])}, edited\n",
        f"Made by `interp_ablate` from {_code(source['name'])} ({_line(source['kind'])}{base_model}), "
        f"weights in {_line(manifest['dtype'])}.\n",
    ]
    sections |= {"Merging": [manifest["merging"]]} if manifest.get("merging") else {}
    for title, content in sections.items():
        lines += [f"## {title}\n", *content, ""]
    return "\n".join([*lines, *filter(None, [manifest.get("more_card")])])


def _front_matter(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The card's metadata; fields of the hub: https://huggingface.co/docs/hub/model-cards."""
    source, card = manifest["source"], manifest.get("source_card") or {}
    kind = manifest.get("kind", "checkpoint")
    relation, library, _ = _KINDS[kind]
    base = source["name"] if source["kind"] == "hub" else source.get("base_model")
    base = base or card.get("base_model")
    names = [base] if isinstance(base, str) else list(base or ())
    bases = [name for name in names if _HUB_NAME.fullmatch(name)]
    front: dict[str, Any] = {"license": source.get("license") or card.get("license")}
    if front["license"] == card.get("license"):
        front |= {key: card.get(key) for key in ("license_name", "license_link")}
    link = front.get("license_link")
    if link and not re.match(r"https?://", link) and kind != "checkpoint":  # LICENSE is not copied
        front["license_link"] = (
            f"https://huggingface.co/{bases[0]}/blob/main/{link}" if bases else None
        )
    front["language"] = card.get("language")
    front["base_model"] = bases[0] if len(bases) == 1 else bases
    front["base_model_relation"] = relation if bases else None
    front["pipeline_tag"] = card.get("pipeline_tag", "text-generation")
    front["library_name"] = library
    inherited = card.get("tags", ())
    inherited = [inherited] if isinstance(inherited, str) else inherited
    subjects = [tag for tag in inherited if tag.lower() not in _FORMAT_TAGS]
    front["tags"] = [*dict.fromkeys([*subjects, *TAGS, *(["gguf"] if kind == "gguf" else [])])]
    return {key: value for key, value in front.items() if value}


def _yaml(front: Mapping[str, Any]) -> str:
    import yaml

    def line(value: Any) -> Any:
        return " ".join(value.split()) if isinstance(value, str) else [line(each) for each in value]

    texts = {key: line(value) for key, value in front.items()}
    return yaml.safe_dump(texts, sort_keys=False, allow_unicode=True, width=1000)


def _line(value: object) -> str:
    """The value on one line, without HTML."""
    return " ".join(str(value).split()).replace("<", "&lt;")


def _code(value: object) -> str:
    """The value as code, in a line or a cell of a table."""
    text = " ".join(", ".join(value).split() if isinstance(value, list) else str(value).split())
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def _edits(manifest: Mapping[str, Any], certificate: Mapping[str, Any]) -> list[str]:
    edits, changed = manifest["plan"]["edits"], manifest["edited"]
    lines = ["There is no plan: these are the weights of the model in memory."]
    if edits:
        lines = ["| edit | along | sites | amount | positions |", "|---|---|---|---|---|"]
        lines += [_edit(edit) for edit in edits]
    count = f"{len(changed)} tensors changed, {len(manifest['unchanged'])} did not"
    lines += ["", f"{count}{':' if changed else '.'}", ""]
    lines += [f"- {family}" for family in _families(changed)]
    added = manifest.get("added", ())
    lines += ["", f"Added: {', '.join(_families(added))}."] if added else []
    tied = manifest.get("tied") or ("untie" if manifest.get("untied") else None)
    # An adapter leaves the unembedding alone until it is merged: "Merging" says what happens then.
    if tied and (manifest.get("kind") != "lora" or tied == "skip-embedding"):
        lines += ["", _TIED[tied]]
    lines += ["", manifest["dequantized"]] if manifest.get("dequantized") else []
    left_out = manifest.get("left_out")
    if left_out:
        names = ", ".join(map(_code, left_out))
        lines += [
            "",
            f"Left behind in the source, because nothing here edits or checks it: {names}.",
        ]
    cost = certificate.get("cost_of_accept") or certificate.get("cost_of_skipped_embedding")
    if cost:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in cost.items())
        lines += [f"How far it is from the plan itself: {numbers}."]
    return [*lines, "", "The full plan and the names of all tensors are in `interp_ablate.json`."]


def _edit(edit: Mapping[str, Any]) -> str:
    names = [key for key in ("strength", "coefficient", "value") if key in edit]
    amount = ", ".join(f"{name} {_amount(edit[name])}" for name in names)
    layers: dict[str, list[int]] = {}
    for site in map(Site.parse, edit["sites"]):
        layers.setdefault(site.point, []).append(site.layer)
    places = [p if p.endswith("embed") else f"{p} {_ranges(at)}" for p, at in layers.items()]
    rank = len(edit["read"] if edit["op"] == "affine" else edit.get("vectors") or [0])
    op = edit["op"] + (f", rank {rank}" if rank > 1 else "")
    shifted = ", with a shift" if any(edit.get("shift") or ()) else ""
    op += ", norm-preserving" if edit.get("norm_preserving") else shifted
    where = f"{len(edit['sites'])} sites: {'; '.join(places)}"
    return f"| {op} | {_code(edit['label'])} | {where} | {amount} | {edit['positions']} |"


def _amount(value: float | Sequence[float]) -> str:
    values = value if isinstance(value, Sequence) else [value]
    low, high = min(values), max(values)
    return f"{low:.3g}" + (f" to {high:.3g}" if high > low else "")


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def _families(names: Sequence[str]) -> list[str]:
    """Tensors that differ in their numbers only as one: `layers.{0-3, 7}.weight` (5)."""
    by_pattern: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name)]
        by_pattern.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), []).append(numbers)
    families = []
    for pattern, rows in sorted(by_pattern.items()):
        ranges = [
            f"{{{_ranges(column)}}}" if len(rows) > 1 else f"{column[0]}" for column in zip(*rows)
        ]
        parts = pattern.split("{}")
        name = parts[0] + "".join(a + b for a, b in zip(ranges, parts[1:]))
        families.append(_code(name) + (f" ({len(rows)})" if len(rows) > 1 else ""))
    return families


def _results(test: Mapping[str, Any] | None) -> list[str]:
    if not test:
        return ["Not measured in this export."]
    n = test.get("n", {})
    how = {**({f"{side} prompts": count for side, count in n.items()}), **test.get("how", {})}
    details = ", ".join(f"{_line(k)}: {_line(v)}" for k, v in how.items())
    lines = [
        f"On prompts that neither made nor selected the direction{details and f' ({details})'}"
    ]
    intervals = test.get("intervals", {})
    lines += ["", "| measure (test split) | value | 95% interval |", "|---|---|---|"]
    for pattern, name in _METRICS.items():
        for when, edited in (("_before", ", unedited"), ("_after", ", edited")):
            key = pattern.format(when)
            if isinstance(test.get(key), (int, float)) and (when == "_before" or key != pattern):
                value, span = test[key], _interval(intervals.get(key))
                lines.append(f"| {name.format(edited)} | {value:.3g} | {span} |")
    if test.get("controls"):
        lines += [
            "",
            "| control, same edit | behaviour after | 95% interval | KL |",
            "|---|---|---|---|",
        ]
    for control in test.get("controls", ()):
        value, span = control["behaviour_after"], _interval(control.get("interval"))
        kl = control.get("kl_first_token", "")
        lines.append(f"| {_line(control['name'])} | {_short(value)} | {span} | {_short(kl)} |")
    if isinstance(test.get("kl_floor"), (int, float)):
        lines += [
            "",
            f"Rounding alone gives a KL of {test['kl_floor']:.2g} nats in {_line(test['kl_dtype'])}.",
        ]
    return lines


def _interval(low_high: Sequence[float | None] | None) -> str:
    return " to ".join(map(_short, low_high or ()))


def _short(value: float | str | None) -> str:
    """A number with three digits; "?" for one that is not finite, which JSON has as null."""
    return "?" if value is None else f"{value:.3g}" if not isinstance(value, str) else value


def _certificate(certificate: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    if certificate.get("passed") is None:
        return [
            "Not compared by logits when it was written; `interp-ablate verify` (below) does it."
        ]
    limits = certificate["limits"]
    rows = ["| reloaded, against the hooked model | value | limit |", "|---|---|---|"]
    rows += [f"| {name} | {certificate[name]:.3g} | {limits[name]:.3g} |" for name in limits]
    verdict = "passed" if certificate["passed"] else "FAILED"
    dtype = _line(certificate.get("dtype", manifest["dtype"]))
    effect, prompts = certificate.get("max_abs_logit_effect_of_plan"), certificate.get("prompts")
    text = f"Certificate: **{verdict}** (`certificate.json`), with the limits of {dtype} weights"
    text += f", on {prompts} prompts" if prompts else ""
    text += f"; the plan itself moves logits by up to {effect:.3g}" if effect else ""
    return [*rows, "", f"{text}.", *_compared(certificate, manifest)]


def _compared(certificate: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """What was compared in which precision, and in which version of transformers."""
    precisions = certificate.get("compared")
    if not isinstance(precisions, Mapping):
        return []
    version = manifest.get("versions", {}).get("transformers")
    text = (
        f"Weights stored in {_line(precisions['stored'])}, loaded in {_line(precisions['reloaded'])}"
        + (f" by transformers {_line(version)}" if version else "")
        + f"; the hooked model computed in {_line(precisions['hooked'])}."
    )
    return ["", text]


def _commands(manifest: Mapping[str, Any], base: Any) -> list[str]:
    code = _KINDS[manifest.get("kind", "checkpoint")][2]
    first = base[0] if isinstance(base, list) else base
    file = re.sub(r"[^\w.-]", "_", str(manifest.get("file", "model.gguf")))
    lines = [code.replace("BASE", first or "SOURCE").replace("FILE", file)]
    if manifest.get("kind", "checkpoint") == "checkpoint":
        lines.append("interp-ablate verify SOURCE THIS --plan interp_ablate.json")
    return [
        "THIS is this repository or folder, SOURCE the model it was made from:",
        "",
        "\n".join(["```", *lines, "```"]),
        *filter(None, [manifest.get("transformers_4")]),
    ]


def _limits(test: Mapping[str, Any] | None) -> list[str]:
    return [
        "Research into how behaviours are represented.",
        "",
        ("" if test else "No behaviour was measured in this export. ")
        + "Not tested: other languages, long contexts, several turns, sampling, other behaviours, other "
        "dtypes, quantized weights, and safety.",
        "",
        f"**{SAFETY_NOTICE}**",
    ]
