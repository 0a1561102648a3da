"""Caches on disk: one safetensors file, its header's metadata in JSON.

The tensors are what each layer holds:

- a packed layer: tiles, tail, sinks and frozen statistics
- a layer of transformers (sliding window, recurrent state): its fields

The metadata holds the format's version, the preset, the fields of the model's configuration that decide its keys and
values, and a checksum of every tensor. Each packed layer also stores one token as it was decoded. Loading decodes that
token again. A version that reads the bytes by other rules therefore refuses the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from turboquant_hf.cache.hybrid import packed_part
from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.cache.sides import SIDES, Side
from turboquant_hf.checks import check_file, shown
from turboquant_hf.config import CachePreset
from turboquant_hf.files import checksum, text_checksum, write_file
from turboquant_hf.quantizers.profile import Profile, layers_of
from turboquant_hf.version import __version__

FORMAT, VERSIONS = "turboquant-cache", ("1", "2")
"""Version 2 is version 1 with the maps of a profile."""
MODEL_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "layer_types", "sliding_window", "attention_chunk_size", "kv_lora_rank", "num_kv_shared_layers",
    "rope_theta", "rope_parameters",
)  # fmt: skip
"""The fields of a model's configuration that decide its keys and values. Weights are not compared."""
WITNESS_ERROR = 0.02
"""The largest relative difference between a decoded token and the file's copy: devices round differently."""

Tensors = dict[str, torch.Tensor]


class CacheFileError(ValueError):
    """A file is not a saved cache, is damaged, or belongs to another model or version. The message says which.

    Example:
        >>> from pathlib import Path
        >>> from transformers import LlamaConfig
        >>> from turboquant_hf import CacheFileError, TurboQuantCache
        >>> _ = Path("broken.cache").write_text("not a cache")
        >>> try:
        ...     TurboQuantCache.load("broken.cache", LlamaConfig())
        ... except CacheFileError as error:
        ...     print(str(error).partition(":")[0])
        broken.cache is damaged or no saved cache
    """


def save_cache(cache, path: str | Path) -> None:
    """Write a `TurboQuantCache` to `path`, all or nothing: an older file stays whole until the new one is complete.

    Raises:
        CacheFileError: a layer holds something that cannot be written.
        ValueError: `path` is a folder, or not a path.
        OSError: the file cannot be written.
    """
    if not isinstance(path, (str, Path)) or Path(path).is_dir():
        raise ValueError(f"path={shown(path)} is not supported; allowed: the path of a file")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    tensors: Tensors = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        packed = packed_part(layer)
        raw = None if packed is layer else _describe_raw(layer, f"{index}.", tensors)
        described = None if packed is None else _describe_packed(packed, f"{index}.", tensors)
        layers.append({"kind": _kind(layer), "packed": described, "raw": raw})
    profile, preset = cache.profile, cache.preset.with_overrides(profile=None).to_dict()
    if profile is not None:
        tensors |= {f"profile.{name}": x for name, x in profile.tensors().items()}
    content = {
        "package": __version__,
        "transformers": transformers.__version__,
        "preset": {name: value for name, value in preset.items() if name != "profile"},
        "profile": profile and {"model": profile.model, "about": profile.about, "layers": len(profile.layers)},
        "model": cache.model_fields,
        "layers": layers,
    }
    write_file(path, tensors, content, FORMAT, VERSIONS[profile is not None])


