"""What models are asked: prompts with hidden facts, retrieval tasks, LongBench."""
