"""Negative log-likelihood of a text, window by window, and rows of perplexity and bits a byte of two models.

Knows: documents, windows, losses, which windows two models can be compared on. Does not know: other measures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from interp_ablate.edits.conditional import refuse_conditions
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ModelError, RunError
from interp_ablate.evaluation.metrics import chosen_logprobs
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.evaluation.results import ComparisonRow, ratio_row
from interp_ablate.models.model import Model
from interp_ablate.prompts.chat_template import encode
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.incoming_files import incoming_text, parse_json

SEPARATOR = "---"  # alone on a line of a text file, between documents
# Log-probabilities held at a time, of whole distributions at the counted tokens.
HELD = 100_000_000


@dataclass(frozen=True)
class Corpus:
    """Documents whose perplexity is measured.

    Raises:
        RunError: no document with any text.
    """

    name: str
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.documents or not all(document.strip() for document in self.documents):
            raise RunError(
                f"{self.name} has no text, or an empty document: perplexity needs text in every one"
            )

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


def read_corpus(*paths: str | Path) -> Corpus:
    """Documents from files; without any, the bundled ones (28 passages of 3900 words in all).

    A text file is a document, or several with lines of `---` between them; a JSONL file has a document a
    line, under "text".

    Raises:
        RunError: no such file, not UTF-8, a malformed line (named), nothing in it.
    """
    if not paths:
        return Corpus("bundled text", _documents(bundled("texts", "text.txt")))
    documents = tuple(document for path in paths for document in _documents(Path(path)))
    return Corpus(", ".join(Path(path).name for path in paths), documents)


def _documents(path: Path) -> tuple[str, ...]:
    content = incoming_text(path)
    if path.suffix == ".jsonl":
        documents = tuple(_row_text(path, i, line) for i, line in enumerate(content.split("\n"), 1))
        documents = tuple(text for text in documents if text)
    else:
        parts: list[list[str]] = [[]]
        for line in content.splitlines():
            parts.append([]) if line.strip() == SEPARATOR else parts[-1].append(line)
        documents = tuple(text for part in parts if (text := "\n".join(part).strip()))
    if not documents:
        raise RunError(f"{path} holds no text: perplexity needs some")
    return documents


def _row_text(path: Path, number: int, line: str) -> str:
    if not line.strip():
        return ""
    try:
        text = parse_json(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f'{path}, line {number}: expected a JSON object with "text" ({error!r})'
        ) from error
    if not isinstance(text, str) or not text.strip():
        raise RunError(f'{path}, line {number}: "text" is {text!r}, not a text')
    return text.strip()


@dataclass(frozen=True)
class Window:
    """Tokens begin..end of a row, of which those from `scored` on are counted."""

    begin: int
    scored: int
    end: int


def windows(n: int, *, context: int, stride: int, first: int = 1) -> list[Window]:
    """Windows of at most `context` tokens, `stride` apart, that count every token from `first` on once.

    A token has the tokens before it in its window as context: at least context - stride of them after
    the first window. Source: the fixed-length perplexity of
    https://huggingface.co/docs/transformers/perplexity, without the token that each window loses there
    where windows do not overlap.

    Raises:
        RunError: a stride that leaves no overlap, a context below 2 tokens.
    """
    if context < 2 or not 1 <= stride < context:
        raise RunError(
            f"context {context}, stride {stride}: a window has at least 2 tokens, and the stride is from 1 "
            "to context - 1, so that each window's first counted token has one before it"
        )
    cut, done = [], first
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        if end > done:
            cut.append(Window(begin, done, end))
            done = end
        if end == n:
            break
    return cut


@dataclass(frozen=True)
class WindowLoss:
    """The negative log-likelihood of one window's counted tokens."""

    document: int
    tokens: int
    nats: float
    bytes: int | None
    """Bytes of the text that the tokens stand for; None where the tokenizer does not say which it is."""


