"""Presets: the quantizers of a cache, and which of its tokens stay raw. They are read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from turboquant_hf.checks import check_file, check_keys, check_whole, guess, shown
from turboquant_hf.quantizers import QUANTIZERS, Quantizer
from turboquant_hf.quantizers.data import quantizer_data, quantizer_from, quantizer_label
from turboquant_hf.quantizers.layers import LayerOverride, layer_overrides, ordinals
from turboquant_hf.quantizers.profile import Profile
from turboquant_hf.quantizers.profiled import takes_profile
from turboquant_hf.resources import config_path

DEFAULT_PRESET = "k4v4"
BOUNDARY_VALUES = QUANTIZERS["mse"](bits=8, codebook="uniform", scale="norm-corrected", channel_major=True)
"""The quantizer of values in boundary layers, with 8 bits."""
AUTO = "auto"
"""The profile in the model's folder, if there is one."""
MOST_TOKENS = 131_072
"""The largest `tile`, `sinks`, `recent_window` and `min_statistics`: their room is allocated in advance."""


@dataclass(frozen=True)
class CachePreset:
    """Everything that decides what a cache stores.

    Attributes:
        name: the name that reports show.
        keys, values: the quantizers of the packed tiles.
        tile: tokens per tile (a multiple of 8).
        sinks: number of tokens at the start of each sequence that stay in the model's dtype.
        recent_window: number of newest tokens that stay in the model's dtype, at least. Up to `tile` - 1 more tokens
            wait there until their tile is full.
        min_statistics: tokens to see before the first encode, for quantizers that measure their input.
        boundary_layers: number of KV layers at each end that keep their values at 8 bits.
        sparse_v_threshold: the threshold below which GPU kernels skip the values of a tile. It applies to all attention
            probabilities of the tile, relative to the largest probability seen in their row. 0 turns it off.
        encode_first: encode new tokens before attention reads them, to measure the quantizers alone. Tokens that do not
            fill a tile yet are read through a trial encode. Only the recent window is then read raw. This is slower and
            less accurate.
        layers: overrides by KV-layer ordinal (packed layers counted from 0; negative numbers count from the end), or by
            a slice as text ("::2": every other layer). The last override that names a layer wins.
        profile: a profile of the model (`turboquant-hf profile`): a file's path, a `Profile`, "auto" for the one in the
            model's folder if there is one, or None. `conditioned` keys use it, and the `mse` values beside them.

    Example:
        >>> from turboquant_hf import CachePreset
        >>> preset = CachePreset(name="mine", keys={"quantizer": "uniform", "bits": 8}, recent_window=64)
        >>> preset.keys.bits, preset.values.name
        (8, 'mse')
        >>> CachePreset.from_dict(preset.to_dict()) == preset
        True
    """

    name: str = "custom"
    keys: Quantizer = field(default_factory=lambda: QUANTIZERS["conditioned"]())
    values: Quantizer = field(default_factory=lambda: QUANTIZERS["mse"](scale="norm-corrected", channel_major=True))
    tile: int = 128
    sinks: int = 4
    recent_window: int = 128
    min_statistics: int = 256
    boundary_layers: int = 0
    sparse_v_threshold: float = 0.0
    encode_first: bool = False
    layers: tuple[tuple[int | str, LayerOverride], ...] = ()
    profile: str | Path | Profile | None = AUTO
    _origin = None  # the preset that `with_overrides` changed

    def __post_init__(self) -> None:
        for name, low in (("tile", 8), ("sinks", 0), ("recent_window", 0), ("min_statistics", 0)):
            check_whole(name, getattr(self, name), low, MOST_TOKENS)
        check_whole("boundary_layers", self.boundary_layers, 0)
        if self.tile % 8:
            raise ValueError(f"tile={self.tile} is not supported; allowed: multiples of 8")
        if not isinstance(self.sparse_v_threshold, (int, float)) or not 0.0 <= self.sparse_v_threshold < 1.0:
            raise ValueError(f"sparse_v_threshold={shown(self.sparse_v_threshold)} is not supported; allowed: [0, 1)")
        if not isinstance(self.name, str):
            raise ValueError(f"name={shown(self.name)} is not supported; allowed: text")
        if not isinstance(self.encode_first, bool):
            raise ValueError(f"encode_first={shown(self.encode_first)} is not supported; allowed: true, false")
        if not (self.profile is None or (self.profile and isinstance(self.profile, (str, Path, Profile)))):
            raise ValueError(
                f"profile={shown(self.profile)} is not supported; allowed: a file's path, a Profile, {AUTO!r} or None"
            )
        for role in ("keys", "values"):
            if not isinstance(getattr(self, role), Quantizer):
                object.__setattr__(self, role, quantizer_from(getattr(self, role), role))
        object.__setattr__(self, "layers", layer_overrides(self.layers))

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of all fields. A preset file and the overrides of a cache may hold these."""
        return [f.name for f in fields(cls)]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CachePreset:
        """Build a preset from plain data.

        An entry "preset" (a name, a path or a mapping) is the base, and the other entries change it.

        Raises:
            ValueError: for an unknown or invalid entry; the message says what is allowed.

        Example:
            >>> from turboquant_hf import CachePreset
            >>> CachePreset.from_dict({"preset": "k4v4", "sinks": 8}).label
            'k4v4 with sinks=8'
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a preset is a mapping of fields, got {shown(data)}")
        if "preset" in data:
            return load_preset(data["preset"], **{key: value for key, value in data.items() if key != "preset"})
        check_keys("preset", data, cls.field_names())
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back, also through JSON or YAML."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["keys"], data["values"] = quantizer_data(self.keys), quantizer_data(self.values)
        data["layers"] = [
            [index, {role: quantizer_data(q) for role, q in vars(override).items() if q is not None}]
            for index, override in self.layers
        ]
        data["profile"] = self._profile_data()
        return data

    def _profile_data(self) -> str | None:
        path = self.profile.path if isinstance(self.profile, Profile) else self.profile
        if path is None and self.profile is not None:
            raise ValueError("profile: one that is in no file is not plain data; allowed: profile.save(path) first")
        return None if path is None else str(path)

    @classmethod
    def from_yaml(cls, path: str | Path) -> CachePreset:
        """Read a preset file. The default of its `name` is the name of the file.

        Raises:
            ValueError: the file does not hold a preset, or `path` is a folder or not a path.
            FileNotFoundError: there is no such file.
        """
        if isinstance(path, str) and path in preset_names() and not Path(path).exists():
            raise FileNotFoundError(f"path={path!r}: no such file; preset={path!r} names the shipped preset")
        path = check_file("path", path, "a YAML file")
        with path.open(encoding="utf-8") as file:
            try:
                data = yaml.safe_load(file)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(data, Mapping):
            raise ValueError(f"{path}: a preset file holds a mapping of fields, got {type(data).__name__}")
        return cls.from_dict({"name": path.stem, **data})

    def with_overrides(self, **overrides: Any) -> CachePreset:
        """A copy with some fields replaced; see `load_preset`. `keys` and `values` may be plain data, as in YAML."""
        check_keys("preset", overrides, self.field_names())
        changed = replace(self, **overrides)
        if "name" not in overrides:
            object.__setattr__(changed, "_origin", self._origin or self)
        return changed

    @property
    def label(self) -> str:
        """The name, and the fields that differ from the preset of that name: "k4v4 with values=lossless, sinks=8"."""
        base = self._origin or (load_preset(self.name) if self.name in preset_names() else self)
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(base, f.name)]
        changes = ", ".join(f"{name}={_described(getattr(self, name))}" for name in names)
        return f"{self.name} with {changes}" if changes else self.name

    def layer_quantizers(self, ordinal: int, num_layers: int) -> tuple[Quantizer, Quantizer]:
        """(key quantizer, value quantizer) of KV layer `ordinal`. An override has priority over the boundary rule."""
        keys, values = self.keys, self.values
        if min(ordinal, num_layers - 1 - ordinal) < self.boundary_layers:
            values = BOUNDARY_VALUES
        for which, override in self.layers:
            if ordinal in ordinals(which, num_layers):
                keys, values = override.keys or keys, override.values or values
        return keys, values

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError for an override of a layer that a model with `num_layers` packed layers does not have.

        A slice may be empty.
        """
        for which, _ in self.layers:
            if num_layers and not isinstance(which, str) and not ordinals(which, num_layers):
                raise ValueError(f"layers: {which} is not supported; allowed: the {num_layers} KV layers of this model")

    @property
    def first_encode(self) -> int:
        """The number of tokens at which the first tile is packed."""
        waits = self.keys.needs_statistics or self.values.needs_statistics
        if self.takes_profile and self.profile not in (None, AUTO):
            waits = False
        return max(self.recent_window + self.tile, self.min_statistics if waits else 0)

    @property
    def takes_profile(self) -> bool:
        """Whether some layer of a model may have a use for a profile."""
        return any(takes_profile(keys) for keys in (self.keys, *(x.keys for _, x in self.layers if x.keys)))

    def validate(self, head_dim: int) -> None:
        """Raise ValueError if a quantizer of this preset cannot serve `head_dim`."""
        quantizers = [self.keys, self.values]
        quantizers += [q for _, override in self.layers for q in (override.keys, override.values) if q is not None]
        for quantizer in quantizers:
            quantizer.validate(head_dim, self.tile)


def load_preset(preset: str | Path | Mapping[str, Any] | CachePreset, **overrides: Any) -> CachePreset:
    """A preset with some of its fields replaced.

    Args:
        preset: a shipped preset's name, the path of a YAML file, a mapping, or a `CachePreset`.
        **overrides: any field of `CachePreset`.

    Raises:
        ValueError: the name is not a shipped preset (the message lists them), or a field is unknown or invalid.
        FileNotFoundError: there is no such file.

    Example:
        >>> from turboquant_hf import load_preset
        >>> load_preset("k4v4", recent_window=64).label
        'k4v4 with recent_window=64'
    """
    if isinstance(preset, Mapping):
        preset = CachePreset.from_dict(preset)
    elif not isinstance(preset, CachePreset):
        if not isinstance(preset, (str, Path)):
            raise ValueError(
                f"preset={shown(preset)} is not supported; allowed: a name, a path, a mapping or a CachePreset"
            )
        path = Path(preset)
        if path.suffix not in (".yaml", ".yml"):
            path = config_path("cache", f"{preset}.yaml")
            if not path.is_file():
                raise ValueError(
                    f"preset={str(preset)!r} is not supported{guess(str(preset), preset_names())}; "
                    f"allowed: {', '.join(preset_names())}, or a path to a YAML file"
                )
        preset = CachePreset.from_yaml(check_file("preset", path, "a YAML file"))
    return preset.with_overrides(**overrides) if overrides else preset


def preset_names() -> list[str]:
    """The names of the shipped presets, sorted.

    Example:
        >>> from turboquant_hf import preset_names
        >>> "k4v4" in preset_names()
        True
    """
    return sorted(path.stem for path in config_path("cache").glob("*.yaml"))


def _described(value: Any) -> str:
    """A field's value for a label."""
    if isinstance(value, tuple):
        layers = (f"{index}: {_described(override)}" for index, override in value)
        return "{" + ", ".join(layers) + "}"
    if isinstance(value, LayerOverride):
        return ", ".join(f"{role}={_described(q)}" for role, q in vars(value).items() if q is not None)
    return quantizer_label(value) if isinstance(value, Quantizer) else repr(value)
