"""The backends, by name, and the one that a TransformerLens object needs.

Knows: one class a backend. Does not know: how a model is loaded or used.
"""

from __future__ import annotations

from typing import Any

from interp_ablate.errors import ModelError
from interp_ablate.models.backends.backend import Backend
from interp_ablate.models.backends.bridge import BridgeBackend
from interp_ablate.models.backends.checks import refuse_processed
from interp_ablate.models.backends.hf import HFBackend
from interp_ablate.models.backends.hooked import HookedBackend
from interp_ablate.models.loading import BackendName

BACKENDS: dict[BackendName, type[BridgeBackend] | type[HookedBackend] | type[HFBackend]] = {
    "bridge": BridgeBackend,
    "hooked": HookedBackend,
    "hf": HFBackend,
}


def backend_of(obj: Any, hf_config: Any = None) -> Backend:
    """The backend over a TransformerLens object that already exists.

    Raises:
        ModelError: another kind of object, processed weights, a HookedTransformer over several devices.
    """
    kind = type(obj).__name__
    if kind not in ("HookedTransformer", "TransformerBridge"):
        raise ModelError(
            f"cannot wrap a {kind}: accepted are transformer_lens' HookedTransformer and "
            "TransformerBridge; for a name or a folder use load_model(...)"
        )
    refuse_processed(obj)
    if kind == "HookedTransformer" and (obj.cfg.n_devices or 1) > 1:
        raise ModelError(
            f"this HookedTransformer is spread over {obj.cfg.n_devices} devices: make it on one, or load the model with "
            "load_model(..., device='auto'), whose Bridge runs over several"
        )
    return HookedBackend(obj, hf_config) if kind == "HookedTransformer" else BridgeBackend(obj)
