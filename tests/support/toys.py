"""The toy model and cells of the benchmark's tests."""

import torch

from turboquant_hf.evaluation.benchmark import settings

CPU = torch.device("cpu")
TOY = settings.Shape("toy", hidden=64, heads=4, kv_heads=2, head_dim=32, intermediate=96, vocab=50)
PRESET = "paper-mse-4"


def toy(**options) -> settings.Group:
    defaults = {"shape": TOY, "dtype": "float32", "presets": (PRESET,), "layers": 2, "cells": ((1, 384),)}
    return settings.Group(**{**defaults, **options})
