"""Measures what a cache costs, in quality, memory and time.

- `commands/`: one file per subcommand of `turboquant-hf`: its flags, and what a run of it does.
- `harness/`: what commands share: run descriptions, output folders, models, texts, decoding, fidelity.
- `presets/`: what is known of a preset without a model: bits, bytes, widths.
- `tasks/`: the questions that models are asked: needles, retrieval tasks, LongBench.
- `metrics/`: how answers are scored, one file per metric.
- `rivals/`: other methods and other libraries' caches.
- `benchmark/`: speed and memory.
- `report/`: one page from the folders of finished runs.
- `labels.py`: words that every table and picture spells alike.

A room imports only what tests/test_imports.py allows it; reports import no experiment.
"""
