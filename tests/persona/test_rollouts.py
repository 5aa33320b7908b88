"""Rollouts: stored as they come, the same after any interruption, scored once, filtered with every loss told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import shared
from tiny import tiny as tiny_hf

from interp_ablate import Add, Plan, Site
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.persona.extraction import describe_counts, filter_rollouts, kept_answers
from interp_ablate.persona.rollouts import (
    Rollout,
    RolloutRequest,
    fluency,
    read_answers,
    rollout_requests,
    run_rollouts,
)
from interp_ablate.persona.settings import SamplingConfig
from interp_ablate.persona.traits import load_trait
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse

SAMPLING = SamplingConfig(max_new_tokens=6, batch_size=4)


@dataclass
class Vowels:
    """100 x the share of vowels in the answer; counts what it was asked."""

    name: str = "vowels"
    weight: float = 100.0
    seen: list[str] = field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": self.name, "weight": self.weight}

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        self.seen += [exchange.answer for exchange in exchanges]
        return [
            self.weight * sum(c in "aeiou" for c in e.answer.lower()) / len(e.answer)
            for e in exchanges
        ]


def jobs(questions: int = 3) -> list[RolloutRequest]:
    trait = load_trait("gloomy")
    two = replace(trait, positive=trait.positive[:2], negative=trait.negative[:2])
    return rollout_requests(two, trait.extraction_questions[:questions], samples=2)


def answered(path: Path, **options: Any) -> list[Rollout]:
    options = {"scorer": Vowels(), "sampling": SAMPLING, **options}
    return run_rollouts(shared(), jobs(), path, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Rollout]]:
    """An uninterrupted run's file and answers."""
    path = tmp_path_factory.mktemp("whole") / "rollouts.jsonl"
    return path, answered(path)


def test_every_question_is_answered_under_every_system_prompt(whole: Any) -> None:
    trait, answers = load_trait("gloomy"), whole[1]
    assert len(answers) == 2 * 2 * 3 * 2
    told = {(a.prompt.system, a.prompt.text, a.key["sample"]) for a in answers}
    wanted = {
        (system, question, sample)
        for system in (*trait.positive[:2], *trait.negative[:2])
        for question in trait.extraction_questions[:3]
        for sample in range(2)
    }
    assert told == wanted
    assert {a.key["side"] for a in answers if a.prompt.system in trait.negative} == {"negative"}
    first = [a for a in answers if a.key["question"] == 0 and a.key["pair"] == 0]
    assert len({a.tokens for a in first}) == len(first)  # samples are drawn, not repeated


def test_an_answer_is_what_the_model_writes(tmp_path: Path) -> None:
    """Greedy answers are those of the model alone, row by row; plans apply to their own rows."""
    hf, plain = tiny_hf("llama_gqa")[0], shared()
    plan = Plan((Add(5 * tiny.unit(3), Site(1, "resid_post"), positions="generated"),))
    asked = [
        RolloutRequest({"n": i}, Prompt(text), plan if i % 2 else None)
        for i, text in enumerate(("A?", "Be?", "See!"))
    ]
    sampling = SamplingConfig(max_new_tokens=5, temperature=0.0)
    found = run_rollouts(plain, asked, tmp_path / "a.jsonl", scorer=Vowels(), sampling=sampling)
    for job, answer in zip(asked, found):
        row = plain.encode(job.prompt)
        assert answer.tokens == tiny.greedy(hf, row, 5, plan=job.plan, eos=plain.eos_token_ids)
    assert found[1].tokens != tiny.greedy(
        hf, plain.encode(asked[1].prompt), 5, eos=plain.eos_token_ids
    )


# ---- interruptions --------------------------------------------------------------------------------


