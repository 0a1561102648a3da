"""Encode and decode whole tiles of rotated, scaled and packed codes."""

from turboquant_hf.kernels.encode.reference import decode_tiles, encode_tiles, tile_mean

__all__ = ["decode_tiles", "encode_tiles", "tile_mean"]
