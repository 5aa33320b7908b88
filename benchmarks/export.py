"""A plan streamed into a checkpoint of Llama-3-8B's shapes (bf16, 16 GB, synthetic), against `cp -r` of it.

Peak resident memory and seconds of the whole command, side by side in one run; needs 50 GB of disk for
a while, deletes what it made. The page cache is dropped before each copy where the machine allows it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

GIB = 2**30
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMOKE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8000,
}


def shapes(sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama checkpoint, untied."""
    d, hidden = sizes["hidden_size"], sizes["intermediate_size"]
    kv = d // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    yield "model.embed_tokens.weight", (sizes["vocab_size"], d)
    for layer in range(sizes["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        yield block + "input_layernorm.weight", (d,)
        yield block + "mlp.down_proj.weight", (d, hidden)
        yield block + "mlp.gate_proj.weight", (hidden, d)
        yield block + "mlp.up_proj.weight", (hidden, d)
        yield block + "post_attention_layernorm.weight", (d,)
        for name, rows in (("k", kv), ("o", d), ("q", d), ("v", kv)):
            yield f"{block}self_attn.{name}_proj.weight", (rows, d)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (sizes["vocab_size"], d)


def make_checkpoint(folder: Path, sizes: dict[str, int], shard_bytes: int) -> int:
    """Write random bf16 tensors in shards; returns the bytes of all tensors."""
    import torch

    folder.mkdir()
    noise = (torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    block = noise.view(torch.uint8).numpy().tobytes()
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, shape in shapes(sizes):
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled, total = filled + size, total + size
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        weight_map.update({name: file for name, _ in shard})
        _write_shard(folder / file, shard, block)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], block: bytes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard:
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(block)):
            file.write(block[: min(len(block), end - start)])


def make_plan(path: Path, sizes: dict[str, int]) -> None:
    import torch

    from interp_ablate import Ablate, Plan, everywhere

    direction = torch.randn(sizes["hidden_size"], generator=torch.Generator().manual_seed(1))
    Plan((Ablate(direction, everywhere(sizes["num_hidden_layers"])),)).save(path)


def drop_caches() -> bool:
    """Writes reach the disk and reads come from it, for both alike; False where that is not allowed.

    The libraries are read again before the clock starts: their first load is no part of the copy.
    """
    subprocess.run(["sync"], check=True)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    warm = "import torch, transformers, interp_ablate.export.checkpoint; transformers.LlamaConfig()"
    subprocess.run([sys.executable, "-c", warm], check=True)
    return True


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of a command to its end, `sync` included, and its peak resident memory in GiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="a small checkpoint: does it run at all?"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--work", help="folder to work in; needs 50 GB free (default: the system's)"
    )
    args = parser.parse_args()
    sizes, shard = (SMOKE, 8 << 20) if args.smoke else (LLAMA_3_8B, 5_000_000_000)
    rounds = 1 if args.smoke else args.rounds
    with tempfile.TemporaryDirectory(dir=args.work) as place:
        root = Path(place)
        source, plan = root / "source", root / "plan.json"
        total = make_checkpoint(source, sizes, shard)
        make_plan(plan, sizes)
        ours = [
            sys.executable, "-m", "interp_ablate", "export", "--source", str(source),
            "--plan", str(plan), "--out", str(root / "ours"),
        ]  # fmt: skip
        commands = {
            "cp -r": ["cp", "-r", str(source), str(root / "copy")],
            "export --source": ours,
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        peaks = []
        for _ in range(rounds):
            for name, command in commands.items():
                cold = drop_caches()
                took, peak = timed(command)
                seconds[name].append(took)
                if name != "cp -r":
                    peaks.append(peak)
                shutil.rmtree(root / ("copy" if name == "cp -r" else "ours"))
    common.report(
        f"streamed export of {total / 1e9:.1f} GB",
        seconds,
        "cp -r",
        peak_rss_gib=round(max(peaks), 3),
        median_gb_per_s=round(total / 1e9 / statistics.median(seconds["export --source"]), 2),
        cold_cache=cold,
    )


if __name__ == "__main__":
    main()
