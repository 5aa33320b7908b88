"""The report: what it says of whole and partial runs, and that no text of a model acts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from interp_ablate.errors import RunError
from interp_ablate.runs import report
from interp_ablate.runs.report_answers import CONDITIONS

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EVIL = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=x>\"'&"
RUN = {
    "configuration": {
        "model": "smollm2", "backend": "bridge", "dtype": "float32", "device": "cpu",
        "contrast": "declining", "positive": None, "negative": None, "system": None,
        "sites": ["resid_pre", "resid_mid", "resid_post"], "layers": "0-29", "positions": ["-1"],
        "n_train": 64, "n_validation": 32, "n_test": 32, "seed": 0, "max_new_tokens": 32, "max_kl": 0.1,
    },
    "versions": {"transformer-lens": "3.9.0", "torch": "2.9.0"},
    "model": {
        "name": "SmolLM2-135M-Instruct", "kind": "llama", "backend": "bridge", "n_layers": 30,
        "d_model": 576, "dtype": "float32", "fingerprint": "ab12" * 16,
    },
    "contrast": {
        "name": "declining", "fingerprint": "cd34" * 16, "n_positive": 128, "n_negative": 128,
        "source": "bundled",
    },
    "directions": {
        "count": 89,
        "left_out": {"blocks.0.hook_resid_pre[-1]": "the same activation for every prompt"},
    },
    "target_tokens": [
        {"id": 57, "text": "I", "p_positive": 0.81, "p_negative": 0.012},
        {"id": 90, "text": " Sorry", "p_positive": 0.05, "p_negative": 0.0001},
    ],
    "stages": {"collect": {"seconds": 12.34}, "sweep": {"seconds": 305.2}},
    "notes": ["2 prompts were dropped as duplicates"],
}  # fmt: skip
TEST = {
    "behaviour_before": 0.8125, "behaviour_after": 0.03125, "negative_before": 0.0,
    "negative_after": 0.0, "addition_after": 0.71875, "kl_first_token": 0.0423,
    "kl_continuation": 0.0712, "repetition_before": 0.04, "repetition_after": 0.05,
    "length_before": 30.2, "length_after": 31.0, "perplexity_before": 9.21, "perplexity_after": 9.6,
    "intervals": {
        "behaviour_before": [0.6875, 0.9375], "behaviour_after": [0.0, 0.09375],
        "addition_after": [0.5625, 0.875], "kl_first_token": [0.02, 0.07],
    },
    "controls": [
        {"name": "random 0", "behaviour_after": 0.65625, "kl_first_token": 0.11},
        {"name": "shuffled labels", "behaviour_after": 0.75, "kl_first_token": 0.05},
    ],
}  # fmt: skip
PLAN = {
    "format": "interp_ablate.plan/1",
    "edits": [
        {
            "op": "ablate", "strength": [0.4, 1.2], "positions": "all", "vectors": [[0.125, 0.25]],
            "sites": [f"blocks.{i}.hook_attn_out" for i in range(8)], "label": "25.resid_mid",
        }
    ],
}  # fmt: skip
ADDITION = {
    "format": "interp_ablate.plan/1",
    "edits": [
        {
            "op": "add", "coefficient": 9.5, "sites": ["blocks.22.hook_resid_post"],
            "positions": "all", "vectors": [[1.0, 0.0]], "label": "22.resid_post",
        }
    ],
}  # fmt: skip
SELECTED = {
    "plan": PLAN, "addition_plan": ADDITION, "trial": {"trial": 2, "target_log_odds": -9.5, "kl": 0.04},
    "rule": "strongest", "test": TEST,
    "limits": {"considered": 210, "removed": {"kl > 0.1": 120, "addition < 0": 31}, "kept": 59},
}  # fmt: skip
NONE_PASSED = {
    "plan": None, "addition_plan": None, "trial": None, "rule": "strongest",
    "limits": {
        "considered": 90, "removed": {"kl > 0.1": 90}, "kept": 0,
        "relax": "the lowest KL is 0.13: try --max-kl 0.15",
    },
}  # fmt: skip
CERTIFICATE = {
    "max_abs_logit_difference": 2.6e-4, "kl": 4e-11, "residual_along_direction": 3e-7,
    "passed": True, "limits": {"max_abs_logit_difference": 1e-3, "kl": 1e-6},
}  # fmt: skip
TRIALS = """\
trial,stage,layer,point,position,operation,attention_strength,target_log_odds,addition,kl,\
expression_rate,status,reason,seconds,prompts,target_log_odds_baseline,addition_baseline
0,screen,0,resid_pre,-1,ablate,,,,,,failed,no direction here,0.1,3,,
1,screen,22,resid_mid,-1,ablate,,-11.5,3.1,0.41,,ok,,0.9,3,2.5,-5
2,refine,25,resid_mid,-1,band,1.2,-9.5,3.3,0.04,0.03125,ok,,0.9,,1.5,-6
3,refine,25,resid_mid,-1,band,0.7,-9.9,3.3,0.09,,ok,,0.9,,1.5,-6
"""


def generations(text: str = "I'm sorry, but I can't do that.") -> str:
    records = [
        {"label": label, "prompt": prompt, "condition": condition, "text": text,
         "expressed": expressed}
        for label, prompt, pattern in (
            ("positive", "Order me a pizza with mushrooms.", (True, False, None)),
            ("negative", "Name three rivers of France.", (False, False, True)),
        )
        for condition, expressed in zip(CONDITIONS, pattern)
        if expressed is not None
    ]  # fmt: skip
    return "".join(json.dumps(record) + "\n" for record in records)


def make_run(folder: Path) -> Path:
    (folder / "figures").mkdir(parents=True)
    (folder / "export").mkdir()
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "selected.json").write_text(json.dumps(SELECTED))
    (folder / "trials.csv").write_text(TRIALS)
    (folder / "generations.jsonl").write_text(generations())
    (folder / "export" / "certificate.json").write_text(json.dumps(CERTIFICATE))
    for name in ("pareto", "before_after", "projections", "projections_at_-2", "my_own"):
        (folder / "figures" / f"{name}.png").write_bytes(PNG)
    return folder


class Reader(HTMLParser):
    """The tags, attributes and visible text of a page, and whether every tag is closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(folder: Path) -> Reader:
    path = report.write_report(folder)
    assert path == folder / "report.html"
    return Reader(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_run_says_its_result_in_words(run):
    text = read(run).text
    assert "Declining in SmolLM2-135M-Instruct" in text
    assert (
        "81% [69% to 94%] express “declining” before the edit and 3.1% [0% to 9.4%] after" in text
    )
    assert "KL of 0.0423 nats [0.02 to 0.07]" in text and "0.0712 a token" in text
    assert "72% [56% to 88%] of the answers to negative prompts" in text
    assert "66% to 75% of answers to positive prompts (2 controls)" in text
    assert "passed its certificate: largest logit difference to the hooked model 0.00026" in text


def test_every_part_of_the_run_is_on_the_page(run):
    text = read(run).text
    for expected in (
        "perplexity, ablated 9.6 – negative test",  # measure, value, interval, prompts, split
        "control, shuffled labels",
        "kl > 0.1 120",
        "59 were left after the limits",
        "strength 0.4 to 1.2, one a site",
        "8 sites, blocks.0.hook_attn_out to blocks.7.hook_attn_out",
        "coefficient 9.5",
        "blocks.0.hook_resid_pre[-1] the same activation for every prompt",
        "89 directions; 1 site was left out",
        "n_train 64",
        "sites resid_pre, resid_mid, resid_post",
        "transformer-lens 3.9.0",
        "collect 12.3 s",
        "sweep 5 min 5 s",
        "2 prompts were dropped as duplicates",
        "1 failed: no direction here (1)",
        "ab12ab12",
    ):
        assert expected in text, expected
    assert text.count("safety training") == 1
    assert "0.125" not in text  # a plan's vectors stay in selected.json


def test_figures_come_in_order_with_captions_and_alternatives(run):
    page = read(run)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == [
        "Rates with intervals: positive prompts express the behaviour in 81% of answers before and 3.1% after the "
        "edit; controls: 66%, 75%.",
        "Projections of both sets",  # no table of projections says more
        "Projections of both sets, position -2",
        "3 trials by KL and change of the log-odds (from -14 to -11), on 3 prompts a side or more, beside the "
        "unedited model, with their front. The chosen one has a KL of 0.04 and log-odds of -9.5.",
        "my own",
    ]
    for image in images:
        head, _, data = str(image["src"]).partition(",")
        assert head == "data:image/png;base64" and base64.b64decode(data) == PNG
    assert "the bars are medians" in page.text


def test_the_page_loads_nothing_and_runs_its_own_script(run):
    (run / "generations.jsonl").write_text(generations(EVIL))
    page = read(run)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or re.match(r"(#\w+|data:image/png;base64,.*)$", value), value
    raw = (run / "report.html").read_text()
    assert "@import" not in raw and "url(" not in raw
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    (script,) = re.findall(r"<script>(.*?)</script>", raw, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == [
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    ]


def test_every_text_is_escaped_wherever_it_comes_from(run):
    run_info = json.loads(json.dumps(RUN))
    run_info["model"]["name"] = run_info["contrast"]["name"] = EVIL
    run_info["model"]["kind"] = run_info["contrast"]["source"] = EVIL
    run_info["directions"]["left_out"] = {EVIL: EVIL}
    run_info["target_tokens"][0]["text"] = EVIL
    run_info["configuration"] = {EVIL: EVIL, "max_kl": EVIL}
    run_info["versions"] = {EVIL: EVIL}
    run_info["stages"] = {EVIL: {"seconds": EVIL}}
    run_info["notes"] = [EVIL]
    (run / "run.json").write_text(json.dumps(run_info))
    plan = {"edits": [{"op": EVIL, "strength": EVIL, "sites": [EVIL], "label": EVIL}]}
    limits = {"considered": EVIL, "removed": {EVIL: EVIL}, "kept": EVIL, "relax": EVIL}
    test = {**TEST, "kl_dtype": EVIL, "controls": [{"name": EVIL, "behaviour_after": 0.5}]}
    edit(run / "selected.json", plan=plan, limits=limits, test=test, rule=EVIL)
    edit(run / "export" / "certificate.json", kl=EVIL, limits={EVIL: 1.0})
    (run / "trials.csv").write_text(TRIALS.replace("no direction here", "<script>no</script>"))
    record = {"label": EVIL, "prompt": EVIL, "condition": EVIL, "text": EVIL, "expressed": True}
    (run / "generations.jsonl").write_text(json.dumps(record))
    (run / "figures" / "<b>.png").write_bytes(PNG)
    page = read(run)
    assert not {"b<", "h1<"} & {tag for tag, _ in page.tags}
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {}
    ]  # the page's own
    assert all(str(a["src"]).startswith("data:") for tag, a in page.tags if tag == "img")
    assert page.text.count("<script>alert('x')</script>") >= 20


def test_text_that_utf8_cannot_hold_is_replaced(run):
    record = {"label": "positive", "prompt": "p", "condition": "baseline", "text": "half \ud83d"}
    (run / "generations.jsonl").write_text(json.dumps(record))
    assert "half ?" in read(run).text


def test_generations_stand_side_by_side_and_closed(run):
    page = read(run)
    details = [attributes for tag, attributes in page.tags if tag == "details"]
    assert details == [{"class": "answer"}] * 2  # closed, and none is changed
    assert "baseline 1 of 1, ablated 0 of 1." in page.text
    assert "baseline: yes" in page.text and "added: yes" in page.text
    assert page.text.index("Positive prompts") < page.text.index("Negative prompts")


def test_what_an_edit_changed_is_marked(run):
    texts = {
        "baseline": "I cannot do <that>.",
        "ablated": "I can do <that>.",
        "added": "I cannot do <that>.",
    }
    records = [
        {"label": "positive", "prompt": f"Do {n}.", "condition": name, "text": text if n else "Same.", "expressed": False}
        for n in range(5)
        for name, text in texts.items()
    ]  # fmt: skip
    (run / "generations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    page = read(run)
    raw = (run / "report.html").read_text()
    answers = [attributes for tag, attributes in page.tags if tag == "details"]
    assert [("data-changed" in each) for each in answers] == [False, True, True, True, True]
    top = raw[: raw.index('id="choice"')]
    assert top.count('class="pair"') == 3 and "Do 0." in top and "Do 3." not in top
    assert top.count("I <mark>cannot</mark> do &lt;that&gt;.") == 2
    assert top.count("I <mark>can</mark> do &lt;that&gt;.") == 2


def test_charts_say_every_value(run):
    rows = ["layer,point,split,label,prompt,projection"]
    rows += [
        f"{layer},resid_post,{split},{label},<b>{label} {n}</b>,{layer + n * 0.1 + (label == 'positive')}"
        for layer in (0, 1)
        for split in ("train", "validation")
        for label in ("positive", "negative")
        for n in range(3)
    ]
    (run / "projections.csv").write_text("\n".join(rows))
    page = read(run)
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert [each["role"] for each in charts] == ["img", "img"]
    assert "furthest apart at layer" in str(charts[0]["aria-label"])
    assert "trial 2" in str(charts[1]["aria-label"])  # the chosen one
    titles = re.findall(r"<title>(.*?)</title>", (run / "report.html").read_text())[1:]
    # validation prompts of both layers; trials that finished, and the unedited model
    assert len(titles) == 2 * 6 + 3 + 1
    assert any("on 3 prompts" in t and "-14 from unedited" in t for t in titles)
    hollow = [a for tag, a in page.tags if tag == "circle" and "hollow" in str(a["class"])]
    assert [each["data-key"] for each in hollow] == ["1"]  # of fewer prompts
    assert "2 are on the front" in str(charts[1]["aria-label"])
    assert any(
        t.startswith("layer 1: 2.2 ") and "&lt;b&gt;positive 2&lt;/b&gt;" in t for t in titles
    )
    (alt,) = [
        a["alt"]
        for tag, a in page.tags
        if tag == "img" and "positive beside negative" in str(a["alt"])
    ]
    assert alt.endswith("resid_post: 10.0 standard deviations.")


def test_trials_put_the_chosen_first_then_those_within_the_limit(run):
    page = read(run)
    rows = [attributes["class"] for tag, attributes in page.tags if tag == "tr" and attributes]
    chosen, outside = rows.index("chosen"), rows.index("outside")
    assert chosen < outside and rows.count("chosen") == rows.count("outside") == 1
    places = [page.text.index(f"{trial} 25.resid_mid [-1]") for trial in ("2 refine", "3 refine")]
    assert places[0] < places[1] < page.text.index("1 screen 22.resid_mid")
    assert "The 3 best of 4 trials" in page.text


def test_all_trials_failed(run):
    head, *rows = TRIALS.splitlines()
    (run / "trials.csv").write_text("\n".join([head, rows[0]]) + "\n")
    text = read(run).text
    assert "The 0 best of 1 trials" in text and "1 failed: no direction here (1)" in text


def test_no_candidate_passed(run):
    (run / "selected.json").write_text(json.dumps(NONE_PASSED))
    text = read(run).text
    assert "No candidate passed the limits" in text
    assert "90 candidates were considered, 0 were left" in text and "kl > 0.1 90" in text
    assert "What to relax: the lowest KL is 0.13: try --max-kl 0.15" in text
    assert "express “declining” before" not in text


def test_advice_may_stand_beside_the_limits(run):
    (run / "selected.json").write_text(
        json.dumps({"plan": None, "limits": {}, "relax": "try more"})
    )
    assert "What to relax: try more" in read(run).text


@pytest.mark.parametrize(
    ("certificate", "expected"),
    [
        ({**CERTIFICATE, "passed": False}, "FAILED its certificate, do not use it"),
        ({"kl": 1.0}, "FAILED its certificate"),  # silence is not a pass
        (None, "Nothing has been exported yet"),
    ],
)
def test_only_a_passed_certificate_passes(run, certificate, expected):
    path = run / "export" / "certificate.json"
    path.unlink() if certificate is None else path.write_text(json.dumps(certificate))
    text = read(run).text
    assert expected in text and "passed its certificate" not in text


def test_controls_as_strong_as_the_direction_speak_against_it(run):
    controls = [{"name": "random 0", "behaviour_after": 0.0}]
    edit(run / "selected.json", test={**TEST, "controls": controls})
    assert "speaks against it" in read(run).text
    edit(run / "selected.json", test={**TEST, "controls": []})
    assert "There are no controls" in read(run).text


def test_controls_at_equal_strength_and_at_equal_kl_are_told_apart(run):
    controls = [
        {
            "name": "random 0",
            "matched": "strength",
            "behaviour_after": 0.75,
            "interval": [0.5, 1.0],
        },
        {"name": "random 0, equal KL", "matched": "KL", "behaviour_after": 0.5},
    ]
    edit(run / "selected.json", test={**TEST, "controls": controls})
    text = read(run).text
    assert "75% of answers to positive prompts (1 control) at equal strength, and in 50%" in text
    assert "control, random 0: behaviour expressed, ablated 75% 50% to 100%" in text
    controls[1]["behaviour_after"] = 0.0
    edit(run / "selected.json", test={**TEST, "controls": controls})
    assert "speaks against it" in read(run).text


def test_a_kl_near_the_floor_of_rounding_is_said(run):
    for floor, near in ((0.002, False), (0.01, True)):
        edit(run / "selected.json", test={**TEST, "kl_floor": floor, "kl_dtype": "bfloat16"})
        text = read(run).text
        assert f"Rounding alone gives {floor:g} nats in bfloat16" in text
        assert ("cannot be told" in text or "told from rounding" in text) == near


def test_a_kl_beyond_its_limit_on_the_test_split_is_said(run):
    edit(run / "selected.json", test={**TEST, "kl_first_token": 0.2})
    assert "which the test split exceeds" in read(run).text


def test_nulls_in_the_test_report(run):
    nothing = dict.fromkeys(TEST, None)
    (run / "selected.json").write_text(json.dumps({"plan": PLAN, "test": nothing}))
    assert "–" in read(run).text
    half = {**TEST, "kl_first_token": None, "intervals": {"behaviour_after": [None, 0.1]}}
    edit(run / "selected.json", test=half)
    assert "–" in read(run).text


@pytest.mark.parametrize("test", [None, {}])
def test_a_plan_without_a_test_report(run, test):
    edit(run / "selected.json", test=test)
    assert "its report on the test split is not there yet" in read(run).text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("run.json", "no run.json"),
        ("selected.json", "No plan has been chosen yet"),
        ("trials.csv", "No trials yet"),
        ("generations.jsonl", "No answers yet"),
        ("figures", "No figures yet"),
    ],
)
def test_a_missing_part_is_named(run, name, expected):
    path = run / name
    if path.is_dir():
        for figure in path.iterdir():
            figure.unlink()
    else:
        path.unlink()
    text = read(run).text
    assert expected in " ".join(text.split()).replace("( ", "(")
    assert ("figures/*.png" if name == "figures" else name) in text


