"""A persona: a trait's directions in one model, and the folder that holds them.

Knows: the folder's files. Does not know: how a persona is extracted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from interp_ablate.activations.pooling import POSITIONS
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.edits.edit import Positions
from interp_ablate.edits.kinds import Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import DirectionError, RunError
from interp_ablate.models.model import Model, check_model
from interp_ablate.persona.readout import COLUMNS as READOUT_COLUMNS
from interp_ablate.persona.readout import METHOD as READOUT_METHOD
from interp_ablate.persona.traits import Trait, load_trait
from interp_ablate.sites import Site, SiteLike
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)


FORMAT = "interp_ablate.persona/2"
LAYER_COLUMNS = (
    "layer", "site", "norm", "coefficient", "score", "score_low", "score_high", "coherence", "answers",
    "no_verdict", "chosen",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Persona:
    """A trait's directions in one model, the one that was chosen, and how strongly to add it."""

    trait: Trait
    directions: Directions
    """The differences of means of every layer and pooling, then the slopes for `readout_direction`."""
    direction: Direction
    """The chosen direction. Its `raw` is the difference of means: coefficient 1 moves the mean response
    without the trait onto that with it."""
    coefficient: float
    model: str
    """Name of the model that it was extracted from."""
    details: dict[str, Any] = field(default_factory=dict)
    """The rest of `persona.json`: layers, counts, settings, versions."""

    @property
    def site(self) -> Site:
        """resid_post of the chosen layer; `hidden_states[layer + 1]` in the published code's counting."""
        return self.direction.site

    @property
    def name(self) -> str:
        return self.trait.name

    @property
    def readout_direction(self) -> Direction:
        """The direction to project text on: how the trait shows, where `direction` is how to bring it about.

        It is that of the layer that reads best (`readout.fit_readout`), or `direction` where the extraction
        found none.
        """
        site = (self.details.get("readout") or {}).get("site")
        return self.direction if site is None else self.readout_direction_at(site)

    def readout_direction_at(self, site: SiteLike) -> Direction:
        """The direction to project text on at another layer's resid_post.

        Raises:
            DirectionError: none there.
        """
        return self.directions[site, POSITIONS["response_mean"], READOUT_METHOD]

    def plan(self, coefficient: float | None = None, *, positions: Positions = "generated") -> Plan:
        """The raw vector times the coefficient, added at the chosen site.

        At "generated" positions every token of the answer is edited as it is read back, and the prompt is
        not. The published code edits the last token of the prompt too, so that its first answer token is
        steered; here that one is the model's own.
        """
        amount = self.coefficient if coefficient is None else coefficient
        return addition_plan(self.direction, amount, positions)

    def check(self, model: Model) -> None:
        """Refuse a model of another shape; another model's name is logged.

        Raises:
            DirectionError: another d_model, or fewer layers.
        """
        check_model(model)
        width, last = (
            len(self.direction.vector),
            max(self.site.layer, self.readout_direction.site.layer),
        )
        if width != model.d_model or last >= model.n_layers:
            raise DirectionError(
                f"the persona {self.name!r} is of {self.model} (d_model {width}, {self.site}); "
                f"{model.source.name} has d_model {model.d_model} and {model.n_layers} layers: extract "
                "the trait from this model"
            )
        if model.source.name != self.model:
            logger.warning(
                "persona %s is of %s, used on %s", self.name, self.model, model.source.name
            )

    def save(self, folder: str | Path) -> None:
        """Write persona.json, trait.json, layers.csv, readout.csv and the directions; persona.json last.

        Raises:
            RunError, DirectionError, PromptError: the folder cannot be written.
        """
        folder = Path(folder)
        self.trait.save(folder / "trait.json")
        self.directions.save(folder / "directions.safetensors")
        layers = pd.DataFrame(self.details.get("layers", []), columns=list(LAYER_COLUMNS))
        write_atomic(folder / "layers.csv", layers.to_csv(index=False))
        rows = (self.details.get("readout") or {}).get("layers", [])
        readouts = pd.DataFrame(rows, columns=list(READOUT_COLUMNS))
        write_atomic(folder / "readout.csv", readouts.to_csv(index=False))
        content = {
            "format": FORMAT,
            "model": self.model,
            "trait": self.name,
            "trait_fingerprint": self.trait.fingerprint,
            "site": str(self.site),
            "position": self.direction.position,
            "norm": float(self.direction.norm),
            "coefficient": self.coefficient,
            **self.details,
        }
        write_atomic(folder / "persona.json", json_text(content, indent=1))


def load_persona(folder: str | Path) -> Persona:
    """Read a persona folder (`interp-ablate persona extract`).

    Raises:
        RunError: no persona there, not finished, or a corrupt file, named.
        DirectionError, PromptError: its directions or its trait cannot be read.
    """
    folder = Path(folder)
    path = folder / "persona.json"
    if not path.is_file():
        began = (folder / "rollouts.jsonl").exists()
        raise RunError(
            f"{folder} holds no persona (no persona.json): "
            + (
                "its extraction was interrupted; run it again, it goes on"
                if began
                else "make one with"
            )
            + f" `interp-ablate persona extract TRAIT --model MODEL --out {folder}`"
        )
    try:
        content = incoming_object(path)
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        site, position = Site.parse(content.pop("site")), content.pop("position")
        coefficient, model = float(content.pop("coefficient")), str(content.pop("model"))
        fingerprint = content.pop("trait_fingerprint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"cannot read {path}: {error!r}. Extract the persona again into another folder"
        ) from error
    trait = load_trait(folder / "trait.json")
    if trait.fingerprint != fingerprint:
        raise RunError(
            f"{folder / 'trait.json'} is not the trait that {path.name} was made with: put it back, or "
            "extract the persona again into another folder"
        )
    directions = Directions.load(folder / "directions.safetensors")
    details = {k: v for k, v in content.items() if k not in ("format", "trait", "norm")}
    return Persona(trait, directions, directions[site, position], coefficient, model, details)


def addition_plan(
    direction: Direction, coefficient: float, positions: Positions = "generated"
) -> Plan:
    """A plan that adds coefficient * raw vector at the direction's own site."""
    edit = Add(
        direction,
        direction.site,
        coefficient=coefficient,
        positions=positions,
        label=f"{direction.method}@{direction.site}",
    )
    return Plan((edit,))
