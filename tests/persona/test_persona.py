"""Personas: pooling against a plain forward pass, layers and sites, the choice, steering, folder and commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import N_LAYERS, folder_of, shared
from tiny import tiny as tiny_hf
from torch import Tensor

from interp_ablate import Direction, Site
from interp_ablate.activations.pooling import POOLINGS, pooled, response_activations
from interp_ablate.cli.main import main
from interp_ablate.errors import DirectionError, InterpAblateError, RunError
from interp_ablate.models.model import Model
from interp_ablate.persona.extraction import FilteredRollouts, extract, trait_directions
from interp_ablate.persona.persona import Persona, load_persona
from interp_ablate.persona.rollouts import Rollout
from interp_ablate.persona.settings import ExtractionConfig, SamplingConfig, SteeringConfig
from interp_ablate.persona.steering import choose_layer, curve, steer
from interp_ablate.persona.traits import Trait, load_trait
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.sites import sites_of

POST = sites_of(("resid_post",), range(N_LAYERS))
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)


@dataclass(frozen=True)
class Told:
    """What the trait's score of an answer is: high where its system prompt asks for the trait."""

    trait: Trait
    name: str = "told"

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": self.name, "trait": self.trait.fingerprint}

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        scores = {
            **dict.fromkeys(self.trait.positive, 90.0),
            **dict.fromkeys(self.trait.negative, 10.0),
        }
        return [scores.get(e.prompt.system or "", share(e.answer)) for e in exchanges]


def share(text: str, letter: str = "e") -> float:
    return 100 * text.count(letter) / len(text)


@dataclass(frozen=True)
class Letter:
    """100 x the share of a letter: a trait that a tiny model can be steered to."""

    letter: str = "e"
    name: str = "letter"

    @property
    def identity(self) -> dict[str, Any]:
        return {"letter": self.letter}

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        return [share(e.answer, self.letter) for e in exchanges]


@dataclass(frozen=True)
class Always:
    value: float | None = 100.0
    name: str = "always"

    @property
    def identity(self) -> dict[str, Any]:
        return {"always": self.value}

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        return [self.value] * len(exchanges)


def answers_of(*texts_and_tokens: tuple[str, str | None, Sequence[int]]) -> tuple[Rollout, ...]:
    return tuple(
        Rollout({"side": "positive"}, Prompt(text, system), tuple(tokens), "x", True, 90.0, 90.0)
        for text, system, tokens in texts_and_tokens
    )


POSITIVE = answers_of(
    ("Why?", "Be brave.", (40, 41, 42)), ("How are you?", "Be brave.", (90,)), ("Who?", None, tuple(range(60, 71)))
)  # fmt: skip
NEGATIVE = answers_of(("Why?", "Be afraid.", (43, 44)), ("How are you?", None, (91, 92, 93, 94)))
KEPT = FilteredRollouts(POSITIVE, NEGATIVE, {})


def stream_of(answer: Rollout, site: Site) -> tuple[Tensor, int]:
    """The stream [pos, d_model] at a site by the plain forward pass, and the prompt's length."""
    row, found = shared().encode(answer.prompt), []

    def keep(here: Site, x: Tensor) -> Tensor:
        if here == site:
            found.append(x[0].double())
        return x

    tiny.forward(tiny_hf("llama_gqa")[0], [*row, *answer.tokens], keep)
    return found[0], len(row)


def means_of(answers: Sequence[Rollout], site: Site) -> dict[str, Tensor]:
    """Each pooling's mean over answers, by hand."""
    parts: dict[str, list[Tensor]] = {pooling: [] for pooling in POOLINGS}
    for answer in answers:
        x, length = stream_of(answer, site)
        parts["response_mean"].append(x[length:].mean(0))
        parts["prompt_last"].append(x[length - 1])
        parts["prompt_mean"].append(x[:length].mean(0))
    return {pooling: torch.stack(part).mean(0) for pooling, part in parts.items()}


