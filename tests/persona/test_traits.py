"""Trait files: the bundled ones, the published layout, what is refused and how, asking an endpoint for one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from interp_ablate.cli.main import main
from interp_ablate.errors import InterpAblateError, PromptError
from interp_ablate.persona.trait_writer import PAIRS, QUESTIONS, generate_trait
from interp_ablate.persona.traits import Trait, bundled_traits, load_trait, split_questions

NAMES = ["casual", "cheerful", "formal", "gloomy", "humorous", "terse", "verbose"]


def small(**changes: Any) -> dict[str, Any]:
    """A whole trait file with little in it."""
    data: dict[str, Any] = {
        "name": "brave",
        "description": "It is brave.",
        "instruction": [{"pos": "Be brave.", "neg": "Be a coward."}],
        "extraction_questions": ["What do you do in a storm?", "Who goes first?"],
        "evaluation_questions": ["Will you jump?"],
        "eval_prompt": "How brave is it?",
    }
    return {key: value for key, value in {**data, **changes}.items() if value is not ...}


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


# ---- bundled --------------------------------------------------------------------------------------


def test_the_bundled_traits() -> None:
    assert bundled_traits() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_trait_is_whole(name: str) -> None:
    trait = load_trait(name)
    assert trait.name == name
    assert len(trait.positive) == len(trait.negative) == PAIRS
    assert len(trait.extraction_questions) == len(trait.evaluation_questions) == QUESTIONS
    assert "0:" in trait.rubric and "100:" in trait.rubric
    # a question that names the trait, or a prompt without its counterpart's length, would tilt the vector
    questions = " ".join(trait.extraction_questions + trait.evaluation_questions).lower()
    assert name not in questions
    lengths = [len(" ".join(side).split()) for side in (trait.positive, trait.negative)]
    assert max(lengths) < 1.35 * min(lengths)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "humorous"])
def test_a_bundled_scorer_tells_the_trait(name: str) -> None:
    from interp_ablate.prompts.prompt import Prompt
    from interp_ablate.scoring.exchange import PromptResponse
    from interp_ablate.scoring.registry import make_scorer

    texts = {
        "cheerful": "What a wonderful day! I love it, and I am so happy and grateful.",
        "gloomy": "It is a miserable, hopeless day. I feel sad, lonely and lost.",
        "formal": "Furthermore, the aforementioned documentation constitutes a prerequisite; consequently, "
        "participation necessitates authorisation.",
        "casual": "Yeah dude, that's super cool! I'm gonna grab some stuff, don't worry, it's kinda fun!",
        "terse": "It is blue.",
        "verbose": "The sky is, as many have said before, "
        + "and one might go on to say that " * 12,
    }
    opposite = dict(zip(texts, ("gloomy", "cheerful", "casual", "formal", "verbose", "terse")))
    spec = load_trait(name).scorer
    assert spec is not None
    own, other = make_scorer(spec)(
        [PromptResponse(Prompt("What about it?"), texts[which]) for which in (name, opposite[name])]
    )
    assert own is not None and other is not None and own >= 60 and other < 40


def test_a_trait_comes_back_from_its_file(tmp_path: Path) -> None:
    trait = load_trait("gloomy")
    trait.save(tmp_path / "mine.json")
    assert load_trait(tmp_path / "mine.json") == trait
    assert replace(trait, rubric="Other.").fingerprint != trait.fingerprint


def test_questions_are_split_without_overlap() -> None:
    trait = load_trait("cheerful")
    parts = split_questions(trait, extraction=10, selection=6, evaluation=20)
    assert [len(part) for part in (parts.extraction, parts.selection, parts.evaluation)] == [
        10,
        6,
        20,
    ]
    assert not set(parts.extraction) & set(parts.selection)
    assert not set(parts.evaluation) & {*parts.extraction, *parts.selection}
    # more questions for one purpose leave the others as they are
    assert (
        split_questions(trait, extraction=14, selection=6, evaluation=1).selection
        == parts.selection
    )
    for sizes, said in (
        ((15, 6, 1), "20 questions"),
        ((0, 1, 1), "extraction=0"),
        ((1, 1, 21), "21"),
    ):
        with pytest.raises(PromptError, match=said):
            split_questions(trait, extraction=sizes[0], selection=sizes[1], evaluation=sizes[2])


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('{\n "name": "x",\n "description": }', "line 3, column 17: not JSON"),
        ('{"name": "x",\n "name": "y"}', "'name' is there twice"),
        ("[1]", "one JSON object, not list"),
        ("[" * 100_000, "nested too deeply"),
        (small(eval_prompt=...), "the key 'eval_prompt' is missing"),
        (small(instruction=...), "the key 'instruction' is missing"),
        (small(rubric="x"), "unknown key 'rubric'"),
        (small(instruction=[]), '"instruction" is a list of objects'),
        (small(instruction=[{"pos": "Be brave."}]), r"instruction\[0\]: the key 'neg' is missing"),
        (small(instruction=[{"pos": 3, "neg": "x"}]), r"instruction\[0\]: pos: needs a text, got 3"),
        (small(instruction=[{"pos": " x", "neg": "X"}]), "pair 0: positive and negative are the same"),
        (small(description=" "), "description: needs a text"),
        (small(name="../up"), "'../up' names files"),
        (small(scorer=3), "scorer: needs a text"),
        (small(evaluation_questions="Who?"), "evaluation_questions: needs a list"),
        (small(evaluation_questions=["a", None]), r"evaluation_questions\[1\]: needs a text, got None"),
        (small(extraction_questions=["Who goes?"]), "1 of at least 2"),
        (small(extraction_questions=["Who?", "how?", "who? "]), r"\[2\]: the same as .*\[0\]"),
        (small(evaluation_questions=["who  goes FIRST?"]), "for extraction too, such as 'who  goes"),
        (small(eval_prompt="\ud800"), "not valid Unicode"),
    ],
)  # fmt: skip
def test_a_faulty_file_is_named_with_its_fault(tmp_path: Path, data: Any, said: str) -> None:
    path = write(tmp_path / "brave.json", data)
    with pytest.raises(PromptError, match=said) as error:
        load_trait(path)
    assert "brave.json" in str(error.value)


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{\n"name": "\xff"}')
    with pytest.raises(PromptError, match=r"x\.json, line 2: not UTF-8"):
        load_trait(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [("gloom", "did you mean 'gloomy'"), ("nosuch.json", "bundled name"), (".", "is a folder")],
)
def test_what_is_not_there(name: str, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        load_trait(name)


def test_a_trait_in_python_is_held_to_the_same() -> None:
    trait = load_trait("gloomy")
    with pytest.raises(PromptError, match="5 and 4 system prompts"):
        replace(trait, negative=trait.negative[:4])
    assert Trait("x", "d", ["a"], ["b"], ["q", "r"], ["s"], "r").positive == ("a",)  # type: ignore[arg-type]


# ---- the published layout -------------------------------------------------------------------------


def published(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Both halves of a trait in the published repository's layout."""
    pairs = [{"pos": "Take every risk.", "neg": "Take no risk."}]
    extract = {"instruction": pairs, "questions": ["Storm?", "Fire?"], "eval_prompt": "{question}?"}
    evaluate = {**extract, "questions": ["Jump?"], "eval_prompt": "Judge {answer}."}
    return (
        write(folder / "trait_data_extract" / "adventurous.json", {**extract, **changes}),
        write(folder / "trait_data_eval" / "adventurous.json", {**evaluate, **changes}),
    )


