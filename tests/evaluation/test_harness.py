"""lm-evaluation-harness on our models: against plain transformers, and against its own HF wrapper."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from interp_ablate import Ablate, Direction, Plan, Site, export_checkpoint, load_model
from interp_ablate.cli.main import main
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.evaluation import harness_adapter
from interp_ablate.evaluation.harness import BUNDLED_FOLDER, BUNDLED_TASK, Tasks, TaskScore
from interp_ablate.evaluation.harness_adapter import loglikelihoods, longest
from interp_ablate.models.model import Model

pytest.importorskip("lm_eval")

ITEMS = [
    json.loads(line) for line in (BUNDLED_FOLDER / f"{BUNDLED_TASK}.jsonl").read_text().splitlines()
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data/rows.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
ROWS = [
    {"q": "a b", "answer": "c"},
    {"q": "d", "answer": "x y"},
    {"q": "longer words", "answer": "z"},
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `datasets` makes of the items goes to a folder of the test."""
    import datasets

    place = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)


def plan_of(model: Model, seed: int = 0) -> Plan:
    direction = Direction(tiny.unit(seed), 1.0, Site(1, "resid_post"), method="test")
    return Plan(Ablate(direction, model.writers))


def by_name(scores: list[TaskScore]) -> dict[str, TaskScore]:
    return {score.metric: score for score in scores}


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return Tasks()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks of every kind of request, their data beside them."""
    place = tmp_path / "mine"
    (place / "data").mkdir(parents=True)
    (place / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rolling = "metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]"
    generate = (
        'metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: ["e"], max_gen_toks: 6}'
    )
    few = "metric_list: [{metric: acc}, {metric: perplexity}]\nnum_fewshot: 1\nfewshot_split: test"
    for name, kind, text, more in (
        ("mine_rolling", "loglikelihood_rolling", "", rolling),
        (
            "mine_target",
            "loglikelihood",
            "Q: {{q}} A:",
            few,
        ),
        ("mine_text", "generate_until", "{{q}}", generate),
    ):
        target = "{{q}} {{answer}}" if kind == "loglikelihood_rolling" else "{{answer}}"
        yaml = TASK.format(name=name, kind=kind, text=text, more=more).replace("{{answer}}", target)
        (place / f"{name}.yaml").write_text(yaml)
    return place


# ---- the bundled task ----------------------------------------------------------------------------


def test_bundled_items_are_sound() -> None:
    assert len(ITEMS) >= 100
    assert len({item["question"] for item in ITEMS}) == len(ITEMS)
    for item in ITEMS:
        assert len(set(item["choices"])) == 4 and 0 <= item["answer"] < 4
    places = [sum(item["answer"] == i for item in ITEMS) for i in range(4)]
    assert min(places) > len(ITEMS) / 8  # no place gives the answer away
    longest_is_right = sum(
        max(range(4), key=lambda i: len(item["choices"][i])) == item["answer"] for item in ITEMS
    )
    assert longest_is_right < 0.45 * len(ITEMS)


def option_logprobs(hf: Any, tokenizer: Any, item: dict[str, Any]) -> list[float]:
    """Of each option, in plain transformers, an option at a time."""
    context = f"Question: {item['question']}\nAnswer:"
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    found = []
    for choice in item["choices"]:
        row = tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = hf(torch.tensor([row])).logits[0].double().log_softmax(-1)
        found.append(sum(float(logprobs[i - 1, row[i]]) for i in range(len(before), len(row))))
    return found


def test_ten_items_are_those_of_plain_transformers(tasks: Tasks) -> None:
    hf, tokenizer = tiny.tiny()
    found = by_name(tasks.run(BUNDLED_TASK, tiny.shared(), limit=10))
    right, right_by_length = [], []
    for item in ITEMS[:10]:
        values = option_logprobs(hf, tokenizer, item)
        by_length = [v / len(c) for v, c in zip(values, item["choices"])]
        right.append(float(values.index(max(values)) == item["answer"]))
        right_by_length.append(float(by_length.index(max(by_length)) == item["answer"]))
    assert found["acc"].items == tuple(right)
    assert found["acc_norm"].items == tuple(right_by_length)
    assert found["acc"].value == pytest.approx(sum(right) / 10)
    spread = (found["acc"].value * (1 - found["acc"].value) / 9) ** 0.5
    assert found["acc"].stderr == pytest.approx(spread)


def test_log_likelihoods_are_those_of_plain_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of one token that share a pass, of several, and a context that is cut."""
    hf, _ = tiny.tiny()
    context = tiny.rows_of(9)[0]
    pairs = [
        (context, [5]),
        (context, [9]),
        (context, [9, 5, 7]),
        (context[:2], [5]),
        (context, [5]),
    ]
    long = tiny.rows_of(300, seed=3)[0]
    pairs.append((long, [7, 8, 9]))
    fed: list[int] = []
    real = Model.stream

    def stream(self: Model, rows: Any, **options: Any) -> Any:
        fed.extend(map(len, rows))
        return real(self, rows, **options)

    monkeypatch.setattr(Model, "stream", stream)
    found = loglikelihoods(tiny.shared(), pairs)
    most = longest(tiny.shared())
    assert max(fed) == most  # the whole context, and no more
    assert most == 256
    for (start, end), (value, greedy) in zip(pairs, found):
        row = [*start, *end][-(most + 1) :]
        with torch.no_grad():
            logprobs = hf(torch.tensor([row[:-1]])).logits[0].double().log_softmax(-1)
        tail = logprobs[-len(end) :]
        assert value == pytest.approx(sum(float(tail[i, t]) for i, t in enumerate(end)), abs=1e-4)
        assert greedy == (tail.argmax(-1).tolist() == list(end))
    best = int(hf(torch.tensor([context])).logits[0, -1].argmax())
    assert loglikelihoods(tiny.shared(), [(context, [best])])[0][1] is True
    with pytest.raises(RunError, match="257 tokens"):
        loglikelihoods(tiny.shared(), [(context, [5] * 257)])


