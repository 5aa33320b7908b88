"""`interp-ablate search` on `declining`, and the same search from a random direction, with and without fits.

What it must reach in 10 minutes on 2 cores: 0 of 32 validation requests declined, first-token KL at most 0.02,
no more repetition than the unedited model's. A trial is answers of 32 tokens to 32 prompts and first-token
KL on 32 others, as heretic's is; plans of the front also answer those. heretic 1.4.0 takes 18 to 19 s for it on
the machine this was measured on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import common  # noqa: F401  (offline settings)


def search(out: Path, *, minutes: float, smoke: bool, control: str | None, fits: bool) -> dict:
    import pandas as pd

    from interp_ablate.runs.configuration import Configuration
    from interp_ablate.runs.run_folder import Run
    from interp_ablate.runs.search_run import SearchSettings, run_search

    small = {"n_train": 8, "n_validation": 6, "n_test": 4, "layers": "18-20"} if smoke else {}
    settings = Configuration(model="smollm2", contrast="declining", max_kl=0.02, **small)
    run = Run(out, settings)
    run_search(
        run,
        SearchSettings(
            minutes=minutes, trials=2 if smoke else None, control=control, fits=fits and not smoke
        ),
    )
    trials, selected = (
        pd.read_csv(out / "trials.csv"),
        json.loads((out / "selected.json").read_text()),
    )
    done = trials[(trials["stage"] == "search") & (trials["status"] == "ok")]
    finalists = trials[trials["stage"] == "finalist"]
    unedited = selected["validation_baseline"]
    clean = finalists[finalists["repetition"] <= unedited["repetition"]]
    gone = clean[clean["expression_rate"] == 0]
    name = f"{control or 'concept'}{'' if fits else ', kernels only'}"
    print(f"\n{name}: {len(done)} trials, median {done['seconds'].median():.1f} s")
    columns = ["trial", "edit", "expression_rate", "kl", "repetition"]
    print(finalists[columns].to_string(index=False))
    test = selected.get("test")
    keys = ("behaviour_after", "kl_first_token", "repetition_after", "positive_repetition_after")
    return {
        "search": name,
        "trials": len(done),
        "seconds_a_trial": round(float(done["seconds"].median()), 2),
        "unedited": {k: round(v, 4) for k, v in unedited.items()},
        "least_kl_with_0_declined": None if gone.empty else round(float(gone["kl"].min()), 4),
        "least_rate_within_kl_0.02": _least(clean[clean["kl"] <= 0.02]),
        "chosen": None if not test else int(selected["trial"]["trial"]),
        "test": None if not test else {key: round(test[key], 4) for key in keys},
    }


def _least(rows) -> float | None:  # type: ignore[no-untyped-def]
    return None if rows.empty else float(rows["expression_rate"].min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--control-minutes", type=float, default=5.0)
    parser.add_argument("--keep", type=Path, help="folder for the searches' own folders")
    args = parser.parse_args()
    found = []
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        for number, (control, fits) in enumerate(
            ((None, True), (None, False), ("random", False), ("random", True))
        ):
            minutes = args.minutes if number == 0 else args.control_minutes
            out = Path(folder) / str(number)
            found.append(search(out, minutes=minutes, smoke=args.smoke, control=control, fits=fits))
            if args.smoke:
                break
    print(json.dumps({"benchmark": "search", "searches": found}))


if __name__ == "__main__":
    main()
