"""`Profiled`: replaces `conditioned` keys and `mse` values if the model has a profile. It applies a known map per head.

- The map is linear (`primitives.moments`). It decorrelates the channels and sorts them by importance.
- Groups, rotations, codebooks and scales are those of the quantizer that is replaced.
- Nothing is learned from the tokens. So no tile waits for statistics, and equal tokens become equal bytes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from turboquant_hf.kernels.statistics import power_of_two
from turboquant_hf.quantizers.base import Quantizer, State
from turboquant_hf.quantizers.conditioned import Conditioned
from turboquant_hf.quantizers.mse import MSE
from turboquant_hf.quantizers.rotated import RotatedQuantizer, block_rotation


class HeadMaps:
    """The maps of one side of one layer. Two objects are never equal, and a copy is the same object.

    Args:
        matrix: float32 [H, D, D] on the CPU, A of `primitives.rounding_map` for each KV head.
        energy: float32 [H, D], the energies of the channels of A x, in descending order.
    """

    def __init__(self, matrix: torch.Tensor, energy: torch.Tensor) -> None:
        self.matrix, self.energy = matrix, energy
        self._made: dict[Any, Any] = {}
        self._lock = threading.Lock()

    @property
    def heads(self) -> int:
        return self.matrix.shape[0]

    @property
    def head_dim(self) -> int:
        return self.matrix.shape[1]

    def turned(self, quantizer: Profiled, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, B^-T, balance): a vector x is coded as B (balance * x), with unit energy in every group of channels.

        All layers and caches get the same tensors, because kernels keep the tables that they make of a tensor. The
        balance consists of powers of two and brings the channels of x near 1.

        Returns: float32 [1, H, D, D], [1, H, D, D] and [1, H, D].
        """
        what = quantizer.sizes, quantizer.rotation, quantizer.rounds, quantizer.seed, quantizer.centered, str(device)
        with self._lock:
            if what not in self._made:
                self._made[what] = self._turn(quantizer, device)
            return self._made[what]

    @torch.inference_mode(False)
    def _turn(self, quantizer: Profiled, device: torch.device) -> tuple[torch.Tensor, ...]:
        matrix, energy = self.matrix.double(), self.energy.double()
        inverse = torch.linalg.inv(matrix)
        parts = energy.split([size for size, _ in quantizer.sizes], dim=-1)
        level = torch.cat([part.mean(-1, keepdim=True).expand_as(part) for part in parts], dim=-1).sqrt().unsqueeze(-1)
        rotation = block_rotation(quantizer.sizes, quantizer.rotation, quantizer.rounds, quantizer.seed, 0).double()
        balance = torch.ones_like(energy)
        if quantizer.centered:  # a vector without a mean is multiplied by the matrix as it comes, without a balance
            balance = power_of_two(1.0 / (inverse.square() @ energy.unsqueeze(-1)).squeeze(-1).sqrt())
        forward = rotation @ (matrix / level) / balance.unsqueeze(-2)
        dual = rotation @ (inverse.transpose(-1, -2) * level) * balance.unsqueeze(-2)
        return tuple(x.float()[None].contiguous().to(device) for x in (forward, dual, balance))

    def __deepcopy__(self, memo: dict) -> HeadMaps:
        return self

    def __reduce__(self):
        return HeadMaps, (self.matrix, self.energy)

    def __repr__(self) -> str:
        return f"HeadMaps(heads={self.heads}, head_dim={self.head_dim})"


@dataclass(frozen=True)
class Profiled(RotatedQuantizer):
    """A quantizer with the maps of a profile; see `profiled`.

    Attributes:
        sizes: (channels, bits) of every group.
        center: keep the mean of every tile (fp16) and code the rest.
        maps: of this side of this layer.
    """

    name: ClassVar[str] = "profiled"
    sizes: tuple[tuple[int, int], ...] = ()
    center: bool = False
    maps: HeadMaps | None = None

    @property
    def kind(self) -> Hashable:
        return replace(self, maps=None), weakref.ref(self.maps)

    def group_sizes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        return self.sizes

    @property
    def centered(self) -> bool:
        return self.center

    def validate(self, head_dim: int, tile: int) -> None:
        if head_dim != self.maps.head_dim:
            raise ValueError(
                f"profile: head_dim={head_dim} is not supported; allowed: {self.maps.head_dim}, as in the profile"
            )
        super().validate(head_dim, tile)

    def shared_nbytes(self, head_dim: int) -> int:
        """The map and its inverse, which all caches of a model share."""
        return 2 * self.maps.heads * head_dim * head_dim * 4

    def rotation_of(self, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        return self._turned(num_heads, device)[0]

    def dual_of(self, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        return self._turned(num_heads, device)[1]

    def signs_of(self, head_dim: int, num_heads: int, device: torch.device) -> None:
        return None

    def transform(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        forward, _, balance = self._turned(num_heads, device)
        return forward * balance.unsqueeze(-2)

    def inverse(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        _, dual, balance = self._turned(num_heads, device)
        return (dual / balance.unsqueeze(-2)).transpose(-1, -2)

    def fit(
        self,
        tiles: torch.Tensor,
        weight: torch.Tensor,
        query_rms: torch.Tensor | None,
        *,
        flag: torch.Tensor | None = None,
    ) -> State:
        """A state that does not depend on the tiles.

        Centred vectors get the balance of their map. Others get a gain of 1: a head with NaN or infinity needs a place
        where `Encoder.encode` can mark it.
        """
        batch, device = tiles.shape[0], tiles.device
        if self.center:
            return {"balance": self._turned(self.maps.heads, device)[2].expand(batch, -1, -1).contiguous()}
        return {"gain": torch.ones(tiles.shape[:2], dtype=torch.float32, device=device)}

    def _turned(self, num_heads: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        if num_heads != self.maps.heads:
            raise ValueError(
                f"profile: {num_heads} KV heads are not supported; allowed: {self.maps.heads}, as in the profile "
                "(under tensor parallelism a process has a part of them: use no profile there)"
            )
        return self.maps.turned(self, device)


def profiled(keys: Quantizer, values: Quantizer, maps: tuple[HeadMaps, HeadMaps]) -> tuple[Quantizer, Quantizer]:
    """The quantizers of a layer with the maps of its keys and values, where they take them.

    `conditioned` keys with balance "query" do, and `mse` values beside them. Others are left as they are.
    """
    if not takes_profile(keys):
        return keys, values
    return _with_maps(keys, maps[0]), _with_maps(values, maps[1]) if isinstance(values, MSE) else values


def takes_profile(keys: Quantizer) -> bool:
    """Whether keys of this kind, and the values beside them, have a use for a profile."""
    return isinstance(keys, Conditioned) and keys.balance == "query"


def _with_maps(quantizer: RotatedQuantizer, maps: HeadMaps) -> Profiled:
    options = {field.name: getattr(quantizer, field.name) for field in fields(RotatedQuantizer)}
    sizes = quantizer.group_sizes(maps.head_dim)
    return Profiled(**options, sizes=sizes, center=quantizer.centered, maps=maps)
