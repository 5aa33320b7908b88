"""Selection by three metrics over all sites, against one full pass per metric and candidate.

Bypass is the target log-odds of positive prompts under ablation, induce that of negative prompts under
addition at the direction's site, KL that of negative prompts' first token under ablation; the rule of
Arditi et al. 2024 chooses. The baseline is TransformerLens' own `run_with_hooks` on the Bridge over padded
batches: nothing shared, the logits of all positions as it returns them. Ours scores every distinct
direction once (resid_pre of a layer is resid_post of the layer before) with `ModelOutputs`, and runs an addition
from its own layer on: what enters there is cached in one unedited pass, whose seconds (with the check
that blocks can be run so) are added to every estimate of ours.

The layers are taken three at a time, the baseline and ours in turn. The baseline scores one layer of
the three and is scaled by the number of sites, unless --full. The site that ours chooses is scored by the baseline
too, and both choose among all that the baseline scored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common

METRICS = ("target_log_odds", "addition", "kl")
# The paper's limit first; a small model may have no direction within it.
MAX_KL = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
CHUNK = 3
LIMIT = 4


@dataclass(frozen=True)
class Task:
    """Validation rows, target tokens and the directions of all sites."""

    model: Any
    positive: list[list[int]]
    negative: list[list[int]]
    target: Any
    directions: list[Any]


def task_of(model: Any, args: Any) -> Task:
    from interp_ablate import ContrastSet, collect, estimate_directions
    from interp_ablate.evaluation.metrics import TargetLogOdds, find_target_tokens
    from interp_ablate.evaluation.outputs import ModelOutputs

    n = 4 if args.smoke else 32
    split = ContrastSet.load("declining").split(args.prompts, n, 1)
    train, sides = split.train, (split.train.positive[:32], split.train.negative[:32])
    found = find_target_tokens(*(ModelOutputs(model, side).first_logprobs for side in sides))
    directions = estimate_directions(collect(model, train))
    return Task(
        model,
        model.encode_all(split.validation.positive),
        model.encode_all(split.validation.negative),
        TargetLogOdds(tuple(token for token, _, _ in found)),
        list(directions),
    )


# ---- one full pass per metric and candidate ------------------------------------------------------------


def passed(tl: Any, given: Sequence[Any], hooks: list[tuple[str, Any]]) -> Any:
    """First-token log-probabilities, prompts in the batches' order."""
    import torch

    found = []
    with torch.no_grad():
        for batch in given:
            logits = tl.run_with_hooks(batch.tokens, attention_mask=batch.mask, fwd_hooks=hooks)
            found.append(logits[:, -1].float().log_softmax(-1))
    return torch.cat(found)


class FullPasses:
    """The baseline: three passes a candidate."""

    def __init__(self, task: Task) -> None:
        from interp_ablate.models.batches import batches

        self.tl, self.target = task.model.tl, task.target
        self.positive = batches(task.positive, size=32)
        self.negative = batches(task.negative, size=32)
        self.writers = [str(site) for site in task.model.writers]
        self.reference = passed(self.tl, self.negative, [])

    def score(self, item: Any) -> dict[str, float]:
        from interp_ablate.evaluation.metrics import kl_divergence

        unit, raw = item.vector.float(), item.raw.float()

        def ablate(x: Any, hook: Any) -> Any:
            return x - (x @ unit)[..., None] * unit

        def add(x: Any, hook: Any) -> Any:
            return x + raw

        # the Bridge's hook_resid_mid is the MLP branch's input only: what attention adds reaches both
        name = str(item.site).replace("hook_resid_mid", "hook_attn_out")
        everywhere = [(writer, ablate) for writer in self.writers]
        bypass = self.target.of_logprobs(passed(self.tl, self.positive, everywhere))
        kl = kl_divergence(self.reference, passed(self.tl, self.negative, everywhere))
        induce = self.target.of_logprobs(passed(self.tl, self.negative, [(name, add)]))
        values = (bypass, induce, kl)
        return {metric: float(v.mean()) for metric, v in zip(METRICS, values)}


# ---- ours -----------------------------------------------------------------------------------------------


class Shared:
    """Ours: the distinct directions, each scored once.

    `once`: seconds of the residual cache for all of them.
    """

    def __init__(self, task: Task) -> None:
        from interp_ablate.evaluation.outputs import ModelOutputs

        self.task = task
        self.reference = ModelOutputs(task.model, task.negative)
        self.reference.first_logprobs  # noqa: B018  (computed here, as the baseline's is)
        start = time.perf_counter()
        self.reference.residual_cache  # noqa: B018
        self.once = time.perf_counter() - start

    def score(self, item: Any) -> dict[str, float]:
        from interp_ablate import Ablate, Add, Plan
        from interp_ablate.evaluation.metrics import kl_divergence
        from interp_ablate.evaluation.outputs import ModelOutputs

        task, n = self.task, len(self.task.positive)
        plan = Plan((Ablate(item, task.model.writers),))
        ablated = ModelOutputs(task.model, [*task.positive, *task.negative], plan).first_logprobs
        added = self.reference.with_plan(Plan((Add(item, item.site),))).first_logprobs
        values = (
            task.target.of_logprobs(ablated[:n]),
            task.target.of_logprobs(added),
            kl_divergence(self.reference.first_logprobs, ablated[n:]),
        )
        return {metric: float(v.mean()) for metric, v in zip(METRICS, values)}


