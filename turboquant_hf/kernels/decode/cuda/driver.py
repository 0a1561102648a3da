"""Launches of compiled kernels through cuLaunchKernelEx: torch's own launcher cannot pass launch attributes."""

from __future__ import annotations

import ctypes

import torch

PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h."""


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: a number, and a union of 64 bytes, of which one int is used."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class LaunchOptions(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


class Launcher:
    """Launches one compiled kernel. overlaps: it may start early, because it waits for the previous kernel itself."""

    def __init__(self, kernel, threads: int, shared: int, overlaps: bool) -> None:
        self._kernel, self._threads, self._shared = kernel, threads, shared
        self._launch = torch.cuda._utils._get_gpu_runtime_library().cuLaunchKernelEx
        self._attributes = ctypes.pointer(LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1))
        self._count = int(overlaps)

    def options(self) -> LaunchOptions:
        """New options for the launches of one caller. Threads must not share them."""
        return LaunchOptions(
            block=(self._threads, 1, 1), shared=self._shared, attributes=self._attributes, count=self._count
        )

    def __call__(self, grid: tuple[int, int, int], arguments, stream: int, options: LaunchOptions) -> None:
        """arguments: `ctypes.pointer` of the kernel's only parameter, which the driver copies before this returns."""
        options.grid[0], options.grid[1], options.grid[2] = grid
        options.stream = stream
        status = self._launch(ctypes.byref(options), self._kernel.func, ctypes.byref(arguments), None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx failed with error {status} (grid {grid}, {self._threads} threads)")
