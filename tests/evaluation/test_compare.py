"""The table of before and after: perplexity against plain transformers, pairs, intervals, resume, bad input."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from tokenizers import processors

from interp_ablate import Ablate, Add, Direction, Plan, Prompt, Site, export_checkpoint, load_model
from interp_ablate.cli.main import main
from interp_ablate.errors import InterpAblateError, ModelError, PlanError, RunError
from interp_ablate.evaluation.compare import _task_row, evaluate
from interp_ablate.evaluation.harness import TaskScore
from interp_ablate.evaluation.measures import EvaluationConfig, read_prompts
from interp_ablate.evaluation.metrics import first_token_kl
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.evaluation.perplexity import Corpus, corpus_losses, read_corpus, windows
from interp_ablate.evaluation.results import ComparisonRow, Evaluation, paired_row, ratio_row
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.plots.evaluation import save_evaluation
from interp_ablate.scoring.exchange import PromptResponse

TEXT = Corpus(
    "passages",
    (
        "A short one.",
        "The rest of the day was quiet, and nobody came to the door until it was dark.",
        "x = [i * i for i in range(10)]",
        "Rain fell on the hills for a week and the river rose.",
        "He said nothing, and then he laughed.",
        "One two three four five six seven eight nine ten.",
    ),
)
PROMPTS = {
    "short": tuple(Prompt(text) for text in ("Hi!", "Name a bird.", "2 + 2?", "Go", "Sing", "Why?"))
}


def plan_of(model: Model, seed: int = 0) -> Plan:
    vector = tiny.unit(seed)
    direction = Direction(vector=vector, site=Site(1, "resid_post"), norm=1.0, method="test")
    return Plan(Ablate(direction, model.writers))


class Vowels:
    """The share of vowels, 0 to 100; no verdict on what begins with a space."""

    name = "vowels"
    identity: ClassVar[dict[str, Any]] = {"kind": "vowels", "version": 1}

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        self.asked += len(exchanges)
        return [self._one(e.answer) for e in exchanges]

    @staticmethod
    def _one(answer: str) -> float | None:
        if not answer or answer[0] == " ":
            return None
        return 100 * sum(c in "aeiou" for c in answer) / len(answer)


SMALL = EvaluationConfig(
    text=TEXT, prompts=PROMPTS, scorers=(Vowels(),), max_new_tokens=8, context=40, stride=16
)


def named(found: Evaluation, measure: str) -> ComparisonRow:
    (row,) = [row for row in found.rows if row.measure == measure]
    return row


# ---- windows and perplexity ----------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("context, stride", [(8, 1), (8, 4), (8, 7), (2, 1), (100, 50)])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 12, 16, 17, 31])
def test_every_token_is_counted_once(n: int, context: int, stride: int, first: int) -> None:
    found = windows(n, context=context, stride=stride, first=first)
    counted = [i for w in found for i in range(w.scored, w.end)]
    assert counted == list(range(first, n))
    for window in found:
        assert window.begin < window.scored < window.end <= window.begin + context
        if window.begin:
            assert window.scored - window.begin >= context - stride
    if n <= context:
        assert len(found) == (n > first)  # one window, or nothing to count


@pytest.mark.parametrize("context, stride", [(1, 1), (8, 8), (8, 0), (8, 9)])
def test_windows_that_lose_tokens_are_refused(context: int, stride: int) -> None:
    with pytest.raises(RunError, match="context - 1"):
        windows(20, context=context, stride=stride)


def by_hand(hf: Any, row: list[int], context: int, stride: int) -> list[float]:
    """Each token's nats in plain transformers, from the rule: the first window that reaches it counts it."""
    found = []
    for t in range(1, len(row)):
        begin = stride * max(0, math.ceil((t + 1 - context) / stride))
        with torch.no_grad():
            logits = hf(torch.tensor([row[begin:t]])).logits[0, -1].double()
        found.append(-float(logits.log_softmax(-1)[row[t]]))
    return found