def wrapped(
    task: str, folder: Path | None, *, chat: bool = False, limit: int = 6
) -> dict[str, Any]:
    """The library's own wrapper of the plain checkpoint, on the same task."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    hf, tokenizer = tiny.tiny()
    before = Path.cwd()
    os.chdir(folder or BUNDLED_FOLDER)  # where it looks for the data
    try:
        manager = TaskManager(include_path=str(folder or BUNDLED_FOLDER), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=hf, tokenizer=tokenizer, batch_size=1),
            tasks=[task],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
        )
    finally:
        os.chdir(before)
    return found["results"][task]


@pytest.mark.parametrize("chat", [False, True])
def test_the_bundled_task_is_the_same_in_the_librarys_own_wrapper(tasks: Tasks, chat: bool) -> None:
    mine = by_name(tasks.run(BUNDLED_TASK, tiny.shared(), limit=20, chat=chat))
    theirs = wrapped(BUNDLED_TASK, None, chat=chat, limit=20)
    for metric, score in mine.items():
        assert score.value == pytest.approx(theirs[f"{metric},none"])


def test_few_shot_examples_are_turns_of_their_own_in_a_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library's command line has it: each example a question of the user and an answer."""
    seen: list[list[str]] = []
    model = tiny.make()
    render = harness_adapter.apply_template

    def rendered(chat: list[dict[str, str]], *args: Any, **options: Any) -> str:
        seen.append([message["role"] for message in chat])
        return render(chat, *args, **options)

    monkeypatch.setattr(harness_adapter, "apply_template", rendered)
    mine = by_name(Tasks([folder]).run("mine_target", model, chat=True))
    assert seen and all(roles == ["user", "assistant", "user"] for roles in seen)
    theirs = wrapped("mine_target", folder, chat=True)
    assert mine["perplexity"].value == pytest.approx(theirs["perplexity,none"], rel=1e-4)


def test_every_kind_of_request_is_the_same_in_the_librarys_own_wrapper(folder: Path) -> None:
    """Rolling likelihood, likelihood of a target, generated text with a stop string; data found beside."""
    own = Tasks([folder])
    for name in ("mine_rolling", "mine_target", "mine_text"):
        theirs = wrapped(name, folder)
        scores = own.run(name, tiny.shared())
        assert scores
        for score in scores:
            assert score.value == pytest.approx(
                theirs[f"{score.metric},{score.filter}"], rel=1e-5
            ), name
            # a perplexity is no mean of its items
            assert (score.items is None) == ("perplexity" in score.metric or "bits" in score.metric)


def test_generated_text_ends_at_a_stop_string(folder: Path) -> None:
    from interp_ablate.evaluation.harness_adapter import as_harness_lm

    model = tiny.shared()
    (whole,) = model.generate([model.tokenizer("ab")["input_ids"]], max_new_tokens=6)

    class Request:
        args = ("ab", {"until": [whole.text[3]], "max_gen_toks": 6})

    (found,) = as_harness_lm(model, None).generate_until([Request()])
    assert found == whole.text.split(whole.text[3])[0] != whole.text