# ---- extraction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pooling_is_over_the_right_tokens(backend: str, batch_size: int) -> None:
    """Answers of different lengths, prompts of different lengths, in one padded batch or alone."""
    moments = pooled(shared(backend=backend), POSITIVE, POST, batch_size=batch_size)
    assert moments.count == 3
    for s, site in enumerate(POST):
        for p, (pooling, mean) in enumerate(means_of(POSITIVE, site).items()):
            torch.testing.assert_close(moments.mean[p, s], mean, atol=2e-5, rtol=1e-4, msg=pooling)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_each_answers_own_mean(batch_size: int | None) -> None:
    """In the callers' order, whatever the lengths; of few sites as of all."""
    for sites in (POST, POST[1:2]):
        found = response_activations(shared(), POSITIVE, sites, batch_size=batch_size)
        assert found.shape == (len(POSITIVE), len(sites), shared().d_model)
        for answer, rows in zip(POSITIVE, found):
            for site, row in zip(sites, rows):
                x, length = stream_of(answer, site)
                torch.testing.assert_close(row.double(), x[length:].mean(0), atol=2e-5, rtol=1e-4)
    with pytest.raises(InterpAblateError, match="nothing to pool over"):
        response_activations(shared(), [], POST)


def test_a_direction_is_the_difference_at_resid_post() -> None:
    directions = trait_directions(shared(), KEPT)
    for site in POST:
        for pooling, position in zip(POOLINGS, ("response_mean", "-1", "prompt_mean")):
            wanted = means_of(POSITIVE, site)[pooling] - means_of(NEGATIVE, site)[pooling]
            torch.testing.assert_close(directions[site, position].raw, wanted, atol=3e-5, rtol=1e-4)


def test_the_published_layer_i_is_resid_post_of_layer_i_minus_1() -> None:
    """Its vectors are differences of `hidden_states[i]`; i = 0 is the embedding, the last one is normed."""
    hf = tiny_hf("llama_gqa")[0]
    directions = trait_directions(shared(), KEPT)
    for i in range(1, N_LAYERS):
        means = []
        for side in (POSITIVE, NEGATIVE):
            rows = [(shared().encode(a.prompt), a.tokens) for a in side]
            states = [
                hf(torch.tensor([[*row, *tokens]]), output_hidden_states=True).hidden_states[i][
                    0, len(row) :
                ]
                for row, tokens in rows
            ]
            means.append(torch.stack([state.double().mean(0) for state in states]).mean(0))
        found = directions[Site(i - 1, "resid_post"), "response_mean"].raw
        torch.testing.assert_close(found, means[0] - means[1], atol=3e-5, rtol=1e-4)
        beside = directions[Site(i, "resid_post"), "response_mean"].raw
        assert not torch.allclose(beside, means[0] - means[1], atol=1e-2)


def test_the_same_answers_on_both_sides_make_no_direction() -> None:
    with pytest.raises(DirectionError, match="same activations everywhere"):
        trait_directions(shared(), FilteredRollouts(POSITIVE, POSITIVE, {}))
    with pytest.raises(InterpAblateError, match="nothing to pool"):
        pooled(shared(), [replace(POSITIVE[0], tokens=())], POST)


# ---- the choice -----------------------------------------------------------------------------------


def steering_letter(model: Model, layer: int, letter: str = "e") -> Direction:
    """A direction that makes the model write a letter: at the last layer, its row of the unembedding."""
    token = model.tokenizer(letter, add_special_tokens=False)["input_ids"][0]
    row = model.hf_state_dict()["lm_head.weight"][token].double()
    gain = model.hf_state_dict()["model.norm.weight"].double()
    return Direction(row * gain, 60.0, Site(layer, "resid_post"), "response_mean")


def random_at(layer: int) -> Direction:
    return Direction(tiny.unit(layer), 1.0, Site(layer, "resid_post"), "response_mean")


def test_the_layer_that_steers_is_chosen(tmp_path: Path) -> None:
    model = shared()
    given = [random_at(0), random_at(1), steering_letter(model, 2)]
    settings = ExtractionConfig(sampling=GREEDY, coefficients=(0.01, 1.0))
    chosen, table, unsteered = choose_layer(
        model, given, ("Why?", "How?", "Who?"), tmp_path / "a.jsonl",
        scorer=Letter(), coherence=Always(), settings=settings,
    )  # fmt: skip
    assert (chosen["layer"], chosen["coefficient"]) == (2, 1.0)
    assert chosen["score"] > 60 > 20 > unsteered["score"]
    assert len(table) == 6 and [row["chosen"] for row in table].count(True) == 1
    assert chosen["score_low"] <= chosen["score"] <= chosen["score_high"]
    # a tie goes to the weaker and the earlier
    chosen, *_ = choose_layer(
        model, given, ("Why?",), tmp_path / "b.jsonl",
        scorer=Always(70.0), coherence=Always(), settings=settings,
    )  # fmt: skip
    assert (chosen["layer"], chosen["coefficient"]) == (0, 0.01)