def test_the_published_layout_is_read_as_it_is(tmp_path: Path) -> None:
    paths = published(tmp_path)
    trait = load_trait(paths[0])
    assert trait == load_trait(paths[1])  # either half names the whole
    assert trait.name == "adventurous" and trait.scorer is None
    assert trait.extraction_questions == ("Storm?", "Fire?")
    assert trait.evaluation_questions == ("Jump?",)
    assert trait.rubric == "Judge {answer}."
    # its pipeline puts these before an instruction
    assert trait.positive == ("You are an adventurous assistant. Take every risk.",)
    assert trait.negative == ("You are a helpful assistant. Take no risk.",)


def test_half_of_a_published_trait_is_refused(tmp_path: Path) -> None:
    extract, evaluate = published(tmp_path)
    evaluate.unlink()
    with pytest.raises(PromptError, match=r"half of a trait: .*trait_data_eval.* is missing"):
        load_trait(extract)
    alone = write(tmp_path / "elsewhere" / "x.json", extract.read_text())
    with pytest.raises(PromptError, match="extraction_questions"):
        load_trait(alone)


def test_a_fault_of_a_published_file_is_named(tmp_path: Path) -> None:
    extract, evaluate = published(tmp_path, instruction=[{"pos": "Be bold."}])
    with pytest.raises(
        PromptError, match=r"trait_data_extract.*instruction\[0\].*'neg' is missing"
    ):
        load_trait(evaluate)
    published(tmp_path, questions=["Storm?", "Fire?"])
    with pytest.raises(PromptError, match="for extraction too"):
        load_trait(extract)


