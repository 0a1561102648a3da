"""`keys` and `values` of a packed layer are decoded copies: they can be read, and editing them raises an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

NOT_STORED = (
    "{name} of a packed cache is a decoded copy, and a change of it would not reach what attention reads. Change keys "
    "and values before `cache.update(keys, values, layer)`, or change a tensor of your own: `.clone()`"
)
HARMLESS = ("requires_grad_", "share_memory_")


class DecodedCopy(torch.Tensor):
    """A tensor that cannot be changed in place, and neither can its views. Other results are ordinary tensors.

    Raises: RuntimeError for an operation that writes to the tensor or to a view of it.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(x, DecodedCopy) for x in tensors_in(_targets(func, args, kwargs))):
            raise RuntimeError(NOT_STORED.format(name="`keys` or `values`"))
        with torch._C.DisableTorchFunctionSubclass():
            read = {_memory(x) for x in tensors_in((args, kwargs)) if isinstance(x, DecodedCopy)}
            return _guarded(func(*args, **kwargs), read)

    def numpy(self, *, force: bool = False) -> Any:
        """An array that cannot be written to."""
        array = self.as_subclass(torch.Tensor).numpy(force=force)
        array.flags.writeable = False
        return array

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: int) -> Any:
        """A file holds an ordinary tensor, so that torch.load reads it without this package."""
        return self.clone().__reduce_ex__(protocol)


class DecodedProperty:
    """`keys` or `values` of a packed layer, as a `DecodedCopy`; None before the first update.

    Args:
        read: the layer's method that decodes.

    Raises: AttributeError if the property is assigned to.
    """

    def __init__(self, read: Callable[[Any], torch.Tensor | None]) -> None:
        self._read, self.__doc__ = read, read.__doc__

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        dense = self if layer is None else self._read(layer)
        if not isinstance(dense, torch.Tensor) or torch.compiler.is_compiling():
            return dense
        return dense.as_subclass(DecodedCopy)

    def __set__(self, layer: Any, value: Any) -> None:
        raise AttributeError(NOT_STORED.format(name=f"`{self._read.__name__}`"))


def _targets(func: Callable, args: tuple, kwargs: dict) -> tuple:
    """The arguments that a torch function writes to."""
    name = func.__name__
    if name.startswith("__"):
        augmented = name.startswith("__i") and hasattr(torch.Tensor, f"__{name[3:]}")  # __iand__, but not __iter__
        writes = augmented or name in ("__setitem__", "__set__")
    else:
        writes = name.endswith("_") and name not in HARMLESS
    if writes or _asks_in_place(func, args, kwargs):
        return kwargs.get("out"), args[0] if args else kwargs.get("input")
    return (kwargs.get("out"),)


def _asks_in_place(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a function such as torch.nn.functional.relu was given inplace=True, by name or by position."""
    if not inspect.isfunction(func):
        return False
    return bool(inspect.signature(func).bind(*args, **kwargs).arguments.get("inplace"))


def tensors_in(item: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, (list, tuple, dict)):
        for value in item.values() if isinstance(item, dict) else item:
            yield from tensors_in(value)


def _guarded(result: Any, read: set[int]) -> Any:
    """`result`, in which every tensor that shares memory with `read` is a `DecodedCopy`. read: addresses."""
    if isinstance(result, torch.Tensor):
        shares = result.layout is torch.strided and _memory(result) in read
        return result.as_subclass(DecodedCopy if shares else torch.Tensor)
    if type(result) in (tuple, list):
        return type(result)(_guarded(x, read) for x in result)
    return result


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
