"""Encoding whole tiles (rotate, scale, round, pack), and decoding them to vectors."""

from turboquant_hf.kernels.encode.reference import decode_tiles, encode_tiles

__all__ = ["decode_tiles", "encode_tiles"]