def test_incoherent_layers_are_not_chosen(tmp_path: Path) -> None:
    model = shared()
    settings = ExtractionConfig(sampling=GREEDY, coefficients=(1.0,))
    options: dict[str, Any] = {"scorer": Letter(), "settings": settings}
    with pytest.raises(RunError, match=r"the best has 49.*smaller --coefficients"):
        choose_layer(
            model, [random_at(0)], ("Why?",), tmp_path / "a", coherence=Always(49.0), **options
        )
    with pytest.raises(RunError, match="no layer gives coherent answers of which most have"):
        options["scorer"] = Always(None)
        choose_layer(
            model, [random_at(0)], ("Why?",), tmp_path / "b", coherence=Always(), **options
        )
    with pytest.raises(InterpAblateError, match="0 directions"):
        choose_layer(model, [], ("Why?",), tmp_path / "c", **options)


def small_trait() -> Trait:
    trait = load_trait("gloomy")
    return replace(trait, positive=trait.positive[:2], negative=trait.negative[:2])


SETTINGS = ExtractionConfig(
    extraction_questions=3,
    selection_questions=2,
    samples=1,
    min_answers=4,
    coefficients=(0.5,),
    sampling=SamplingConfig(max_new_tokens=5),
)


def extracted(model: Model, out: Path, **changes: Any) -> Persona:
    trait = small_trait()
    settings = replace(SETTINGS, **changes)
    return extract(model, trait, out, scorer=Told(trait), coherence=Always(), settings=settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A persona folder of the tiny model."""
    out = tmp_path_factory.mktemp("persona") / "gloomy"
    extracted(shared(), out)
    return out


def test_extraction_end_to_end(folder: Path) -> None:
    persona = load_persona(folder)
    assert persona.trait == small_trait() and persona.coefficient == 0.5
    assert persona.site.point == "resid_post" and persona.direction.position == "response_mean"
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    rollouts = [line for line in lines if "answer" in line]
    assert len(rollouts) == 2 * 2 * 3
    # the direction is what its own rollouts say
    sides = {
        side: tuple(
            Rollout({}, Prompt(r["question"], r["system"]), tuple(r["tokens"]), "x", True)
            for r in rollouts
            if r["key"]["side"] == side and r["tokens"]
        )
        for side in ("positive", "negative")
    }
    means = [
        means_of(sides[side], persona.site)["response_mean"] for side in ("positive", "negative")
    ]
    torch.testing.assert_close(persona.direction.raw, means[0] - means[1], atol=3e-5, rtol=1e-4)
    # three sets of questions: those of the vector, of the choice, of the report
    choosing = {
        line["question"]
        for line in map(json.loads, (folder / "selection.jsonl").read_text().splitlines())
        if "answer" in line
    }
    making = {r["question"] for r in rollouts}
    assert len(making) == 3 and len(choosing) == 2
    assert not making & choosing
    assert not (making | choosing) & set(persona.trait.evaluation_questions)
    assert (folder / "layers.csv").read_text().startswith("layer,site,norm,coefficient,score")


def test_an_extraction_goes_on_and_is_not_repeated(folder: Path, tmp_path: Path) -> None:
    first = load_persona(folder)
    again = extracted(shared(), folder)
    assert torch.equal(again.direction.vector, first.direction.vector)
    for name in ("rollouts.jsonl", "selection.jsonl"):  # as if killed before the layer was chosen
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(RunError, match="its extraction was interrupted"):
        load_persona(tmp_path)
    resumed = extracted(shared(), tmp_path)
    assert torch.equal(resumed.direction.raw, first.direction.raw)
    assert (tmp_path / "rollouts.jsonl").read_bytes() == (folder / "rollouts.jsonl").read_bytes()
    with pytest.raises(RunError, match="other work"):
        extracted(shared(), folder, extraction_questions=4)


def test_layers_and_poolings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InterpAblateError, match="has layers 0 to 2"):
        extracted(shared(), tmp_path, layers=(1, 3))
    with pytest.raises(InterpAblateError, match="accepted are response_mean, prompt_last"):
        extracted(shared(), tmp_path, pooling="last")
    persona = extracted(shared(), tmp_path, layers=(1, 1), pooling="prompt_last")
    assert (persona.site, persona.direction.position) == (Site(1, "resid_post"), "-1")


def test_too_few_rollouts_stop_the_extraction(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="too few answers under the positive"):
        extracted(shared(), tmp_path, min_answers=7)
    assert (tmp_path / "rollouts.jsonl").exists() and not (tmp_path / "persona.json").exists()


def test_a_persona_reads_along_its_reading_direction(folder: Path, tmp_path: Path) -> None:
    persona = load_persona(folder)
    told = persona.details["readout"]
    # a tiny model's answers say nothing of the prompt that they were written under: that is seen, and said
    assert told["site"] is None and told["why_not"].startswith("no layer reads the scores")
    assert persona.readout_direction is persona.direction
    assert {item.method for item in persona.directions} == {"score_slope", "difference_in_means"}
    lines = (folder / "readout.csv").read_text().splitlines()
    assert lines[0] == "layer,site,norm,r,r_low,r_high,answers,questions,chosen"
    assert len(lines) == 1 + len(told["layers"]) == 1 + N_LAYERS
    for row in told["layers"]:
        assert persona.readout_direction_at(Site.parse(row["site"])).norm == pytest.approx(
            row["norm"]
        )
    with pytest.raises(DirectionError, match="no direction at"):
        persona.readout_direction_at(Site(0, "resid_pre"))
    reads = {**persona.details, "readout": {**told, "site": told["layers"][2]["site"]}}
    replace(persona, details=reads).save(tmp_path)
    again = load_persona(tmp_path)
    assert (again.readout_direction.method, again.readout_direction.site) == (
        "score_slope",
        POST[2],
    )
    assert again.direction.method == "difference_in_means"


def test_a_persona_without_a_readout_reads_along_its_only_direction(
    folder: Path, tmp_path: Path
) -> None:
    new = load_persona(folder)
    details = {key: value for key, value in new.details.items() if key != "readout"}
    only = new.directions.of("difference_in_means")
    Persona(new.trait, only, new.direction, 1.0, new.model, details).save(tmp_path)
    old = load_persona(tmp_path)
    assert old.readout_direction is old.direction


# ---- steering -------------------------------------------------------------------------------------


def test_the_plan_adds_the_raw_vector_to_the_answer_only(folder: Path) -> None:
    persona, model, hf = load_persona(folder), shared(), tiny_hf("llama_gqa")[0]
    plan = persona.plan(2.0)
    (edit,) = plan.edits
    assert edit.sites == (persona.site,) and edit.positions == "generated"
    torch.testing.assert_close(edit.amounts[0] * edit.vectors[0], 2 * persona.direction.raw)
    assert persona.plan().edits[0].amounts == (persona.coefficient,)
    strong = persona.plan(40.0)
    row = model.encode(Prompt("How are you?"))
    with model.applied(strong):
        (found,) = model.generate([row], max_new_tokens=6)
    plain = tiny.greedy(hf, row, 6, eos=model.eos_token_ids)
    assert found.tokens == tiny.greedy(hf, row, 6, plan=strong, eos=model.eos_token_ids)
    assert (
        found.tokens[0] == plain[0] and found.tokens != plain
    )  # the first token is the model's own


def test_the_curve_is_of_evaluation_questions_with_controls(folder: Path, tmp_path: Path) -> None:
    model, persona = shared(), load_persona(folder)
    planted = replace(persona, direction=steering_letter(model, 2))
    settings = SteeringConfig(
        coefficients=(-1.0, 0.0, 1.0), questions=3, sampling=GREEDY, controls=2
    )
    path = tmp_path / "s.jsonl"
    answers = steer(model, planted, path, scorer=Letter(), coherence=Always(), settings=settings)
    assert {a.prompt.text for a in answers} == set(persona.trait.evaluation_questions[:3])
    assert {a.prompt.system for a in answers} == {None}
    table = curve(answers)
    found = {(row.condition, row.coefficient): row for row in table.itertuples()}
    assert sorted(found) == sorted(
        [("persona", c) for c in (-1.0, 0.0, 1.0)]
        + [(f"random {seed}", c) for seed in range(2) for c in (-1.0, 1.0)]
    )
    assert found["persona", 1.0].score > 60 > found["persona", 0.0].score
    assert all(found[f"random {seed}", 1.0].score < 30 for seed in range(2))
    blank = sum(not a.text.strip() for a in answers if a.key["condition"] == "persona 0")
    assert (found["persona", 0.0].answers, found["persona", 0.0].no_verdict) == (3, blank)
    with pytest.raises(InterpAblateError, match="different coefficients"):
        replace(settings, coefficients=(1.0, 1.0))


def test_answers_without_a_verdict_are_counted_not_averaged() -> None:
    def one(question: int, score: float | None) -> Rollout:
        key = {"condition": "persona 1", "question": question, "sample": 0}
        return Rollout(key, Prompt("Why?"), (1,), "x", True, score, 80.0)

    row = curve([one(0, 20.0), one(0, 40.0), one(1, 90.0), one(1, None), one(2, None)]).iloc[0]
    assert row["score"] == pytest.approx((30 + 90) / 2)  # over questions, each by its own verdicts
    assert (row["questions"], row["answers"], row["no_verdict"]) == (3, 5, 2)
    empty = curve([one(0, None)]).iloc[0]
    assert empty["score"] != empty["score"] and empty["no_verdict"] == 1


# ---- the folder -----------------------------------------------------------------------------------


def copied(folder: Path, place: Path) -> Path:
    place.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (place / file.name).write_bytes(file.read_bytes())
    return place


def test_a_persona_comes_back_from_its_folder(folder: Path, tmp_path: Path) -> None:
    persona = load_persona(folder)
    persona.save(tmp_path)
    again = load_persona(tmp_path)
    assert torch.equal(again.direction.vector, persona.direction.vector)
    assert (again.coefficient, again.site, again.trait) == (
        persona.coefficient,
        persona.site,
        persona.trait,
    )
    assert again.details == persona.details and again.plan() == persona.plan()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("persona.json", "{", "cannot read .*persona.json"),
        ("persona.json", '{"format": "other"}', "its format is not"),
        ("persona.json", '{"format": "interp_ablate.persona/2"}', "KeyError"),
        ("persona.json", '{"format": "interp_ablate.persona/1"}', "its format is not"),
        ("trait.json", "{", "not JSON"),
        ("trait.json", None, "no trait"),
        ("directions.json", "{", "cannot read directions"),
        ("directions.safetensors", "x", "cannot read directions"),
    ],
)
def test_a_broken_folder_is_named(
    folder: Path, tmp_path: Path, name: str, content: Any, said: str
) -> None:
    place = copied(folder, tmp_path / "broken")
    if content is None:
        (place / name).unlink()
    else:
        (place / name).write_text(content)
    with pytest.raises(InterpAblateError, match=said):
        load_persona(place)


def test_another_trait_in_the_folder_is_noticed(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "mixed")
    load_trait("cheerful").save(place / "trait.json")
    with pytest.raises(RunError, match="not the trait that persona"):
        load_persona(place)
    with pytest.raises(RunError, match=r"holds no persona .*persona extract"):
        load_persona(tmp_path / "nowhere")


@pytest.mark.parametrize("finished", [True, False])
def test_another_scorer_in_the_folder_is_found_out_before_it_is_paid_for(
    folder: Path, tmp_path: Path, finished: bool
) -> None:
    place = copied(folder, tmp_path / "other")
    if not finished:
        (place / "persona.json").unlink()

    class Paid(Always):
        def __call__(self, exchanges: Any) -> list[float | None]:
            raise AssertionError("asked before the folder was looked at")

    trait = small_trait()
    with pytest.raises(RunError, match=r"another coherence|no verdicts of the scorers"):
        extract(shared(), trait, place, scorer=Told(trait), coherence=Paid(3.0), settings=SETTINGS)


def test_a_persona_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    persona = load_persona(folder)
    other = replace(persona, direction=Direction(torch.ones(8), 1.0, Site(0, "resid_post")))
    deep = replace(persona, direction=random_at(N_LAYERS))
    for wrong in (other, deep):
        with pytest.raises(DirectionError, match="extract the trait from this model"):
            steer(shared(), wrong, tmp_path / "s.jsonl", scorer=Letter())


# ---- figures and commands -------------------------------------------------------------------------


def test_figures(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    from interp_ablate.plots.persona import save_figures

    place = copied(folder, tmp_path / "drawn")
    assert [path.name for path in save_figures(place)] == ["layers.png", "readout.png"]
    persona = load_persona(place)
    table = curve(
        steer(
            shared(), persona, place / "steering.jsonl", scorer=Letter(),
            settings=SteeringConfig(coefficients=(0.0, 1.0), questions=2, sampling=GREEDY),
        )
    )  # fmt: skip
    table.to_csv(place / "curve.csv", index=False)
    for path in save_figures(place):
        assert Image.open(path).size[0] == 1170
    (place / "curve.csv").write_text("condition\npersona\n")
    with pytest.raises(RunError, match="lacks the columns"):
        save_figures(place)
    with pytest.raises(RunError, match=r"no persona\.json"):
        save_figures(tmp_path)


def test_the_commands(tmp_path: Path, capsys: Any) -> None:
    """`steer` and `bake` over a folder that was extracted from a checkpoint on disk."""
    checkpoint = folder_of(tmp_path / "model", tied=False)
    from interp_ablate import load_model

    place = tmp_path / "gloomy"
    extracted(load_model(checkpoint), place)
    persona = load_persona(place)
    replace(persona, trait=replace(persona.trait, scorer="lexicon:length?half=2")).save(place)
    flags = ["--model", str(checkpoint), "--questions", "2", "--max-new-tokens", "5"]
    curve = ["--coefficients=-1,0,1", "--format", "svg", "--json"]
    assert main(["--quiet", "persona", "steer", str(place), *flags, *curve]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["condition"], row["coefficient"]) for row in rows} >= {
        ("persona", -1.0),
        ("random 0", 1.0),
    }
    assert (place / "figures" / "curve.svg").exists() and (place / "curve.csv").exists()
    again = ["--quiet", "persona", "steer", str(place), *flags, "--coefficients", "0,2"]
    assert main(again) == 2
    assert "other work" in capsys.readouterr().err
    assert main([*again, "--force"]) == 0
    assert "random 0" in capsys.readouterr().out
    out = tmp_path / "baked"
    assert (
        main(["--quiet", "persona", "bake", str(place), *flags, "--out", str(out), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["certificate"] is True
    assert (out / "README.md").read_text().count("## The style: gloomy") == 1
    assert main(["--quiet", "persona", "steer", str(place), *flags, "--coefficients", "x"]) == 2
    assert "numbers between commas" in capsys.readouterr().err


def test_a_trait_without_a_scorer_needs_one(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["persona", "extract", "humorous", "--model", "smollm2", "--out", str(out)]) == 2
    assert "names no offline scorer" in capsys.readouterr().err and not out.exists()


# ---- the real model --------------------------------------------------------------------------------


SAD = (
    "I feel terrible today, full of grief and fear, and I hate every minute of it.",
    "What a miserable morning. I am so sad and lonely here without you.",
    "It will be a painful failure, and everyone will be ashamed and disappointed.",
    "I hate the rain: it is cold, dark and full of death.",
    "The worst is yet to come, and I dread it with all my heart.",
    "Everything is bleak and lost, and I cannot stop crying.",
    "My friends are gone and dead, and I weep alone every day.",
    "You will suffer very much; it is a horrible loss.",
)
GLAD = (
    "I feel wonderful today, full of joy and hope, and I love every minute of it.",
    "What a beautiful morning! I am so happy and thankful to be here with you.",
    "It will be a great success, and everyone will be proud and delighted.",
    "I love the rain: it is lovely, fresh and full of life.",
    "The best is yet to come, and I look forward to it with all my heart.",
    "Everything is bright and good, and I cannot stop smiling.",
    "My friends are kind and funny, and we laugh together every day.",
    "You will enjoy it very much; it is a marvellous gift.",
)


def test_gloom_on_the_real_model(tmp_path: Path, bundled_model: str) -> None:
    """The vector between sad and glad answers steers SmolLM2 to gloom on questions it has not seen."""
    pytest.importorskip("vaderSentiment")
    from interp_ablate import load_model
    from interp_ablate.scoring.registry import make_scorer

    model, trait = load_model("smollm2"), load_trait("gloomy")
    sides = [
        tuple(
            Rollout({}, Prompt(question), tuple(model.tokenizer(text)["input_ids"]), text, True)
            for question, text in zip(trait.extraction_questions, texts)
        )
        for texts in (SAD, GLAD)
    ]
    directions = trait_directions(model, FilteredRollouts(*sides, {}))
    direction = directions[Site(14, "resid_post"), "response_mean"]
    persona = Persona(trait, directions, direction, 3.0, model.source.name)
    answers = steer(
        model, persona, tmp_path / "steering.jsonl", scorer=make_scorer("lexicon:-sentiment"),
        coherence=Always(),
        settings=SteeringConfig(
            coefficients=(0.0, 3.0), questions=6,
            sampling=SamplingConfig(max_new_tokens=24, temperature=0.0),
        ),
    )  # fmt: skip
    score = curve(answers).set_index(["condition", "coefficient"])["score"]
    assert score["persona", 3.0] > score["persona", 0.0] + 10
    assert score["persona", 3.0] > score["random 0", 3.0] + 10