# ---- side by side ---------------------------------------------------------------------------------------


Scores = dict[Any, dict[str, float]]  # by site


def all_sites(scores: Scores, directions: Sequence[Any]) -> Scores:
    """Scores of every site from those of the distinct ones."""
    from interp_ablate import Site

    found = {}
    for item in directions:
        site = item.site
        same = site if site in scores else Site(site.layer - 1, "resid_post")
        found[site] = scores[same]
    return found


@dataclass(frozen=True)
class Limits:
    """Of the rule, as `arditi` takes them."""

    max_kl: float
    min_addition: float


def chosen(scores: Scores, n_layers: int, limits: Limits) -> str:
    import pandas as pd

    from interp_ablate.search.selection import arditi

    rows = [
        {"site": str(site), "layer": site.layer, **scores[site]}
        for site in sorted(scores, key=lambda site: site.order)
    ]
    choice = arditi(pd.DataFrame(rows), n_layers=n_layers, **asdict(limits))
    return choice.row["site"] if choice.row else "none"


def narrowest(scores: Scores, n_layers: int, unedited: float) -> Limits:
    """The paper's limits, or the first wider ones within which there is a choice.

    `unedited`: the unedited model's own log-odds, which addition should raise at the least.
    """
    tried = [Limits(kl, addition) for addition in (0.0, unedited) for kl in MAX_KL]
    passing = [limits for limits in tried if chosen(scores, n_layers, limits) != "none"]
    return passing[0] if passing else tried[-1]


def timed(score: Any, items: Sequence[Any], scores: Scores) -> float:
    start = time.perf_counter()
    for item in items:
        scores[item.site] = score(item)
    return time.perf_counter() - start


def measured(
    task: Task, layers: range, full: bool
) -> tuple[dict[str, list[float]], Scores, Scores, FullPasses]:
    """Seconds for all sites, one estimate a chunk of layers, and both tables of scores."""
    from interp_ablate.search.race import distinct

    plain, shared = FullPasses(task), Shared(task)
    items = [item for item in task.directions if item.site.layer in layers]
    once = distinct(items)
    theirs: Scores = {}
    mine: Scores = {}
    seconds: dict[str, list[float]] = {"a pass per metric and site": [], "ours": []}
    for start in range(layers.start, layers.stop, CHUNK):
        chunk = range(start, min(start + CHUNK, layers.stop))
        some = [i for i in items if i.site.layer in chunk and (full or i.site.layer == chunk[-1])]
        spent = timed(plain.score, some, theirs)
        seconds["a pass per metric and site"].append(spent / len(some) * len(items))
        some = [item for item in once if item.site.layer in chunk]
        spent = timed(shared.score, some, mine)
        seconds["ours"].append(spent / len(some) * len(once) + shared.once)
    return seconds, theirs, all_sites(mine, items), plain


def main() -> None:
    args = common.arguments(__doc__, full={"action": "store_true"})
    from interp_ablate import load_model

    model = load_model("smollm2")
    task = task_of(model, args)
    layers = range(10, 11) if args.smoke else range(model.n_layers)
    seconds, theirs, mine, plain = measured(task, layers, args.full)
    unedited = float(task.target.of_logprobs(plain.reference).mean())
    limits = narrowest(mine, model.n_layers, unedited)
    choice = chosen(mine, model.n_layers, limits)
    for item in task.directions:
        if str(item.site) == choice and item.site not in theirs:
            theirs[item.site] = plain.score(item)
    both = {site: mine[site] for site in theirs}
    found = {
        "all sites, ours": choice,
        "the baseline's sites, ours": chosen(both, model.n_layers, limits),
        "the baseline's sites, baseline": chosen(theirs, model.n_layers, limits),
    }
    for name, site in found.items():
        print(f"  choice, {name:<32} {site}")
    apart = {m: max(abs(theirs[s][m] - mine[s][m]) for s in theirs) for m in METRICS}
    print("  largest difference of a score:   ", {m: f"{v:.1e}" for m, v in apart.items()})
    facts = {
        "sites": len(mine),
        "sites_of_baseline": len(theirs),
        "prompts": [len(task.positive), len(task.negative)],
        "limits": asdict(limits),
        "choices": found,
        "same_choice": len({*found.values()}) == 1 and choice != "none",
        "largest_difference": {m: float(f"{v:.2e}") for m, v in apart.items()},
        "limit": LIMIT,
    }
    common.report("selection: bypass, induce and KL over all sites", seconds, "ours", **facts)


if __name__ == "__main__":
    main()
