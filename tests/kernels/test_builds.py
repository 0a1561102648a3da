"""No Triton kernel is built again because a length changed: the first call, of any length, builds all variants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.names import kernels_by_name

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not built")

SHAPES = 5
A_SHAPE = {  # builds of one shape: a preset, head dim, dtype and number of heads
    "_add_kernel": 1,
    "_append_kernel": 1,
    "_decode_kernel": 2,  # keys, values
    "_encode_kernel": 2,  # keys, values
    "_merge_kernel": 1,
    "_query_kernel": 1,
    "_rank_kernel": 1,
    "_scale_kernel": 1,
    "_split_kernel": 8,  # with a mask or without, counts on the host or device, up to 8 queries or more
    "_state_kernel": 2,
    "_tile_kernel": 3,
}


def test_no_run_time_number_is_specialised():
    pytest.importorskip("triton")
    for name, kernel in kernels_by_name().items():
        numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.startswith("p_")]
        assert all(p.do_not_specialize for p in numbers), name


@pytest.mark.slow
def test_no_length_builds_a_kernel_anew():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.builds"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["later"] == [], "\n".join(found["later"])
    assert set(found["kernels"]) == set(kernels_by_name())
    for name, builds in found["kernels"].items():
        assert builds <= SHAPES * A_SHAPE[name], f"{name} was built {builds} times"
