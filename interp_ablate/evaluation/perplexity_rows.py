"""Perplexity and bits a byte of a corpus, before and after, as rows of an evaluation.

Knows: which windows two models can be compared on. Does not know: how a loss is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from interp_ablate.evaluation.perplexity import WindowLoss
from interp_ablate.evaluation.results import ComparisonRow, ratio_row
from interp_ablate.models.model import Model
from interp_ablate.prompts.chat_template import encode
from interp_ablate.prompts.prompt import Prompt


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


def document_start(model: Model) -> str:
    """Say which tokens a document begins with."""
    row = encode(Prompt("x"), model.tokenizer, template="none")
    plain = model.tokenizer("x", add_special_tokens=False)["input_ids"]
    tokens = model.tokenizer.convert_ids_to_tokens(row[: len(row) - len(plain)])
    if not tokens:
        return "The tokenizer puts no BOS in front of text: a document's first token is not counted"
    return f"A document begins with {' '.join(tokens)}"