@pytest.mark.parametrize("length", [2, 5, 15, 16, 17, 40])
def test_perplexity_is_that_of_plain_transformers(length: int) -> None:
    """Shorter than the window, exactly one window, one token more, several with a partial last one."""
    hf, tokenizer = tiny.tiny()
    document = "the cat sat on the mat and then it went away"[:length]
    row = tokenizer(document, add_special_tokens=False)["input_ids"]
    assert len(row) == length
    found = corpus_losses(tiny.shared(), Corpus("one", (document,)), context=16, stride=6)
    want = by_hand(hf, row, 16, 6)
    assert sum(loss.tokens for loss in found) == len(want) == length - 1
    assert sum(loss.nats for loss in found) == pytest.approx(sum(want), rel=1e-5)
    assert sum(loss.bytes or 0 for loss in found) == length - 1
    if length <= 16:
        with torch.no_grad():
            loss = float(hf(torch.tensor([row]), labels=torch.tensor([row])).loss)
        assert found[0].nats / found[0].tokens == pytest.approx(loss, rel=1e-5)


def test_documents_do_not_see_each_other() -> None:
    model = tiny.shared()
    together = corpus_losses(model, TEXT, context=40, stride=16)
    for number, document in enumerate(TEXT.documents):
        alone = corpus_losses(model, Corpus("one", (document,)), context=40, stride=16)
        mine = [loss for loss in together if loss.document == number]
        assert [loss.tokens for loss in mine] == [loss.tokens for loss in alone]
        assert [x.nats for x in mine] == pytest.approx([x.nats for x in alone], rel=1e-5)


def test_a_bos_is_context_and_the_first_token_counts() -> None:
    hf, tokenizer = tiny.tiny()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    model = Model.wrap(tiny.make().tl, tokenizer)
    text = Corpus("accents", ("déjà vu",))
    (found,) = corpus_losses(model, text)
    row = [start, *tokenizer("déjà vu", add_special_tokens=False)["input_ids"]]
    assert found.nats == pytest.approx(sum(by_hand(hf, row, 512, 256)), rel=1e-5)
    assert found.tokens == len(row) - 1 and found.bytes == len("déjà vu".encode())


def test_a_plan_of_generated_positions_reaches_counted_tokens() -> None:
    model = tiny.shared()
    direction = Direction(vector=tiny.unit(3), site=Site(1, "resid_post"), norm=1.0, method="test")
    sites = (Site(1, "resid_post"),)
    rows = {}
    for positions in ("all", "generated", "prompt"):
        plan = Plan(Add(direction, sites, coefficient=8.0, positions=positions))
        rows[positions] = sum(x.nats for x in corpus_losses(model, TEXT, plan=plan))
    plain = sum(x.nats for x in corpus_losses(model, TEXT))
    assert len({round(x, 3) for x in (*rows.values(), plain)}) == 4


# ---- estimates -----------------------------------------------------------------------------------


def test_intervals_cover() -> None:
    """Of perplexity and its paired difference: the truth is inside about 95 times of 100."""
    generator = np.random.default_rng(0)
    inside = {"ratio": 0, "difference": 0}
    sims, n = 150, 60
    for _ in range(sims):
        tokens = generator.integers(50, 200, n).astype(float)
        level = generator.normal(3.0, 0.5, n)
        before, after = level * tokens, (level + generator.normal(0.1, 0.2, n)) * tokens
        row = ratio_row("nats", "x", "nats", (before, tokens), (after, tokens))
        assert row.before and row.difference
        inside["ratio"] += row.before.low <= 3.0 <= row.before.high  # type: ignore[operator]
        inside["difference"] += row.difference.low <= 0.1 <= row.difference.high  # type: ignore[operator]
    for name, count in inside.items():
        assert 0.88 <= count / sims <= 0.995, (name, count / sims)


