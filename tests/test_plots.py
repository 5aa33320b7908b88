"""Pictures: what each draws, what it refuses, and that a run folder becomes PNG files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from interp_ablate import plots
from interp_ablate.directions import Direction, Directions, Separation
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.sites import Site

POINTS = ("resid_pre", "resid_mid", "resid_post")
ALL_FIGURES = {
    "projections.png", "separation.png", "cosine_similarity.png", "sweep.png", "pareto.png",
    "before_after.png",
}  # fmt: skip


def strength(layer: int, point: str, n_layers: int = 30) -> float:
    """How far apart the two sets are, in SDs: rising in the middle, a little lower at the end."""
    depth = (layer + POINTS.index(point) / 3) / n_layers
    return 0.4 + 5.5 * math.exp(-(((depth - 0.68) / 0.24) ** 2))


def make_projections(n_layers: int = 30, n: int = 32, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    blocks = []
    for layer in range(n_layers):
        for point in POINTS:
            if (layer, point) == (0, "resid_pre"):
                continue  # left out: a zero difference
            scale = 0.5 * 1.22**layer
            for split, count in (("train", 2 * n), ("validation", n)):
                for label, sign in (("positive", 0.5), ("negative", -0.5)):
                    values = rng.normal(sign * strength(layer, point, n_layers), 1, count)
                    if label == "positive":
                        values -= 2.5 * (rng.random(count) < 0.1)  # some requests look answerable
                    blocks.append(
                        pd.DataFrame(
                            {
                                "layer": layer,
                                "point": point,
                                "split": split,
                                "label": label,
                                "prompt": [f"p{index}" for index in range(count)],
                                "projection": scale * (values + 3),
                            }
                        )
                    )
    return pd.concat(blocks, ignore_index=True)


def make_directions(n_layers: int = 30, d_model: int = 48, seed: int = 0) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(d_model, generator=generator, dtype=torch.float64)
    items = []
    for layer in range(n_layers):
        for point in POINTS:
            vector = vector + 0.3 * torch.randn(d_model, generator=generator, dtype=torch.float64)
            gap = strength(layer, point, n_layers)
            auc = 0.5 * (1 + math.erf(gap / 2))
            if (layer, point) != (0, "resid_pre"):
                items.append(
                    Direction(
                        vector, 0.4 * 1.2**layer, Site(layer, point), separation=Separation(auc, gap)
                    )
                )
    return Directions(tuple(items), {"blocks.0.hook_resid_pre[-1]": "the difference is zero"})


def make_trials(n_layers: int = 30, n_refine: int = 120, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(n_layers):
        for point in POINTS:
            gap = strength(layer, point, n_layers)
            rows.append(
                {
                    "stage": "screen", "layer": layer, "point": point, "operation": "ablate",
                    "behaviour": 3 - 2.2 * gap + rng.normal(0, 0.6),
                    "addition": -7 + 1.9 * gap + rng.normal(0, 0.6),
                    "kl": float(np.exp(rng.normal(-1.6 + 0.25 * gap, 0.5))),
                }
            )  # fmt: skip
    for _ in range(n_refine):
        power = rng.random()
        rows.append(
            {
                "stage": "refine", "layer": 25, "point": "resid_mid", "operation": "band",
                "attention_strength": 0.4 + power, "attention_layer": rng.integers(15, 29),
                "mlp_strength": 0.3 + power, "mlp_layer": rng.integers(10, 29),
                "width": rng.integers(4, 20), "addition": 3.0,
                "behaviour": 3 - 13 * power ** 0.5 + rng.normal(0, 1.3),
                "kl": float(np.exp(-4.4 + 3.2 * power + rng.normal(0, 0.6))),
            }
        )  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.insert(0, "trial", range(len(frame)))
    frame = frame.assign(
        position="-1", status="ok", reason="", seconds=0.9, repetition=np.nan, length=np.nan,
        expression_rate=np.nan,
    )  # fmt: skip
    finalists = frame[frame["stage"] == "refine"].nsmallest(8, "behaviour").index
    frame.loc[finalists, "expression_rate"] = np.linspace(0, 0.2, len(finalists))
    failed = frame.index[[0, min(44, len(frame) - 1)]]
    frame.loc[failed, ["behaviour", "addition", "kl"]] = np.nan
    frame.loc[failed, "status"] = "failed"
    frame.loc[failed, "reason"] = "no direction: the difference is zero"
    return frame


TEST = {
    "behaviour_before": 0.81, "behaviour_after": 0.02, "negative_before": 0.0,
    "negative_after": 0.0, "addition_after": 0.72, "kl_first_token": 0.04,
    "intervals": {
        "behaviour_before": [0.69, 0.91], "behaviour_after": [0.0, 0.06],
        "negative_before": [0, 0], "addition_after": [0.58, 0.84], "kl_first_token": [0.02, 0.07],
    },
    "controls": [
        {"name": "random 0", "behaviour_after": 0.66, "kl_first_token": 0.1},
        {"name": "random 1", "behaviour_after": 0.75, "kl_first_token": 0.08},
        {"name": "shuffled labels", "behaviour_after": 0.7, "kl_first_token": 0.05},
    ],
}  # fmt: skip


def make_run(folder: Path, n_layers: int = 30) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    make_projections(n_layers, n=32 if n_layers > 3 else 6).to_csv(
        folder / "projections.csv", index=False
    )
    make_directions(n_layers).save(folder / "directions.safetensors")
    trials = make_trials(n_layers)
    trials.to_csv(folder / "trials.csv", index=False)
    good = trials[(trials["status"] == "ok") & (trials["kl"] <= 0.1)]
    chosen = json.loads(good.loc[good["behaviour"].idxmin()].to_json())
    selected = {"plan": {"format": "x", "edits": []}, "trial": chosen, "test": TEST}
    (folder / "selected.json").write_text(json.dumps(selected))
    (folder / "run.json").write_text(json.dumps({"configuration": {"max_kl": 0.1}}))
    return folder


@pytest.fixture
def ax():
    return Figure().add_subplot()
