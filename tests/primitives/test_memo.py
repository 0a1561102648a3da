"""`once` and `once_per_tensor`: threads compute a result once, and results are bounded or die with their tensor."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from turboquant_hf.primitives import grid, head_rotations, lloyd_max, rotation, rotation_matrix
from turboquant_hf.primitives.memo import once, once_per_tensor

THREADS = 8


def together(function, *arguments):
    """The results of THREADS threads that call `function` at the same time."""
    barrier = Barrier(THREADS)

    def call():
        barrier.wait()
        return function(*arguments)

    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result() for future in [pool.submit(call) for _ in range(THREADS)]]


@pytest.mark.parametrize("kind", [once(maxsize=4), once_per_tensor])
def test_threads_share_one_result(kind):
    calls = []

    @kind
    def slow(x):
        calls.append(x)
        time.sleep(0.05)
        return object()

    first = torch.zeros(3)
    assert len(set(map(id, together(slow, first)))) == 1 and len(calls) == 1
    assert slow(first) is not slow(torch.zeros(3))


def test_once_is_bounded_and_can_be_cleared():
    calls = []

    @once(maxsize=4)
    def square(x):
        calls.append(x)
        return [x * x]

    kept = [square(x) for x in range(50)]
    assert kept[7] == [49] and len(calls) == 50
    assert square.cache_info().currsize == 4
    last = square(49)
    assert len(calls) == 50, "the newest are kept"
    square.cache_clear()
    assert square(49) is not last and len(calls) == 51


def test_once_may_be_recursive_and_keeps_no_error():
    @once(maxsize=64)
    def fibonacci(n):
        if n < 0:
            raise ValueError("n is negative")
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    assert together(fibonacci, 30) == [832040] * THREADS
    for _ in range(2):
        with pytest.raises(ValueError, match="negative"):
            fibonacci(-1)


def test_results_of_once_per_tensor_die_with_the_tensor():
    @once_per_tensor
    def doubled(x, times):
        return times * x

    x = torch.ones(5)
    results = [weakref.ref(doubled(x, times)) for times in (2, 3)]
    assert all(ref() is doubled(x, times) for ref, times in zip(results, (2, 3), strict=True))
    assert doubled(torch.ones(5), 2) is not results[0]()
    del x
    gc.collect()
    assert [ref() for ref in results] == [None, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda: rotation_matrix(24, seed=90_001),
        lambda: head_rotations(3, 24, seed=90_001),
        lambda: lloyd_max(3, 917),
        lambda: grid(3, 917),
        lambda: lloyd_max(2, 916).tensor(dtype=torch.float64),
    ],
    ids=["rotation", "head-rotations", "lloyd-max", "grid", "levels"],
)
def test_shared_results_are_one_object_in_all_threads(make, monkeypatch):
    drawn = rotation._rotation

    def slowly(*args):
        time.sleep(0.02)
        return drawn(*args)

    monkeypatch.setattr(rotation, "_rotation", slowly)
    assert len(set(map(id, together(make)))) == 1


def test_rotations_are_right_whatever_other_threads_ask_for():
    """Many more rotations than are kept, in another order in each thread."""
    expected = {seed: rotation._rotation(8, seed, "auto", 1).float() for seed in range(300)}

    def check(thread):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(thread)).tolist()
        return all(torch.equal(rotation_matrix(8, seed=seed), expected[seed]) for seed in order)

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(check, range(THREADS)))
