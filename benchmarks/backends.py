"""The same work on backend="hf" (plain transformers, hooks on its own modules) and on TransformerLens' bridge."""

from __future__ import annotations

import common


def main() -> None:
    args = common.arguments(__doc__)
    import torch

    from interp_ablate import Ablate, Plan, collect, everywhere, load_model

    backends = ("bridge", "hf")
    models = {backend: load_model("smollm2", backend=backend) for backend in backends}
    rows = [models["hf"].encode(prompt) for prompt in common.prompts(args.prompts)]
    few, new = rows[: max(args.prompts // 4, 4)], 8 if args.smoke else 32
    vector = torch.randn(models["hf"].d_model, generator=torch.Generator().manual_seed(0))
    plan = Plan((Ablate(vector, everywhere(models["hf"].n_layers)),))

    def edited(model):
        with model.applied(plan):
            return model.generate(few, max_new_tokens=new)

    work = {
        "load": lambda model: load_model("smollm2", backend=model.backend),
        "collect": lambda model: collect(model, rows),
        "logits": lambda model: model.logits(rows, keep=1),
        "generate": lambda model: model.generate(few, max_new_tokens=new),
        "generate, ablation at 61 writers": edited,
    }
    got = {backend: model.logits(few, keep=1) for backend, model in models.items()}
    apart = max(float((a - b).abs().max()) for a, b in zip(got["bridge"], got["hf"]))
    for name, call in work.items():
        seconds = common.paired(
            {each: (lambda call=call, each=each: call(models[each])) for each in backends},
            args.rounds,
        )
        facts = {"prompts": len(rows), "max_new_tokens": new, "logits_apart": apart}
        common.report(f"backends, {name}", seconds, "bridge", **facts)


if __name__ == "__main__":
    main()
