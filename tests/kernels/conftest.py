"""Triton kernels run on a CUDA device, and without one in Triton's interpreter, in a process of its own.

Whether functions are interpreted is decided when they are defined, Triton's own included, so TRITON_INTERPRET must be
set before anything imports Triton: `test_interpreted.py` starts that process.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope):
        """Loop bounds are arrays of one element, which NumPy 2.4 no longer converts to int."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_index


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Where the kernel under test runs."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("this process interprets kernels")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("interpreted in the process that test_interpreted.py starts")
    return request.param


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """torch.empty full of NaN (or 255): what a kernel does not write must not be read."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else (255 if x.dtype == torch.uint8 else 0))

    monkeypatch.setattr(torch, "empty", poisoned)
