"""Building blocks in plain torch: rotations, maps from moments, codebooks, trellis codes, bytes, polar transform."""

from __future__ import annotations

from .codebook import Codebook, distortion, grid, lloyd_max, nf4, polynomial, uniform
from .moments import rounding_error, rounding_map, shrunk
from .packing import WORD, pack, pack_words, packed_size, planes, unpack, unpack_words
from .polar import CircularCodebook, from_polar, polar_codebook, to_polar
from .rotation import hadamard_matrix, has_hadamard, head_rotations, rotation_matrix
from .trellis import SIXTEEN_STATES, Trellis
from .trellis_codes import trellis_code

__all__ = [
    "SIXTEEN_STATES",
    "WORD",
    "CircularCodebook",
    "Codebook",
    "Trellis",
    "distortion",
    "from_polar",
    "grid",
    "hadamard_matrix",
    "has_hadamard",
    "head_rotations",
    "lloyd_max",
    "nf4",
    "polynomial",
    "pack",
    "pack_words",
    "packed_size",
    "planes",
    "polar_codebook",
    "rotation_matrix",
    "rounding_error",
    "rounding_map",
    "shrunk",
    "to_polar",
    "trellis_code",
    "uniform",
    "unpack",
    "unpack_words",
]
