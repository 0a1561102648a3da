"""What evaluations share: run descriptions and folders, models and texts, decoding and fidelity through a cache.

`lm_eval.py` is the model class for another harness, EleutherAI's lm-evaluation-harness.
"""