def test_a_plan_is_in_force_and_its_export_gives_the_same(tasks: Tasks, tmp_path: Path) -> None:
    model = tiny.make()
    plan = plan_of(model)
    export_checkpoint(model, plan, tmp_path / "edited")
    item = ITEMS[0]
    tokenizer = tiny.make_tokenizer()
    context = tokenizer(f"Question: {item['question']}\nAnswer:")["input_ids"]
    pairs = [(context, tokenizer(f" {choice}")["input_ids"]) for choice in item["choices"]]
    plain, hooked = loglikelihoods(model, pairs), loglikelihoods(model, pairs, plan=plan)
    exported = loglikelihoods(load_model(tmp_path / "edited"), pairs)
    assert [x for x, _ in hooked] == pytest.approx([x for x, _ in exported], abs=1e-3)
    assert max(abs(x - y) for (x, _), (y, _) in zip(plain, hooked)) > 0.05
    edited = by_name(tasks.run(BUNDLED_TASK, model, plan, limit=30))
    reloaded = by_name(tasks.run(BUNDLED_TASK, load_model(tmp_path / "edited"), limit=30))
    assert edited["acc"].items == reloaded["acc"].items
    assert edited["acc"].items != by_name(tasks.run(BUNDLED_TASK, model, limit=30))["acc"].items


def test_both_backends_give_the_same(tasks: Tasks, backend: str) -> None:
    found = by_name(tasks.run(BUNDLED_TASK, tiny.shared(backend=backend), limit=12))
    assert (
        found["acc"].items == by_name(tasks.run(BUNDLED_TASK, tiny.shared(), limit=12))["acc"].items
    )


def test_nothing_is_said_and_no_generator_is_seeded(
    tasks: Tasks, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    tasks.run(BUNDLED_TASK, tiny.shared(), limit=2)
    assert torch.equal(before, torch.get_rng_state())
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


# ---- bad input -----------------------------------------------------------------------------------


def test_unknown_tasks(tasks: Tasks) -> None:
    with pytest.raises(RunError, match=r"did you mean .*interp_ablate_basics"):
        tasks.identity("interp_ablate_basic")
    with pytest.raises(RunError, match=r"did you mean .*hellaswag"):
        tasks.identity("helaswag")
    assert tasks.identity("hellaswag") != tasks.identity(BUNDLED_TASK)
    with pytest.raises(RunError, match="bundled are interp_ablate_basics; lm_eval itself brings"):
        tasks.identity("zzzzzzzzzzzz")


def test_a_task_whose_data_is_not_here(tasks: Tasks, folder: Path) -> None:
    (folder / "data" / "rows.jsonl").unlink()
    with pytest.raises(RunError, match="'mine_text' cannot be run"):
        Tasks([folder]).run("mine_text", tiny.shared())


def test_a_folder_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no \.yaml"):
        Tasks([tmp_path])


def test_changed_items_are_another_task(folder: Path) -> None:
    before = Tasks([folder]).identity("mine_text")
    with (folder / "data" / "rows.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    after = Tasks([folder]).identity("mine_text")
    assert after != before
    (folder / "data" / "words.txt").write_text("of any kind")
    last = Tasks([folder]).identity("mine_text")
    assert last != after
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "tool.pyc").write_bytes(b"x")
    assert Tasks([folder]).identity("mine_text") == last


def test_logits_with_nan_are_an_error(tasks: Tasks) -> None:
    hf, tokenizer = tiny.tiny()
    hf.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InterpAblateError, match="NaN"):
        tasks.run(BUNDLED_TASK, tiny.from_hf(hf, tokenizer), limit=2)


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    found = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "lm_eval" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(RunError, match=r"interp-ablate\[evaluate\]"):
        Tasks()
    command = ["evaluate", "nothing/here", "nothing/there", "--tasks", "hellaswag", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "pip install 'interp-ablate[evaluate]'" in capsys.readouterr().err


def test_an_unknown_task_is_found_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "nothing/here", "nothing/there", "--tasks", "mine_txt"]
    assert main([*command, "--tasks-folder", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no .yaml" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "no task 'mine_txt'" in capsys.readouterr().err


# ---- the real model ------------------------------------------------------------------------------


def test_real_model_is_above_chance_and_not_perfect(tasks: Tasks, bundled_model: str) -> None:
    found = by_name(tasks.run(BUNDLED_TASK, load_model("smollm2"), limit=24))
    assert 0.4 < found["acc"].value < 1.0
