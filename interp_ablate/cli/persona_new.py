"""`persona new`: a trait file that a model behind a URL writes.

Knows: flags and what is printed. Does not know: what a trait file needs.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

from interp_ablate.cli.options import REPLACE, check_new
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.settings import setting


@dataclass(frozen=True)
class New:
    """Which trait, written by which model."""

    name: str = setting(help="of the trait", positional=True)
    description: str = setting(help="what it means", metavar="TEXT")
    endpoint: str | None = setting(
        None, "OpenAI-compatible (default: OPENAI_BASE_URL)", metavar="URL"
    )
    judge_model: str = setting(help="as the endpoint names it", metavar="M")
    scorer: str | None = setting(None, "spec of an offline scorer to note in the file")
    out: str = setting(help="trait file to write (.json)")
    force: bool = setting(False, REPLACE)


add = adding(New)


def run(args: Namespace) -> int:
    """Write the trait file."""
    from interp_ablate.persona.trait_writer import generate_trait
    from interp_ablate.scoring.endpoint import Endpoint, EndpointSettings

    settings = settings_from(args, New)
    out = Path(settings.out)
    check_new(out, settings.force, ours=lambda begins: begins.lstrip().startswith(b"{"))
    if out.suffix.lower() != ".json":
        raise RunError(f"--out {out}: a trait file ends in .json")
    # forty questions and ten system prompts are some thousand tokens
    limits = EndpointSettings(max_tokens=8192, timeout=300.0)
    endpoint = Endpoint(settings.judge_model, settings.endpoint, settings=limits)
    try:
        trait = generate_trait(endpoint, settings.name, settings.description)
    except InterpAblateError as error:
        raise RunError(f"no trait file was written: {error}") from error
    if settings.scorer:
        trait = replace(trait, scorer=settings.scorer)
    trait.save(out)
    print(
        f"{out}: {len(trait.positive)} pairs, {len(trait.extraction_questions)} + "
        f"{len(trait.evaluation_questions)} questions. Read it before you use it"
    )
    return 0
