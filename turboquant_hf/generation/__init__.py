"""Decode steps as recorded graphs: they replace the model's forward while a loop of `generate` runs."""

from turboquant_hf.generation.hook import register_steps

__all__ = ["register_steps"]
