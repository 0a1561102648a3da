"""`PackedHandle`: what `update` returns when the attention can read packed tiles, in place of the dense tensor.

The registered attention reads the layer behind the handle. Any other code that uses the handle gets the decoded tensor,
which is slower and never wrong.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from turboquant_hf.cache.sides import Side

if TYPE_CHECKING:
    from turboquant_hf.cache.layer import TurboQuantLayer


class PackedHandle:
    """The keys or values of one layer, [B, H, T, D], with the length that they had when the handle was made.

    Shape, dtype and device are known without decoding. `dense()` decodes, and so does every torch function, operator,
    index or unknown attribute.
    """

    def __init__(self, layer: TurboQuantLayer, side: Side) -> None:
        self.layer, self.side, self.length = layer, side, layer.width

    def dense(self) -> torch.Tensor:
        """The decoded tensor [B, H, T, D]."""
        return self.layer.dense(self.side)[:, :, : self.length]

    @property
    def shape(self) -> torch.Size:
        heads, dim = self.layer.num_heads, self.layer.head_dims.of(self.side)
        return torch.Size((self.layer.batch_size, heads, self.length, dim))

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.device

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The handle itself if nothing would change. Models that share keys and values between layers call this."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        target = probe.to(*args, **kwargs)
        if target.dtype == self.dtype and target.device == self.device:
            return self
        return self.dense().to(*args, **kwargs)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("layer", "side", "length", "new"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*tree_map(_densify, args), **tree_map(_densify, kwargs or {}))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.side}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"


def _densify(x: Any) -> Any:
    return x.dense() if isinstance(x, PackedHandle) else x


def _forward_operator(name: str) -> None:
    function = getattr(operator, name)
    setattr(PackedHandle, f"__{name}__", lambda self, other: function(self.dense(), _densify(other)))
    setattr(PackedHandle, f"__r{name}__", lambda self, other: function(_densify(other), self.dense()))


for _name in ("add", "sub", "mul", "truediv", "matmul"):
    _forward_operator(_name)
