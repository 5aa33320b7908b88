"""`models`: the table of architectures, or the measured anatomy of one model.

Knows: what is printed. Does not know: architectures, or how they are measured.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Models:
    """The model that is measured, and how it or the table is printed."""

    model: str | None = setting(
        None, "measure this model: alias, HF folder, .gguf file or hub name", positional=True
    )
    dtype: str = setting("float32", "of the measured model's weights")
    device: str = setting("cpu", "where the model is measured")
    trust_remote_code: bool = setting(False, "run Python code that a model folder brings")
    revision: str | None = setting(None, "branch, tag or commit of a hub name")
    json: bool = setting(False, "one JSON object a line")


add = adding(Models)


def run(args: Namespace) -> int:
    """Print the table, or the anatomy of one model."""
    settings = settings_from(args, Models)
    if settings.model is not None:
        return _print_anatomy(settings)
    from interp_ablate.models.architectures import table

    for row in table():
        if settings.json:
            print(json_text(row))
            continue
        print(f"{row['model_type']}  ({row['families']}; {row['block']})")
        for key in ("embeddings", "attention", "mlp", "norm_after", "biases", "tied"):
            print(f"    {key:<11} {row[key]}")
    return 0


def _print_anatomy(settings: Models) -> int:
    from interp_ablate.models.backends.hf import measured_anatomy
    from interp_ablate.models.load import hf_from_name

    assert settings.model is not None
    hf, _, _ = hf_from_name(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        revision=settings.revision,
    )
    anatomy = measured_anatomy(hf)
    rows = [
        {"layer": i, **_block(block, f"{anatomy.blocks_path}.{i}.")}
        for i, block in enumerate(anatomy.blocks)
    ]
    if settings.json:
        print(
            json_text(
                {
                    "model_type": hf.config.model_type,
                    "embed": anatomy.embed,
                    "embed_scale": anatomy.embed_scale,
                    "pos_embed": anatomy.pos_embed,
                    "embed_norms": [norm.path for norm in anatomy.embed_norms],
                    "blocks": rows,
                    "problems": anatomy.problems,
                }
            )
        )
        return 0
    print(f"{hf.config.model_type}, {len(rows)} blocks at {anatomy.blocks_path}")
    scale = "" if anatomy.embed_scale == 1.0 else f"{anatomy.embed_scale:.4g} * "
    positions = f" + {anatomy.pos_embed}" if anatomy.pos_embed else ""
    norms = _norms(anatomy.embed_norms, "")
    print(f"    stream      {scale}{anatomy.embed}{positions}{norms}, and in each block:")
    described: dict[str, list[int]] = {}
    for row in rows:
        text = "\n".join(
            f"    {point:<11} {branch}"
            for point in ("attn_out", "mlp_out")
            for branch in row[point]
        )
        described.setdefault(f"{text}\n    block       {row['block']}", []).append(row["layer"])
    for text, layers in described.items():
        print(f"  layers {_ranges(layers)}")
        print(text)
    print("    exact       " + ("yes" if not anatomy.problems else "; ".join(anatomy.problems)))
    return 0


def _ranges(layers: list[int]) -> str:
    """Layers in order, runs of them shortened: 0-3, 5."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _block(block: Any, start: str) -> dict[str, Any]:
    """A block's summands in words, with the names inside the block."""
    kind = "parallel" if block.parallel else "sequential" if block.attn else "one summand"
    scaled = "" if block.stream_scale == 1.0 else f", all of it times {block.stream_scale:.4g}"
    return {
        "attn_out": [_branch(branch, start) for branch in block.attn],
        "mlp_out": [_branch(branch, start) for branch in block.mlp],
        "block": (block.problem or kind) + scaled,
    }


def _branch(branch: Any, start: str) -> str:
    scale = "" if branch.scale == 1.0 else f"{branch.scale:.4g} * "
    parts = []
    for part in branch.parts:
        written = " + ".join(
            f"{name.removeprefix(start)} [{layout}]" for name, layout in part.writers.items()
        )
        parts.append(f"{part.problem or written}{_norms(part.norms, start)}")
    return f"{scale}{branch.path.removeprefix(start)}: {'; '.join(parts)}"


def _norms(norms: Any, start: str) -> str:
    """Norms in words, in the order of a pass."""
    texts = []
    for norm in reversed(norms):
        gain = "1 + weight" if norm.offset else "weight" if norm.weighted else "1"
        more = (", centred" if norm.centred else "") + (", and a bias" if norm.biased else "")
        texts.append(f", then {norm.path.removeprefix(start)} (gain = {gain}{more})")
    return "".join(texts)