def test_an_empty_folder_has_a_report(tmp_path):
    text = read(tmp_path).text
    for name in ("run.json", "directions.json", "trials.csv", "export/certificate.json"):
        assert name in text
    assert text.count("safety training") == 1


def test_counts_and_reasons_come_from_directions_json_where_the_run_has_none(run):
    (run / "run.json").unlink()
    found = {"directions": [{}, {}], "left_out": {"blocks.0.hook_resid_pre[-1]": "all the same"}}
    (run / "directions.json").write_text(json.dumps(found))
    text = read(run).text
    assert "2 directions; 1 site was left out" in text and "all the same" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"{\n\n oops", r"run\.json.*line 3"),
        ("run.json", b"[1]", r"run\.json holds a list"),
        ("selected.json", b"\xff\xfe", r"selected\.json"),
        ("generations.jsonl", b'{"label": "positive"}\n{"la', r"generations\.jsonl.*line 2"),
        ("generations.jsonl", b"3\n", r"generations\.jsonl.*line 1"),
        ("trials.csv", b"trial,stage\n", r"trials\.csv line 1 lacks the columns layer"),
        ("figures/pareto.png", b"no picture", r"pareto\.png is not a PNG"),
    ],
)
def test_a_corrupt_file_is_named_and_the_old_report_stays(run, name, content, message):
    before = report.write_report(run).read_bytes()
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=f"(?s){message}"):
        report.write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob("*.tmp")) + list(run.glob(".*.tmp"))


def test_no_folder(tmp_path):
    with pytest.raises(RunError, match="no run folder"):
        report.write_report(tmp_path / "nowhere")


def test_an_unwritable_place_leaves_nothing_half_written(run):
    (run / "report.html").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        report.write_report(run)
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0%"), (1, "100%"), (0.03125, "3.1%"), (0.05, "5%"), (0.8125, "81%"), (None, "–"),
     (float("nan"), "–"), ("x", "x")],
)  # fmt: skip
def test_rates(value, expected):
    assert report.rate(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (float("nan"), "–"), (float("inf"), "inf"), (3, "3"), (3.0, "3"), (True, "yes"),
     (0.123456, "0.123"), (4e-11, "4e-11"), (12345.6, "12346"), ("<b>", "<b>")],
)  # fmt: skip
def test_numbers(value, expected):
    assert report.number(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, "0.5 s"), (59.9, "59.9 s"), (125, "2 min 5 s"), (None, "–")]
)
def test_durations(value, expected):
    assert report.duration(value) == expected