def test_a_run_goes_on_after_any_line(whole: Any, tmp_path: Path) -> None:
    lines = whole[0].read_bytes().splitlines(keepends=True)
    generated = sum(b'"answer"' in line for line in lines)
    for kept in (1, 2, 7, generated, generated + 1, generated + 3, len(lines) - 1, len(lines)):
        path = tmp_path / f"{kept}.jsonl"
        torn = lines[kept][: len(lines[kept]) // 2] if kept < len(lines) else b""
        path.write_bytes(b"".join(lines[:kept]) + torn)
        assert answered(path) == whole[1]
        assert path.read_bytes().startswith(b"".join(lines[:kept]))
        assert sorted(path.read_bytes().splitlines()) == sorted(line.strip() for line in lines)


def test_what_is_done_is_not_done_again(whole: Any, tmp_path: Path) -> None:
    path, before = tmp_path / "a.jsonl", whole[0].read_bytes()
    path.write_bytes(before)
    scorer = Vowels()
    assert answered(path, scorer=scorer) == whole[1]
    assert scorer.seen == [] and path.read_bytes() == before
    # of a run that was stopped while it scored, only the rest is scored
    lines = before.splitlines(keepends=True)
    scored = [i for i, line in enumerate(lines) if b'"by": "score:' in line]
    path.write_bytes(b"".join(lines[: scored[1]]))
    answered(path, scorer=scorer)
    assert len(scorer.seen) == len(json.loads(lines[scored[1]])["scored"])


def test_a_killed_process_loses_no_finished_answer(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    code = (
        "import sys; sys.path[:0] = ['tests/persona', 'tests/support']\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path; import test_rollouts as t\n"
        f"t.answered(Path({str(path)!r}), scorer=t.Slow())"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (path.exists() and b'"answer"' in path.read_bytes()):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()  # type: ignore[union-attr]
    left = path.read_bytes()
    kept = left[: left.rfind(b"\n") + 1]
    assert b'"answer"' in kept and b'"scored"' not in kept  # it was killed before it was done
    assert answered(path) == whole[1]
    assert path.read_bytes().startswith(kept)


class Slow(Vowels):
    """Never done before it is killed."""

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        time.sleep(60)
        return super().__call__(exchanges)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampling": replace(SAMPLING, seed=1)}, "sampling differ"),
        ({"sampling": replace(SAMPLING, temperature=0.5)}, "sampling differ"),
    ],
)
def test_other_answers_are_not_mixed_in(whole: Any, tmp_path: Path, change: Any, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole[0].read_bytes())
    with pytest.raises(RunError, match=said):
        answered(path, **change)
    with pytest.raises(RunError, match="jobs, rendering differ"):
        run_rollouts(shared(), jobs(2), path, scorer=Vowels(), sampling=SAMPLING)
    with pytest.raises(RunError, match="model differ"):
        run_rollouts(shared(seed=1), jobs(), path, scorer=Vowels(), sampling=SAMPLING)


def test_a_corrupt_line_is_named(whole: Any, tmp_path: Path) -> None:
    lines = whole[0].read_bytes().splitlines(keepends=True)
    for bad in (
        b"{}\n",
        b'{"answer": 999}\n',
        b'{"scored": [1], "by": "x", "values": []}\n',
        b"x\n",
    ):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"".join([*lines[:3], bad, *lines[3:]]))
        with pytest.raises(RunError, match="line 4"):
            answered(path)


# ---- scores ---------------------------------------------------------------------------------------


def test_another_scorer_scores_the_same_answers(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole[0].read_bytes())
    other = Vowels(weight=50.0)
    found = answered(path, scorer=other)
    assert [a.tokens for a in found] == [a.tokens for a in whole[1]]
    assert [a.score for a in found] == pytest.approx([a.score / 2 for a in whole[1]])
    assert answered(path) == whole[1]  # and the first one's verdicts are still there


def test_a_file_is_read_by_the_scorers_that_are_asked_for(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole[0].read_bytes())
    answered(path, scorer=Vowels(weight=50.0))  # its verdicts are the last lines
    path.write_bytes(path.read_bytes() + b'{"torn')
    before, fluent = path.read_bytes(), {"fluency": [10.0, 1000.0]}
    assert read_answers(path, scorer=Vowels().identity, coherence=fluent) == whole[1]
    best = max(a.score for a in whole[1] if a.key["side"] == "positive" and a.text.strip())
    limits = {"threshold": best, "min_coherence": 0.0}
    made_of = {"scorer": Vowels().identity, "coherence": fluent, "settings": limits}
    kept = kept_answers(path, made_of)
    assert kept.positive and kept == filter_rollouts(
        whole[1], threshold=best, min_coherence=0.0, min_answers=0
    )
    assert path.read_bytes() == before
    with pytest.raises(RunError, match="no verdicts of the scorers"):
        read_answers(path, scorer=Vowels(weight=7.0).identity, coherence=fluent)
    for missing in (None, {}, {**made_of, "settings": {}}):
        with pytest.raises(RunError, match="extract it again"):
            kept_answers(path, missing)


class Odd(Vowels):
    """Gives what it is told to."""

    def __init__(self, *values: Any, short: bool = False) -> None:
        super().__init__("odd")
        self.values, self.short = values, short

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        found = [self.values[i % len(self.values)] for i in range(len(exchanges))]
        return found[1:] if self.short else found


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        (Odd(101.0), "gave 101"),
        (Odd(50.0, -1.0), "gave -1"),
        (Odd(float("nan")), "gave nan"),
        (Odd(50.0, short=True), "scores for"),
    ],
)
def test_a_scorer_that_lies_is_found_out(tmp_path: Path, scorer: Odd, said: str) -> None:
    with pytest.raises(InterpAblateError, match=said):
        answered(tmp_path / "a.jsonl", scorer=scorer)


