"""The warning about numbers that a quantizer cannot store. They become NaN, and nothing else would say so."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers.utils import logging

from turboquant_hf.quantizers import Quantizer

logger = logging.get_logger(__name__)


def warn_of_nan(arrays: Iterable[torch.Tensor], quantizers: tuple[Quantizer, ...]) -> None:
    """Log a warning, once, if an array that was just stored or learned holds a NaN. Waits for the device."""
    flags = [x.isnan().any() for x in arrays if x.is_floating_point()]
    if flags and torch.stack(flags).any():
        names = "/".join(quantizer.name for quantizer in quantizers)
        logger.warning_once(
            f"The cache of a layer ({names}) was given keys or values that are NaN, infinite, or too large for its "
            "means and scales. Attention reads NaN for those heads until the cache is reset. "
            "preset='lossless' stores every number as it is."
        )
