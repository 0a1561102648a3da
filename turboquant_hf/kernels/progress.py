"""A line in the log while a kernel is built: a first call that stands still for seconds looks like a hang."""

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
"""A build that takes no longer is not worth a line."""


@contextmanager
def announced(name: str, kept: str) -> Iterator[None]:
    """Log one warning where the block, a build of kernel `name`, takes more than SECONDS, as soon as it does.

    Args:
        name: what is built.
        kept: how often that happens, such as "once per process".
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
        if time.monotonic() - start > SECONDS and not said.is_set():  # a compiler that let no other thread run
            logger.warning(text)


def announces(kernel: Any) -> Any:
    """A Triton kernel whose compilations are `announced`; a launch of a compiled kernel does nothing more than before.

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