def test_no_verdict_stays_none(tmp_path: Path) -> None:
    found = answered(tmp_path / "a.jsonl", scorer=Odd(None, 70.0), coherence=Odd(60.0))
    assert {a.score for a in found if a.text.strip()} == {None, 70.0}
    assert {a.coherence for a in found if a.text.strip()} == {60.0}


def test_bad_settings() -> None:
    for wrong in ({"max_new_tokens": 1}, {"batch_size": 0}, {"temperature": -1.0}):
        with pytest.raises(InterpAblateError, match="answers need"):
            SamplingConfig(**wrong)
    with pytest.raises(InterpAblateError, match="0 samples"):
        rollout_requests(load_trait("gloomy"), ["Why?"], samples=0)


# ---- coherence ------------------------------------------------------------------------------------


def answer(text: str, tokens: Sequence[int], **values: Any) -> Rollout:
    return Rollout(
        {"side": "positive", "question": 0}, Prompt("Why?"), tuple(tokens), text, True, **values
    )


def test_fluency_is_its_formula() -> None:
    """Against log-probabilities from the plain forward pass, and repeated 3-grams counted by hand."""
    hf, model = tiny_hf("llama_gqa")[0], shared()
    row = model.encode(Prompt("Why?"))
    likely = list(tiny.greedy(hf, row, 6, eos=model.eos_token_ids))
    cases = [likely, [50, 60, 70, 80, 90], [7, 8, 9, 7, 8, 9, 7, 8, 9]]
    found = fluency(model, [answer("x", tokens) for tokens in cases])
    repeated = [0.0, 0.0, 4 / 7]
    for tokens, value, share in zip(cases, found, repeated):
        logits = tiny.forward(hf, [*row, *tokens]).double().log_softmax(-1)
        places = range(len(row) - 1, len(row) - 1 + len(tokens))
        surprise = -sum(float(logits[p, t]) for p, t in zip(places, tokens)) / len(tokens)
        perplexity = torch.tensor(surprise).double().exp()
        scale = (torch.log10(torch.tensor(1000.0)) - torch.log10(perplexity)) / 2
        assert value == pytest.approx(100 * (1 - share) * float(scale.clamp(0, 1)), abs=1e-3)
    assert found[0] > found[1] > 0
    assert fluency(model, [answer("", [])]) == [0.0]


# ---- the filter -----------------------------------------------------------------------------------


def side(name: str, *scores: Any, coherence: Any = 80.0) -> list[Rollout]:
    return [
        Rollout({"side": name}, Prompt("Why?"), (1,), "text", True, score, coherence)
        for score in scores
    ]


def test_the_filter_keeps_what_shows_the_trait_and_tells_the_rest() -> None:
    answers = [
        *side("positive", 50.0, 100.0, 49.9, None),
        *side("positive", 90.0, coherence=49.9),
        *side("positive", 90.0, coherence=50.0),
        *side("positive", 90.0, coherence=None),
        replace(side("positive", 90.0)[0], text=" "),
        *side("negative", 49.9, 0.0, 50.0),
        *side("negative", 10.0, coherence=10.0),
    ]
    kept = filter_rollouts(answers, min_answers=2)
    assert [a.score for a in kept.positive] == [50.0, 100.0, 90.0]
    assert [a.score for a in kept.negative] == [49.9, 0.0]
    assert kept.counts["positive"] == {
        "answers": 8, "kept": 3, "empty": 1, "no_answer": 0, "no_verdict": 2, "score": 1,
        "coherence": 1,
    }  # fmt: skip
    assert kept.counts["negative"]["score"] == kept.counts["negative"]["coherence"] == 1
    assert describe_counts(kept.counts["negative"]) == (
        "2 of 4 kept (1 on the wrong side of the threshold, 1 incoherent)"
    )
    assert "positive: 3 of 8 kept" in str(kept)
    assert len(filter_rollouts(answers, min_answers=1, threshold=40.0).positive) == 4


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (side("positive", *[90.0] * 3) + side("negative", *[90.0] * 9), "negative .* 0 of 9 kept"),
        (side("positive", *[10.0] * 9), "score at or above 50"),
        (side("positive", *[None] * 9), "another --scorer"),
        (side("positive", *[90.0] * 9, coherence=1.0), "lower --temperature"),
    ],
)
def test_too_few_left_says_what_to_do(answers: list[Rollout], told: str) -> None:
    both = answers if any(a.key["side"] == "negative" for a in answers) else [
        *answers, *side("negative", 1.0, 2.0, 3.0)
    ]  # fmt: skip
    with pytest.raises(RunError, match=told) as error:
        filter_rollouts(both, min_answers=3)
    assert "--extraction-questions" in str(error.value) and "at least 3" in str(error.value)
