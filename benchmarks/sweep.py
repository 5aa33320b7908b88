"""A sweep of 20 directions as the well-known notebook does it, against the same sweep here, row for row.

The recipe, as its article describes it (Labonne 2024, https://huggingface.co/blog/mlabonne/abliteration),
in plain TransformerLens: caches of all positions at every resid site, unit differences of the means at
the last one, the candidates (resid_pre from layer 1) sorted by |mean of components|, and for each of
the first 20 a greedy continuation of 4 prompts by 64 tokens, the whole sequence run again for every
token, under hooks at all resid sites. It knows no end of sequence; rows are compared up to theirs.
It is run once; ours are timed over several rounds after it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import common

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
BATCH = 32  # of the recipe's caches
TIE = 1e-3  # top two logits of the recipe closer than this may change places in fp32
LIMIT = 40


@dataclass(frozen=True)
class Task:
    """Train and test prompts as token rows, and sizes."""

    contrast: Any
    sides: tuple[list[list[int]], list[list[int]]]
    tests: list[list[int]]
    candidates: int
    max_new_tokens: int
    timed: int  # candidates that the recipe runs; its time for all follows, they cost the same


@dataclass(frozen=True)
class Recipe:
    """What the recipe found: directions by layer in its order, whole sequences by layer, seconds."""

    directions: dict[int, Any]
    written: dict[int, Any]
    seconds: dict[str, float]


def task_of(model: Any, args: Any) -> Task:
    from interp_ablate import ContrastSet

    split = ContrastSet.load("declining").split(args.prompts, 1, 4)
    train = split.train
    sides = (model.encode_all(train.positive), model.encode_all(train.negative))
    tests = model.encode_all(split.test.positive)
    candidates, max_new_tokens = (3, 6) if args.smoke else (20, 64)
    return Task(train, sides, tests, candidates, max_new_tokens, args.timed or candidates)


# ---- the recipe: nothing of this package -------------------------------------------------------------


def padded(tl: Any, rows: list[list[int]]) -> Any:
    """Rows padded on the left with the tokenizer's token, by which TransformerLens masks them."""
    import torch

    width = max(map(len, rows))
    pad = tl.tokenizer.pad_token_id
    return torch.tensor([[pad] * (width - len(row)) + row for row in rows])


def cached(tl: Any, rows: list[list[int]]) -> dict[str, Any]:
    """Activations of all positions at every resid site."""
    import torch

    tokens = padded(tl, rows)
    found: dict[str, Any] = {}
    for start in range(0, len(tokens), BATCH):
        _, cache = tl.run_with_cache(
            tokens[start : start + BATCH], names_filter=lambda name: "resid" in name
        )
        for name, values in cache.items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in found.items()}


def candidates(tl: Any, task: Task) -> dict[int, Any]:
    """The recipe's directions by layer, the ones that it would try first in front."""
    positive, negative = (cached(tl, rows) for rows in task.sides)
    units = {}
    for layer in range(1, tl.cfg.n_layers):
        for point in RESIDUAL:
            name = f"blocks.{layer}.hook_{point}"
            gap = positive[name][:, -1].mean(0) - negative[name][:, -1].mean(0)
            units[layer, point] = gap / gap.norm()
    pre = [(layer, unit) for (layer, point), unit in units.items() if point == "resid_pre"]
    pre.sort(key=lambda item: abs(float(item[1].mean())), reverse=True)
    return dict(pre[: task.candidates])


def ablating(tl: Any, direction: Any) -> list[tuple[str, Any]]:
    def ablate(activation: Any, hook: Any, direction: Any) -> Any:
        return activation - (activation @ direction)[..., None] * direction

    hook = functools.partial(ablate, direction=direction)
    layers = range(tl.cfg.n_layers)
    return [(f"blocks.{layer}.hook_{point}", hook) for layer in layers for point in RESIDUAL]


def continued(tl: Any, tokens: Any, hooks: list[tuple[str, Any]], max_new_tokens: int) -> Any:
    """Greedy, without a KV cache: the whole sequence for every token, all its logits."""
    import torch

    for _ in range(max_new_tokens):
        with tl.hooks(fwd_hooks=hooks):
            logits = tl(tokens)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


@contextmanager
def as_the_recipe(tl: Any) -> Iterator[None]:
    """The tokenizer as the recipe sets it, by which TransformerLens masks the padding; no gradients."""
    import torch

    tokenizer = tl.tokenizer
    before = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    with torch.no_grad():
        yield
    tokenizer.padding_side, tokenizer.pad_token = before


