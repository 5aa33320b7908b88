"""Every decoder type of transformers from a folder to a certified export, tiny and random.

`PYTHONPATH=tests python -m support.families [TYPE ...]` loads each from its folder, runs the preflight of `run`, collects,
generates, exports an ablation at all writers, and checks the export in plain transformers (`hand_hooked.py`).
Types with tied and untied embeddings go both ways; those that wrap a text model go as that too. It prints a
table and a JSON line; without types, all of them (`make families`), written to docs/families.json.
Of some types, only `--out` writes anything: their rows replace those of its file.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from support.family_models import build, config_classes
from support.hand_hooked import blocks_of, check, norms_before, reloaded, run_by
from support.tiny import make_tokenizer
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from interp_ablate import Plan
from interp_ablate.activations.collection import collect
from interp_ablate.edits.kinds import Ablate
from interp_ablate.errors import InterpAblateError
from interp_ablate.export.checkpoint import export_checkpoint
from interp_ablate.export.preflight import check_model_exports, check_source_exports
from interp_ablate.models.load import load_model
from interp_ablate.models.sources import resolve

ROWS = [list(range(5, 17)), [*range(5, 14), 99, 98], [3, 4, 5]]
LEFT, LOGITS = (
    1e-5,
    1e-4,
)  # limits: the share along the direction; logits, in standard deviations of them
PROCESSOR = {
    "preprocessor_config.json": '{"image_mean": [0.25]}\n',
    "processor_config.json": "{}\n",
}
AS_IT_IS = "as its config has it"
TABLE = Path(__file__).resolve().parents[2] / "docs" / "families.json"


@dataclass
class Outcome:
    """What came of one type in one form."""

    outcome: str
    """exact, refused (at load or preflight, in words), late (in words, but after work), wrong, raw, not built."""
    detail: str
    model_class: str = ""
    backend: str = ""
    writes: dict[str, list[str]] = field(default_factory=dict)
    """The tensors that write, by site point, without their layer."""


def forms(model_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The forms of a type: (name, arguments of `build`)."""
    kind = config_classes()[model_type]
    yield AS_IT_IS, {}
    try:
        tied = kind().get_text_config(decoder=True).tie_word_embeddings
        yield ("untied" if tied else "tied"), {"tied": not tied}
    except Exception:  # configs that do not say, or that their own defaults refuse
        pass
    wrapped = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)
    if wrapped and MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, wrapped) is not wrapped:
        yield "text", {"text": True}


def carried(model_type: str, place: Path, **form: Any) -> Outcome:
    """What comes of one type in one form, in a folder of its own."""
    shutil.rmtree(place, ignore_errors=True)
    try:
        hf = build(model_type, **form)
        if form.get("tied") is not None and _is_tied(hf) is not form["tied"]:
            return Outcome("no such form", "its embeddings are of one kind only")
        hf.save_pretrained(place / "in")
    except Exception as error:  # whatever transformers raises for a config of ours
        return Outcome("not built", _words(error))
    make_tokenizer().save_pretrained(place / "in")
    for name, text in PROCESSOR.items():
        (place / "in" / name).write_text(text, encoding="utf-8")
    stage = ["load"]
    try:
        result = _exported(hf, place, stage)
    except InterpAblateError as error:
        early = stage[0] in ("load", "preflight")
        result = Outcome("refused" if early else "late", f"{stage[0]}: {_words(error)}")
    except Exception as error:  # a raw exception is a finding
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        result = Outcome("raw", f"{stage[0]}: {_words(error)} ({where})")
    result.model_class = type(hf).__name__
    result.detail = result.detail.replace(f"{place}/", "")
    return result


def _exported(hf: Any, place: Path, stage: list[str]) -> Outcome:
    folder, out = place / "in", place / "out"
    check_source_exports(resolve(folder), out)
    model = load_model(folder)
    stage[0] = "preflight"
    check_model_exports(model, out)
    stage[0] = "collect"
    collect(model, ROWS, positions=(-1,))
    stage[0] = "generate"
    model.generate(ROWS, max_new_tokens=3)
    stage[0] = "export"
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    certificate = export_checkpoint(model, Plan((Ablate(r, model.writers),)), out, prompts=ROWS)
    stage[0] = "check"
    found = check(hf, out, r, ROWS)
    problems = [] if certificate["passed"] else ["the certificate does not pass"]
    problems += [f"{found['left']:.1e} is left along r"] if not found["left"] < LEFT else []
    problems += [f"logits differ by {found['logits']:.1e}"] if not found["logits"] < LOGITS else []
    problems += ["the plan does nothing"] if not found["effect"] > 0.01 else []
    problems += _changed_elsewhere(hf, out)
    detail = "; ".join(
        problems
    ) or "left {left:.0e}, logits {logits:.0e}, effect {effect:.2f}".format(**found)
    return Outcome("wrong" if problems else "exact", detail, "", model.backend, _writes(model))