def read_cache(path: str | Path, config: PreTrainedConfig) -> tuple[CachePreset, Callable[[Any, Any], None]]:
    """Read the header of a file.

    Returns:
        (preset, fill): the preset of the saved cache, and a function that fills a new cache of that preset. The call is
        fill(cache, device), where device is a device, {layer index: device}, or None for the devices that the layers
        were saved from. Only `fill` reads the tensors.

    Raises:
        CacheFileError: the file is not a saved cache, is damaged, or belongs to another model or version.
        FileNotFoundError: there is no such file.
    """
    with _reading(path) as file:
        header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise CacheFileError(f"{path} is no saved cache: format={header.get('format')!r}; allowed: {FORMAT!r}")
        if header.get("version") not in VERSIONS:
            raise CacheFileError(f"{path}: version={header.get('version')!r} is not supported; allowed: '1', '2'")
        text = header.get("content", "")
        if header.get("checksum") != text_checksum(text):
            raise CacheFileError(f"{path} is damaged: its metadata does not match its checksum")
        content = json.loads(text)
        preset = CachePreset.from_dict({**content["preset"], "profile": _read_profile(file, path, content)})
    mine, theirs = model_fields(config), content["model"]
    for name in MODEL_FIELDS:
        if mine.get(name) != theirs.get(name):
            raise CacheFileError(
                f"{path} belongs to a model with {name}={theirs.get(name)!r}, this one has {mine.get(name)!r}"
            )
    return preset, lambda cache, device: _fill(cache, path, content, device)


def model_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """`MODEL_FIELDS` of the part of a configuration that describes the decoder."""
    decoder = config.get_text_config(decoder=True)
    found = {name: config_field(decoder, name) for name in MODEL_FIELDS}
    return json.loads(json.dumps({name: value for name, value in found.items() if value is not None}, default=str))


def config_field(config: PreTrainedConfig, name: str) -> Any:
    """A field of a configuration. None if it has no such field, or if its layers differ in the field."""
    try:
        return getattr(config, name, None)
    except Exception as error:
        # Configs whose layers differ raise this error. Not every version has the class, so it is compared by name.
        if type(error).__name__ != "AmbiguousGlobalPerLayerAttributeError":
            raise
        return None


def _fill(cache, path: str | Path, content: dict[str, Any], device: Any) -> None:
    with _reading(path) as file:
        layers = content["layers"]
        if len(layers) != len(cache.layers):
            raise CacheFileError(f"{path} has {len(layers)} layers, this model {len(cache.layers)}")

        def read(name: str) -> torch.Tensor:
            return _tensor(file, name, path, content)

        for index, (layer, described) in enumerate(zip(cache.layers, layers, strict=True)):
            if _kind(layer) != described["kind"]:
                written = f"{described['kind']} (transformers {content['transformers']})"
                raise CacheFileError(f"{path}: layer {index} is a {written}, this model has a {_kind(layer)}")
            where = device.get(index) if isinstance(device, Mapping) else device
            packed = packed_part(layer)
            if packed is not None:
                _fill_packed(packed, described["packed"], f"{index}.", read, where)
            if packed is not layer:
                _fill_raw(layer, described["raw"], f"{index}.", read, where)


def _tensor(file: Any, name: str, path: str | Path, content: dict[str, Any]) -> torch.Tensor:
    # Files are memory-mapped: what stays must be a copy.
    x = file.get_tensor(name).clone()
    if checksum(x) != content["checksums"].get(name):
        raise CacheFileError(f"{path} is damaged: {name} does not match its checksum")
    return x


def _read_profile(file: Any, path: str | Path, content: dict[str, Any]) -> Profile | None:
    """The profile that the file's tiles were encoded with."""
    described = content.get("profile")
    if described is None:
        return None
    names = [name for name in content["checksums"] if name.startswith("profile.")]
    tensors = {name.removeprefix("profile."): _tensor(file, name, path, content) for name in names}
    return Profile(described["model"], layers_of(tensors, described["layers"]), described["about"])


def _kind(layer: Any) -> str:
    return TurboQuantLayer.__name__ if isinstance(layer, TurboQuantLayer) else type(layer).__name__


@contextmanager
def _reading(path: str | Path) -> Iterator[Any]:
    """Open a file. Any error in its content becomes a CacheFileError."""
    check_file("path", path, "a saved cache")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except CacheFileError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CacheFileError(f"{path} is damaged or no saved cache: {type(error).__name__}: {error}") from error


def _put(tensors: Tensors, name: str, x: torch.Tensor) -> str:
    x = x.detach()
    tensors[name] = x.cpu().contiguous() if x.device.type != "cpu" else x.clone(memory_format=torch.contiguous_format)
    return name


