"""What the CUDA C++ kernels of a process share: one workspace per stream, and transposed rotations. On CPU tensors."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch

from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.config import load_preset
from turboquant_hf.kernels.decode import History, RawTokens, Scoring, cuda
from turboquant_hf.kernels.decode.cuda import geometry, kernel, source, step, workspace
from turboquant_hf.primitives import rotation_matrix

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing of Triton is in it")
CPU, STREAM, THREADS = torch.device("cpu"), 5, 8
SMALL = source.ARRIVALS + 64


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    monkeypatch.setattr(workspace, "_WORKSPACES", {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.setattr(geometry, "multiprocessors", lambda device: 132)


def test_threads_on_one_stream_share_a_workspace_that_one_of_them_grows(monkeypatch):
    made, cleared = [], workspace.cleared

    def slowly(words, device):
        made.append(words)
        Event().wait(0.02)
        return cleared(words, device)

    monkeypatch.setattr(workspace, "cleared", slowly)
    barrier = Barrier(THREADS)

    def ask(_):
        barrier.wait()
        return workspace.of_stream(SMALL, CPU, STREAM)

    with ThreadPoolExecutor(THREADS) as pool:
        given = list(pool.map(ask, range(THREADS)))
    assert len(set(map(id, given))) == 1 and made == [SMALL]
    assert all(workspace.of_stream(SMALL + n, CPU, STREAM).numel() >= SMALL + n for n in (1, 5, 3))


def test_counted_tiles_are_read_while_other_threads_make_workspaces():
    def make(thread):
        for n in range(300):
            workspace.of_stream(SMALL + n, CPU, 100 * thread + n % 100)

    with ThreadPoolExecutor(THREADS) as pool:
        done = [pool.submit(make, thread) for thread in range(THREADS)]
        while not all(future.done() for future in done):
            assert cuda.unread_tiles() == 0
        assert all(future.result() is None for future in done)


def test_streams_that_come_and_go_leave_a_bounded_number_of_workspaces():
    for stream in range(workspace.MAX_WORKSPACES + 30):
        workspace.of_stream(SMALL, CPU, stream)
    assert len(workspace._WORKSPACES) == workspace.MAX_WORKSPACES
    assert (CPU, workspace.MAX_WORKSPACES + 29) in workspace._WORKSPACES and (CPU, 0) not in workspace._WORKSPACES


def test_a_workspace_outlives_the_launch_that_another_thread_grows_it_in(monkeypatch):
    alive = []

    class Launcher:
        def options(self):
            return None

        def __call__(self, grid, arguments, stream, options):
            (held,) = (weakref.ref(x) for x in workspace._WORKSPACES.values())
            address = held().data_ptr()
            with ThreadPoolExecutor(1) as other:
                grown = other.submit(workspace.of_stream, 4 * held().numel(), CPU, STREAM).result()
            gc.collect()
            alive.append(held() is not None and arguments.contents.arrivals == address != grown.data_ptr())

    monkeypatch.setattr(kernel, "load", lambda shape, device: (Launcher(), 8, 4))
    preset = load_preset("k4v4-scalar", min_statistics=0)
    layer = TurboQuantLayer(preset, preset.keys, preset.values, lambda: True)
    layer.update(*torch.randn(2, 1, 2, 600, 64).half())
    layer.commit()
    raw = RawTokens(*layer.sinks.arrays), RawTokens(*layer.tail.view())
    query = torch.randn(1, 8, 1, 64).half()
    cuda.decode_attention(query, History(*layer.packed_sides(), *raw, layer.sinks.starts), Scoring(0.125))
    assert alive == [True]


@pytest.mark.parametrize("dim", [1, 24])
def test_a_transposed_rotation_is_one_per_rotation_and_gone_with_it(dim):
    rotation = rotation_matrix(dim, seed=70_001).clone()
    with ThreadPoolExecutor(THREADS) as pool:
        given = list(pool.map(step._transposed, [rotation] * THREADS))
    assert len(set(map(id, given))) == 1 and torch.equal(given[0], rotation.T) and given[0].is_contiguous()
    kept = weakref.ref(given[0])
    del given
    gc.collect()
    assert kept() is not None
    del rotation
    gc.collect()
    assert kept() is None
