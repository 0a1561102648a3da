"""Model classes for evaluation harnesses of others. Each module imports its harness, which is not a dependency."""
