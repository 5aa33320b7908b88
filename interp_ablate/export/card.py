"""Card: the model card of an exported checkpoint.

Knows: what a reader of the export must be told. Does not know: how any of the numbers was measured.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

PACKAGES = ("interp-ablate", "torch", "transformers", "transformer-lens", "safetensors", "numpy")
SAFETY_NOTICE = (
    "An edit of this kind can remove safety training along with the behaviour it was aimed at. "
    "Treat the result as a model without such training until you have shown otherwise."
)
# metric of the test split -> how the card names it
_METRICS = {
    "behaviour_before": "behaviour, positive prompts, unedited",
    "behaviour_after": "behaviour, positive prompts, edited",
    "negative_before": "behaviour, negative prompts, unedited",
    "negative_after": "behaviour, negative prompts, edited",
    "kl_first_token": "KL to the unedited model, first token, negative prompts (nats)",
    "kl_continuation": "KL per token over the unedited model's own answers (nats)",
    "repetition_before": "repeated 3-grams, negative prompts, unedited",
    "repetition_after": "repeated 3-grams, negative prompts, edited",
    "perplexity_before": "perplexity of the unedited model's answers, unedited",
    "perplexity_after": "perplexity of the unedited model's answers, edited",
}


def versions() -> dict[str, str]:
    """Versions of what computed a result; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def model_card(manifest: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    """README.md of the export: what was edited, from what, what it did, what was not tested."""
    source = manifest["source"]
    base, license_name = source.get("base_model"), source.get("license")
    front = ["---"]
    front += [f"base_model: {base}"] if base else []
    front += [f"license: {license_name}"] if license_name else []
    front += ["library_name: transformers", "tags:", "- activation-steering", "---", ""]
    return "\n".join(
        [
            *front,
            f"# {source['name']}, edited",
            "",
            f"Made by `interp_ablate` from `{source['name']}` ({source['kind']}"
            + (f", base model `{base}`" if base else "")
            + f"), weights in {manifest['dtype']}.",
            "",
            "## What was edited",
            "",
            *_edits(manifest),
            "",
            "## What it did",
            "",
            *_results(manifest.get("test")),
            "",
            "## Is this the model that was measured?",
            "",
            *_certificate(certificate),
            "",
            "## Intended use and limits",
            "",
            "Research into how behaviours are represented. Not tested: other languages, long contexts, "
            "other behaviours, and safety.",
            "",
            f"**{SAFETY_NOTICE}**",
            "",
        ]
    )


def _edits(manifest: Mapping[str, Any]) -> list[str]:
    edits = manifest["plan"]["edits"]
    lines = [
        f"- {edit['op']} along `{edit['label']}` at {len(edit['sites'])} sites "
        f"({edit['sites'][0]} to {edit['sites'][-1]})"
        for edit in edits
    ] or ["- no plan: the weights of the model in memory"]
    lines.append(
        f"- {len(manifest['edited'])} tensors changed, {len(manifest['unchanged'])} did not"
    )
    if manifest["untied"]:
        lines.append("- the tied embedding was untied: `lm_head.weight` keeps the unedited values")
    return [*lines, "", "The full plan and the names of all tensors are in `interp_ablate.json`."]


def _results(test: Mapping[str, Any] | None) -> list[str]:
    if not test:
        return ["Not measured in this export."]
    intervals = test.get("intervals", {})
    rows = ["| measure (test split) | value | 95% interval |", "|---|---|---|"]
    for key, name in _METRICS.items():
        if isinstance(test.get(key), (int, float)):
            low_high = intervals.get(key)
            span = f"{low_high[0]:.3g} to {low_high[1]:.3g}" if low_high else ""
            rows.append(f"| {name} | {test[key]:.3g} | {span} |")
    return rows


def _certificate(certificate: Mapping[str, Any]) -> list[str]:
    limits = certificate["limits"]
    rows = [
        "| reloaded in transformers, against the hooked model | value | limit |",
        "|---|---|---|",
    ]
    rows += [f"| {name} | {certificate[name]:.3g} | {limits[name]:.3g} |" for name in limits]
    verdict = "passed" if certificate["passed"] else "FAILED"
    return [*rows, "", f"Certificate: **{verdict}** (`certificate.json`)."]
