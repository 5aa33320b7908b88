"""`chat`: lines in, answers out, under the plan that is in force."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tiny import N_LAYERS, make, tiny

from interp_ablate.cli.main import main
from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Add, Clamp
from interp_ablate.edits.plan import Plan, everywhere
from interp_ablate.errors import ModelError, PlanError, PromptError, RunError
from interp_ablate.models.conversation import Conversation
from interp_ablate.prompts.messages import Message
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.runs.kept_plans import keep_plan, plan_named, plan_names
from interp_ablate.sites import Site


def some_direction() -> Direction:
    import torch

    return Direction(
        torch.randn(32, generator=torch.Generator().manual_seed(1)), 3.0, Site(1, "resid_post")
    )


def strong_plan() -> Plan:
    return Plan((Add(some_direction(), "1.resid_post", coefficient=8.0),))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = tiny(seed=3)
    folder = tmp_path_factory.mktemp("chat") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", *map(str, arguments), "--max-new-tokens", "5"])


def test_turns_under_plans(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    """Each answer is what `generate` gives for the same turns under the same plan."""
    plan = strong_plan()
    plan.save(tmp_path / "mine.json")
    lines = f"Hello\n/strength 0.5\nAnd now?\n/unedited\nAnd now?\n/clear\nHello\n/plan {tmp_path / 'mine.json'}\nHello\n"
    assert chat(monkeypatch, lines, "--model", model_folder, "--plan", tmp_path / "mine.json") == 0
    said = capsys.readouterr()

    from interp_ablate.models.load import load_model

    model, turns, want = load_model(str(model_folder)), [], []

    def expect(text: str, plan: Plan | None) -> None:
        prompt = Prompt(text, history=tuple(turns))
        if plan is None:
            (answer,) = model.generate([prompt], max_new_tokens=5)
        else:
            with model.applied(plan):
                (answer,) = model.generate([prompt], max_new_tokens=5)
        turns.extend([Message("user", text), Message("assistant", answer.text)])
        want.append(answer.text)

    expect("Hello", plan)
    half = Plan((Add(some_direction(), "1.resid_post", coefficient=4.0),))
    expect("And now?", half)
    expect("And now?", None)
    turns.clear()
    expect("Hello", None)
    turns.clear()
    turns += [Message("user", "Hello"), Message("assistant", want[-1])]
    expect("Hello", plan)
    name = f"plan {tmp_path / 'mine.json'}"
    shown = [
        want[0], f"{name} times 0.5", want[1], "unedited", want[2], "what was said is forgotten",
        want[3], name, want[4],
    ]  # fmt: skip
    assert said.out == "\n".join(shown) + "\n"
    assert want[0] != want[3], "the plan does something"


def test_what_is_wrong_is_one_line_and_the_next_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    lines = "/plan nowhere\n/strength much\n/strength 2\n/nonsense\n\n\u200b\n/help\n"
    assert chat(monkeypatch, lines, "--quiet", "--model", model_folder) == 0
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line and "Loading weights" not in line]
    assert len(errors) == 5 and "Traceback" not in said.err
    for part, error in zip(("nowhere", "number", "no plan", "/plan, /strength", "empty"), errors):
        assert part in error
    assert "/unedited" in said.out


def test_what_cannot_be_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert chat(monkeypatch, "Hello\n") == 2
    assert "run folder" in capsys.readouterr().err
    assert chat(monkeypatch, "Hello\n", tmp_path) == 2
    assert "run.json" in capsys.readouterr().err


def test_an_answer_that_is_not_read_is_no_turn() -> None:
    conversation = Conversation(make(), max_new_tokens=4)
    answer = conversation.say("Hello", strong_plan())
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert not conversation.turns and not conversation.model.plans.is_edited
    assert "".join(conversation.say("Hello")) == conversation.turns[-1].content
    with pytest.raises(PromptError):
        list(conversation.say("  "))
    assert len(conversation.turns) == 2


def test_a_conversation_longer_than_the_positions_is_refused() -> None:
    """Learned positions end; a token beyond them was an IndexError."""
    conversation = Conversation(make("gpt2"), max_new_tokens=10_000)
    with pytest.raises(ModelError, match="positions"):
        list(conversation.say("Hello"))


def test_strengths_times_a_factor() -> None:
    direction = some_direction()
    plan = Plan(
        (
            Ablate(direction, everywhere(N_LAYERS), strength=0.8),
            Add(direction, "1.resid_post", coefficient=3.0),
        )
    )
    half = plan.times(0.5)
    assert [set(edit.amounts) for edit in half] == [{0.4}, {1.5}]
    assert plan.times(1.0) == plan and Plan.from_dict(half.to_dict()) == half
    with pytest.raises(PlanError, match="no strength"):
        Plan((Clamp(direction, "1.resid_post", value=1.0),)).times(0.5)
    with pytest.raises(PlanError, match="finite"):
        plan.times(float("nan"))


def test_plans_by_name(tmp_path: Path) -> None:
    assert plan_names(tmp_path) == []
    with pytest.raises(RunError, match="none is kept yet"):
        plan_named(tmp_path, "gentle")
    path = keep_plan(tmp_path, "gentle", strong_plan())
    assert (
        path == tmp_path / "plans" / "gentle.json"
        and plan_named(tmp_path, "gentle") == strong_plan()
    )
    for name in ("gentle", "chosen", "../gentle", "", ".hidden", "a" * 81, "a/b"):
        with pytest.raises(RunError, match="name"):
            keep_plan(tmp_path, name, strong_plan())
    with pytest.raises(RunError, match="edits nothing"):
        keep_plan(tmp_path, "nothing", Plan())
    with pytest.raises(RunError, match="did you mean gentle"):
        plan_named(tmp_path, "gentel")
