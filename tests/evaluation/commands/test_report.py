"""The page: what it reads, what it shows, what it escapes."""

import json
import re
from datetime import date

import pytest

from turboquant_hf import cli
from turboquant_hf.evaluation.harness.environment import write_environment
from turboquant_hf.version import __version__


def write(folder, metrics):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def runs(tmp_path):
    common = {"top1": 0.9, "perplexity": 9.0}
    write(
        tmp_path / "runs" / "perplexity",
        {
            "model": "tiny <llama>", "text": "topics", "context": 512, "windows": 1, "baseline": {"perplexity": 8.5},
            "results": [
                {"preset": "a", "kl": 0.01, "key_bits": 4.25, "value_bits": 4.25, "compression_ratio": 3.7, **common},
                {"preset": "b", "kl": 0.05, "key_bits": 3.25, "value_bits": 3.25, "compression_ratio": 4.6, **common},
                {"preset": "c", "kl": 0.06, "key_bits": 4.5, "value_bits": 4.5, "compression_ratio": 3.5, **common},
            ],
        },
    )  # fmt: skip
    needle = [
        {"preset": p, "style": "number", "length": n, "depth": d, "accuracy": a, "nll": 0.1}
        for p, a in (("baseline", 1.0), ("a", 0.5)) for n in (512, 1024) for d in (0.0, 1.0)
    ]  # fmt: skip
    write(tmp_path / "runs" / "needle", {"results": needle})
    cell = {"level": "model", "shape": "llama", "dtype": "bfloat16", "batch": 1, "cache": "TurboQuantCache"}
    speed = [
        {**cell, "tokens": 4096, "preset": "a", "ms": 5.0, "memory_saved": 3.1, "ratio_to_fp16": 1.2},
        {**cell, "tokens": 32768, "preset": "a", "ms": 6.0, "memory_saved": 3.6, "ratio_to_fp16": 0.8},
        {**cell, "tokens": 32768, "cache": "DynamicCache", "preset": None, "ms": 7.5},
        {**cell, "level": "kernel", "tokens": 4096, "backend": "triton", "preset": "a", "reason": "no GPU | here"},
    ]
    write(tmp_path / "runs" / "speed", {"tool": "benchmark", "device": "a card", "results": speed})
    write(tmp_path / "runs" / "lesson", {"tool": "lesson", "findings": ["prod loses"], "results": []})
    (tmp_path / "runs" / "lesson" / "figure.png").write_bytes(b"\x89PNG made up")
    return tmp_path


def test_report_is_one_page_without_anything_outside_it(runs):
    assert cli.main(["report", str(runs / "runs"), "--output", str(runs / "out")]) == 0
    page = (runs / "out" / "report.html").read_text()
    assert "tiny &lt;llama&gt;" in page and "prod loses" in page and "a card" in page
    # Pareto plot, needle heatmaps, the lesson's own picture
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 3
    assert not re.findall(r'(?:src|href)="(?!data:|#s\d)', page)
    titles = re.findall(r"<h2 id=.*?>(.*?)</h2>", page)
    assert titles == ["Summary", "benchmark (speed)", "perplexity", "needle", "lesson"]