def test_differences_are_paired() -> None:
    """A small change that every unit shares is seen through a spread that is far larger."""
    generator = np.random.default_rng(1)
    before = generator.normal(0, 10, 40)
    change = 0.1 + generator.normal(0, 0.001, 40)
    row = paired_row("m", "x", "metric", list(before), list(before + change))
    assert row.difference and row.difference.low == pytest.approx(0.1, abs=1e-3)
    assert row.difference.low < 0.1 < row.difference.high  # type: ignore[operator]
    same = paired_row("m", "x", "metric", list(before), list(before + 0.1))
    assert same.difference and same.difference.low is None  # no spread, and nothing that bounds it
    tokens = np.full(40, 100.0)
    nats = generator.uniform(200, 400, 40)
    found = ratio_row("p", "x", "perplexity", (nats, tokens), (nats + 10 * change, tokens))
    assert found.difference and found.difference.low > 0 > found.before.low - found.after.high  # type: ignore[operator,union-attr]


def test_units_without_a_verdict_are_left_out_and_counted() -> None:
    row = paired_row("m", "x", "score", [1.0, None, 3.0, 10.0], [2.0, 5.0, None, 10.0])
    assert (row.n, row.missing) == (2, 2)
    assert row.before and row.before.value == 5.5
    assert row.after and row.after.value == 6.0
    assert row.difference and row.difference.value == 0.5
    none = paired_row("m", "x", "score", [None], [1.0])
    assert none.before is None and none.difference is None and none.missing == 1


# ---- the whole table -----------------------------------------------------------------------------


def test_a_model_against_itself() -> None:
    model = tiny.shared()
    found = evaluate(model, model, measures=SMALL)
    for row in found.rows:
        if row.measure.startswith("KL"):
            assert row.after and row.after.to_list() == [0.0, None, None]
        else:
            assert row.difference and row.difference.value == 0.0, row
            assert row.before == row.after
    assert len(found.answers) == len(PROMPTS["short"])


def test_a_plan_as_hooks_and_the_exported_checkpoint_give_the_same_numbers(tmp_path: Path) -> None:
    model = tiny.make(tied=True)
    plan = plan_of(model)
    export_checkpoint(model, plan, tmp_path / "edited")
    hooked = evaluate(model, plan=plan, measures=SMALL)
    exported = evaluate(model, load_model(tmp_path / "edited"), measures=SMALL)
    assert [row.measure for row in hooked.rows] == [row.measure for row in exported.rows]
    for one, other in zip(hooked.rows, exported.rows):
        for key in ("before", "after", "difference"):
            mine, theirs = getattr(one, key), getattr(other, key)
            assert (mine is None) == (theirs is None)
            if mine:
                ends = [
                    [end for end in side.to_list() if end is not None] for side in (mine, theirs)
                ]
                assert ends[0] == pytest.approx(ends[1], rel=2e-4, abs=5e-5)
    assert [a["after"] for a in hooked.answers] == [a["after"] for a in exported.answers]
    # and the plan does something
    assert named(hooked, "KL, first token").after.value > 1e-3  # type: ignore[union-attr]
    assert named(hooked, "perplexity a token").difference.value != 0  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_that_are_loaded_one_after_the_other_give_the_same_table(
    tmp_path: Path, dtype: str
) -> None:
    both = [tiny.folder_of(tmp_path / str(seed), seed=seed) for seed in (0, 4)]

    class Loader:
        def __call__(self) -> Model:
            return load_model(both[1], dtype=dtype)

    loaders: Any = [partial(load_model, both[0], dtype=dtype), Loader()]
    plan, told = plan_of(loaders[1]()), list[str]()
    apart = evaluate(*loaders, plan=plan, measures=SMALL, out=tmp_path / "out", on_part=told.append)
    together = evaluate(*(load() for load in loaders), plan=plan, measures=SMALL)
    assert apart == together
    assert [part for part in told if "after" in part] == [
        "text, after", "answers to short, after", "vowels of the answers to short, after"
    ]  # fmt: skip
    # killed when the second is measured: what the first has is read, and what is compared with it made again
    log = tmp_path / "out" / "measured.jsonl"
    header, *lines = log.read_text().splitlines(True)
    log.write_text(header + "".join(line for line in lines if "before" in line))
    again: list[str] = []
    resumed = evaluate(
        *loaders, plan=plan, measures=SMALL, out=tmp_path / "out", on_part=again.append
    )
    assert resumed == together and not [part for part in again if "before" in part]
    assert evaluate(loaders[1], plan=plan, measures=SMALL) == evaluate(
        loaders[1](), plan=plan, measures=SMALL
    )


