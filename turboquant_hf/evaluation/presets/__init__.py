"""What is known of a preset without a model: its bits, its bytes, and presets of given widths."""
