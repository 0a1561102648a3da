"""A build of a kernel that takes more than a second is logged once; quick builds and built kernels are not."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from turboquant_hf.kernels import progress
from turboquant_hf.kernels.decode.cuda import built

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is built there")
SHORT, LONG = 0.05, 0.4


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.2)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("turboquant_hf.kernels")]


def test_a_slow_build_says_so_while_it_runs(caplog):
    with progress.announced("encode (Triton)", "once per machine"):
        time.sleep(LONG)
        seen = lines(caplog)
    assert seen == lines(caplog) and len(seen) == 1
    assert "building the kernel encode (Triton) for this GPU, once per machine" in seen[0]
    assert caplog.records[0].levelno == logging.WARNING


def test_a_quick_build_says_nothing_now_or_later(caplog):
    with progress.announced("encode", "once per machine"):
        time.sleep(SHORT)
    time.sleep(LONG)
    assert not lines(caplog)


def test_a_build_that_lets_no_other_thread_run_says_so_afterwards(caplog):
    interval = sys.getswitchinterval()
    try:
        with progress.announced("encode", "once per machine"):
            sys.setswitchinterval(1000)
            stop = time.monotonic() + LONG
            while time.monotonic() < stop:
                pass
    finally:
        sys.setswitchinterval(interval)
    assert len(lines(caplog)) == 1


def test_a_build_that_fails_raises_its_error(caplog):
    with pytest.raises(RuntimeError, match="no compiler"), progress.announced("encode", "once per machine"):
        raise RuntimeError("no compiler")
    time.sleep(LONG)
    assert not lines(caplog)


class Kernel:
    """Like Triton's kernels: a launch builds what has no code yet."""

    __name__ = "_encode_kernel"

    def __init__(self):
        self.built = {}

    def _do_compile(self, key):
        time.sleep(LONG)
        self.built[key] = key
        return key

    def run(self, key):
        return self.built.get(key) or self._do_compile(key)


def test_a_triton_kernel_says_so_once_per_build(caplog):
    kernel = progress.announces(Kernel())
    for key in ("a", "a", "b", "a", "b"):
        assert kernel.run(key) == key
    assert len(lines(caplog)) == 2 and all("_encode_kernel" in line for line in lines(caplog))


def test_a_launch_of_a_built_kernel_is_not_announced(monkeypatch):
    kernel = progress.announces(Kernel())
    kernel.run("a")
    monkeypatch.setattr(progress, "announced", None)
    assert kernel.run("a") == "a"
    assert type(kernel).run is Kernel.run and "run" not in vars(kernel)


def test_a_kernel_without_the_entry_is_left_as_it_is():
    other = object()
    assert progress.announces(other) is other


def test_every_triton_kernel_is_announced():
    pytest.importorskip("triton")
    folder, kernels = Path(progress.__file__).parent, {}
    for path in folder.rglob("*.py"):
        if "import triton" in path.read_text():
            module = import_module("turboquant_hf.kernels." + ".".join(path.relative_to(folder).with_suffix("").parts))
            kernels |= {name: x for name, x in inspect.getmembers(module) if name.endswith("_kernel")}
    assert len(kernels) >= 11
    assert not [name for name, kernel in kernels.items() if "_do_compile" not in vars(kernel)]


REAL = """
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from tests.support.compiling import CompilerOnly
from turboquant_hf.kernels import progress
from turboquant_hf.kernels.statistics.queries import _add_kernel
import torch

progress.SECONDS = 0.001
driver.set_active(CompilerOnly(80))
counts, x, starts = torch.zeros(4, dtype=torch.int32), torch.zeros(64), torch.zeros(1, dtype=torch.int64)
sizes = {"D": 16, "BLOCK_T": 16, "BLOCK_D": 16}
for _ in range(3):
    _add_kernel.run(x, x, x, counts, starts, 16, 16, 16, 1, 1, 1, **sizes, grid=(1,), warmup=True)
"""


@pytest.mark.slow
def test_triton_announces_its_builds_and_the_line_reaches_stderr(tmp_path):
    """In a process without any logging configuration, like a user's script."""
    pytest.importorskip("triton")
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", REAL],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr.count("turboquant_hf: building the kernel _add_kernel") == 1


def test_the_cuda_kernel_says_so_once_per_build_and_is_built_once_per_machine(caplog, monkeypatch, tmp_path):
    compiled, loaded = [], []

    def compile_kernel(source, name, capability, folders, options):
        compiled.append((source, capability))
        time.sleep(LONG)
        return b"binary\nof " + source.encode(), "symbol"

    def load(binary, names):
        loaded.append(binary)
        return {names[0]: binary}

    monkeypatch.setenv(built.VARIABLE, str(tmp_path / "new"))
    monkeypatch.setattr(torch.cuda._utils, "_nvrtc_compile", compile_kernel, raising=False)
    monkeypatch.setattr(torch.cuda._utils, "_cuda_load_module", load, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    first = built.load_kernel("one", "f", ["-O3"], "decode attention (CUDA C++)")
    assert len(lines(caplog)) == 1 and "decode attention (CUDA C++)" in lines(caplog)[0]
    assert built.load_kernel("one", "f", ["-O3"], "again") == first == b"binary\nof one"
    assert compiled == [("one", "90")] and len(lines(caplog)) == 1
    assert built.load_kernel("two", "f", ["-O3"], "another source") == b"binary\nof two"
    built.load_kernel("one", "f", [], "other options")
    assert len(compiled) == 3
    for file in (tmp_path / "new").iterdir():
        file.write_bytes(b"")
    assert built.load_kernel("one", "f", ["-O3"], "a damaged file is built again") == first and len(compiled) == 4
    monkeypatch.setenv(built.VARIABLE, "/dev/null/nowhere")
    assert built.load_kernel("one", "f", ["-O3"], "a folder that cannot be made") == first and len(compiled) == 5


def test_the_logger_is_the_one_that_transformers_gives():
    assert transformers_logging.get_logger("turboquant_hf.kernels.progress") is progress.logger
