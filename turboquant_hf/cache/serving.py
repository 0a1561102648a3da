"""Shows errors to the clients of a server, such as `transformers serve`, as one sentence.

A web server answers an unknown exception with "500 Internal Server Error", and the client never sees the message.
Starlette, on which FastAPI is built, sends the message of its own HTTPException to the client.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

BAD_REQUEST = 400
NO_CONTINUOUS_BATCHING = (
    '"turboquant" does not serve continuous batching (generate_batch, transformers serve --continuous-batching), which '
    "brings its own paged cache and attention; use generate or a server without that option, or "
    'cache_implementation=None and model.set_attn_implementation("sdpa").'
)


def answers_clients(function: Callable) -> Callable:
    """Log a ValueError of `function` and make it an answer to the client, if a web server may be running."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any):
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            answer = _as_answer(error)
            if answer is error:
                raise
            raise answer from error

    return call


def _as_answer(error: ValueError) -> ValueError:
    """The same ValueError, also an HTTPException if this process has loaded starlette."""
    starlette = sys.modules.get("starlette.exceptions")
    if starlette is None or isinstance(error, starlette.HTTPException):
        return error
    logger.error(f"turboquant_hf: {error}")
    return _answer_class(starlette.HTTPException)(str(error))


@functools.lru_cache(maxsize=1)
def _answer_class(http_exception: type[Exception]) -> type[ValueError]:
    class AnsweredValueError(ValueError, http_exception):
        def __init__(self, sentence: str) -> None:
            http_exception.__init__(self, BAD_REQUEST, sentence)

        def __str__(self) -> str:
            return self.detail

    return AnsweredValueError
