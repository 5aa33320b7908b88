"""The fixture `backend` with plain transformers among its values, for folders that try all of them."""

from __future__ import annotations

import pytest


@pytest.fixture(params=("bridge", "hooked", "hf"))
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that is installed: TransformerLens 4 has no HookedTransformer."""
    from tiny import HAS_HOOKED

    if request.param == "hooked" and not HAS_HOOKED:
        pytest.skip("this TransformerLens has no HookedTransformer")
    return str(request.param)
