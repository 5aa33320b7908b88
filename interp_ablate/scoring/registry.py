"""The scorers that a line of text can name: the bundled kinds, and those that other packages register.

Knows: which kind a spec names. Does not know: how any kind scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.scoring import classifier, expressions, judge, lexicon
from interp_ablate.scoring.exchange import ExplainingScorer, ReversedScorer, ScorerKind
from interp_ablate.scoring.own_function import is_own_function, own_function
from interp_ablate.storage.entry_points import entry_named, entry_names

GROUP = "interp_ablate.scorers"
SCORERS: dict[str, ScorerKind] = {
    "expressions": expressions.KIND,
    "lexicon": lexicon.KIND,
    "classifier": classifier.KIND,
    "judge": judge.KIND,
}
"""The bundled kinds. Another package adds one by an entry point of the group `interp_ablate.scorers`, which
names a `ScorerKind`; a bundled kind goes before an entry point of the same name."""


def scorer_kind(name: str) -> ScorerKind | None:
    """The kind of that name, or None; packages that register other kinds are not imported.

    Raises:
        InterpAblateError: an entry point that fails to load, or that is no `ScorerKind`.
    """
    if name not in entry_names(SCORERS, GROUP):
        return None
    return entry_named(name, SCORERS, GROUP, what="scorer", error=RunError, kind=ScorerKind)


def make_scorer(
    spec: str | Mapping[str, Any],
    *,
    rubric: str | None = None,
    cache: str | Path | None = None,
    endpoint: Mapping[str, Any] | None = None,
    own_code: bool = False,
) -> ExplainingScorer:
    """Make the scorer that a line in a trait file, a manifest or a flag names.

    - `expressions:NAME_OR_FILE`, with options as in a URL: `expressions:declining?languages=all&scope=
      first_sentence&negation=true&threshold=2&own_speech=true`
    - `lexicon:sentiment`, `lexicon:formality`, `lexicon:length` (`?half=60`)
    - `classifier:FOLDER[#LABEL]`
    - `judge:MODEL@BASE_URL`, with `rubric` (`?weighted=true`; the rest of a query is the server's); the key
      is OPENAI_API_KEY
    - `NAME:...` for a kind that another package registers
    - `FILE.py:FUNCTION` for a function of yours, where `own_code` allows it

    A `-` before what follows the colon reverses the score: `lexicon:-sentiment` is 100 - x. A mapping is the
    same in parts: {"scorer": "judge:m@http://...", "rubric": ..., "weighted": true, "cache": ...}.

    Args:
        rubric: tells a judge what 0 and 100 mean; other kinds ignore it.
        cache: JSONL file of a judge's replies, so that none is paid for twice.
        endpoint: further fields of `EndpointSettings` (retries, timeout, concurrency, ...).
        own_code: whether a file of Python may be run; true only where a person named it, not a file of others.

    Raises:
        RunError: an unknown kind, name, measure, label or option; a judge without a rubric.
    """
    options: dict[str, Any] = {"rubric": rubric, "cache": cache, "endpoint": endpoint}
    options |= {"scorer": spec} if isinstance(spec, str) else dict(spec)
    named = str(options.pop("scorer", ""))
    if is_own_function(named):
        if not own_code:
            raise RunError(
                f"the scorer {named} is code, and is run only where a person names it: give --scorer {named} on "
                "the command line. In Python pass the function itself, or own_code=True"
            )
        function, reversed_too = own_function(named)
        return ReversedScorer(function) if reversed_too else function
    name, _, rest = named.partition(":")
    kind = scorer_kind(name)
    if kind is None or rest in ("", "-"):
        names = entry_names(SCORERS, GROUP)
        forms = [SCORERS[each].form if each in SCORERS else f"{each}:..." for each in names]
        raise RunError(
            f"no scorer {named!r}: give {', '.join(forms)}, FILE.py:FUNCTION; a - before the name reverses it"
        )
    unknown = sorted(set(options) - {"rubric", "cache", "endpoint", *kind.options})
    if unknown:
        raise RunError(
            f"the scorer {named!r} has no option {', '.join(unknown)}: there are "
            f"{', '.join(kind.options) or 'none'}"
        )
    text, in_spec = kind.split(rest.removeprefix("-"))
    in_parts = {key: value for key, value in options.items() if value is not None}
    scorer = kind.make(text, in_spec | in_parts)
    return ReversedScorer(scorer) if rest.startswith("-") else scorer