def test_kl_is_that_of_plain_transformers() -> None:
    hf, other = tiny.tiny()[0], tiny.tiny(seed=4)[0]
    before, after = tiny.shared(), tiny.shared(seed=4)
    found = evaluate(
        before, after, measures=EvaluationConfig(text=None, prompts=PROMPTS, max_new_tokens=6)
    )
    first, along = [], []
    for prompt in PROMPTS["short"]:
        row = before.encode(prompt)
        answer = list(tiny.greedy(hf, row, 6, eos=before.eos_token_ids))
        with torch.no_grad():
            p, q = (
                m(torch.tensor([row + answer])).logits[0].double().log_softmax(-1)
                for m in (hf, other)
            )
        kl = (p.exp() * (p - q)).sum(-1)[len(row) - 1 :]
        first.append(float(kl[0]))
        if answer:
            along.append(float(kl[: len(answer)].mean()))
    row = named(found, "KL, first token")
    assert row.after and row.after.value == pytest.approx(np.mean(first), rel=1e-4)
    row = named(found, "KL a token over answers")
    assert row.after and row.after.value == pytest.approx(np.mean(along), rel=1e-4)
    assert row.missing == len(PROMPTS["short"]) - len(along)


def test_tokenizers_that_differ() -> None:
    """No KL; bits a byte are compared by document, numbers a token are not."""
    hf, tokenizer = tiny.tiny(seed=2)
    tokenizer.add_tokens(["the", "and"])
    assert len(tokenizer) <= hf.config.vocab_size
    other = Model.wrap(tiny.make(seed=2).tl, tokenizer)
    found = evaluate(tiny.shared(), other, measures=SMALL)
    assert not [row for row in found.rows if row.measure.startswith("KL")]
    assert any("tokenizers differ" in note for note in found.notes)
    tokens, bits = named(found, "perplexity a token"), named(found, "bits a byte")
    assert tokens.difference is None and bits.difference is not None
    assert bits.n == tokens.n == len(TEXT.documents)
    assert named(found, "length of the answer").difference is None
    assert named(found, "vowels").difference is not None


def test_one_vocabulary_and_another_bos() -> None:
    """Windows that hold other tokens are no pairs."""
    _, tokenizer = tiny.tiny()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    other = Model.wrap(tiny.make().tl, tokenizer)
    found = evaluate(tiny.shared(), other, measures=replace(SMALL, prompts={}))
    tokens, bits = named(found, "perplexity a token"), named(found, "bits a byte")
    assert tokens.difference is None and bits.difference is not None
    assert bits.n == tokens.n == len(TEXT.documents)
    assert any("count other tokens" in note for note in found.notes)


def test_logits_with_nan_are_an_error() -> None:
    hf, tokenizer = tiny.tiny()
    hf.model.norm.weight.data[0] = math.nan
    broken = tiny.from_hf(hf, tokenizer)
    for part in ({"prompts": {}}, {"text": None}):
        measures = EvaluationConfig(
            **{"text": TEXT, "prompts": PROMPTS, "max_new_tokens": 4, **part}
        )  # type: ignore[arg-type]
        with pytest.raises(InterpAblateError, match="NaN"):
            evaluate(tiny.shared(), broken, measures=measures)


