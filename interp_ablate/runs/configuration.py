"""The settings of a run, checked before any work.

Knows: settings and their checks. Does not know: what a stage does with them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.sites import POINTS, RESIDUAL_POINTS

MAIN_METHOD = "difference_in_means"


@dataclass(frozen=True)
class Configuration:
    """Everything that decides a run's results. Two runs of equal configurations give equal results.

    Raises:
        RunError: values that cannot be used together, or out of range.
    """

    model: str
    contrast: str | None = None
    positive: str | None = None
    negative: str | None = None
    backend: str = "bridge"
    dtype: str = "float32"
    device: str = "cpu"
    system: str | None = None
    template: str | None = None
    expressions: str | None = None
    sites: tuple[str, ...] = RESIDUAL_POINTS
    layers: str | None = None
    positions: tuple[str, ...] = ("-1",)
    n_train: int = 64
    n_validation: int = 32
    n_test: int = 32
    seed: int = 0
    max_new_tokens: int = 32
    max_kl: float = 0.1

    def __post_init__(self) -> None:
        if (self.contrast is None) == (self.positive is None) or (self.positive is None) != (
            self.negative is None
        ):
            raise RunError("give either --contrast, or both --positive and --negative")
        wrong = [site for site in self.sites if site not in POINTS]
        if wrong or not self.sites:
            raise RunError(
                f"unknown site {wrong[0] if wrong else ''!r}: accepted are {', '.join(POINTS)}"
            )
        for name, least in (
            ("n_train", 2),
            ("n_validation", 2),
            ("n_test", 1),
            ("max_new_tokens", 1),
        ):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise RunError(f"--{flag} must be at least {least}; got {getattr(self, name)}")
        if not self.max_kl > 0:
            raise RunError(f"--max-kl must be above 0 (nats); got {self.max_kl}")

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Configuration:
        """From flags, TOML or run.json; lists become tuples, unset values the defaults.

        Raises:
            RunError: an unknown key, a missing model.
        """
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise RunError(
                f"unknown setting {unknown[0]!r}: accepted are {', '.join(sorted(names))}"
            )
        if not data.get("model"):
            raise RunError(
                "no model: give --model (a bundled alias such as smollm2, a folder, a hub name)"
            )
        try:
            values: dict[str, Any] = {
                k: tuple(map(str, v)) if isinstance(v, list) else v for k, v in data.items()
            }
            return cls(**values)
        except TypeError as error:
            raise RunError(f"a setting has the wrong type: {error}") from error

    def layer_range(self, n_layers: int) -> range:
        """`--layers A-B`, both ends included, checked against the model.

        Raises:
            RunError: not of that form, or beyond the model.
        """
        if self.layers is None:
            return range(n_layers)
        first, _, last = str(self.layers).partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise RunError(f"cannot read --layers {self.layers!r}: write A-B, such as 10-25")
        start, end = int(first), int(last or first)
        if not 0 <= start <= end < n_layers:
            raise RunError(f"--layers {self.layers}: the model has layers 0 to {n_layers - 1}")
        return range(start, end + 1)
