"""Which backend serves a call, and what an unavailable one says."""

from __future__ import annotations

import inspect
import subprocess
import sys
from functools import partial
from importlib import import_module

import pytest
import torch

from tests.support.cases import attend, attention_inputs, groups_of
from turboquant_hf.kernels import dispatch
from turboquant_hf.kernels.codes import TileCoding
from turboquant_hf.kernels.decode import cpu, cuda, reference
from turboquant_hf.kernels.encode import reference as encode_reference
from turboquant_hf.primitives import trellis_code

from .conftest import INTERPRETED


def test_importing_the_package_does_not_import_triton():
    code = "import sys; before = 'triton' in sys.modules; import turboquant_hf.kernels.dispatch as d;"
    code += "d.backend('cpu'); assert before or not any(m.startswith('turboquant_hf') and m.endswith('triton')"
    code += " for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cpu_takes_plain_torch(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.backend("cpu") == "torch"
    arguments = attention_inputs(heads=1)
    for threshold in (0.0, 0.99):
        options = {"scaling": 0.125, "sparse_v_threshold": threshold}
        out = attend(dispatch.decode_attention, arguments, **options)
        torch.testing.assert_close(out, attend(reference.decode_attention, arguments, **options))
    assert not torch.allclose(out, attend(reference.decode_attention, arguments, scaling=0.125))


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "metal")
    with pytest.raises(ValueError, match="'metal'.*auto, torch, triton, cuda"):
        dispatch.backend("cpu")


def test_an_unavailable_backend_says_why(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match="tensors are on 'cpu'"):
        dispatch.backend("cpu")
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        dispatch.backend("cpu")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_code_of_64_states_is_left_to_the_reference(backend, monkeypatch):
    monkeypatch.setattr(dispatch, "backend", lambda device=None: backend)
    groups = groups_of((64, 3), make=partial(trellis_code, states=64))
    coding, x = TileCoding(torch.eye(64), groups, center=True), torch.randn(1, 2, 3, 64, 64)
    packed, expected = dispatch.encode_tiles(x, coding), encode_reference.encode_tiles(x, coding)
    assert all(torch.equal(packed[name], expected[name]) for name in expected)
    decoded = dispatch.decode_tiles(packed, torch.eye(64), coding)
    assert torch.equal(decoded, encode_reference.decode_tiles(packed, torch.eye(64), coding))
    assert (decoded - x).square().mean() < 0.025
    arguments = attention_inputs(keys=groups, values=groups, tile=64, tiles=2)
    wanted = attend(reference.decode_attention, arguments)
    assert torch.equal(attend(dispatch.decode_attention, arguments), wanted)


FAST = [name for name in dispatch.__all__ if hasattr(getattr(dispatch, name), "fast")]


@pytest.mark.parametrize("name", FAST)
def test_a_fast_version_has_the_signature_of_its_reference(name):
    pytest.importorskip("triton")
    dispatched = getattr(dispatch, name)
    fast = getattr(import_module(dispatched.fast), name)
    assert inspect.signature(fast) == inspect.signature(dispatched.__wrapped__) == inspect.signature(dispatched)


def test_every_decode_attention_has_the_parameters_of_the_reference():
    pytest.importorskip("triton")
    wanted = inspect.signature(reference.decode_attention).parameters
    for module in (cpu, cuda, dispatch, import_module("turboquant_hf.kernels.decode.triton")):
        found = inspect.signature(module.decode_attention).parameters
        assert {name: found[name] for name in wanted} == dict(wanted)


@pytest.mark.skipif(not INTERPRETED, reason="interpreted in the process that test_interpreted.py starts")
def test_triton_when_named(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.backend("cpu") == "triton"
    arguments = attention_inputs(heads=1, tiles=1)
    out = attend(dispatch.decode_attention, arguments, scaling=0.125)
    torch.testing.assert_close(out, attend(reference.decode_attention, arguments, scaling=0.125), atol=1e-5, rtol=1e-5)
