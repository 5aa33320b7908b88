"""The settings of a run, checked before any work.

Knows: settings and their checks. Does not know: what a stage does with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.models.loading import LoadingOptions
from interp_ablate.settings import MAX_KL, MAX_NEW_TOKENS, SPLIT_SIZES, setting, suggestion
from interp_ablate.sites import POINTS, RESIDUAL_POINTS, Site, sites_of

MAIN_METHOD = "difference_in_means"
NO_MODEL = "no model: give --model (a bundled alias such as smollm2, a folder, a hub name)"
_OF_SIDE = tuple(
    f"(default {n}, or in proportion where there are fewer)" for n in SPLIT_SIZES.values()
)
# Settings that name a content: what it holds is part of a run's identity, the name is not.
NAMES = (
    "model", "template", "contrast", "positive", "negative", "expressions", "scorer", "rubric",
)  # fmt: skip
PERMISSIONS = ("trust_remote_code", "own_code")


@dataclass(frozen=True)
class Configuration(LoadingOptions):
    """Everything that decides a run's results. Two runs of equal configurations give equal results.

    `trust_remote_code` and `own_code` are permissions: no part of what a folder stores, and never granted by one.

    Raises:
        RunError: values that cannot be used together, or out of range.
    """

    model: str = setting(None, "bundled alias (smollm2), HF folder, .gguf file or hub name")
    contrast: str | None = setting(
        None, "bundled name, JSONL/CSV/parquet file, folder, or hf:NAME of the two sets of prompts"
    )
    positive: str | None = setting(None, "file of prompts in which the concept is present")
    negative: str | None = setting(None, "file of prompts in which it is absent")
    system: str | None = setting(None, "system prompt for every prompt without its own", empty=True)
    expressions: str | None = setting(
        None, "how the behaviour looks: a built-in list, or a file with a phrase a line"
    )
    scorer: str | None = setting(
        None,
        "in place of expressions: lexicon:sentiment, classifier:FOLDER#LABEL, judge:MODEL@BASE_URL, "
        "FILE.py:FUNCTION; its score over 100 is the rate",
        metavar="SPEC",
    )
    rubric: str | None = setting(None, "of a judge: its text, or a file (@FILE)")
    sites: tuple[str, ...] = setting(RESIDUAL_POINTS, "comma-separated points of the stream")
    layers: str | None = setting(None, "A-B, both included (default: all)")
    positions: tuple[str, ...] = setting(
        ("-1",), "comma-separated: -1, -2, ..., after_instruction (all of these), response_mean"
    )
    n_train: int | None = setting(None, f"prompts a side that make the directions {_OF_SIDE[0]}")
    n_validation: int | None = setting(None, f"prompts a side that choose the plan {_OF_SIDE[1]}")
    n_test: int | None = setting(None, f"prompts a side that report it {_OF_SIDE[2]}")
    seed: int = setting(0, "of the split and of everything random")
    max_new_tokens: int = setting(MAX_NEW_TOKENS, "tokens of an answer, at most")
    max_kl: float = setting(MAX_KL, "first-token KL budget in nats")
    own_code: bool = False
    """Whether the scorer may be a file of Python: a permission, which no folder stores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.contrast is None) == (self.positive is None) or (self.positive is None) != (
            self.negative is None
        ):
            raise RunError("give either --contrast, or both --positive and --negative")
        if self.scorer is not None and self.expressions is not None:
            raise RunError(
                "give --expressions or --scorer: either says how the behaviour looks "
                "(--scorer expressions:NAME?... takes a list with options)"
            )
        if self.rubric is not None and not (self.scorer or "").startswith("judge:"):
            raise RunError("--rubric is of a judge: give --scorer judge:MODEL@BASE_URL with it")
        check_points(self.sites)
        for name, least in (
            ("n_train", 2),
            ("n_validation", 2),
            ("n_test", 1),
            ("max_new_tokens", 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                flag = name.replace("_", "-")
                raise RunError(f"--{flag} must be at least {least}; got {value}")
        if not self.max_kl > 0:
            raise RunError(f"--max-kl must be above 0 (nats); got {self.max_kl}")

    @property
    def split_sizes(self) -> dict[str, int | None]:
        """Prompts a side of each part of the split; None: the usual number."""
        return {"n_train": self.n_train, "n_validation": self.n_validation, "n_test": self.n_test}

    def to_dict(self) -> dict[str, Any]:
        """What a run folder stores, as JSON."""
        stored = asdict(self)
        for permission in PERMISSIONS:
            del stored[permission]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in stored.items()}

    @staticmethod
    def stored_in(saved: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a run.json holds, without a permission that somebody wrote into it."""
        stored = saved["configuration"]
        return {name: value for name, value in stored.items() if name not in PERMISSIONS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Configuration:
        """From flags, TOML or run.json; lists become tuples, unset values the defaults.

        Raises:
            RunError: an unknown key, a missing model.
        """
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise RunError(
                f"unknown setting {unknown[0]!r}{suggestion(unknown[0], names)}: accepted are "
                f"{', '.join(sorted(names))}"
            )
        if not data.get("model"):
            raise RunError(NO_MODEL)
        try:
            values: dict[str, Any] = {
                k: tuple(map(str, v)) if isinstance(v, list) else v for k, v in data.items()
            }
            return cls(**values)
        except TypeError as error:
            raise RunError(f"a setting has the wrong type: {error}") from error


def check_points(points: Sequence[str]) -> None:
    """Refuse what `--sites` cannot take.

    Raises:
        RunError: it names what it can.
    """
    wrong = [point for point in points if point not in POINTS]
    if wrong or not points:
        raise RunError(
            f"unknown site {wrong[0] if wrong else ''!r}: accepted are {', '.join(POINTS)}"
        )


def layers_of(layers: str | None, n_layers: int) -> range:
    """`--layers A-B`, both ends included, checked against the model; None: all.

    Raises:
        RunError: not of that form, or beyond the model.
    """
    if layers is None:
        return range(n_layers)
    first, _, last = str(layers).partition("-")
    if not first.isdigit() or not (last or first).isdigit():
        raise RunError(f"cannot read --layers {layers!r}: write A-B, such as 10-25")
    start, end = int(first), int(last or first)
    if not 0 <= start <= end < n_layers:
        raise RunError(f"--layers {layers}: the model has layers 0 to {n_layers - 1}")
    return range(start, end + 1)


def sites_of_model(model: Any, points: Sequence[Any], layers: str | None) -> tuple[Site, ...]:
    """The sites that `--sites` and `--layers` name in a model; the usual three points are those that its blocks have.

    Raises:
        RunError: layers that it lacks.
    """
    chosen: Any = model.residual_points if tuple(points) == RESIDUAL_POINTS else points
    return sites_of(chosen, layers_of(layers, model.n_layers))
