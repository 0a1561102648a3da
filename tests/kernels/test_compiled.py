"""All kernels are compiled for GPUs that this machine need not have: compilers refuse what the interpreter accepts."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.cuda_cases import described
from tests.support.names import kernels_by_name
from turboquant_hf.kernels.decode.cuda import kernel, source

from .conftest import INTERPRETED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="a compiler's work")]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile(capability, tmp_path):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.compiling", str(capability)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    kernels = kernels_by_name()
    assert len(kernels) >= 11 and set(json.loads(run.stdout.splitlines()[-1])) == set(kernels)


class Nvrtc:
    """NVIDIA's run-time compiler, which needs no GPU: PyPI's nvidia-cuda-nvrtc.

    The oldest of CUDA 13 stands in pyproject.toml: what it accepts, newer ones do, and not the other way round.
    """

    def __init__(self) -> None:
        spec = find_spec("nvidia.cu13") if find_spec("nvidia") else None
        places = spec.submodule_search_locations if spec else ()
        found = [path for place in places for path in Path(place).glob("lib/libnvrtc.so.*")]
        if not found:
            pytest.skip("needs nvidia-cuda-nvrtc 13")
        for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):  # some builds do not look beside themselves
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(found[0]))

    def compile(self, text: str, *options: str) -> tuple[int, str]:
        """(status, log)."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"decode.cu", 0, None, None)
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self._library.nvrtcCompileProgram(program, len(options), arguments)
        self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self._library.nvrtcGetProgramLog(program, log)
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return status, log.value.decode()


SHARED = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_120": 99 * 1024}
"""Architecture -> bytes of shared memory per block (CUDA C++ programming guide, technical specifications)."""
CASES = {  # keys, bits of values, head dim, bytes that may spill
    "k4v4-scalar-d128": ("k5/3", 4, 128, 64),
    "k4v4-scalar-d64": ("k5/3", 4, 64, 0),
    "k4v4-scalar-d256": ("k5/3", 4, 256, 512),
    "k3v2-scalar-d128": ("k5/3/2", 2, 128, 64),
    "k8v8-d64": ("k8", 8, 64, 16),
    "k2v2-scalar-d128": ("k4/2/1", 2, 128, 64),
    "matrices-d96": ("k5/3", 4, 96, 64),
    "sparse-d128": ("k5/3", 4, 128, 64),
    "matrices-d64": ("k5/3", 4, 64, 0),
    "matrices-d128": ("k5/3", 4, 128, 64),
    "matrices-d256": ("k5/3/2", 3, 256, 512),
    "wide-d128": ("k5/3", 4, 128, 256),
    "k4v4-d64": ("w5/w3", "w4", 64, 0),
    "k4v4-d96": ("w5/w3", "w4", 96, 0),
    "k4v4-d128": ("w5/w3", "w4", 128, 0),
    "k4v4-d256": ("w5/w3", "w4", 256, 32),
    "k3v3-d64": ("5/w3/w2", "w3", 64, 0),
    "k3v3-d96": ("5/w3/w2 d96", "w3", 96, 0),
    "k3v3-d128": ("5/w3/w2", "w3", 128, 0),
    "k3v3-d256": ("5/w3/w2", "w3", 256, 32),
    "k3v2-d256": ("5/w3/w2", "w2", 256, 32),
    "k2v2-d64": ("w3/w1", "w2", 64, 0),
    "k2v2-d96": ("w3/w1", "w2", 96, 0),
    "k2v2-d256": ("w3/w1", "w2", 256, 32),
    "k25v25-d64": ("w4/w2 quarter", "w3", 64, 0),
    "k25v25-d96": ("w4/w2 quarter d96", "w3", 96, 0),
    "k25v25-d128": ("w4/w2 quarter", "w3", 128, 0),
    "k25v25-d256": ("w4/w2 quarter", "w3", 256, 32),
    "four-groups-d128": ("w4/w3/w2/w1", "w3", 128, 0),
    "two-groups-d128": ("w4/w2", "w3", 128, 0),
    "words-and-rows-d64": ("w4/w1/3", "w1", 64, 0),
    "rows-and-words-d128": ("5/w3", "w4", 128, 0),
    "wide-words-d64": ("w5/w3/w2", "w3", 64, 0),
    "values-of-5-bits-d64": ("w5/w3", "w5", 64, 0),
    "values-of-5-bits-d128": ("w5/w3", "w5", 128, 0),
    "wide-trellis-d128": ("w5/w3", "w4", 128, 64),
    "wide-trellis-d256": ("w4/w2", "w3", 256, 64),
    "sparse-trellis-d128": ("w4/w2", "w3", 128, 0),
}


def architectures(case: str) -> list[str]:
    """One per size of shared memory, on which the source depends. sm_89 and sm_120 have the same and take turns."""
    return ["sm_80", "sm_90", ("sm_89", "sm_120")[list(CASES).index(case) % 2]]


@pytest.mark.parametrize(("case", "architecture"), [(case, name) for case in CASES for name in architectures(case)])
def test_cuda_source_compiles(case, architecture):
    """The source compiles for these architectures without any header, and spills few registers."""
    nvrtc = Nvrtc()
    widths, bits, dim, allowed = CASES[case]
    keys, values = described(widths, bits, dim)
    key_format = "fp16" if widths == "k8" else "e3m5"
    hadamard = dim != 96 and not case.startswith(("matrices", "k2v2-scalar"))
    options = {"hadamard": hadamard, "wide": case.startswith("wide"), "sparse": case.startswith("sparse")}
    shape = source.Shape(dim, keys, values, key_format, "e4m4", bf16=True, **options)
    warps = source.most_warps(shape, SHARED[architecture])
    if not warps:
        pytest.skip("dispatch takes Triton there: too little shared memory for two warps")
    options = (f"--gpu-architecture={architecture}", *kernel.COMPILER_OPTIONS, "--ptxas-options=-v")
    status, log = nvrtc.compile(source.source_text(shape, warps), *options)
    assert status == 0, log
    spilled = int(re.search(r"(\d+) bytes spill stores", log)[1])
    assert spilled <= allowed, log
