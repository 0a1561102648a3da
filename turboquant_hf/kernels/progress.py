"""A line in the log while a kernel is being built, because a first call that takes seconds looks like a hang."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

logger = logging.getLogger(__name__)
"""The same object as transformers' `logging.get_logger` gives; warnings reach stderr where nothing is configured."""

SECONDS = 1.0
"""Builds that take less are not announced."""


@contextmanager
def announced(name: str, kept: str) -> Iterator[None]:
    """Log a warning as soon as the block, a build of kernel `name`, has taken more than SECONDS.

    Args:
        name: what is built.
        kept: how often such a build happens, for example "once per machine".
    """
    text = f"turboquant_hf: building the kernel {name} for this GPU, {kept}; this call waits for the compiler."
    said = threading.Event()

    def say() -> None:
        said.set()
        logger.warning(text)

    timer = threading.Timer(SECONDS, say)
    timer.daemon = True
    start = time.monotonic()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if time.monotonic() - start > SECONDS and not said.is_set():  # the compiler let no other thread run
            logger.warning(text)


def announces(kernel: Any) -> Any:
    """A Triton kernel whose compilations are `announced`. Launches of a compiled kernel cost nothing more.

    Interpreted kernels, and those of a Triton without this entry, are returned as they are.
    """
    build = getattr(kernel, "_do_compile", None)
    if build is not None:

        @wraps(build)
        def announced_build(*args: Any, **kwargs: Any) -> Any:
            with announced(f"{kernel.__name__} (Triton)", "once per machine"):
                return build(*args, **kwargs)

        kernel._do_compile = announced_build
    return kernel