def recipe(tl: Any, task: Task) -> Recipe:
    with as_the_recipe(tl):
        start = time.perf_counter()
        directions = candidates(tl, task)
        middle = time.perf_counter()
        tokens = padded(tl, task.tests)
        written = {
            layer: continued(tl, tokens, ablating(tl, direction), task.max_new_tokens)
            for layer, direction in list(directions.items())[: task.timed]
        }
        end = time.perf_counter()
    generate = (end - middle) * task.candidates / task.timed
    return Recipe(directions, written, {"collect": middle - start, "generate": generate})


# ---- ours ---------------------------------------------------------------------------------------------


def ours(model: Any, task: Task) -> dict[int, list[Any]]:
    """The same candidates, all of them and all prompts in one batch; generations by layer."""
    from interp_ablate import Ablate, Plan, collect, estimate_directions

    directions = estimate_directions(collect(model, task.contrast))
    pre = [d for d in directions if d.site.point == "resid_pre" and d.site.layer]
    pre.sort(key=lambda d: abs(float(d.vector.mean())), reverse=True)
    chosen = pre[: task.candidates]
    plans = [Plan((Ablate(item, model.writers),)) for item in chosen]
    n = len(task.tests)
    with model.applied_each([plan for plan in plans for _ in range(n)]):
        rows = model.generate(task.tests * len(plans), max_new_tokens=task.max_new_tokens)
    return {item.site.layer: rows[n * i : n * (i + 1)] for i, item in enumerate(chosen)}


# ---- side by side -------------------------------------------------------------------------------------


def compared(tl: Any, task: Task, theirs: Recipe, found: dict[int, list[Any]], name: str) -> dict:
    """How many rows are the same; the first differing token of every other row, explained or not."""
    if list(found) != list(theirs.directions):
        print(
            f"  {name}: other candidates or another order: {list(theirs.directions)}, {list(found)}"
        )
    same = ties = total = 0
    end = tl.tokenizer.eos_token_id
    width = max(map(len, task.tests))
    for layer in [layer for layer in found if layer in theirs.written]:
        for i, generation in enumerate(found[layer]):
            total += 1
            mine = [*generation.tokens, *([end] if generation.finished else [])]
            theirs_row = theirs.written[layer][i, width:].tolist()[: len(mine)]
            place = next((k for k, (a, b) in enumerate(zip(theirs_row, mine)) if a != b), None)
            if place is None:
                same += 1
                continue
            ties += explained(tl, theirs, (layer, i, width + place), mine[place], name)
    return {"rows": total, "same": same, "ties": ties, "unexplained": total - same - ties}


def explained(tl: Any, theirs: Recipe, place: tuple[int, int, int], mine: int, name: str) -> bool:
    """Print a first differing token; whether our token is the recipe's second and nearly its first."""
    layer, row, at = place
    hooks = ablating(tl, theirs.directions[layer])
    with as_the_recipe(tl), tl.hooks(fwd_hooks=hooks):
        top = tl(theirs.written[layer][:, :at])[row, -1].topk(2)
    margin = float(top.values[0] - top.values[1])
    tie = margin < TIE and mine == int(top.indices[1])
    first, other = (tl.tokenizer.decode([t]) for t in (int(top.indices[0]), mine))
    print(
        f"  {name}: layer {layer}, prompt {row}, token {at}: {first!r} there, {other!r} here; "
        f"margin {margin:.2g}: {'a tie in fp32' if tie else 'NOT a tie'}"
    )
    return tie


def main() -> None:
    timed = {"type": int, "help": "run the recipe on this many candidates and scale its time"}
    args = common.arguments(__doc__, timed=timed)
    from interp_ablate import load_model

    models = {
        "ours, Bridge": load_model("smollm2"),
        "ours, HookedTransformer": load_model("smollm2", backend="hooked"),
    }
    hooked = models["ours, HookedTransformer"].tl
    task = task_of(models["ours, Bridge"], args)
    theirs = recipe(hooked, task)
    rows = {
        name: compared(hooked, task, theirs, ours(model, task), name)
        for name, model in models.items()
    }
    seconds = common.paired(
        {name: functools.partial(ours, model, task) for name, model in models.items()}, args.rounds
    )
    once = sum(theirs.seconds.values())
    seconds["the recipe (run once)"] = [once] * args.rounds
    facts = {
        "train": 2 * args.prompts,
        "candidates": task.candidates,
        "run_by_the_recipe": task.timed,
        "tests": len(task.tests),
        "max_new_tokens": task.max_new_tokens,
        "recipe_seconds": {name: round(value, 2) for name, value in theirs.seconds.items()},
        "compared": rows,
        "limit": LIMIT,
    }
    title = f"sweep: {task.candidates} candidates x {len(task.tests)} prompts"
    common.report(title, seconds, "ours, Bridge", **facts)


if __name__ == "__main__":
    main()
