"""A scorer that asks a text-classification model in a folder.

Knows: a classifier's labels. Does not know: judges.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.scoring.exchange import (
    ExplainingScorer,
    PromptResponse,
    ScorerKind,
    Verdict,
    as_flag,
)
from interp_ablate.storage.atomic_files import hash_file

logger = logging.getLogger(__name__)


class ClassifierScorer(ExplainingScorer):
    """100 x the probability of a label, by a `transformers` text-classification model.

    Args:
        model: a local folder, or a pipeline that is loaded already.
        label: the label whose probability counts; must be named where the model has more than one.
        with_prompt: the prompt goes in as the first text of a pair; by default the answer alone is judged.

    Longer texts are cut at the model's length; `detail` says which, and a warning how many.

    Raises:
        RunError: no such folder, no text-classification model in it, a label that it lacks, a regression.
    """

    def __init__(
        self,
        model: str | Path | Any,
        label: str | None = None,
        *,
        with_prompt: bool = False,
        batch_size: int = 8,
    ) -> None:
        self._folder = Path(model) if isinstance(model, (str, Path)) else None
        self._pipeline: Any = _load_classifier(self._folder) if self._folder else model
        self.with_prompt, self.batch_size = with_prompt, batch_size
        self.max_length = _longest(self._pipeline)
        self.label = self._chosen(label)

    def _chosen(self, label: str | None) -> str:
        config = self._pipeline.model.config
        labels = [config.id2label[i] for i in range(config.num_labels)]
        if config.problem_type == "regression":
            raise RunError(
                f"{self._title} is a regression: its output is no probability of a label"
            )
        if label is None and len(labels) == 1:
            return labels[0]
        if label is None or label not in labels:
            what = "which label? Add #LABEL" if label is None else f"it has no label {label!r}"
            raise RunError(f"{self._title}: {what}; there are {', '.join(labels)}")
        return label

    @property
    def _title(self) -> str:
        return (
            f"the classifier {self._folder or self._pipeline.model.config.name_or_path or 'given'}"
        )

    @property
    def name(self) -> str:
        return f"classifier:{self._folder.name if self._folder else 'given'}#{self.label}"

    @cached_property
    def identity(self) -> dict[str, Any]:  # type: ignore[override]
        source = (
            _folder_print(self._folder) if self._folder else _weights_print(self._pipeline.model)
        )
        return {
            "kind": "classifier",
            "label": self.label,
            "weights": source,
            "with_prompt": self.with_prompt,
            "max_length": self.max_length,
        }

    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        texts = [
            {"text": e.prompt.text, "text_pair": e.answer}
            if self.with_prompt
            else {"text": e.answer}
            for e in exchanges
        ]
        outputs = self._pipeline(
            texts,
            top_k=None,
            truncation=True,
            max_length=self.max_length,
            batch_size=self.batch_size,
        )
        lengths = [
            len(self._pipeline.tokenizer(**text, truncation=False, verbose=False)["input_ids"])
            for text in texts
        ]
        cut = [length > self.max_length for length in lengths]
        if any(cut):
            logger.warning(
                "%s read the first %d tokens of %d of %d texts",
                self._title,
                self.max_length,
                sum(cut),
                len(cut),
            )
        return [self._verdict(rows, long) for rows, long in zip(outputs, cut)]

    def _verdict(self, rows: list[dict[str, Any]], cut: bool) -> Verdict:
        score = {row["label"]: float(row["score"]) for row in rows}[self.label]
        if not math.isfinite(score):
            return Verdict(None, "not a number")
        return Verdict(100 * score, detail={"cut": True} if cut else {})


def _load_classifier(folder: Path) -> Any:
    from transformers import pipeline

    if not (folder / "config.json").is_file():
        raise RunError(
            f"no classifier in {folder}: give a folder with config.json, weights and tokenizer of a "
            "text-classification model (save_pretrained writes one)"
        )
    try:
        return pipeline("text-classification", model=str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RunError(f"cannot load a text-classification model from {folder}: {error}") from error


def _longest(pipeline: Any) -> int:
    """Number of tokens that the model can read: the tokenizer's limit, within the model's positions."""
    config, limit = pipeline.model.config, int(min(pipeline.tokenizer.model_max_length, 10**9))
    places = config.to_dict().get("max_position_embeddings") or limit
    if "roberta" in config.model_type or config.model_type == "camembert":
        places -= (config.pad_token_id or 0) + 1  # their positions start behind the padding's
    return min(limit, places)


def _folder_print(folder: Path) -> str:
    """sha256 over a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(
        p
        for p in folder.iterdir()
        if p.suffix in (".json", ".txt", ".model", ".safetensors", ".bin")
    ):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        hash_file(digest, path)
    return digest.hexdigest()


def _weights_print(model: Any) -> str:
    """sha256 over the sums of a loaded model's tensors, and its configuration's."""
    sums = [
        f"{name} {tensor.cpu().double().sum().item()!r}"
        for name, tensor in model.state_dict().items()
    ]
    return hashlib.sha256("\n".join([*sums, model.config.to_json_string()]).encode()).hexdigest()


def _make(place: str, options: dict[str, Any]) -> ClassifierScorer:
    folder, _, label = place.partition("#")
    with_prompt = as_flag(options.get("with_prompt", False))
    return ClassifierScorer(folder, label or options.get("label"), with_prompt=with_prompt)


KIND = ScorerKind(
    _make,
    "classifier:FOLDER[#LABEL]",
    options=("label", "with_prompt"),
    query="none",
    cost=3,
)
