"""What the commands share: run descriptions and folders, models and texts, decoding and fidelity through a cache.

`lm_eval.py` is a model class for EleutherAI's lm-evaluation-harness.
"""