# ---------------------------------------------------------------------- packed layers


def _describe_packed(layer: TurboQuantLayer, prefix: str, tensors: Tensors) -> dict[str, Any]:
    described, arrays = layer.export()
    if described.get("tiles"):
        arrays |= {f"witness.{number}": _witness(layer, side) for number, side in enumerate(SIDES)}
    for name, x in arrays.items():
        _put(tensors, prefix + name, x)
    return described


def _witness(layer: TurboQuantLayer, side: Side) -> torch.Tensor:
    """The first token of the newest tile, [B, H, D] float32."""
    count = layer.tiles.of(side).count
    return layer.decode(side, count - 1, count)[:, :, 0].float()


def _fill_packed(layer: TurboQuantLayer, described: dict, prefix: str, read: Callable, device: Any) -> None:
    if not described["filled"]:
        layer.note_padding(described["noted"])
        return
    device = torch.device(described["device"] if device is None else device)

    def take(name: str, shape: tuple[int, ...] | None = None, kind: torch.dtype | None = None) -> torch.Tensor:
        x = read(prefix + name)
        if (shape is not None and tuple(x.shape) != shape) or (kind is not None and x.dtype != kind):
            raise CacheFileError(f"{prefix}{name}: {x.dtype} {list(x.shape)} is not {kind} {list(shape)}")
        return x.to(device)

    layer.restore(described, take, device)
    for number, side in enumerate(SIDES if described["tiles"] else ()):
        got = _witness(layer, side)
        expected = take(f"witness.{number}", tuple(got.shape), torch.float32)
        scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max() if expected.numel() else 0.0
        if not torch.allclose(got, expected, rtol=0.0, atol=float(WITNESS_ERROR * scale), equal_nan=True):
            name = layer.quantizers.of(side).name
            raise CacheFileError(f"layer {prefix[:-1]} was written by rules for {name} that this version does not read")


# ---------------------------------------------------------------------- layers of transformers


def _describe_raw(layer: Any, prefix: str, tensors: Tensors) -> dict[str, Any]:
    try:
        return {name: _plain(value, f"{prefix}raw.{name}", tensors) for name, value in _raw_fields(layer).items()}
    except TypeError as error:
        raise CacheFileError(f"layer {prefix[:-1]}, a {type(layer).__name__}, cannot be saved: {error}") from error


def _raw_fields(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if not isinstance(value, TurboQuantLayer)}


def _plain(value: Any, name: str, tensors: Tensors) -> Any:
    """JSON for a field of a transformers layer: tensors by name, containers and torch's types as [kind, content]."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return ["tensor", _put(tensors, name, value), str(value.device)]
    if isinstance(value, (torch.device, torch.dtype)):
        return [type(value).__name__, str(value).removeprefix("torch.")]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [_plain(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]]
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return ["dict", [[key, _plain(item, f"{name}.{key}", tensors)] for key, item in value.items()]]
    raise TypeError(f"{name.split('.')[-1]} is a {type(value).__name__}")


def _fill_raw(layer: Any, described: dict, prefix: str, read: Callable, device: Any) -> None:
    missing = _raw_fields(layer).keys() - described.keys()
    odd = [name for name in described if callable(getattr(type(layer), name, None))]
    if missing or odd:
        raise CacheFileError(f"layer {prefix[:-1]}: a {type(layer).__name__} has other fields: {*missing, *odd}")

    def value(item: Any) -> Any:
        if not isinstance(item, list):
            return item
        kind, content, *saved = item
        if kind == "tensor":
            return read(content).to(saved[0] if device is None else device)
        if kind == "device":
            return torch.device(content if device is None else device)
        if kind == "dtype":
            return getattr(torch, content)
        if kind == "dict":
            return {key: value(entry) for key, entry in content}
        return {"list": list, "tuple": tuple}[kind](value(entry) for entry in content)

    vars(layer).update({name: value(item) for name, item in described.items()})
