"""The lesson holds on small samples, and the sentences follow the figures."""

import json

import pytest

from turboquant_hf import cli
from turboquant_hf.evaluation.commands import qjl_lesson


def test_prod_has_no_bias_and_more_variance_than_the_unbiased_scale():
    rows = {(row["method"], row["bits"]): row for row in qjl_lesson.vector_errors([2, 3], 64, tokens=1024)}
    for bits in (2, 3):
        assert abs(rows["prod", bits]["bias"]) < 0.02 and abs(rows["mse, unbiased", bits]["bias"]) < 0.01
        assert rows["mse", bits]["bias"] < -0.02
        assert (
            rows["prod", bits]["variance"]
            > rows["prod, orthogonal", bits]["variance"]
            > rows["mse, unbiased", bits]["variance"]
        )


def test_more_sketch_rows_help_and_cost_more_than_wider_codes():
    rows = {row["method"]: row for row in qjl_lesson.sketch_sizes(64, tokens=1024)}
    assert rows["gaussian, 32 rows"]["error"] > rows["gaussian, 64 rows"]["error"] > rows["gaussian, 128 rows"]["error"]
    assert rows["orthogonal, 256 rows"]["real bits"] > rows["mse 5"]["real bits"]
    assert rows["orthogonal, 256 rows"]["error"] > rows["mse 5"]["error"]


def test_symmetric_estimator_is_the_noisier_where_most_keys_are():
    rows = {(row["estimator"], row["cosine"]): row for row in qjl_lesson.hamming_errors(64)}
    assert rows["symmetric", 0.0]["std"] > 1.2 * rows["asymmetric", 0.0]["std"]
    assert rows["asymmetric", 0.0]["std"] == pytest.approx((1.5708 / 64) ** 0.5, rel=0.1)
    assert abs(rows["asymmetric", 0.5]["bias"]) < 0.02


def test_softmax_amplifies_noise_with_the_spread_of_the_scores():
    rows = {row["method"]: row for row in qjl_lesson.softmax_errors([3], 64, tokens=256)}
    assert rows["prod"]["spread 4"] > rows["prod"]["spread 1"] > rows["mse"]["spread 1"]


def test_qjl_lesson_without_a_model_writes_findings(tmp_path, capsys):
    arguments = ["--windows", "0", "--head-dim", "32", "--bits", "2", "3", "--output", str(tmp_path)]
    assert cli.main(["qjl-lesson", *arguments]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["results"] == [] and len(metrics["findings"]) == 5
    assert (tmp_path / "findings.md").read_text().startswith("- At 3 bits")
    assert (tmp_path / "qjl_lesson.png").stat().st_size > 10_000


def test_findings_name_each_figures_method():
    vectors, sizes = qjl_lesson.vector_errors([2], 32, tokens=128), qjl_lesson.sketch_sizes(32, tokens=128)
    hamming, softmax = qjl_lesson.hamming_errors(32, pairs=16), qjl_lesson.softmax_errors([2], 32, tokens=64)
    kl = {f"{name} 2 (keys)": (i + 1) / 10 for i, name in enumerate(qjl_lesson.METHODS)}
    results = [{"preset": name, "kl": value} for name, value in {**kl, "old-turbo4": 0.6, "turbo4": 0.2}.items()]
    *_, keys, both = qjl_lesson.findings(vectors, sizes, hamming, softmax, results)
    assert keys == (
        "Model with 2-bit keys only: KL is 0.1000 for mse, 0.2000 (2.0x) for mse with the unbiased scale, "
        "0.3000 (3.0x) for prod and 0.4000 (4.0x) for prod with an orthogonal sketch."
    )
    assert both.endswith("0.6000 for old-turbo4, which has QJL, and 0.2000 for turbo4, which has not: 3.0 times less.")
