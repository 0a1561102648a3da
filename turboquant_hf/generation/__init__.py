"""What drives decode steps: recorded graphs in place of the model's forward, for the length of `generate`'s loop."""

from turboquant_hf.generation.hook import register_steps

__all__ = ["register_steps"]
