"""Encode and decode whole tiles of rotated, scaled and packed codes."""

from turboquant_hf.kernels.encode.reference import bad_heads, decode_tiles, encode_tiles, tile_mean

__all__ = ["bad_heads", "decode_tiles", "encode_tiles", "tile_mean"]
