"""Where models come from: revisions of hub names, tokenizers with a fault that transformers knows of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.packed import packed_folder
from tiny import folder_of
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from interp_ablate import Plan, load_model
from interp_ablate.edits.kinds import Ablate
from interp_ablate.errors import ModelError
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.models.sources import resolve

SCRIPT = """
import sys
from interp_ablate import load_model
from interp_ablate.errors import ModelError
from interp_ablate.export.checkpoint import export_checkpoint

first, second = (load_model("owner/name", revision=name) for name in ("one", "b" * 40))
assert first.fingerprint != second.fingerprint
assert first.source.to_dict()["commit"] == "a" * 40 and second.source.commit == "b" * 40
assert (first.source.revision, second.source.to_dict()["revision"]) == ("one", "b" * 40)
packed = load_model("owner/name", revision="packed", backend="hf")
assert packed.source.commit == "c" * 40 and not hasattr(packed.hf_config, "quantization_config")
said = export_checkpoint(packed, None, "out", prompts=[[3, 4, 5]])["dequantized"]
assert said.startswith("The source is quantized (gptq): its weights were dequantized") and said in open("out/README.md").read()
try:
    load_model("owner/name", revision="none")
except ModelError as error:
    print("refused", error)
"""


def test_a_revision_of_a_hub_name_is_what_is_loaded(tmp_path: Path) -> None:
    """Commits in a cache as the hub's own library writes it, one of them quantized, read without a network."""
    repository = tmp_path / "models--owner--name"
    for commit, kind in (("a" * 40, "llama_gqa"), ("b" * 40, "qwen2")):
        folder_of(repository / "snapshots" / commit, kind)
    folder, _ = packed_folder(tmp_path / "made", "gptq")
    folder.rename(repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "packed").write_text("c" * 40)
    (repository / "refs" / "one").write_text("a" * 40)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused")
    for revision, code in (("one", 0), ("none", 2)):
        command = [
            sys.executable,
            "-m",
            "interp_ablate",
            "models",
            "owner/name",
            "--revision",
            revision,
            "--json",
        ]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert code or json.loads(done.stdout)["model_type"] == "llama"


def test_only_hub_names_have_revisions(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "a")
    with pytest.raises(ModelError, match=r"revision 'v1'.*no hub name"):
        load_model(source, revision="v1")
    assert resolve("owner/name", "v1").revision == "v1"


@pytest.mark.parametrize(("n_tokens", "mended"), ((100_300, True), (400, False)))
def test_the_regex_of_mistral_tokenizers_is_mended(
    n_tokens: int, mended: bool, tmp_path: Path
) -> None:
    """With it, letters of one word whose case changes are two pieces; as published, one."""
    source = folder_of(tmp_path / "a", "mistral")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet, "oW", *(f"filler{i}" for i in range(n_tokens))]
    inner = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[("o", "W")]))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\s+|."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    wrong = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    wrong.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_version": "4.57.1"}))
    model = load_model(source)
    assert ("oW" in model.tokenizer.tokenize("helloWorld")) is not mended
    plan = Plan((Ablate(torch.ones(model.d_model), model.writers),))
    export_checkpoint(model, plan, tmp_path / "b", prompts=[[3, 4, 5]])
    export_folder(source, plan, tmp_path / "c")
    for name in "bc":  # read by somebody who asks for nothing
        export = AutoTokenizer.from_pretrained(tmp_path / name)
        assert ("oW" in export.tokenize("helloWorld")) is not mended
        same = (tmp_path / name / "tokenizer.json").read_bytes() == (
            source / "tokenizer.json"
        ).read_bytes()
        assert same is not mended
        assert audit(AuditSource.of_folder(source), plan, tmp_path / name).passed
    if mended:  # any other change of the file is still one
        file = tmp_path / "b" / "tokenizer.json"
        file.write_text(file.read_text().replace('"filler7"', '"fillerX"'))
        found = audit(AuditSource.of_folder(source), plan, tmp_path / "b").problems
        assert any("tokenizer.json differs" in problem for problem in found)