# ---- asking an endpoint ---------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A local server that speaks the chat completions protocol and says what it is told to."""

    def __init__(self) -> None:
        self.reply: Any = {}
        self.asked: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        reply = self.server.reply
        text = reply if isinstance(reply, str) else json.dumps(reply)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        data = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
            }
        )
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("openai")
    found = Server()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def generated(**changes: Any) -> dict[str, Any]:
    return {
        "instruction": [{"pos": f"Be brave {i}.", "neg": f"Be afraid {i}."} for i in range(PAIRS)],
        "extraction_questions": [f"What of {i}?" for i in range(QUESTIONS)],
        "evaluation_questions": [f"And of {i}?" for i in range(QUESTIONS)],
        "eval_prompt": "0: a coward. 100: a hero.",
        **changes,
    }


def test_a_trait_from_an_endpoint(server: Server, tmp_path: Path) -> None:
    server.reply = generated()
    out = tmp_path / "brave.json"
    command = [
        "persona",
        "new",
        "brave",
        "--description",
        "It fears nothing.",
        "--judge-model",
        "m",
    ]
    assert main([*command, "--endpoint", url(server), "--out", str(out)]) == 0
    trait = load_trait(out)
    assert trait.name == "brave" and trait.description == "It fears nothing."
    assert len(trait.positive) == PAIRS and trait.rubric == "0: a coward. 100: a hero."
    said = server.asked[0]["messages"][-1]["content"]
    assert "It fears nothing." in said and "evaluation_questions" in said
    assert main([*command, "--endpoint", url(server), "--out", str(out)]) == 2  # it is there


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Sure! Here is a trait for you.", "expected a JSON object"),
        (generated(extraction_questions=["What of 0?"] * QUESTIONS), "the same as"),
        (generated(evaluation_questions=[f"What of {i}?" for i in range(QUESTIONS)]), "for extraction"),
        (generated(instruction=generated()["instruction"][:2]), "instruction"),
        ({key: v for key, v in generated().items() if key != "eval_prompt"}, "eval_prompt"),
        (generated(eval_prompt="  "), "eval_prompt|rubric"),
    ],
)  # fmt: skip
def test_a_lacking_trait_is_refused(server: Server, tmp_path: Path, reply: Any, said: str) -> None:
    from interp_ablate.scoring.endpoint import Endpoint

    server.reply = reply
    with pytest.raises(InterpAblateError, match=said):
        generate_trait(Endpoint("m", url(server)), "brave", "It fears nothing.")


def test_an_endpoint_that_holds_nobody_to_the_schema_is_held_to_it_here() -> None:
    class Loose:
        def ask_json(self, messages: Any, schema: Any) -> dict[str, Any]:
            return generated(extraction_questions=["Who?", "How?"])

    with pytest.raises(PromptError, match="extraction_questions has 2, 20 were asked for"):
        generate_trait(Loose(), "brave", "It fears nothing.")


def test_a_failed_request_writes_no_file(server: Server, tmp_path: Path, capsys: Any) -> None:
    server.reply = "no"
    out = tmp_path / "brave.json"
    command = ["persona", "new", "brave", "--description", "x", "--judge-model", "m"]
    assert main([*command, "--endpoint", url(server), "--out", str(out)]) == 2
    assert not out.exists() and "no trait file was written" in capsys.readouterr().err


# ---- the command ----------------------------------------------------------------------------------


def test_the_command_lists_traits(capsys: Any, tmp_path: Path) -> None:
    assert main(["persona", "traits"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES) and "needs a judge" in out
    assert main(["persona", "traits", "gloomy"]) == 0
    assert "p4-" in capsys.readouterr().out
    assert main(["persona", "traits", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    path = write(tmp_path / "again.json", rows[0])
    assert load_trait(path) == load_trait(rows[0]["name"])
    assert main(["persona", "traits", "gloom"]) == 2
