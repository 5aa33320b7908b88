"""Files of a model's folder: what transformers says of them, in one message."""

from __future__ import annotations

import pytest

from interp_ablate.errors import ModelError
from interp_ablate.models.model_files import transformers_reads


def test_a_package_that_is_missing_is_named_whole() -> None:
    """Gemma 3n without timm was said to be a broken download, and `pip install` was cut off."""
    with (
        pytest.raises(ModelError, match=r"needs a package.*`pip install timm`"),
        transformers_reads("x"),
    ):
        raise ImportError("TimmWrapperModel requires timm. Install it:\n`pip install timm`")