def test_what_is_refused(tmp_path: Path) -> None:
    model = tiny.shared()
    with pytest.raises(RunError, match="nothing to compare"):
        evaluate(model)
    with pytest.raises(RunError, match="nothing to measure"):
        evaluate(model, model, measures=EvaluationConfig(text=None, prompts={}))
    with pytest.raises(RunError, match="two scorers"):
        evaluate(model, model, measures=EvaluationConfig(scorers=(Vowels(), Vowels())))
    with pytest.raises(RunError, match="limit 0"):
        evaluate(model, model, measures=EvaluationConfig(limit=0))
    with pytest.raises(PlanError, match="d_model"):
        wide = Direction(
            vector=torch.eye(64)[0], site=Site(0, "resid_post"), norm=1.0, method="test"
        )
        plan = Plan(Ablate(wide, [Site(0, "resid_post")]))
        evaluate(
            model, plan=plan, measures=EvaluationConfig(text=TEXT, prompts={}), out=tmp_path / "out"
        )
    with pytest.raises(ModelError, match="has 256 positions"):
        gpt2 = tiny.make("gpt2")
        long = EvaluationConfig(text=TEXT, prompts=PROMPTS, max_new_tokens=250)
        evaluate(model, gpt2, measures=long, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the folder ----------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Dying(Vowels):
    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        if self.asked:
            raise Interrupted
        return super().__call__(exchanges)


def test_resume_measures_nothing_twice(tmp_path: Path) -> None:
    model, told = tiny.shared(), []
    plan = plan_of(model)
    from dataclasses import replace

    with pytest.raises(Interrupted):
        dying = replace(SMALL, scorers=(Dying(),))
        evaluate(model, plan=plan, measures=dying, out=tmp_path, on_part=told.append)
    scorer = Vowels()
    whole = replace(SMALL, scorers=(scorer,))
    again: list[str] = []
    found = evaluate(model, plan=plan, measures=whole, out=tmp_path, on_part=again.append)
    assert not set(told[:-1]) & set(again) and told[-1] in again  # the part that died is done again
    assert scorer.asked == len(PROMPTS["short"])  # the first model's answers were scored already
    third: list[str] = []
    same = evaluate(model, plan=plan, measures=whole, out=tmp_path, on_part=third.append)
    assert third == [] and same == found
    assert found.rows == evaluate(model, plan=plan, measures=whole).rows
    # one more scorer: only that is asked
    more = Vowels()
    more.name, more.identity = "more", {"kind": "more"}  # type: ignore[misc]
    both = replace(whole, scorers=(scorer, more))
    evaluate(model, plan=plan, measures=both, out=tmp_path, on_part=third.append)
    assert len(third) == 2 and all("more" in part for part in third)


@pytest.mark.parametrize("change", ["plan", "model", "text", "context", "prompts"])
def test_a_folder_of_other_work_is_refused(tmp_path: Path, change: str) -> None:
    from dataclasses import replace

    small = replace(SMALL, prompts={}, scorers=())
    evaluate(tiny.shared(), plan=plan_of(tiny.shared()), measures=small, out=tmp_path)
    model, plan = tiny.shared(), plan_of(tiny.shared())
    if change == "plan":
        plan = plan_of(model, seed=1)
    elif change == "model":
        model = tiny.shared(seed=3)
    elif change == "text":
        small = replace(small, text=Corpus("other", ("Other words.",)))
    elif change == "context":
        small = replace(small, context=30)
    else:
        small = replace(small, prompts=PROMPTS)
    what = {"plan": "after", "model": "before, after"}.get(change, change)
    with pytest.raises(RunError, match=rf"other work: {what} differ"):
        evaluate(model, plan=plan, measures=small, out=tmp_path)


def test_files_hold_the_table(tmp_path: Path) -> None:
    found = evaluate(tiny.shared(), tiny.shared(seed=4), measures=SMALL, out=tmp_path)
    told = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["measure"] for row in told["rows"]] == [row.measure for row in found.rows]
    table = pd.read_csv(tmp_path / "evaluation.csv")
    row = table[table.measure == "perplexity a token"].iloc[0]
    assert row.difference == pytest.approx(row.after - row.before)
    items = list(csv.DictReader((tmp_path / "items.csv").open()))
    kl = [float(x["after"]) for x in items if x["measure"] == "KL, first token"]
    assert np.mean(kl) == pytest.approx(named(found, "KL, first token").after.value)  # type: ignore[union-attr]
    answers = list(csv.DictReader((tmp_path / "answers.csv").open()))
    assert [a["prompt"] for a in answers] == [p.text for p in PROMPTS["short"]]
    page = (tmp_path / "evaluation.md").read_text()
    assert "| perplexity a token | passages | " in page and "figures/evaluation.png" in page
    assert save_evaluation(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_figure_needs_a_table(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="interp-ablate evaluate"):
        save_evaluation(tmp_path)
    (tmp_path / "evaluation.csv").write_text("measure,on\nx,y\n")
    with pytest.raises(RunError, match="lacks the columns"):
        save_evaluation(tmp_path)


# ---- text and prompts ----------------------------------------------------------------------------


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n---\nthree\n---\n\n")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n\n{"text": "five", "id": 2}\n')
    found = read_corpus(tmp_path / "a.txt", tmp_path / "b.jsonl")
    assert (
        found.documents == ("one\ntwo", "three", "four", "five") and found.name == "a.txt, b.jsonl"
    )
    assert len(read_corpus().documents) == 28
    for name, content, message in (
        ("empty.txt", b" \n\n", "holds no text"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": 3}\n', "line 2"),
        ("worse.jsonl", b'{"text": "x"}\n{\n', "line 2"),
        ("other.jsonl", b'{"prompt": "x"}\n', "line 1"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=message):
            read_corpus(tmp_path / name)
    with pytest.raises(RunError, match="nothere"):
        read_corpus(tmp_path / "nothere.txt")


def test_contrast_set(tmp_path: Path) -> None:
    sides = read_prompts("declining")
    assert list(sides) == ["declining, positive", "declining, negative"]
    assert [len(side) for side in sides.values()] == [32, 32]
    (tmp_path / "mine.txt").write_text("One\n# two\nTwo\n")
    assert [p.text for p in read_prompts(tmp_path / "mine.txt")["mine"]] == ["One", "# two", "Two"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "One", "id": 1}\n{"prompt": "Two"}\n')
    assert list(read_prompts(tmp_path / "rows.jsonl")) == ["rows"]
    (tmp_path / "both.jsonl").write_text(
        '{"prompt": "a", "label": 1}\n{"prompt": "b", "label": 0}\n'
    )
    assert list(read_prompts(tmp_path / "both.jsonl")) == ["both, positive", "both, negative"]
    with pytest.raises(InterpAblateError, match="did you mean declining"):
        read_prompts("declinin")


# ---- command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    place = tmp_path_factory.mktemp("models")
    tiny.folder_of(place / "a")
    hf, tokenizer = tiny.tiny(seed=6)
    hf.save_pretrained(place / "b")
    tokenizer.save_pretrained(place / "b")
    return str(place / "a"), str(place / "b")


def test_command_line(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("Hello\nName a tree.\n")
    (tmp_path / "text.txt").write_text(f"{TEXT.documents[1]}\n---\n{TEXT.documents[3]}\n")
    command = [
        *("evaluate", *folders, "--prompts", str(tmp_path / "prompts.txt")),
        *("--text", str(tmp_path / "text.txt"), "--tasks", "none", "--max-new-tokens", "4"),
        *("--scorer", "lexicon:length", "--out", str(tmp_path / "out"), "--format", "pdf"),
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    for word in (
        "perplexity a token",
        "bits a byte",
        "KL, first token",
        "lexicon:length",
        "difference",
    ):
        assert word in said.out
    assert "text, before" in said.err
    drawn = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert drawn == {"evaluation.png", "evaluation.pdf"}  # the page shows the PNG
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == said.out and "text, before" not in again.err  # nothing was measured
    assert main([*command, "--limit", "1"]) == 2
    assert "limit differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "nothing to compare"),
        (["{a}", "--text", "{tmp}/empty.txt"], "holds no text"),
        (["{a}", "--text", "{tmp}/none.txt"], "none.txt"),
        (["{tmp}"], "config.json"),
        (["{a}", "--stride", "512"], "context - 1"),
        (["{a}", "--prompts", "{tmp}/empty.txt"], "empty"),
        (["{a}", "--scorer", "lexicon:weight"], "lexicon"),
        (["{a}", "--plan", "{tmp}/plan.json"], "plan.json"),
        (["{a}", "--limit", "0"], "at least 1"),
        (["{a}", "--rubric", "@{tmp}/no.txt"], "rubric"),
    ],
)
def test_bad_input(
    flags: list[str],
    message: str,
    folders: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    given = [flag.format(a=folders[1], tmp=tmp_path) for flag in flags]
    command = ["evaluate", folders[0], *given, "--tasks", "none", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


# ---- the real model ------------------------------------------------------------------------------


def test_real_model(bundled_model: str) -> None:
    """Perplexity of SmolLM2 on two bundled passages, and what a random ablation costs."""
    model = load_model("smollm2")
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(
        vector=vector / vector.norm(), site=Site(9, "resid_post"), norm=1.0, method="test"
    )
    plan = Plan(Ablate(direction, model.writers))
    measures = EvaluationConfig(
        prompts={"two": tuple(map(Prompt, ("Hi!", "Name a bird.")))}, max_new_tokens=6, limit=2
    )
    found = evaluate(model, plan=plan, measures=measures)
    row = named(found, "perplexity a token")
    assert row.before and 15 < row.before.value < 60
    assert row.difference and 1 < row.difference.value < row.before.value
    kl = named(found, "KL, first token").after
    assert kl and 0 < kl.value < 3


def test_a_weak_plan_on_a_half_precision_model_has_a_weak_kl() -> None:
    """In bfloat16 itself the KL of a plan of strength 0.001 is that of rounding."""
    hf, tokenizer = tiny.tiny()
    model = from_hf(hf.to(torch.bfloat16), tokenizer)
    weak = Plan((Ablate(tiny.unit(), model.writers, strength=1e-3),))
    found = evaluate(model, plan=weak, measures=SMALL)
    unedited = ModelOutputs(model, PROMPTS["short"])
    rounding = float(first_token_kl(unedited.with_plan(weak), unedited).mean())
    assert named(found, "KL, first token").after.value < 0.2 * rounding  # type: ignore[union-attr]
    assert model.dtype == torch.bfloat16


def test_a_task_whose_items_are_not_told_has_no_interval_without_an_error() -> None:
    def row(*errors: float | None) -> ComparisonRow:
        one, other = (TaskScore("t", "f1", "none", 1.0, error, None) for error in errors)
        return _task_row(one, other, "f1")

    for found in (row(0.0, 0.0), row(None, 0.1)):
        assert found.before and found.before.to_list() == [1.0, None, None]
    assert row(0.1, 0.1).after.to_list() == pytest.approx([1.0, 0.804, 1.196])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("answers to ", [{"tokens": [1], "text": "a", "finished": True, "thought": "", "lead": 2.5, "answer": "a"}]),
        ("answers to ", []),
        ("KL divergences on ", {"kl_first_token": [[]]}),
        ("text, ", [{"document": 0, "tokens": 3, "nats": "1.5", "bytes": None}]),
    ],
)  # fmt: skip
def test_what_is_stored_is_of_its_shape(part: str, value: Any, tmp_path: Path) -> None:
    """A line that was changed is named, with what is wrong, before a number is made of it."""
    model, path = tiny.shared(), tmp_path / "measured.jsonl"
    small = replace(SMALL, scorers=())
    evaluate(model, plan=plan_of(model), measures=small, out=tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number, line = next(
        (n, each) for n, each in enumerate(lines, 1) if each.get("part", "").startswith(part)
    )
    line["value"] = value
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    with pytest.raises(RunError, match=rf"line {number}: its value.*measured again"):
        evaluate(model, plan=plan_of(model), measures=small, out=tmp_path)
