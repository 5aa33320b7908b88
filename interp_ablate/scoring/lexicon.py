"""Scorers that count words: sentiment, formality, length.

Knows: word lists. Does not know: classifiers and judges.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from interp_ablate.errors import RunError
from interp_ablate.scoring.exchange import (
    ExplainingScorer,
    PromptResponse,
    ScorerKind,
    Verdict,
    as_number,
)
from interp_ablate.scoring.text_folding import sentences, without_spaces

Measure = Literal["sentiment", "formality", "length"]


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Function words that hardly any English text of some length does without.
_ENGLISH = _set_of(
    "the a an of to and in is are was it that you i for with on as be this have not at or by we my your "
    "he she they but from so can if do what there me will"
)
# Function words of Portuguese, Spanish, Italian, French, German and Dutch that are no English words.
_FOREIGN = _set_of(
    "que de da dos das em um uma o os com para por n\u00e3o muito meu minha est\u00e1 el la los las y es un una mi muy su "
    "del al con si il lo gli che di e per mio mia non sono molto \u00e8 le les des et est une du dans pour avec je tu "
    "nous vous pas mon ma mes tr\u00e8s der das ist und ich nicht ein eine zu mit auf mich mir sehr wir sie den dem het een "
    "en ik niet van voor met zijn mijn heel te ze wij ook aan"
)
_CONTRACTION = re.compile(
    r"\b\w+(?:n't|'(?:s|re|ve|ll|d|m))\b|\b(?:gonna|wanna|gotta|kinda|sorta|lemme|dunno)\b"
)
_INFORMAL = _set_of(
    "hey hi yeah yep yup nope nah ok okay wow cool awesome guy guys kid kids stuff lots pretty really super "
    "totally basically literally honestly gosh oops lol haha hmm dude buddy folks crazy anyway whatever "
    "thing things bit get gets got getting"
)
_FORMAL = _set_of(
    "furthermore moreover therefore thus hence consequently accordingly nevertheless nonetheless whereas "
    "however additionally regarding concerning pursuant herein upon shall whom whose wherein thereby "
    "sincerely respectfully kindly cordially esteemed endeavour endeavor commence ascertain facilitate "
    "obtain provide require request inquire inform assist sufficient numerous subsequently prior"
)


@dataclass(frozen=True)
class LexiconScorer(ExplainingScorer):
    """A measure of English text that needs no model.

    - sentiment: 50 + 50 x the mean over sentences of VADER's compound score; 50 is neutral. A mean, for
      the compound of a whole text saturates with its length. Source: Hutto and Gilbert 2014.
    - formality: formal words (connectives, officialese, words of nine letters and more) as a share of
      formal and informal ones (contractions, slang, exclamation marks, emoji), drawn to 50 where there
      are few of either: a count of markers, no more.
    - length: 100 x words / (words + `half`); a CJK character counts as a word.

    Text of other languages, or without a word that is known, has no sentiment and no formality: no verdict.
    There is no measure of humour that deserves the name without a model: ask a judge.

    Raises:
        RunError: an unknown measure, no vaderSentiment package.
    """

    measure: Measure = "sentiment"
    half: float = 60.0

    def __post_init__(self) -> None:
        if self.measure not in _MEASURES:
            raise RunError(
                f"no lexicon measures {self.measure!r}: there are {', '.join(_MEASURES)}. What needs "
                "understanding (humour, sarcasm, truth) is for judge: or classifier:"
            )
        if not (math.isfinite(self.half) and self.half > 0):
            raise RunError(f"half is a number of words above 0; got {self.half!r}")
        if self.measure == "sentiment":
            self._vader  # noqa: B018  (a missing package fails here, not after the rollouts)

    @property
    def name(self) -> str:
        return f"lexicon:{self.measure}"

    @property
    def identity(self) -> dict[str, Any]:
        more = {"half": self.half} if self.measure == "length" else {}
        return {"kind": "lexicon", "measure": self.measure, "version": 2, **more}

    @cached_property
    def _vader(self) -> Any:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise RunError(
                "the sentiment lexicon is the vaderSentiment package: pip install 'interp-ablate[lexicon]'"
            ) from error
        return SentimentIntensityAnalyzer()

    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        return [self._verdict(exchange.answer) for exchange in exchanges]

    def _verdict(self, text: str) -> Verdict:
        if self.measure != "length":
            why = _not_english(text, self._vader.lexicon if self.measure == "sentiment" else ())
            if why:
                return Verdict(None, why)
        return _MEASURES[self.measure](self, text)

    def _sentiment(self, text: str) -> Verdict:
        # straight apostrophes: VADER knows "don't", not its curly form
        plain = text.replace("\u2019", "'")
        compounds = [self._vader.polarity_scores(one)["compound"] for one in sentences(plain)]
        return Verdict(
            50 + 50 * sum(compounds) / len(compounds), detail={"sentences": len(compounds)}
        )

    def _formality(self, text: str) -> Verdict:
        plain = text.replace("\u2019", "'").casefold()
        words = _words(plain)
        formal = sum(word in _FORMAL or len(word) > 8 for word in words)
        marks = plain.count("!") + sum(unicodedata.category(c) == "So" for c in plain)
        informal = len(_CONTRACTION.findall(plain)) + sum(w in _INFORMAL for w in words) + marks
        share = (formal + 1) / (formal + informal + 2)
        return Verdict(100 * share, detail={"formal": formal, "informal": informal})

    def _length(self, text: str) -> Verdict:
        n = len(_words(text))
        return Verdict(100 * n / (n + self.half), detail={"words": n})


_MEASURES: dict[str, Callable[[LexiconScorer, str], Verdict]] = {
    "sentiment": LexiconScorer._sentiment,
    "formality": LexiconScorer._formality,
    "length": LexiconScorer._length,
}


def _words(text: str) -> list[str]:
    """The words of a text; characters of scripts without spaces one by one."""
    words: list[str] = []
    for word in re.findall(r"[\w']+", text):
        if any(map(without_spaces, word)):
            words += [c for c in word if without_spaces(c)]
        elif word.strip("'"):
            words.append(word.strip("'"))
    return words


def _not_english(text: str, lexicon: Container[str]) -> str:
    """Why an English lexicon has nothing to say of a text; "" where it has.

    English is a text in Latin letters of which one word in twelve is one of the common English ones, with more
    of these than of other languages' (any word with a letter that is not ASCII counts as such). Of a text of
    fewer than ten words one word has to be known, here or to the lexicon.
    """
    letters = [c for c in text if c.isalpha()]
    if sum("LATIN" in unicodedata.name(c, "") for c in letters) < 0.8 * len(letters):
        return "not English"
    words = [word.partition("'")[0] for word in _words(text.casefold().replace("\u2019", "'"))]
    common = sum(word in _ENGLISH for word in words)
    foreign = sum(word in _FOREIGN or not word.isascii() for word in words)
    if foreign > common or (len(words) >= 10 and common * 12 < len(words)):
        return "not English"
    known = common or any(w in lexicon or w in _FORMAL or w in _INFORMAL for w in words)
    return "" if known else "no word that is known"


def _make(measure: Any, options: dict[str, Any]) -> LexiconScorer:
    numbers = {key: as_number(key, value) for key, value in options.items() if key == "half"}
    return LexiconScorer(measure, **numbers)


KIND = ScorerKind(_make, "lexicon:MEASURE", options=("half",), cost=2)
