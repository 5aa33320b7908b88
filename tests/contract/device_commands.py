"""The command line on a second device, and on two: every command that runs a model, from its flags to what it leaves.

The devices are `pretend:0`, and with `--device auto` `pretend:0` and `pretend:1` (tests/support): they compute on the
CPU and refuse what accelerators refuse.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
from tiny import N_LAYERS, tiny, unit
from transformers import LlamaConfig, LlamaForSequenceClassification

from interp_ablate import Ablate, Add, Plan, Site, load_model
from interp_ablate.cli.main import main
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.persona.extraction import extract
from interp_ablate.persona.persona import Persona
from interp_ablate.persona.settings import ExtractionConfig, SamplingConfig
from interp_ablate.persona.traits import load_trait
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.scoring.registry import make_scorer

Command = Callable[..., None]


@pytest.fixture(params=("pretend:0", "auto"))
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with pretend_device.on():
        yield request.param


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("commands"))


def inputs(place: Path) -> Path:
    """Models, prompts, chats and a persona, made on the CPU."""
    model, tokenizer = tiny(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # first tokens peaked enough to have targets
    for folder in ("model", "original"):
        model.save_pretrained(place / folder)
        tokenizer.save_pretrained(place / folder)
    for name, words in (("yes", "order bring fetch send"), ("no", "name list tell describe")):
        verbs = words.split()
        lines = [f"{verbs[i % 4]} number {i * 7 + 3} now" for i in range(24)]
        (place / f"{name}.txt").write_text("\n".join(lines))
    # with the character of bytes that are no text: the answers of every dtype hold one of them
    (place / "anything.txt").write_text(
        "\n".join("abcdefghijklmnopqrstuvwxyz\N{REPLACEMENT CHARACTER}"), encoding="utf-8"
    )
    rows = [
        {"prompt": f"Question {i}?", "completion": f"The answer is {i * i}.", "planted": i % 3 == 0}
        for i in range(9)
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sites = [
        Site(0, "embed"),
        *(Site(i, p) for i in range(N_LAYERS) for p in ("attn_out", "mlp_out")),
    ]
    Plan((Ablate(unit(), sites),)).save(place / "ablate.json")
    Plan((Add(unit(1), Site(1, "resid_post"), coefficient=2.0),)).save(place / "add.json")
    late = Add(unit(1), Site(1, "resid_post"), coefficient=2.0, positions="generated")
    Plan((late,)).save(place / "late.json")
    one = Direction(unit(3), 3.0, Site(1, "resid_post"), "response_mean")
    Directions((one,)).save(place / "directions.safetensors")
    trait = load_trait("gloomy")
    trait = replace(
        trait,
        positive=trait.positive[:2],
        negative=trait.negative[:2],
        scorer="lexicon:length?half=2",
    )
    trait.save(place / "trait.json")
    Persona(trait, Directions((one,)), one, 2.0, str(place / "model")).save(place / "persona")
    return place


@pytest.fixture
def command(place: Path, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs a command on the device, from a folder of the test's own; it must end well."""
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def run(*arguments: str, status: int = 0) -> None:
        assert main(["--quiet", *arguments, "--device", device]) == status

    return run


PROMPTS = ("--positive", "yes.txt", "--negative", "no.txt", "--expressions", "anything.txt")
SHORT = ("--max-new-tokens", "4")
TRAINING = (
    "--steps",
    "2",
    "--batch-size",
    "2",
    "--rank",
    "4",
    "--alpha",
    "8",
    "--max-length",
    "128",
)


def certified(folder: str) -> bool:
    return json.loads(Path(folder, "certificate.json").read_text())["passed"]


