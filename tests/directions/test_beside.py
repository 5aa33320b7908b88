"""Directions beside directions: oracles in numpy and scipy, bands by brute force, SAE folders as SAELens writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from interp_ablate.activations.activations import Activations
from interp_ablate.directions.beside import cosine_table, principal_angles, shuffled_directions
from interp_ablate.directions.direction import Direction, random_direction
from interp_ablate.directions.estimators import estimate_with
from interp_ablate.directions.mean_difference import estimate_directions, shuffled_labels
from interp_ablate.directions.sae_features import SAEDecoder, nearest_features
from interp_ablate.directions.subspaces import Subspace
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

D, N = 10, 16
SITES = tuple(Site(layer, "resid_post") for layer in range(3))
LABELS = torch.arange(2 * N) < N


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(seed: int = 0) -> Activations:
    """Layers 0 and 1 share noise and a concept; layer 2 has the noise of layer 1 and no concept."""
    shared, concept = draw(seed, 2 * N, D) * torch.linspace(0.1, 3, D), draw(seed + 1, D)
    layers = [shared + 0.1 * draw(seed + 10 + i, 2 * N, D) for i in range(3)]
    for layer in layers[:2]:
        layer[LABELS] += 4 * concept
    return Activations(torch.stack(layers, 1)[:, None], SITES, ("-1",), LABELS)


def test_cosines_and_bands_are_those_of_a_loop_in_numpy() -> None:
    held = activations()
    items = list(estimate_directions(held))
    frame = cosine_table(items, activations=held, n_shuffled=50, seed=3)
    assert len(frame) == 3 and list(frame["first_layer"]) == [0, 0, 1]
    row = frame.iloc[0]
    x = held.values[:, 0].numpy()

    def unit(site: int, y: np.ndarray) -> np.ndarray:
        gap = x[y, site].mean(0) - x[~y, site].mean(0)
        return gap / np.linalg.norm(gap)

    assert row["cosine"] == pytest.approx(unit(0, LABELS.numpy()) @ unit(1, LABELS.numpy()))
    shuffles = [shuffled_labels(LABELS, seed=3000 + i).numpy() for i in range(50)]
    null = [unit(0, y) @ unit(1, y) for y in shuffles]
    assert (row["null_low"], row["null_high"]) == pytest.approx(
        tuple(np.quantile(null, [0.025, 0.975]))
    )
    assert row["n_shuffled"] == 50


def test_noise_that_layers_share_is_in_the_band_and_a_concept_of_other_prompts_is_told() -> None:
    held, others = activations(), activations(5)
    same, other = list(estimate_directions(held)), list(estimate_directions(others))
    own = cosine_table(same, activations=held)
    assert (
        own["null_high"].min() > 0.9
    )  # directions of shared noise are alike whatever the labels are
    apart = cosine_table(
        {"here": same[0]}, {"there": other[0]}, activations=held, other_activations=others
    )
    assert apart["null_low"].item() < -0.2 and apart["null_high"].item() > 0.2
    again = cosine_table({"a": same[0]}, {"b": same[0]}, activations=held)
    assert bool(again["outside"].item()) and again["cosine"].item() == pytest.approx(1)


@pytest.mark.parametrize("method", ["difference_in_means", "pca", "lda"])
def test_estimators_are_compared_each_by_its_own_shuffles(method: str) -> None:
    held = activations()
    mean, other = estimate_directions(held).items[0], estimate_with(method, held).items[0]
    frame = cosine_table({"mean": mean}, {"other": other}, activations=held, other_activations=held)
    assert frame["cosine"].item() == pytest.approx(mean.cosine(other))
    assert frame["null_low"].item() < frame["null_high"].item() or method == "difference_in_means"


def test_orthogonalized_directions_are_estimated_again() -> None:
    held = activations()
    items = estimate_directions(held, orthogonalized_too=True)
    frame = cosine_table(items, activations=held)
    assert len(frame) == 15 and frame["null_low"].notna().all()


def test_without_activations_there_is_no_band() -> None:
    frame = cosine_table([Direction(draw(i, D), 1.0, SITES[i]) for i in range(2)])
    assert frame["outside"].isna().all() and np.isnan(frame["null_low"]).all()
    assert frame["n_shuffled"].item() == 0


def test_what_cannot_be_compared_is_refused_in_words() -> None:
    held, item = activations(), estimate_directions(activations()).items[0]
    wide = Direction(draw(1, D + 2), 1.0, SITES[0])
    for raised, arguments in (
        ("no direction to compare", ([],)),
        ("two directions are called", ([item, item],)),
        (f"d_model {D}, and other .* {D + 2}: streams of different widths", (item, wide)),
    ):
        with pytest.raises(DirectionError, match=raised):
            cosine_table(*arguments)
    with pytest.raises(DirectionError, match="39 shuffles or more"):
        cosine_table([item], activations=held, n_shuffled=10)
    with pytest.raises(DirectionError, match="is not what difference_in_means gives"):
        cosine_table([item], activations=activations(9))
    with pytest.raises(DirectionError, match="random"):
        cosine_table([random_direction(item, seed=0)], activations=held)
    with pytest.raises(DirectionError, match="cannot be estimated again"):
        cosine_table([Direction(item.vector, 1.0, Site(9, "resid_post"))], activations=held)


def test_principal_angles_are_the_angles_between_planes() -> None:
    e = torch.eye(D, dtype=torch.float64)
    turned = torch.stack([np.cos(0.3) * e[0] + np.sin(0.3) * e[2], e[3]])
    assert principal_angles(e[:2], turned) == pytest.approx([np.rad2deg(0.3), 90])
    a, b = draw(1, 3, D), draw(2, 4, D)
    qa, qb = (np.linalg.qr(x.numpy().T)[0] for x in (a, b))
    want = np.rad2deg(np.arccos(np.linalg.svd(qa.T @ qb)[1]))
    assert principal_angles(a, b) == pytest.approx(want)
    spanned = Subspace(torch.linalg.qr(a.T)[0].T, SITES[0])
    assert principal_angles(spanned, a) == pytest.approx([0, 0, 0], abs=1e-5)
    one, two = Direction(a[0], 1.0, SITES[0]), Direction(b[0], 1.0, SITES[1])
    angle = principal_angles(one, two)
    assert angle == pytest.approx([np.rad2deg(np.arccos(abs(one.cosine(two))))])
    with pytest.raises(DirectionError, match="span no subspace"):
        principal_angles(torch.stack([a[0], 2 * a[0]]), b)
    with pytest.raises(DirectionError, match="d_model"):
        principal_angles(a, draw(3, 2, D + 1))


# ---- sparse autoencoders

FLAT = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.8.hook_resid_pre",
    "neuronpedia_id": "gpt2-small/8-res-jb",
}
SIZES: dict[str, Any] = {"d_in": D, "d_sae": 40, "architecture": "standard", "dtype": "float32"}


def sae_folder(place: Path, config: dict[str, Any], decoder: Tensor | None = None) -> Path:
    """As SAELens writes it: `cfg.json` and `sae_weights.safetensors`."""
    place.mkdir()
    (place / "cfg.json").write_text(json.dumps(config))
    rows = draw(4, 40, D).float() if decoder is None else decoder
    tensors = {"W_dec": rows, "W_enc": rows.T, "b_enc": torch.zeros(40), "b_dec": torch.zeros(D)}
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        place / "sae_weights.safetensors",
    )
    return place


@pytest.mark.parametrize(
    "config", [{**SIZES, **FLAT}, {**SIZES, "metadata": {**FLAT, "sae_lens_version": "6.21.0"}}]
)
def test_features_are_the_decoders_rows_nearest_to_a_direction(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    rows = draw(4, 40, D).float()
    rows[5] = 0
    folder = sae_folder(tmp_path / "sae", config, rows)
    item = Direction(rows[7].double() + 0.05 * draw(9, D), 1.0, Site(8, "resid_pre"))
    frame = nearest_features(item, folder, top=40)
    unit = rows.double().numpy()
    want = unit @ item.vector.numpy() / np.maximum(np.linalg.norm(unit, axis=1), 1e-300)
    order = np.argsort(-np.abs(want), kind="stable")
    assert list(frame["feature"])[:39] == list(order)[:39] and frame["feature"].iloc[0] == 7
    assert frame["cosine"].to_numpy() == pytest.approx(want[order])
    assert frame["address"].iloc[0] == "https://www.neuronpedia.org/gpt2-small/8-res-jb/7"
    assert set(frame["hook_name"]) == {"blocks.8.hook_resid_pre"}
    assert bool(frame["outside"].iloc[0]) and not bool(frame["outside"].iloc[-1])


def test_the_chance_of_a_feature_is_that_of_the_best_of_all(tmp_path: Path) -> None:
    folder, held = sae_folder(tmp_path / "sae", SIZES), activations()
    item = estimate_directions(held).items[0]
    null = shuffled_directions(item, held, 60)
    frame = nearest_features(item, SAEDecoder.open(folder), controls=null)
    rows = draw(4, 40, D).float().double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    best = [float((rows @ each.vector).abs().max()) for each in null]
    assert frame["chance"].iloc[0] == pytest.approx(np.quantile(best, 0.95))
    assert set(frame["address"]) == {""}
    named = SAEDecoder.open(folder, neuronpedia_id="my-model/3-res")
    assert named.address(2) == "https://www.neuronpedia.org/my-model/3-res/2"


def test_folders_that_are_no_decoder_of_the_stream_are_refused(tmp_path: Path) -> None:
    item = Direction(draw(1, D), 1.0, SITES[0])
    heads = sae_folder(tmp_path / "z", {**SIZES, "hook_name": "blocks.3.attn.hook_z"})
    with pytest.raises(DirectionError, match="no place of the residual stream"):
        nearest_features(item, heads)
    turned = sae_folder(tmp_path / "t", SIZES, draw(4, 40, D).float().T.contiguous())
    with pytest.raises(DirectionError, match=r"W_dec of shape \(10, 40\)"):
        nearest_features(item, turned)
    narrow = sae_folder(tmp_path / "n", {}, draw(4, 40, D + 3).float())
    with pytest.raises(DirectionError, match="of another model"):
        nearest_features(item, narrow)
    broken = sae_folder(tmp_path / "b", SIZES, torch.full((40, D), torch.nan))
    with pytest.raises(DirectionError, match="NaN or infinity"):
        nearest_features(item, broken)
    (tmp_path / "b" / "sae_weights.safetensors").write_bytes(b"short")
    with pytest.raises(DirectionError, match="cannot read"):
        nearest_features(item, broken)
    with pytest.raises(DirectionError, match=r"cfg\.json"):
        nearest_features(item, tmp_path / "none")