def corpus_losses(
    model: Model,
    text: Corpus,
    *,
    plan: Plan | None = None,
    context: int = 512,
    stride: int = 256,
) -> list[WindowLoss]:
    """Negative log-likelihoods of a text's tokens, window by window, in the documents' order.

    Every document is a row of its own. It starts with what the tokenizer puts in front of raw text (a
    BOS, where it has one); where it puts nothing, the first token is context and not counted. Under a
    plan, counted tokens are positions `generated`, the others `prompt`.

    Raises:
        RunError: see `windows`; no document has a token to count.
        ModelError: a model without a tokenizer.
        InterpAblateError: NaN or infinity in the logits.
    """
    refuse_conditions(plan, "perplexity of text", model.plans.conditions)
    if model.tokenizer is None:
        raise ModelError(f"{model.source.name} has no tokenizer: perplexity of text needs one")
    cut = [
        placed
        for number, document in enumerate(text.documents)
        for placed in _placed(model, number, document, context, stride)
    ]
    if not cut:
        raise RunError(f"{text.name}: no document has more than one token: nothing can be counted")
    losses = [loss for loss, _, _ in cut]
    left = sorted(range(len(cut)), key=lambda i: -len(cut[i][1]) - len(cut[i][2]))
    while left:
        size = max(1, HELD // (max(len(cut[i][2]) for i in left) * model.tl.cfg.d_vocab))
        chosen, left = left[:size], left[size:]
        ends = [cut[i][2] for i in chosen]
        outputs = ModelOutputs(model, [cut[i][1] for i in chosen], plan)
        for i, logprobs in zip(chosen, outputs.continuation_logprobs(ends, batch_size=size)):
            nats = -float(chosen_logprobs(logprobs, cut[i][2]).sum())
            losses[i] = replace(losses[i], nats=nats)
    return losses


def _placed(
    model: Model, number: int, document: str, context: int, stride: int
) -> Iterator[tuple[WindowLoss, list[int], list[int]]]:
    """A document's windows, their nats still unknown: what is context, and what is counted."""
    row, first, starts = _tokens(model, document)
    size = len(document.encode())
    for window in windows(len(row), context=context, stride=stride, first=first):
        length = None
        if starts is not None:
            end = starts[window.end] if window.end < len(row) else size
            length = end - starts[window.scored]
        loss = WindowLoss(number, window.end - window.scored, math.nan, length)
        yield loss, row[window.begin : window.scored], row[window.scored : window.end]


def _tokens(model: Model, document: str) -> tuple[list[int], int, list[int] | None]:
    """A document's row, the first token that is counted, and the byte at which each token begins."""
    row = encode(Prompt(document), model.tokenizer, template="none")
    if not model.tokenizer.is_fast:
        plain = list(model.tokenizer(document, add_special_tokens=False)["input_ids"])
        return row, max(1, len(row) - len(plain)), None
    tokenized = model.tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
    extra = len(row) - len(tokenized["input_ids"])
    counted = [0]  # bytes before each character
    for character in document:
        counted.append(counted[-1] + len(character.encode()))
    starts = [0] * extra + [counted[start] for start, _ in tokenized["offset_mapping"]]
    return row, max(1, extra), starts


def perplexity_rows(
    name: str,
    before: Sequence[WindowLoss],
    after: Sequence[WindowLoss],
    *,
    comparable: bool,
    with_bytes: bool,
) -> Iterator[ComparisonRow]:
    """Rows of perplexity a token and, with bytes, of bits a byte.

    Args:
        comparable: the two models count the same tokens, so that a difference means something.
    """

    def column(of: str) -> list[np.ndarray]:
        return [np.array([getattr(x, of) for x in side], float) for side in (before, after)]

    nats, tokens = column("nats"), column("tokens")
    sums = [(n, t) for n, t in zip(nats, tokens)]
    yield ratio_row(
        "perplexity a token", name, "perplexity", sums[0], sums[1], comparable=comparable
    )
    if with_bytes:
        sums = [(n / math.log(2), size) for n, size in zip(nats, column("bytes"))]
        yield ratio_row("bits a byte", name, "bits", sums[0], sums[1])


def whole_documents(*sides: Sequence[WindowLoss]) -> list[list[WindowLoss]]:
    """Sum the losses by document, for the documents that both tokenizers have tokens to count in."""
    summed = []
    shared = set.intersection(*({loss.document for loss in losses} for losses in sides))
    for losses in sides:
        whole = []
        for number in sorted(shared):
            parts = [loss for loss in losses if loss.document == number]
            sizes = [part.bytes for part in parts]
            size = None if None in sizes else sum(x for x in sizes if x is not None)
            tokens, nats = sum(part.tokens for part in parts), math.fsum(p.nats for p in parts)
            whole.append(WindowLoss(number, tokens, nats, size))
        summed.append(whole)
    return summed


def document_start(tokenizer: Any) -> str:
    """Say which tokens a document begins with."""
    row = encode(Prompt("x"), tokenizer, template="none")
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(row[: len(row) - len(plain)])
    if not tokens:
        return "The tokenizer puts no BOS in front of text: a document's first token is not counted"
    return f"A document begins with {' '.join(tokens)}"
