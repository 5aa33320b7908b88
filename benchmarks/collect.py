"""collect of all 90 sites at the last position, against the bare HF body over the same batches.

The issue of fairness: `collect` runs the chat template's shared prefix once; the second row runs prompts
that share nothing (the template's default system turn is replaced), where that saves nothing.
"""

from __future__ import annotations

import common


def main() -> None:
    args = common.arguments(__doc__)
    import torch

    from interp_ablate import collect
    from interp_ablate.models.batches import batches

    bare, _, model = common.models()
    chat = [model.encode(prompt) for prompt in common.prompts(args.prompts)]
    # the same lengths, but no two rows start alike: token 100 + i in front, the rest as it is
    unshared = [[100 + i, *row[1:]] for i, row in enumerate(chat)]

    def body(rows):
        for batch in batches(rows, size=32):
            with torch.no_grad():
                bare.model(
                    input_ids=batch.tokens,
                    attention_mask=batch.mask,
                    position_ids=batch.positions,
                    use_cache=False,
                )

    for name, rows in (("chat prompts", chat), ("no shared prefix", unshared)):
        seconds = common.paired(
            {
                "HF body, no hooks, no logits": lambda rows=rows: body(rows),
                "collect, 90 sites": lambda rows=rows: collect(model, rows),
            },
            args.rounds,
        )
        facts = {"prompts": len(rows), "tokens": sum(map(len, rows))}
        common.report(f"collect: {name}", seconds, "HF body, no hooks, no logits", **facts)


if __name__ == "__main__":
    main()
