"""The quickstart on a tiny model: it prints a line per step with its time, true labels, and what to try next."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from turboquant_hf.evaluation.harness import models, texts

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def test_quickstart_says_what_it_does_and_what_is_next(tiny_folder, monkeypatch, capsys):
    load_model = models.load_model

    def load_tiny():
        model, tokenizer = load_model(tiny_folder)
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        return model, tokenizer

    monkeypatch.setattr(models, "load_model", load_tiny)
    monkeypatch.setattr(texts, "packaged_text", lambda: "All happy families are alike. " * 60)
    runpy.run_path(str(SCRIPTS / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    steps = re.findall(r"^Step (\d) of (\d): .+?^  done in \d+ s$", printed, flags=re.MULTILINE | re.DOTALL)
    assert steps == [("2", "4"), ("3", "4"), ("4", "4")]
    assert "Step 1 of 4: " in (SCRIPTS / "quickstart.sh").read_text()
    assert re.search(r"^uncompressed \(float32\) +\S+ +0 +1 +32 +32$", printed, flags=re.MULTILINE)
    last = printed[printed.rindex("done in") :]
    assert "Next: " in last and 'cache_implementation="turboquant"' in last and "turboquant-hf presets" in last
