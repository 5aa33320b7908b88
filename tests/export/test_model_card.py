"""Cards: valid front matter whatever the names, what is inherited, what every kind of export says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.export.model_card import SAFETY_NOTICE, model_card, source_front_matter
from interp_ablate.sites import Site, sites_of
from interp_ablate.storage.provenance import versions

R = torch.eye(4, dtype=torch.float64)
SOURCE = {"name": "o/base", "kind": "hub", "path": None, "base_model": "o/base", "license": None}
PASSED = {
    "kl": 1e-9,
    "max_abs_logit_difference": 2e-5,
    "limits": {"kl": 1e-6, "max_abs_logit_difference": 1e-3},
    "dtype": "float32",
    "passed": True,
    "prompts": 8,
    "max_abs_logit_effect_of_plan": 9.5,
}


def manifest(plan: Plan | None = None, **more: Any) -> dict[str, Any]:
    layers = [0, 1, 2, 5]
    return {
        "source": SOURCE,
        "dtype": "float32",
        "edited": [f"model.layers.{i}.self_attn.o_proj.weight" for i in layers],
        "unchanged": ["model.norm.weight", "lm_head.weight"],
        "plan": (plan or Plan()).to_dict(),
        "versions": versions(),
        "test": None,
        **more,
    }


def front_of(card: str) -> dict[str, Any]:
    start, front, body = card.split("---\n", 2)
    assert start == "" and body.startswith("\n# ")
    return yaml.safe_load(front)


# --------------------------------------------------------------------------------- front matter


@pytest.mark.parametrize(
    ("kind", "relation", "library"),
    (
        ("checkpoint", "finetune", "transformers"),
        ("lora", "adapter", "peft"),
        ("gguf", "finetune", None),
    ),
)
def test_kinds(kind: str, relation: str, library: str | None) -> None:
    card = model_card(manifest(kind=kind, file="edited.gguf"), PASSED)
    front = front_of(card)
    assert front["base_model"] == "o/base" and front["base_model_relation"] == relation
    assert front.get("library_name") == library
    assert {"interp-ablate", "activation-steering"} <= set(front["tags"])
    assert ("gguf" in front["tags"]) == (kind == "gguf")
    loading = {
        "checkpoint": "AutoModelForCausalLM.from_pretrained('THIS')",
        "lora": "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('o/base'), 'THIS')",
        "gguf": "llama-cli -m THIS/edited.gguf",
    }
    assert {k for k, code in loading.items() if code in card} == {kind}
    verify = "interp-ablate verify SOURCE THIS --plan interp_ablate.json"
    assert (verify in card) == (kind == "checkpoint")


def test_what_is_inherited() -> None:
    card = {
        "license": "other",
        "license_name": "their licence",
        "license_link": "LICENSE.md",
        "language": ["en", "no"],
        "base_model": "o/grandparent",
        "tags": ["chat", "gguf", "LoRA", "interp-ablate"],
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text",
    }
    folder = {"name": "here", "kind": "folder", "path": "/home/me/here", "license": None}
    text = model_card(manifest(source=folder, source_card=card), PASSED)
    assert front_of(text) == {
        "license": "other",
        "license_name": "their licence",
        "license_link": "LICENSE.md",
        "language": ["en", "no"],
        "base_model": "o/grandparent",
        "base_model_relation": "finetune",
        "pipeline_tag": "image-text-to-text",
        "library_name": "transformers",
        "tags": ["chat", "interp-ablate", "activation-steering"],
    }
    assert "`their licence`, inherited" in text and "/home/me" not in text
    adapter = front_of(model_card(manifest(kind="lora", source=folder, source_card=card), PASSED))
    assert adapter["license_link"] == "https://huggingface.co/o/grandparent/blob/main/LICENSE.md"


def test_whose_licence_and_base_count() -> None:
    card = {"license": "mit", "license_name": "x", "base_model": "o/grandparent"}
    # of a hub model, the base is the model itself; what was bundled knows its own licence
    hub = front_of(model_card(manifest(source_card=card), PASSED))
    assert hub["base_model"] == "o/base" and hub["license"] == "mit"
    bundled = {**SOURCE, "name": "alias", "kind": "gguf", "license": "apache-2.0"}
    front = front_of(model_card(manifest(source=bundled, source_card=card), PASSED))
    assert front["license"] == "apache-2.0" and "license_name" not in front
    assert front["base_model"] == "o/base"


def test_a_source_without_a_name_or_licence() -> None:
    folder = {"name": "here", "kind": "folder", "path": "/x", "base_model": "/home/me/x"}
    card = model_card(manifest(source=folder), PASSED)
    front = front_of(card)
    assert not {"license", "base_model", "base_model_relation"} & set(front)
    assert "The source names none" in card and "/home/me" not in card
    merged = {"base_model": ["a/b", "c/d", "../e"]}
    front = front_of(
        model_card(manifest(source={**folder, "base_model": None}, source_card=merged), PASSED)
    )
    assert front["base_model"] == ["a/b", "c/d"]


@pytest.mark.parametrize(
    "name",
    ("a\n---\nlicense: mit", "yes", "a: b # c", "'\"`|<b>", "- [x", "&a *b !c", "\u2028x\x85"),
)
def test_no_name_breaks_the_card(name: str) -> None:
    source = {**SOURCE, "name": name, "license": name}
    plan = Plan((Ablate(R[0], Site(1, "mlp_out"), label=name),))
    inherited = {"tags": [name], "language": name}
    card = model_card(manifest(plan, source=source, source_card=inherited, edited=[name]), PASSED)
    flat = " ".join(name.split())
    front = front_of(card)
    assert front["license"] == flat and front["tags"][0] == flat and front["language"] == flat
    assert "<b>" not in card.split("# ", 1)[1].splitlines()[0]
    row = next(line for line in card.splitlines() if line.startswith("| ablate"))
    assert row.replace("\\|", "").count("|") == 6
    assert [line for line in card.splitlines() if line.startswith("## ")] == [
        "## What was edited",
        "## What it did",
        "## Is this the model that was measured?",
        "## How to load and check it",
        "## Licence",
        "## Intended use, and what was not tested",
        "## How to make it again",
    ]


# --------------------------------------------------------------------------------- the source's card


def write(folder: Path, text: str) -> Path:
    (folder / "README.md").write_bytes(text.encode())
    return folder


def test_the_sources_front_matter(tmp_path: Path) -> None:
    text = "---\r\nlicense: mit\r\nlanguage: no\r\ntags:\r\n- a\r\nmodel-index: [1]\r\n---\r\n# Hi\r\n---\r\n"
    found = {"license": "mit", "language": "no", "tags": ["a"]}
    assert source_front_matter(write(tmp_path, text)) == found
    assert source_front_matter(write(tmp_path, "\ufeff" + text)) == found
    assert source_front_matter(str(tmp_path)) == found


def test_a_card_of_2_mb(tmp_path: Path) -> None:
    results = "model-index:\n" + "- name: x\n  value: 0.5\n" * 90_000
    for text in (
        f"---\nlicense: mit\n{results}tags:\n- a\n---\n# Hi\n",
        "---\nlicense: mit\ntags:\n- a\n---\n" + "text\n" * 400_000,
    ):
        assert len(text) > 1_900_000
        found = source_front_matter(write(tmp_path, text))
        assert found == {"license": "mit", "tags": ["a"]}


def test_what_was_compared_in_which_precision() -> None:
    compared = {"stored": "bfloat16", "hooked": "float32", "reloaded": "float32"}
    versions = {
        "versions": {"transformers": "5.0"},
        "left_out": ["a.msgpack"],
        "transformers_4": "No.",
    }
    card = model_card({**manifest(Plan()), **versions}, {**PASSED, "compared": compared})
    assert (
        "Weights stored in bfloat16, loaded in float32 by transformers 5.0; the hooked model computed in float32."
    ) in card
    assert (
        "Left behind in the source, because nothing here edits or checks it: `a.msgpack`." in card
    )
    assert "\nNo.\n" in card


def test_a_source_without_front_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert source_front_matter(None) == source_front_matter(tmp_path) == {}
    for text in (
        "",
        "# A card\n---\nlicense: mit\n---\n",
        "---\nlicense: mit\n",
        "---\n- a\n---\n",
    ):
        assert source_front_matter(write(tmp_path, text)) == {}
    assert not caplog.records


def test_front_matter_that_is_no_yaml(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in (
        "---\nlicense: [mit\n---\n",
        "---\n\tlicense: mit\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
    ):
        with caplog.at_level(logging.WARNING):
            assert source_front_matter(write(tmp_path, text)) == {}
        assert "README.md is ignored, and its licence with it" in caplog.text
        caplog.clear()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert source_front_matter(tmp_path) == {} and "is ignored" in caplog.text


def test_front_matter_constructs_nothing(tmp_path: Path) -> None:
    hit = tmp_path / "hit"
    text = f"---\nlicense: mit\ntags: !!python/object/apply:os.mkdir ['{hit}']\nlanguage: {{a: b}}\n---\n"
    found = source_front_matter(write(tmp_path, text))
    assert found["license"] == "mit" and "language" not in found and not hit.exists()
    bomb = "a: &a [x, x]\n" + "".join(
        f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi")
    )
    found = source_front_matter(write(tmp_path, f"---\n{bomb}tags: *i\nlicense: mit\n---\n"))
    assert found == {"license": "mit"}


# --------------------------------------------------------------------------------- sections


def test_what_was_edited() -> None:
    sites = sites_of(("embed", "attn_out", "mlp_out"), [0, 1, 2, 5])
    plan = Plan(
        (
            Ablate(R[0], sites, strength=[0.25 * i for i in range(9)], label="r"),
            Ablate(R[:2], Site(3, "attn_out"), label="two", norm_preserving=True),
            Add(R[1], Site(4, "resid_post"), coefficient=1.5, positions="generated", label="s"),
        )
    )
    card = model_card(manifest(plan, added=["lm_head.weight"]), PASSED)
    for text in (
        "| ablate | `r` | 9 sites: embed; attn_out 0-2, 5; mlp_out 0-2, 5 | strength 0 to 2 | all |",
        "| ablate, rank 2, norm-preserving | `two` | 1 sites: attn_out 3 | strength 1 | all |",
        "| add | `s` | 1 sites: resid_post 4 | coefficient 1.5 | generated |",
        "4 tensors changed, 2 did not:",
        "- `model.layers.{0-2, 5}.self_attn.o_proj.weight` (4)",
        "Added: `lm_head.weight`.",
    ):
        assert text in card, text


def test_families_of_tensors() -> None:
    edited = [
        "a.0.experts.1.w2.weight",
        "a.0.experts.3.w2.weight",
        "a.1.experts.1.w2.weight",
        "b.weight",
    ]
    edited += ["h.7.c_proj.weight"]
    card = model_card(manifest(edited=edited), PASSED)
    assert "- `a.{0-1}.experts.{1, 3}.w2.weight` (3)" in card
    assert "- `b.weight`\n" in card and "- `h.7.c_proj.weight`\n" in card


def test_tied_embeddings() -> None:
    words = {"untie": "was untied", "skip-embedding": "is unedited", "accept": "another function"}
    for choice, text in words.items():
        card = model_card(manifest(tied=choice), PASSED)
        assert [t for t in words.values() if t in card] == [text]
    cost = {**PASSED, "cost_of_accept": {"kl": 0.047, "max_abs_logit_difference": 1.25}}
    assert "kl 0.047, max_abs_logit_difference 1.25" in model_card(manifest(tied="accept"), cost)
    card = model_card(manifest(tied=None), PASSED)
    assert not [text for text in words.values() if text in card]


def test_how_it_was_measured() -> None:
    test = {
        "behaviour_before": 0.75,
        "behaviour_after": 0.0,
        "intervals": {"behaviour_after": [0, 0.109]},
        "n": {"positive": 32, "negative": 31},
        "how": {"decoding": "greedy, 32 tokens", "scorer": "expressions"},
        "kl_floor": 2e-9,
        "kl_dtype": "float32",
        "controls": [
            {"name": "a", "behaviour_after": 0.5, "interval": [0.25, 0.75], "kl_first_token": 0.01}
        ],
    }
    card = model_card(manifest(test=test), PASSED)
    for text in (
        "positive prompts: 32, negative prompts: 31, decoding: greedy, 32 tokens, scorer: expressions",
        "| behaviour, positive prompts, unedited | 0.75 |  |",
        "| behaviour, positive prompts, edited | 0 | 0 to 0.109 |",
        "| a | 0.5 | 0.25 to 0.75 | 0.01 |",
        "Rounding alone gives a KL of 2e-09 nats in float32",
    ):
        assert text in card, text
    assert "No behaviour was measured" not in card
    card = model_card(manifest(), PASSED)
    assert "Not measured in this export." in card and "No behaviour was measured" in card


def test_the_certificate() -> None:
    card = model_card(manifest(), PASSED)
    for text in (
        "| kl | 1e-09 | 1e-06 |",
        "Certificate: **passed** (`certificate.json`), with the limits of float32 weights, on 8 prompts",
        "moves logits by up to 9.5",
    ):
        assert text in card
    assert "**FAILED**" in model_card(manifest(), {**PASSED, "passed": False, "dtype": "bfloat16"})
    card = model_card(manifest(), {"compared": "no", "passed": None, "limits": {}})
    assert "Not compared by logits" in card and "**passed**" not in card


def test_every_card_warns_and_says_how_to_make_it_again() -> None:
    for kind in ("checkpoint", "lora", "gguf"):
        card = model_card(manifest(kind=kind), PASSED)
        assert SAFETY_NOTICE in card and "other languages" in card and "Intended use" in card
        assert f"torch {versions()['torch']}" in card
