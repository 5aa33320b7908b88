"""`lint`: faults of a contrast set that a direction would pick up.

Knows: flags and what is printed. Does not know: how a fault is found.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Lint:
    """Which contrast set is looked at."""

    contrast: str | None = setting(None, "bundled name, file, folder, or hf:NAME", positional=True)
    positive: str | None = setting(None, "file of prompts in which the concept is present")
    negative: str | None = setting(None, "file of prompts in which it is absent")
    system: str | None = setting(None, "system prompt for every prompt without its own", empty=True)
    json: bool = setting(False, "the whole report as JSON")


add = adding(Lint)


def run(args: Namespace) -> int:
    """Print the report."""
    from interp_ablate.prompts.contrast_set import ContrastSet
    from interp_ablate.prompts.linting import lint

    settings = settings_from(args, Lint)
    contrast = ContrastSet.load(
        settings.contrast,
        positive=settings.positive,
        negative=settings.negative,
        system=settings.system,
    )
    report = lint(contrast)
    if settings.json:
        print(json_text(report.to_dict(), ensure_ascii=False, indent=1))
        return 0
    print(
        f"{contrast.name}: {len(contrast.positive)} positive, {len(contrast.negative)} negative prompts"
    )
    print(f"bag of words alone separates them with AUC {report.bag_of_words_auc:.2f}")
    print(f"length alone separates them with AUC {report.length_auc:.2f}")
    for finding in report.findings:
        print(f"{finding.severity}: {finding.message}")
        for example in finding.examples:
            print(f"    {example}")
    return 0
