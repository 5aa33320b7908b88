"""`--scorer` in runs and searches: the rate is the scorer's, its identity the run's, and code is run only where it was named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_task import write_task

from interp_ablate.cli.main import main
from interp_ablate.errors import RunError
from interp_ablate.runs.configuration import Configuration
from interp_ablate.runs.run_folder import Run
from interp_ablate.scoring.behaviour import ScoredBehaviour
from interp_ablate.scoring.lexicon import LexiconScorer
from interp_ablate.scoring.registry import make_scorer

MINE = """
def long(answer):
    return None if answer.startswith("?") else 100 * min(1, len(answer) / 8)

def asked(prompt, answer):
    return 100.0 * ("order" in prompt)

def wild(answer):
    return 300
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scorer")
    write_task(place)
    (place / "mine.py").write_text(MINE)
    return place


def flags(place: Path, *more: str) -> list[str]:
    return [
        *("--quiet", "--model", str(place / "model")),
        *("--positive", str(place / "yes.txt"), "--negative", str(place / "no.txt")),
        *("--n-train", "8", "--n-validation", "6", "--n-test", "6"),
        *("--max-new-tokens", "5", "--max-kl", "50", *more),
    ]


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    out = place / "run"
    scorer = f"{place / 'mine.py'}:long"
    assert main(["run", *flags(place, "--scorer", scorer), "--out", str(out)]) in (0, 1)
    return out


def test_the_rate_is_the_scores_of_the_answers(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = json.loads((done / "run.json").read_text())
    assert "concept" not in state["stages"] and "sweep" in state["stages"]
    assert state["made_of"]["expressions"]["scorer"]["kind"] == "function"
    assert "own_code" not in state["configuration"]
    assert any("a fit makes expressions unlikely" in note for note in state["notes"])
    selected = json.loads((done / "selected.json").read_text())
    rows = [json.loads(line) for line in (done / "generations.jsonl").read_text().splitlines()]
    assert selected["plan"] is not None and rows
    for name, condition, label in (
        ("behaviour_before", "baseline", "positive"),
        ("behaviour_after", "ablated", "positive"),
        ("negative_before", "baseline", "negative"),
    ):
        texts = [r["text"] for r in rows if r["condition"] == condition and r["label"] == label]
        want = [0.0 if not t.strip() or t.startswith("?") else min(1, len(t) / 8) for t in texts]
        assert selected["test"][name] == pytest.approx(sum(want) / len(want), abs=1e-6)
    assert all(r["expressed"] == ((r["score"] or 0) >= 50) for r in rows)
    trials = pd.read_csv(done / "trials.csv")
    assert trials["expression_rate"].dropna().between(0, 1).all()
    assert "mine.py:long" in selected["test"]["how"]["behaviour"]


def test_a_folder_never_has_its_scorer_run(done: Path, place: Path) -> None:
    """A run.json is a file of somebody's: its FILE.py is loaded where a person names it, and nowhere else."""
    saved = json.loads((done / "run.json").read_text())
    stored = Configuration.stored_in(
        {"configuration": {**saved["configuration"], "own_code": True}}
    )
    opened = Run(done, Configuration.from_dict(stored))
    assert len(opened.directions)  # it opens, and nothing was run
    with pytest.raises(RunError, match="only where a person names it"):
        opened.expression  # noqa: B018
    with pytest.raises(RunError, match="only where a person names it"):
        make_scorer(f"{place / 'mine.py'}:long")


def test_another_scorer_or_another_file_is_another_run(
    done: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(scorer: str) -> int:
        return main(["run", *flags(place, "--scorer", scorer), "--out", str(done)])

    assert again(f"{place / 'mine.py'}:asked") == 2
    assert "another scorer or other expressions" in capsys.readouterr().err
    assert again("lexicon:length") == 2
    changed = place / "changed.py"
    changed.write_text(MINE + "# another file\n")
    assert again(f"{changed}:long") == 2
    moved = place / "moved.py"
    moved.write_text(MINE)
    assert again(f"{moved}:long") in (0, 1)  # a name may change


@pytest.mark.parametrize(
    "more, message",
    [
        (["--scorer", "lexicon:nothing"], "nothing"),
        (["--scorer", "judge:m@http://127.0.0.1:9/v1"], "rubric"),
        (["--scorer", "lexicon:length", "--expressions", "declining"], "--expressions or --scorer"),
        (["--scorer", "lexicon:length", "--rubric", "0 is bad and 100 good"], "--rubric is of a judge"),
        (["--scorer", "PLACE/mine.py:none"], "has no function 'none'"),
        (["--scorer", "PLACE/absent.py:f"], "cannot load the scorer"),
        (["--scorer", "judge:m@http://127.0.0.1:9/v1", "--rubric", "0 is bad, 100 good", "--executor", "ray"],
         "kept by one process"),
    ],
)  # fmt: skip
def test_what_cannot_score_is_refused_before_any_work(
    place: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [each.replace("PLACE", str(place)) for each in more]
    assert main(["run", *flags(place, *more), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_search_takes_the_scorer_too(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    out = tmp_path / "run"
    more = ["--scorer", "lexicon:length?half=2", "--trials", "4", "--minutes", "0.05"]
    assert main(["search", *flags(place, *more), "--out", str(out)]) in (0, 1)
    state = json.loads((out / "run.json").read_text())
    assert (
        state["made_of"]["expressions"]["scorer"] == make_scorer("lexicon:length?half=2").identity
    )


class Outputs:
    """Answers of a model, for a scorer."""

    def __init__(self, *texts: str) -> None:
        from interp_ablate.prompts.prompt import Prompt
        from interp_ablate.scoring.exchange import PromptResponse

        self.texts = list(texts)
        self.exchanges = [PromptResponse(Prompt("say"), text) for text in texts]


def test_every_answer_is_scored_once_and_one_without_a_verdict_counts_as_none() -> None:
    asked: list[Any] = []

    class Counting(LexiconScorer):
        def judged(self, exchanges: Any) -> Any:
            asked.extend(exchanges)
            return super().judged(exchanges)

    behaviour = ScoredBehaviour(Counting("length"))
    outputs: Any = Outputs("one two three", "", "one two three", "four")
    first, again = behaviour(outputs, outputs), behaviour(outputs, outputs)
    assert torch.equal(first, again) and len(asked) == 2
    want = make_scorer("lexicon:length")(outputs.exchanges)
    assert first.tolist() == pytest.approx([(w or 0) / 100 for w in want])
    assert first[1] == 0


def test_a_judges_cost_is_told_and_its_replies_are_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real server on this machine, which gives each answer a number."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    calls: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            calls.append(body["messages"][-1]["content"])
            score = 90 if "order" in calls[-1] else 60
            message = {"role": "assistant", "content": str(score)}
            reply = json.dumps(
                {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                 "usage": {"prompt_tokens": 5, "completion_tokens": 1}}
            ).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        judge = f"judge:m@http://127.0.0.1:{server.server_port}/v1"
        more = [each for each in flags(place, "--scorer", judge) if each != "--quiet"]
        command = [
            "run",
            *more,
            "--rubric",
            "0 is short and 100 is long",
            "--out",
            str(tmp_path / "run"),
        ]
        assert main(command) in (0, 1)
        assert f"{len(calls)} calls" in capsys.readouterr().err
        before = len(calls)
        assert (tmp_path / "run" / "replies.jsonl").is_file() and before
        (tmp_path / "run" / "selected.json").unlink()
        assert main(command) in (0, 1)
        assert len(calls) == before  # the evaluation again, from the kept replies
    finally:
        server.shutdown()