def test_report_says_with_what_a_run_was_made_and_shows_pictures_before_tables(runs):
    folder = runs / "runs" / "perplexity"
    write_environment(folder, "cpu")
    (folder / "config.yaml").write_text("dtype: bfloat16\nrecent_window: 64\n")
    cli.main(["report", str(runs / "runs"), "--output", str(runs / "out")])
    text, page = ((runs / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    line = next(line for line in text.splitlines() if line.startswith("date: "))
    versions = (f"turboquant_hf {__version__}", "transformers ", "torch ")
    for part in (date.today().isoformat(), "hardware: CPU (", *versions):
        assert part in line
    assert "dtype: bfloat16" in line and "recent window: 64 tokens" in line
    needle = page.split(">needle</h2>")[1]
    assert needle.index("<img") < needle.index("<table"), "the picture first"
    assert "uncompressed" in needle and "baseline" not in needle, "one name, also for older runs"


def test_a_report_names_the_recent_windows_where_they_differ(tmp_path):
    row = {"preset": "a", "kl": 0.1, "key_bits": 4.0, "value_bits": 4.0, "compression_ratio": 3.0, "perplexity": 9.0}
    write(tmp_path / "run", {"results": [{**row, "top1": 0.9}], "dtype": "float32", "recent_windows": {"a": 0, "b": 7}})
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "dtype: float32; recent window: a 0, b 7" in (tmp_path / "out" / "report.md").read_text()


def test_report_merges_the_runs_of_a_preset_into_its_summary(runs):
    cli.main(["report", str(runs / "runs"), "--output", str(runs / "out")])
    text = (runs / "out" / "report.md").read_text()
    header, row = (next(line for line in text.splitlines() if line.startswith(start)) for start in ("| preset", "| a "))
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["needles found"] == "0.5" and cells["KL"] == "0.01"
    assert (cells["memory held, times less"], cells["step time / uncompressed |"]) == ("3.6", "0.8 |"), (
        "of the largest cell"
    )
    assert "Pareto front, fewest bits first: b, a." in text


def test_report_shows_what_a_benchmark_measured_level_by_level(runs):
    cli.main(["report", str(runs / "runs"), "--output", str(runs / "out")])
    text = (runs / "out" / "report.md").read_text()
    assert (
        "*One decode step of a model with random weights*\n\n| model | dtype | batch | tokens | cache | preset | ms |"
        in text
    )
    assert "| llama | bfloat16 | 1 | 32,768 | DynamicCache |  | 7.5 |" in text
    assert "no GPU \\| here" in text


def test_report_shows_thresholds_of_sparse_v_and_the_timed_layer(tmp_path):
    rows = [{"threshold": 0.001, "unread": 0.37, "kl": 0.003, "kl_added": 0.002, "top1": 0.95}]
    layer = [{"threshold": 1e-05, "unread": 0.5, "us": 48.1, "error": 0.0016, "times faster": 1.17}]
    write(tmp_path / "run", {"tool": "sparse-v", "preset": "k4v4", "results": rows, "layer": layer})
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 0.001 | 0.37 |" in text and "| 0.5 | 48.1 |" in text


def test_report_computes_the_memory_of_shipped_presets(tmp_path):
    row = {"preset": "k4v4", "kl": 0.01, "key_bits": 4.4, "value_bits": 4.1, "compression_ratio": 3.7}
    write(tmp_path / "run", {"results": [{**row, "perplexity": 9.0, "top1": 0.9}, {**row, "preset": "other"}]})
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    memory = text.split("## Memory")[1].split("##")[0]
    assert "| preset | 512 | 2k | 8k | 32k | 128k |" in memory and "other" not in memory
    assert "| k4v4 | 1.24x (2.17x) | 2.49x (3.18x) | 3.25x (3.60x) | 3.50x (3.72x) |" in memory
    assert "the room allocated ahead included" in memory


def test_report_says_where_nothing_was_found(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no metrics.json under" in capsys.readouterr().err


def test_the_summary_holds_presets_of_one_model_and_no_toys(tmp_path):
    """More rows of an experiment, a CPU's benchmark, and another model's runs stay in their own sections."""
    row = {"kl": 0.01, "key_bits": 4.4, "value_bits": 4.1, "compression_ratio": 3.7, "perplexity": 9.0, "top1": 0.9}
    write(tmp_path / "ppl", {"tool": "perplexity", "model": "m", "results": [{"preset": "k4v4", **row}]})
    lesson = [{"preset": f"prod {n}", **row, "kl": 0.2} for n in range(4)]
    write(tmp_path / "qjl", {"tool": "qjl-lesson", "model": "m", "results": lesson})
    write(
        tmp_path / "base", {"tool": "baselines", "model": "m", "results": [{"preset": f"b{n}", **row} for n in (1, 2)]}
    )
    cell = {"level": "model", "batch": 1, "tokens": 64, "preset": "k4v4", "memory_saved": 5.3, "ratio_to_fp16": 4.4}
    write(tmp_path / "speed", {"tool": "benchmark", "device": "CPU (x86_64, 2 threads)", "results": [cell]})
    other = [{"preset": "k4v4", "style": "number", "length": 512, "depth": 0.0, "accuracy": 0.25, "nll": 1.0}]
    write(tmp_path / "needle", {"model": "another", "results": other})
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    summary = text.split("## Summary")[1].split("\n## ")[0]
    assert "those of ppl" in summary and "Of m; runs of other models are only below: needle." in summary
    assert not any(word in summary for word in ("prod", "memory held", "needles found")) and "| b1 |" not in summary


def test_a_report_says_where_a_cache_takes_more_than_16_bit(tmp_path):
    row = {"preset": "lossless", "kl": 0.01, "key_bits": 16, "value_bits": 16, "compression_ratio": 1.0}
    write(tmp_path / "run", {"tool": "perplexity", "results": [{**row, "perplexity": 9.0, "top1": 0.9}]})
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    memory = (tmp_path / "out" / "report.md").read_text().split("## Memory")[1]
    assert "| lossless | 0.65x: larger than 16 bit (0.99x) |" in memory


def test_a_report_lays_a_run_out_by_the_command_that_wrote_it(tmp_path):
    """The run's own command decides, even if its rows look like those of another command."""
    rows = [{"task": "a", "score": 1.0, "preset": "uncompressed", "kl": 0.5}]
    write(tmp_path / "run", {"tool": "some-tool", "results": rows})
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## some-tool (run)" in text and "| task | score | preset | kl |" in text and "## Summary" not in text


def test_the_uncompressed_label_names_the_dtype_of_its_run(tmp_path):
    rows = [{"preset": p, "task": "t", "length": 9, "score": 1.0} for p in ("uncompressed", "k4v4")]
    write(tmp_path / "run", {"tool": "retrieval", "results": rows})
    (tmp_path / "run" / "config.yaml").write_text("dtype: float32\n")
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("| uncompressed (float32) |") == 2 and "| uncompressed |" not in text
