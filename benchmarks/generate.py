"""Cached greedy generation under an all-site ablation plan, against HF's own unhooked `generate`."""

from __future__ import annotations

import common


def main() -> None:
    args = common.arguments(__doc__)
    import torch

    from interp_ablate import Ablate, Plan, everywhere
    from interp_ablate.models.batches import pad_left
    from interp_ablate.sites import RESIDUAL_POINTS, sites_of

    bare, _, model = common.models()
    rows = [model.encode(prompt) for prompt in common.prompts(max(args.prompts // 4, 4))]
    tokens, mask = pad_left(rows)
    new = 8 if args.smoke else 32
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    writers = Plan((Ablate(vector, everywhere(model.n_layers)),))
    residual = Plan((Ablate(vector, sites_of(RESIDUAL_POINTS, range(model.n_layers))),))

    def unhooked():
        return bare.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=new, do_sample=False
        )

    def ours(plan=None):
        if plan is None:
            return model.generate(rows, max_new_tokens=new)
        with model.applied(plan):
            return model.generate(rows, max_new_tokens=new)

    eos = model.eos_token_ids
    theirs = [[t for t in row.tolist() if t not in eos] for row in unhooked()[:, tokens.shape[1] :]]
    same = sum(list(g.tokens) == row for g, row in zip(ours(), theirs))
    seconds = common.paired(
        {
            "HF generate, no hooks": unhooked,
            "ours, no plan": ours,
            "ours, ablation at 61 writers": lambda: ours(writers),
            "ours, ablation at 90 resid sites": lambda: ours(residual),
        },
        args.rounds,
    )
    facts = {
        "prompts": len(rows),
        "max_new_tokens": new,
        "same_rows_unedited": f"{same}/{len(rows)}",
    }
    common.report("generate", seconds, "HF generate, no hooks", **facts)


if __name__ == "__main__":
    main()
