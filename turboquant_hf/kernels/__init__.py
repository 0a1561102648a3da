"""The hot operations: tensors in, tensors out, each with a plain reference beside its fast versions."""
