"""Random plans of every kind of edit, with conditions: hooks against formulas in numpy on a plain Hugging Face pass.

In one padded batch, with answers after the prompts, in rows under plans of their own, in cached generation and from a
cached stream. The formulas here are those of the papers, on the vectors as they were given, and use nothing of the
package. INTERP_ABLATE_FUZZ=N tries N plans of each architecture.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BACKENDS, D_MODEL, N_LAYERS, PARTS, hf_forward, rows_of, shared, source_of
from torch import Tensor

from interp_ablate import Ablate, Add, Clamp, Plan, Site, sites_of
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.conditional import Condition, Conditional
from interp_ablate.edits.kinds import Erase
from interp_ablate.edits.rotation import Rotate
from interp_ablate.evaluation.outputs import ModelOutputs

PLANS = int(os.environ.get("INTERP_ABLATE_FUZZ", "3"))
NEAR = 2e-5  # of the largest logit
Array = np.ndarray
Formula = Callable[[Array, int], Array]
"""From activations [pos, d_model] and the number of the site to what the edit makes of them."""


@dataclass(frozen=True)
class Case:
    """An edit of the package beside its own formula."""

    edit: Any
    formula: Formula
    condition: Condition | None = None

    @property
    def whole(self) -> Any:
        return Conditional(self.edit, self.condition) if self.condition else self.edit


def ablated(vectors: Array, strengths: Sequence[float]) -> Formula:
    onto = np.linalg.pinv(vectors) @ vectors
    return lambda x, i: x - strengths[i] * x @ onto


def turned(one: Array, two: Array, angles: list[float], shares: list[float], some: bool) -> Formula:
    first = one / np.linalg.norm(one)
    second = two - (two @ first) * first
    second /= np.linalg.norm(second)

    def formula(x: Array, i: int) -> Array:
        inside = x @ first + 1j * (x @ second)  # the plane as complex numbers
        arc = np.angle(np.exp(1j * math.radians(angles[i])) / inside * np.abs(inside))
        moved = inside * np.exp(1j * shares[i] * arc) - inside
        moved = np.where((inside.real > 0) | (not some), moved, 0)
        return x + moved.real[:, None] * first + moved.imag[:, None] * second

    return formula


def random_case(draw: random.Random, kind: str) -> Case:
    points: Any = ["resid_pre", "resid_post", "attn_out", "mlp_out"]
    points += [] if PARTS[kind].parallel else ["resid_mid"]
    sites = draw.sample([*sites_of(points, range(N_LAYERS)), Site(0, "embed")], draw.choice((1, 2)))
    numbers = np.random.default_rng(draw.randrange(10**6))
    at: dict[str, Any] = {"positions": draw.choice(("all", "all", "prompt", "generated"))}
    s, v = [[draw.uniform(-0.5, 1.5) for _ in sites] for _ in range(2)]
    a, b = numbers.normal(size=(2, D_MODEL))
    one, two = torch.tensor(a), torch.tensor(b)
    op = draw.choice(("ablate", "add", "clamp", "erase", "affine", "rotate"))
    if op == "ablate":
        rows = numbers.normal(size=(draw.choice((1, 3)), D_MODEL))
        return Case(Ablate(torch.tensor(rows), sites, strength=s, **at), ablated(rows, s))
    if op == "add":
        return Case(Add(one, sites, coefficient=s, **at), lambda x, i: x + s[i] * a)
    if op == "clamp":
        unit = a / np.linalg.norm(a)
        return Case(
            Clamp(one, sites, value=s, **at), lambda x, i: x + (s[i] - x @ unit)[:, None] * unit
        )
    if op == "erase":
        edit: Any = Erase(one, one + two, sites, strength=s, value=v, **at)
        return Case(edit, lambda x, i: x - s[i] * (x @ (a + b) - v[i])[:, None] * a / (a @ (a + b)))
    if op == "affine":
        write, read = 0.05 * numbers.normal(size=(3, D_MODEL)), numbers.normal(size=(3, D_MODEL))
        edit = AffineEdit(
            torch.tensor(write), torch.tensor(read), sites, shift=0.3 * one, strength=s, **at
        )
        return Case(edit, lambda x, i: x + s[i] * (x @ read.T @ write + 0.3 * a))
    angles, some = [draw.uniform(-400, 400) for _ in sites], draw.random() < 0.5
    return Case(
        Rotate(one, two, sites, angle=angles, strength=s, adaptive=some, **at),
        turned(a, b, angles, s, some),
    )


def similarity(condition: Condition, prompt: Array) -> float:
    h = prompt.mean(0) if condition.pooled == "mean" else prompt[-1]
    c = condition.vector.numpy()
    other = np.tanh((c @ h) * c) if condition.similarity == "projected" else c
    return float(h @ other / np.linalg.norm(h) / np.linalg.norm(other))


def passed(
    kind: str,
    row: Sequence[int],
    cases: Sequence[Case],
    n_prompt: int | None = None,
    seen: dict[int, float] | None = None,
) -> Tensor:
    """Logits [pos, d_vocab] of one row under the formulas; `seen` gets the similarity of each condition."""
    n, values = n_prompt or len(row), {} if seen is None else seen

    def edit(site: Site, x: Tensor) -> Tensor:
        late = np.arange(x.shape[1]) >= n
        where = {"all": late | ~late, "prompt": ~late, "generated": late}
        wide = x[0].double().numpy()
        for k, case in enumerate(cases):
            if case.condition and case.condition.site == site:
                values[k] = similarity(case.condition, wide[:n])
        for k, case in enumerate(cases):
            if site not in case.edit.sites:
                continue
            needed = case.condition
            if needed and (values[k] > needed.threshold) != needed.above:
                continue
            new = case.formula(wide, case.edit.sites.index(site))
            wide = np.where(where[case.edit.positions][:, None], new, wide)
        return torch.from_numpy(wide)[None].to(x)

    return hf_forward(source_of(kind), kind, row, edit)


def with_condition(draw: random.Random, kind: str, rows: list[list[int]], case: Case) -> Case:
    """The case in some rows only: those above or below the widest gap between their similarities."""
    points: Any = ("resid_pre", "resid_post")
    early = [s for s in sites_of(points, range(N_LAYERS)) if not min(case.edit.sites) < s]
    if not early:
        return case
    vector = torch.tensor(np.random.default_rng(draw.randrange(10**6)).normal(size=D_MODEL))
    form: dict[str, Any] = {
        "similarity": draw.choice(("projected", "cosine")), "pooled": draw.choice(("mean", "last")),
        "above": draw.random() < 0.5,
    }  # fmt: skip
    place, seen = draw.choice(early), []
    asked = replace(case, condition=Condition(vector, place, threshold=0.0, **form))
    for row in rows:
        values: dict[int, float] = {}
        passed(kind, row, [asked], seen=values)
        seen.append(values[0])
    gap, threshold = max((b - a, (a + b) / 2) for a, b in pairwise(sorted(seen)))
    if gap < 1e-3:
        return case
    return replace(case, condition=Condition(vector, place, threshold=threshold, **form))


def near(got: Sequence[Tensor], want: Sequence[Tensor], what: str) -> None:
    for one, other in zip(got, want, strict=True):
        assert float((one - other).abs().max()) <= NEAR * max(1.0, float(other.abs().max())), what


def greedy_by(kind: str, row: list[int], cases: Sequence[Case], tokens: Sequence[int]) -> bool:
    """Whether each token is the likeliest one under the formulas, to rounding."""
    for k, token in enumerate(tokens):
        logits = passed(kind, [*row, *tokens[:k]], cases, len(row))[-1]
        if float(logits.max() - logits[token]) > 1e-3:
            return False
    return True


@pytest.mark.parametrize("number", range(PLANS))
@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2", "gemma2", "gptj"])
def test_hooks_are_the_formulas(kind: str, number: int) -> None:
    draw = random.Random(1000 * number + len(kind))
    backend = draw.choice(["hf", *(b for b in BACKENDS if kind != "gemma2" or b != "hooked")])
    model, rows = shared(kind, backend), rows_of(9, 14, 6, 11, seed=number)
    # the condition first: what it reads must not depend on edits before it
    first = with_condition(draw, kind, rows, random_case(draw, kind))
    cases = [first, *(random_case(draw, kind) for _ in range(draw.randrange(3)))]
    if first.condition:
        cases[1:] = [c for c in cases[1:] if not min(c.edit.sites) < first.condition.site]
    plan = Plan(tuple(case.whole for case in cases))
    assert Plan.from_dict(plan.to_dict()) == plan
    what = f"{kind}, {backend}, plan {number}: {plan!r}"
    want = [passed(kind, row, cases)[-1] for row in rows]
    longer = [[*row, 5, 6, 7] for row in rows]
    after = [passed(kind, r, cases, len(r) - 3)[-4:].log_softmax(-1) for r in longer]
    unedited = ModelOutputs(model, rows, max_new_tokens=3)
    outputs = unedited.with_plan(plan)
    assert unedited.first_logprobs.shape == outputs.first_logprobs.shape
    near(list(outputs.first_logprobs), [each.log_softmax(-1) for each in want], what)
    near(outputs.continuation_logprobs([[5, 6, 7, 8]] * 4), after, what)
    own = [plan, None, Plan((cases[-1].edit,)), plan]
    alone = [cases, [], [replace(cases[-1], condition=None)], cases]
    with model.applied_each(own):
        together = list(model.logits(rows)[:, -1])
    near(together, [passed(kind, *each)[-1] for each in zip(rows, alone)], what)
    with model.applied(plan):
        near(list(model.logits(rows)[:, -1]), want, what)
    for row, answer in zip(rows, outputs.generations):
        assert greedy_by(kind, row, cases, answer.tokens), what
