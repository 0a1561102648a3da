"""Profiles of a model: what its queries, keys, values and output weights are like, as one map per head and side.

A file is safetensors. Its tensors are, for every packed layer n and side, float32:

    layers.n.keys.matrix     [H, D, D]    `primitives.rounding_map` of E[k k'] (centred by tile) and E[q q']
    layers.n.keys.energy     [H, D]       the energies of its channels
    layers.n.values.matrix, layers.n.values.energy     the same of E[v v'] and W_o' W_o

Its header holds the format's version, what of the model's configuration decides its keys and values, how the profile
was made, and a checksum of each of these and of the tensors.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from turboquant_hf.checks import check_file
from turboquant_hf.files import checksum, text_checksum, write_file
from turboquant_hf.primitives.memo import once
from turboquant_hf.quantizers.base import Quantizer
from turboquant_hf.quantizers.profiled import HeadMaps, profiled

FORMAT, VERSION = "turboquant-profile", 1
SIDES = ("keys", "values")


class Profile:
    """Maps of every packed layer of one model. It never changes: a copy is the same object.

    Args:
        model: the fields of the model's configuration that decide its keys and values, as plain data.
        layers: the maps of keys and of values of every packed layer, in order.
        about: how it was made, as plain data: for people.
        path: the file that it came from.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from turboquant_hf import Profile, make_profile
        >>> sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, intermediate_size=64, **sizes))
        >>> windows = torch.randint(100, (2, 1, 300)).unbind()
        >>> profile = make_profile(model, windows, note=lambda line: None)
        >>> profile.save("profile.safetensors")
        >>> len(Profile.load("profile.safetensors").layers)
        2
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        layers: tuple[tuple[HeadMaps, HeadMaps], ...],
        about: Mapping[str, Any] | None = None,
        path: Path | None = None,
    ) -> None:
        self.model, self.layers, self.about, self.path = dict(model), tuple(layers), dict(about or {}), path

    def quantizers(self, ordinal: int, keys: Quantizer, values: Quantizer) -> tuple[Quantizer, Quantizer]:
        """Those of packed layer `ordinal` with its maps, where they take them."""
        return profiled(keys, values, self.layers[ordinal])

    def check(self, model: Mapping[str, Any], layers: int) -> None:
        """Raise ValueError where this is not the profile of a model with these fields and so many packed layers."""
        for name in sorted({*self.model, *model}):
            if self.model.get(name) != model.get(name):
                raise ValueError(
                    f"{self.label} belongs to a model with {name}={self.model.get(name)!r} and does not serve this "
                    f"one; allowed: {name}={model.get(name)!r}. turboquant-hf profile makes one for this model"
                )
        if layers != len(self.layers):
            raise ValueError(
                f"{self.label} has {len(self.layers)} layers and does not serve this model; allowed: {layers}"
            )

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"profile={'of this process' if self.path is None else str(self.path)!r}"

    def save(self, path: str | Path) -> None:
        """Write the file, all or nothing.

        Raises:
            ValueError: `path` is a folder. OSError: the disk's own complaint.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"profile={str(path)!r} is not supported, because it is a folder; allowed: a file")
        content = {"model": self.model, "about": self.about, "layers": len(self.layers)}
        write_file(path, self.tensors(), content, FORMAT, str(VERSION))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the file, by name."""
        return {
            f"layers.{ordinal}.{side}.{name}": getattr(maps, name)
            for ordinal, layer in enumerate(self.layers)
            for side, maps in zip(SIDES, layer, strict=True)
            for name in ("matrix", "energy")
        }

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a file that `save` wrote; the same object as long as the file does not change.

        Raises:
            ValueError: the file is no profile, is damaged, or has another version; the message says which.
            FileNotFoundError: there is no such file.
        """
        path = check_file("profile", path, "a file that turboquant-hf profile wrote").resolve()
        seen = path.stat()
        return _read(path, seen.st_mtime_ns, seen.st_size)

    @cached_property
    def checksum(self) -> int:
        """Of all tensors."""
        total = 0
        for x in self.tensors().values():
            total = zlib.crc32(x.contiguous().numpy(), total)
        return total

    def __deepcopy__(self, memo: dict) -> Profile:
        return self

    def __repr__(self) -> str:
        kind = self.model.get("model_type", "model")
        return f"Profile({kind}, layers={len(self.layers)}, checksum={self.checksum:08x})"


@once(maxsize=4)
def _read(path: Path, changed: int, size: int) -> Profile:
    """The profile in a file of this time of change and size."""
    owner = f"profile={str(path)!r}"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{owner} is no profile: format={header.get('format')!r}; allowed: {FORMAT!r}")
            if header.get("version") != str(VERSION):
                raise ValueError(f"{owner}: version={header.get('version')!r} is not supported; allowed: '{VERSION}'")
            text = header.get("content", "")
            if header.get("checksum") != text_checksum(text):
                raise ValueError(f"{owner} is damaged: its header does not match its checksum")
            content = json.loads(text)
            tensors = {name: file.get_tensor(name).clone() for name in content["checksums"]}
        for name, x in tensors.items():
            if checksum(x) != content["checksums"][name]:
                raise ValueError(f"{owner} is damaged: {name} does not match its checksum")
        return Profile(content["model"], layers_of(tensors, content["layers"]), content["about"], path)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{owner} is damaged or no profile: {error}") from error


def layers_of(tensors: Mapping[str, torch.Tensor], count: int) -> tuple[tuple[HeadMaps, HeadMaps], ...]:
    """The maps in the tensors of `Profile.tensors`."""
    return tuple(
        tuple(HeadMaps(*(tensors[f"layers.{n}.{side}.{name}"] for name in ("matrix", "energy"))) for side in SIDES)
        for n in range(count)
    )