def _changed_elsewhere(hf: Any, out: Path) -> Iterator[str]:
    """What an export changed beside the decoder's blocks and embeddings, or left out."""
    export = reloaded(out)
    if type(export) is not type(hf):
        yield f"the folder names {type(export).__name__}, not {type(hf).__name__}"
    embeddings = [m for m in run_by(hf, ROWS[0]) if isinstance(m, nn.Embedding)]
    blocks = blocks_of(hf, ROWS[0])
    norms = norms_before(hf, blocks, hf.get_input_embeddings().weight.shape[-1], ROWS[0])
    written = [*blocks, *embeddings, *norms, hf.get_output_embeddings()]
    own = {id(p) for module in written if module is not None for p in module.parameters()}
    after = dict(export.named_parameters())
    for name, p in hf.named_parameters():
        if id(p) not in own and not torch.equal(p, after[name]):
            yield f"{name} is not what it was"
    for name, text in PROCESSOR.items():
        kept = out / name
        if not kept.is_file() or kept.read_text(encoding="utf-8") != text:
            yield f"{name} was not kept"


def _is_tied(hf: Any) -> bool:
    head = hf.get_output_embeddings()
    return head is not None and head.weight is hf.get_input_embeddings().weight


def _writes(model: Any) -> dict[str, list[str]]:
    names = model.hf_state_dict()
    found: dict[str, set[str]] = {}
    for site in model.writers:
        for gains, layouts in model.architecture.parts(site, names, model.hf_config):
            after = "".join(
                f" then {_inside(gain.name) if gain.name else 'a norm without a weight'}"
                for gain in reversed(gains)
            )
            for name, layout in layouts.items():
                if layout == "bias":
                    continue
                inside = name if site.point.endswith("embed") else _inside(name)
                text = f"{inside.removesuffix('.weight')} [{layout}]{after}"
                found.setdefault(site.point, set()).add(text)
    return {point: sorted(texts) for point, texts in found.items()}


def _inside(name: str) -> str:
    """A parameter's name in its block, with one word for all experts."""
    inside = re.sub(r"^.*?\.\d+\.", "", name)
    return re.sub(r"\.\d+\.", ".{expert}.", inside).removesuffix(".weight")


def _words(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason"
    return f"{type(error).__name__}: {text}"[:400]


def quiet() -> None:
    """No progress bars, no notes of libraries; one thread, which is the fastest for what is tiny."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("interp_ablate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def measured(model_type: str) -> dict[str, Outcome]:
    """What comes of a type in all its forms; the others only where the first is exact."""
    results: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as place:
        for form, arguments in forms(model_type):
            result = carried(model_type, Path(place) / "x", **arguments)
            if result.outcome != "no such form":
                results[form] = result
            if results[AS_IT_IS].outcome != "exact":
                break
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; status 1 if a type is wrong, late or raises something raw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument(
        "--out", type=Path, help="of all types docs/families.json; those of some are put into it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(argv)
    names = options.types or list(config_classes())
    rows: dict[str, dict[str, Any]] = {}
    with get_context("spawn").Pool(options.jobs, initializer=quiet) as pool:
        for model_type, results in zip(names, pool.imap(measured, names)):
            for form, result in results.items():
                name = model_type if form == AS_IT_IS else f"{model_type}, {form}"
                print(
                    f"{name:34} {result.outcome:9} {result.backend:7} {result.detail}", flush=True
                )
            rows[model_type] = {
                form: {key: value for key, value in asdict(result).items() if value}
                for form, result in results.items()
            }
    out = options.out or (None if options.types else TABLE)
    if options.types and out and out.is_file():
        before = json.loads(out.read_text(encoding="utf-8"))
        rows = dict(sorted({**before["outcomes"], **rows}.items()))
    outcomes = [(form, each["outcome"]) for forms in rows.values() for form, each in forms.items()]
    first = Counter(outcome for form, outcome in outcomes if form == AS_IT_IS)
    others = Counter(outcome for form, outcome in outcomes if form != AS_IT_IS)
    counts = {"types": dict(first), "other_forms": dict(others)}
    table = {"transformers": transformers.__version__, **counts, "outcomes": rows}
    if out:
        out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "families", **counts}))
    return int(any(outcome in ("wrong", "raw", "late") for _, outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
