"""What can be computed about a preset without a model: its bits, its bytes, and presets of given widths."""
