"""Judges: what scores exchanges from 0 to 100 (`exchanges.TextScorer`), each with its reasons for no verdict.

Knows: expression lists, lexicons, text classifiers and language models as judges, reading their verdicts
strictly, and a scorer from a line of text. Does not know: how expressions match (`expressions`), how a server
is asked (`endpoints`), where exchanges come from, what is done with a score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from interp_ablate.errors import RunError
from interp_ablate.scoring.classifier import ClassifierScorer
from interp_ablate.scoring.endpoint import Endpoint
from interp_ablate.scoring.expression_lists import expression_names, read_expressions
from interp_ablate.scoring.expression_text import ExpressionTextScorer
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.scoring.judge import Judge
from interp_ablate.scoring.lexicon import LexiconScorer
from interp_ablate.scoring.verdicts import ExplainingScorer, ReversedScorer

KINDS = "expressions:NAME_OR_FILE, lexicon:MEASURE, classifier:FOLDER[#LABEL], judge:MODEL@BASE_URL"


# ---- a scorer from a line of text ----------------------------------------------------------------


def make_scorer(
    spec: str | Mapping[str, Any],
    *,
    rubric: str | None = None,
    cache: str | Path | None = None,
    endpoint: Mapping[str, Any] | None = None,
) -> ExplainingScorer:
    """A scorer as it is named in trait files, manifests and flags.

    - `expressions:NAME_OR_FILE`, with options as in a URL: `expressions:declining?languages=all&scope=
      first_sentence&negation=true&threshold=2`
    - `lexicon:sentiment`, `lexicon:formality`, `lexicon:length` (`?half=60`)
    - `classifier:FOLDER[#LABEL]`
    - `judge:MODEL@BASE_URL`, with `rubric` (`?weighted=true`; the rest of a query is the server's); the key
      is OPENAI_API_KEY

    A `-` before what follows the colon reverses the score: `lexicon:-sentiment` is 100 - x. A mapping is the
    same in parts: {"scorer": "judge:m@http://...", "rubric": ..., "weighted": true, "cache": ...}.

    Args:
        rubric: of a judge.
        cache: JSONL file of a judge's replies, so that none is paid for twice.
        endpoint: further arguments of `Endpoint` (retries, timeout, concurrency, ...).

    Raises:
        RunError: an unknown kind, name, measure, label or option; a judge without a rubric.
    """
    options: dict[str, Any] = {"rubric": rubric, "cache": cache, "endpoint": endpoint}
    given = {"scorer": spec} if isinstance(spec, str) else dict(spec)
    named = str(given.pop("scorer", ""))
    options |= given
    kind, colon, rest = named.partition(":")
    back = rest.startswith("-")
    rest = rest.removeprefix("-")
    if kind not in _KINDS or not colon or not rest:
        raise RunError(f"no scorer {named!r}: give {KINDS}; a - before the name reverses it")
    unknown = sorted(set(options) - {"rubric", "cache", "endpoint", *_OPTIONS[kind]})
    if unknown:
        raise RunError(
            f"the scorer {named!r} has no option {', '.join(unknown)}: there are "
            f"{', '.join(_OPTIONS[kind]) or 'none'}"
        )
    scorer = _KINDS[kind](rest, {k: v for k, v in options.items() if v is not None})
    return ReversedScorer(scorer) if back else scorer


def _expressions_of(rest: str, options: dict[str, Any]) -> ExplainingScorer:
    name, given = _split_options(rest, "expressions")
    given |= {k: v for k, v in options.items() if k in _OPTIONS["expressions"]}
    languages = given.get("languages", ())
    chosen: dict[str, Any] = {
        "languages": tuple(languages.split(","))
        if isinstance(languages, str)
        else tuple(languages),
        "scope": given.get("scope", "whole"),
        "negation": _flag(given.get("negation", False)),
        "threshold": _number("threshold", given.get("threshold", 1.0)),
    }
    expressions = name if name in expression_names() else read_expressions(name)
    label = name if name in expression_names() else Path(name).stem
    return ExpressionTextScorer(ExpressionScorer(expressions, **chosen), label)


def _lexicon_of(rest: str, options: dict[str, Any]) -> ExplainingScorer:
    measure, given = _split_options(rest, "lexicon")
    given |= {k: v for k, v in options.items() if k in _OPTIONS["lexicon"]}
    known: Any = measure
    return LexiconScorer(known, **{k: _number(k, v) for k, v in given.items()})


def _classifier_of(rest: str, options: dict[str, Any]) -> ExplainingScorer:
    folder, _, label = rest.partition("#")
    return ClassifierScorer(
        Path(folder),
        label or options.get("label"),
        with_prompt=_flag(options.get("with_prompt", False)),
    )


def _judge_of(rest: str, options: dict[str, Any]) -> ExplainingScorer:
    rest, given = _own_options(rest, "judge")
    options = {**given, **options}
    model, at, url = rest.rpartition("@http")
    base_url = f"http{url}" if at else None
    model = model if at else rest
    if "rubric" not in options:
        raise RunError(f"judge:{model} needs a rubric (--rubric FILE): what is 0, and what is 100?")
    where = Endpoint(
        model,
        base_url,
        cache=options.get("cache"),
        **dict(options.get("endpoint", {})),
    )
    return Judge(where, options["rubric"], weighted=_flag(options.get("weighted", False)))


_KINDS: dict[str, Callable[[str, dict[str, Any]], ExplainingScorer]] = {
    "expressions": _expressions_of,
    "lexicon": _lexicon_of,
    "classifier": _classifier_of,
    "judge": _judge_of,
}
_OPTIONS: dict[str, tuple[str, ...]] = {
    "expressions": ("languages", "scope", "negation", "threshold"),
    "lexicon": ("half",),
    "classifier": ("label", "with_prompt"),
    "judge": ("weighted",),
}


def _split_options(rest: str, kind: str) -> tuple[str, dict[str, Any]]:
    """NAME?option=value&option=value."""
    name, mark, query = rest.partition("?")
    try:
        given = dict(parse_qsl(query, strict_parsing=bool(mark)))
    except ValueError:
        given = {query: ""}
    unknown = sorted(set(given) - set(_OPTIONS[kind]))
    if unknown:
        raise RunError(
            f"{kind}:{rest}: no option {', '.join(unknown)}; there are "
            f"{', '.join(f'{one}=...' for one in _OPTIONS[kind])}, joined by &"
        )
    return name, dict(given)


def _own_options(rest: str, kind: str) -> tuple[str, dict[str, str]]:
    """A URL without the options that are ours, and these."""
    name, mark, query = rest.partition("?")
    parts = [part.partition("=") for part in query.split("&")]
    given = {key: value for key, _, value in parts if key in _OPTIONS[kind]}
    left = "&".join("".join(part) for part in parts if part[0] not in given)
    return (f"{name}{mark}{left}" if left else name), given


def _flag(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    found = known.get(str(value).casefold())
    if found is None:
        raise RunError(f"expected true or false; got {value!r}")
    return found


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise RunError(f"{name} is a number; got {value!r}") from error
