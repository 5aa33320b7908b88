"""`persona traits`: bundled traits, or what a trait file says.

Knows: what is printed. Does not know: trait files.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Traits:
    """Which trait is shown."""

    trait: str | None = setting(None, "bundled name or trait file", positional=True)
    json: bool = setting(False, "one JSON object a line")


add = adding(Traits)


def run(args: Namespace) -> int:
    """Print the traits."""
    from interp_ablate.persona.traits import bundled_traits, load_trait

    settings = settings_from(args, Traits)
    for name in [settings.trait] if settings.trait else bundled_traits():
        trait = load_trait(name)
        if settings.json:
            print(json_text(trait.to_dict()))
            continue
        print(f"{trait.name:<10} {trait.description}")
        if settings.trait:
            for place, (positive, negative) in enumerate(zip(trait.positive, trait.negative)):
                print(f"  p{place}+  {positive}\n  p{place}-  {negative}")
        counts = f"{len(trait.positive)} pairs, {len(trait.extraction_questions)} questions for extraction"
        print(
            f"{'':<10} {counts}, {len(trait.evaluation_questions)} for evaluation; scorer "
            f"{trait.scorer or 'none: needs a judge or classifier'}"
        )
    return 0
