"""Tensors in, tensors out: the hot operations, each with a plain reference beside its fast versions."""
