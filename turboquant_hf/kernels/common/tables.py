"""Codebooks as tables on a device, one per list of groups. `GroupSpec.table` says where a group's entries start."""

from __future__ import annotations

from itertools import pairwise

import torch

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.primitives.memo import once


@once(maxsize=256)
@torch.inference_mode(False)
def level_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """The levels of all groups one after the other, float32."""
    return torch.cat([group.codebook.tensor() for group in groups]).to(device)


@once(maxsize=256)
@torch.inference_mode(False)
def threshold_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """The thresholds of all groups, each followed by one +inf, so that offsets are those of the levels.

    A trellis has the thresholds of its four subsets one after the other, each followed by +inf.
    """
    rows = []
    for group in groups:
        levels = group.codebook.levels
        for part in [levels[subset::4] for subset in range(4)] if group.in_words else [levels]:
            edges = ((low + high) / 2 for low, high in pairwise(part))
            rows.append(torch.tensor((*edges, float("inf")), dtype=torch.float32))
    return torch.cat(rows).to(device)


@once(maxsize=256)
@torch.inference_mode(False)
def pair_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """int32, offsets as in `level_table`: the level of each code and of the next, as two halves in the codebook's unit.

    A codebook without a unit has zeros. The threshold lies halfway between the two levels, so one load is enough to
    decide between two codes.
    """
    rows = []
    for group in groups:
        steps = group.codebook.tensor() / (group.codebook.unit or torch.inf)
        rows.append(torch.stack([steps, steps.roll(-1)], dim=1).half().view(torch.int32)[:, 0])
    return torch.cat(rows).to(device)
