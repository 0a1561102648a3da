"""Safetensors files whose header describes and guards them: saved caches and profiles."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def checksum(x: torch.Tensor) -> int:
    """The CRC-32 of a CPU tensor's bytes, in the order of its elements."""
    return zlib.crc32(x.reshape(-1).view(torch.uint8).numpy())


def text_checksum(text: str) -> str:
    return str(zlib.crc32(text.encode()))


def write_file(
    path: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any], kind: str, version: str
) -> None:
    """Write tensors, with `content` and their checksums as JSON in the header.

    An older file stays whole until the new one is complete and on the disk.

    Args:
        kind, version: the header's "format" and "version".

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps({**content, "checksums": {name: checksum(x) for name, x in tensors.items()}})
    header = {"format": kind, "version": version, "content": text, "checksum": text_checksum(text)}
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(dict(tensors), scratch, metadata=header)
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