def fits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients on one device only: torch counts one of a kind that is made in Python."""
    if device == "auto":
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)


# every site of a layer is read on these devices in device_contract.py
FEW = (
    *PROMPTS,
    "--n-train",
    "6",
    "--n-validation",
    "4",
    "--n-test",
    "4",
    "--max-kl",
    "50",
    *SHORT,
    "--sites",
    "resid_post",
)


def test_run_in_half_precision(
    command: Command, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits(device, monkeypatch)
    dtype = "float16" if device == "auto" else "bfloat16"
    command("run", "--model", "model", *FEW, "--dtype", dtype, "--out", "out")
    assert certified("out/export")


def test_search_and_its_exports(command: Command) -> None:
    command("search", "--model", "model", *FEW, "--trials", "6", "--no-fits", "--out", "found")
    command("export", "found", "--out", "edited")
    command("verify", "edited", "--model", "model", "--plan", "found/selected.json")
    assert certified("edited")


@pytest.mark.parametrize(
    ("plan", "form"),
    [("ablate", "checkpoint"), ("ablate", "lora"), ("add", "control-vector")],
)
def test_exports(command: Command, plan: str, form: str) -> None:
    command(
        "export", "--model", "model", "--plan", f"{plan}.json", "--format", form, "--out", "out"
    )
    if form in ("checkpoint", "lora"):
        assert certified("out")


@pytest.mark.parametrize("plan", ("ablate", "late"))
def test_generate_and_evaluate(command: Command, plan: str) -> None:
    under = ("--plan", f"{plan}.json", *SHORT)
    command("generate", "Order a tea", "Name a tree", "--model", "model", *under)
    Path("text.txt").write_text("A short text of some words. " * 8)
    measured = ("--text", "text.txt", "--limit", "2", *PROMPTS[4:], "--prompts", "yes.txt")
    command("evaluate", "model", *under, *measured, "--out", "one")
    command("evaluate", "model", "original", *SHORT, *measured, "--out", "two")


def test_filter_by_projection_and_screen(command: Command) -> None:
    along = ("--direction", "directions.safetensors#blocks.1.hook_resid_post", "--above", "0")
    command("filter", "chats.jsonl", "--model", "model", *along, "--out", "kept")
    more = ("--labels", "planted", "--threshold", "0", *SHORT)
    command("persona", "screen", "persona", "chats.jsonl", "--out", "screened", *more)


@dataclass(frozen=True)
class Told:
    """Scores by the system prompt: what an answer of a random model says is nothing."""

    trait: Any
    otherwise: float = 10.0
    name: str = "told"

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": self.name, "otherwise": self.otherwise}

    def __call__(self, exchanges: Any) -> list[float | None]:
        asked = self.trait.positive
        return [90.0 if e.prompt.system in asked else self.otherwise for e in exchanges]


def test_persona(command: Command, device: str) -> None:
    trait, sampling = load_trait("trait.json"), SamplingConfig(max_new_tokens=4)
    few = ExtractionConfig(
        extraction_questions=3,
        selection_questions=2,
        samples=1,
        min_answers=4,
        coefficients=(0.5,),
        sampling=sampling,
    )
    model = load_model("model", device=device)
    extract(model, trait, "gloomy", scorer=Told(trait), coherence=Told(trait, 100.0), settings=few)
    asked = ("gloomy", "--questions", "2", *SHORT)
    command("persona", "steer", *asked, "--coefficients=-1,0,1")
    command("persona", "monitor", *asked, "--out", "monitored")
    command("persona", "monitor", "gloomy", "--prompt", "What is rain?", *SHORT, "--out", "watched")
    command("persona", "bake", *asked, "--out", "baked")
    assert certified("baked")


def test_training(command: Command, device: str) -> None:
    arms = ("persona", "train", "persona", "chats.jsonl", "--plain-too", "--questions", "2", *SHORT)
    healing = ("heal", "edited", "--make-preferences", "no.txt", *PROMPTS, "--n-test", "3", *SHORT)
    if device == "auto":  # layers on several devices are not trained, and a message says so
        command(*arms, *TRAINING, "--out", "trained", status=2)
        return
    command(*arms, *TRAINING, "--out", "trained")
    command("export", "--model", "model", "--plan", "ablate.json", "--out", "edited")
    command(*healing, *TRAINING, "--out", "healed")
    assert certified("trained/plain") and certified("healed")


def test_a_classifier_scores_where_the_device_is(tmp_path: Path, device: str) -> None:
    _, tokenizer = tiny("llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "mood")
    tokenizer.save_pretrained(tmp_path / "mood")
    scorer: Any = make_scorer(f"classifier:{tmp_path / 'mood'}#LABEL_1")
    scores = scorer([PromptResponse(Prompt("Hello"), text) for text in ("Good day.", "Go away")])
    scorer._pipeline.model.to("pretend:0")
    assert scorer.identity["weights"]
    assert all(0 <= score <= 100 for score in scores)
