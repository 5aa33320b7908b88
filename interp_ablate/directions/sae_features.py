"""A direction beside the features of a sparse autoencoder: cosines with its decoder's rows, from a SAELens folder.

The format is SAELens': `cfg.json` and `sae_weights.safetensors`, whose `W_dec` is [d_sae, d_model]. Nothing of
SAELens is needed, and nothing is fetched: addresses are text.

Knows: that format, Neuronpedia's addresses. Does not know: encoders, activations of features, other formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction, random_directions
from interp_ablate.errors import DirectionError, InterpAblateError
from interp_ablate.sites import Site
from interp_ablate.storage.incoming_files import check_file, incoming_object

if TYPE_CHECKING:
    import pandas as pd

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_BLOCK = 4096  # rows that are in memory at a time


@dataclass(frozen=True)
class SAEDecoder:
    """The decoder of a sparse autoencoder on disk, whose rows are read when they are wanted."""

    folder: Path
    n_features: int
    d_model: int
    hook_name: str
    """Where its features write, as its config says; "" if it does not."""
    neuronpedia_id: str
    """Such as `gpt2-small/8-res-jb`; "" where the config has none."""

    @classmethod
    def open(cls, folder: str | Path, *, neuronpedia_id: str | None = None) -> SAEDecoder:
        """The decoder in a folder that SAELens wrote, or that holds an SAE which it published.

        Args:
            neuronpedia_id: the model and the SAE in Neuronpedia's addresses, where cfg.json does not say them.

        Raises:
            DirectionError: no such folder, another layout, or one that writes into no stream (such as hook_z).
        """
        folder = Path(folder)
        config = incoming_object(folder / CONFIG, error=DirectionError)
        # version 6 keeps under "metadata" what earlier ones had beside the sizes
        metadata = config.get("metadata")
        said = {**config, **(metadata if isinstance(metadata, dict) else {})}
        hook = str(said.get("hook_name_out") or said.get("hook_name") or "")
        _check_writes_to_stream(folder, hook)
        shape = _shape_of(folder)
        sizes = [config.get("d_sae"), config.get("d_out") or config.get("d_in")]
        if any(size is not None and size != n for size, n in zip(sizes, shape)):
            raise DirectionError(
                f"{folder / WEIGHTS} has a W_dec of shape {shape}, and {CONFIG} says {sizes}: it is to be "
                "[d_sae, d_model], as SAELens writes it"
            )
        known = neuronpedia_id or said.get("neuronpedia_id") or ""
        return cls(folder, *shape, hook, str(known).strip("/"))

    def address(self, feature: int) -> str:
        """The feature's page on Neuronpedia; "" where its id is not known."""
        at = self.neuronpedia_id
        return f"https://www.neuronpedia.org/{at}/{feature}" if at else ""

    def cosines(self, directions: Sequence[Direction]) -> Float[Tensor, "direction feature"]:
        """The cosine of each direction with each row of the decoder; 0 for rows of zeros.

        Raises:
            DirectionError: another d_model, or a file that cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        for item in directions:
            if len(item.vector) != self.d_model:
                raise DirectionError(
                    f"{item.name} has d_model {len(item.vector)}, and the SAE in {self.folder} {self.d_model}: it "
                    "is of another model"
                )
        vectors = torch.stack([item.vector for item in directions])
        parts = []
        try:
            with safe_open(self.folder / WEIGHTS, framework="pt") as file:
                rows = file.get_slice("W_dec")
                for start in range(0, self.n_features, _BLOCK):
                    block = rows[start : start + _BLOCK].double()
                    parts.append(vectors @ block.T / block.norm(dim=1).clamp(min=1e-300))
        except (OSError, SafetensorError) as error:
            raise DirectionError(f"cannot read {self.folder / WEIGHTS}: {error}") from error
        cosines = torch.cat(parts, 1)
        if not torch.isfinite(cosines).all():
            raise DirectionError(f"W_dec in {self.folder / WEIGHTS} holds NaN or infinity")
        return cosines


def nearest_features(
    direction: Direction,
    sae: SAEDecoder | str | Path,
    *,
    top: int = 10,
    controls: Sequence[Direction] | int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """The features whose decoder rows are nearest to a direction, by the size of the cosine.

    A row a feature: feature, cosine, chance, outside, hook_name, address. `chance` is what the largest cosine of all
    features stays below for 95% of the controls, and `outside` whether this feature's is larger.

    Args:
        controls: directions to compare with, such as those of shuffled labels; a number stands for random ones.

    Raises:
        DirectionError: another d_model; a folder of another layout.
    """
    import pandas as pd

    decoder = sae if isinstance(sae, SAEDecoder) else SAEDecoder.open(sae)
    null = (
        random_directions(direction, controls, seed=seed)
        if isinstance(controls, int)
        else [*controls]
    )
    cosines = decoder.cosines([direction, *null])
    own = cosines[0]
    chance = float(cosines[1:].abs().amax(1).quantile(0.95)) if null else float("nan")
    rows: list[dict[str, Any]] = [
        {
            "feature": i,
            "cosine": float(own[i]),
            "chance": chance,
            "outside": abs(float(own[i])) > chance if null else None,
            "hook_name": decoder.hook_name,
            "address": decoder.address(i),
        }
        for i in own.abs().topk(min(max(top, 0), len(own))).indices.tolist()
    ]
    columns = ["feature", "cosine", "chance", "outside", "hook_name", "address"]
    return pd.DataFrame(rows, columns=columns).astype({"outside": "boolean"})


def _shape_of(folder: Path) -> tuple[int, int]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    check_file(path, DirectionError)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shape = file.get_slice("W_dec").get_shape() if "W_dec" in names else None
    except (OSError, SafetensorError) as error:
        raise DirectionError(f"cannot read {path}: {error}. Is the file whole?") from error
    if shape is None or len(shape) != 2 or 0 in shape:
        raise DirectionError(
            f"{path} holds {', '.join(sorted(names)[:6])}, and no W_dec of shape [d_sae, d_model] (it has "
            f"{shape}): give a folder as SAELens writes it"
        )
    return int(shape[0]), int(shape[1])


def _check_writes_to_stream(folder: Path, hook: str) -> None:
    """Refuse the features of heads or neurons, whose width may be d_model and whose axes are others."""
    if "hook_" not in hook:
        return
    try:
        Site.parse(hook)
    except InterpAblateError:
        raise DirectionError(
            f"the SAE in {folder} is of {hook}, which is no place of the residual stream: its decoder's rows have "
            "no cosine with a direction"
        ) from None
