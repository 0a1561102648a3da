"""The model class for lm-evaluation-harness, compared with the harness's own, and a run of the command line."""

import json
import sys

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from turboquant_hf import cli, load_preset  # noqa: E402
from turboquant_hf.cache import defaults  # noqa: E402
from turboquant_hf.evaluation.harness.lm_eval import TurboQuantLM  # noqa: E402

CONTEXTS = ["a" * 7 + "bcd ", "The quick brown fox. " * 31, "xyzzy " * 109, "q"]
CONTINUATIONS = [" one", "B", " and a much longer continuation, " * 9, "C"]


def requests_of(kind: str, pairs) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def pairs():
    """Log-likelihood requests of unequal lengths; some differ in their last token alone, one has no context."""
    return [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS] + [("", "alone")]


@pytest.fixture(scope="module")
def plain(tiny_folder):
    return HFLM(str(tiny_folder), device="cpu", dtype="float32", batch_size=1)


def packed(folder, preset, **options) -> TurboQuantLM:
    return TurboQuantLM(str(folder), preset, device="cpu", dtype="float32", **options)


def test_the_harness_knows_the_model_by_name():
    assert get_model("turboquant") is TurboQuantLM


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_lossless_gives_the_likelihoods_of_the_uncompressed_model(tiny_folder, plain, pairs, batch_size):
    expected = plain.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    model = packed(tiny_folder, "lossless", recent_window=0, batch_size=batch_size)

    found = model.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)

    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([x for x, _ in found]), torch.tensor([x for x, _ in expected]), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lossless_gives_the_rolling_likelihoods_of_the_uncompressed_model(tiny_folder, batch_size):
    """Windows of 700 tokens: the first text takes three, the last is one token."""
    texts = [("Emma Woodhouse, handsome, clever, and rich. " * 41,), ("seven",), ("z" * 650,), ("y",)]
    plain = HFLM(str(tiny_folder), device="cpu", dtype="float32", batch_size=1, max_length=700)
    expected = plain.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts), disable_tqdm=True)
    model = packed(tiny_folder, "lossless", batch_size=batch_size, max_length=700)

    found = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts), disable_tqdm=True)

    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-3)


def test_a_coarse_preset_changes_the_likelihoods_of_long_texts(tiny_folder, pairs):
    long = requests_of("loglikelihood", [pairs[6]])
    fine, coarse = (
        packed(tiny_folder, name, recent_window=0).loglikelihood(long, disable_tqdm=True)[0][0]
        for name in ("lossless", "k2v2")
    )
    assert abs(fine - coarse) > 1e-2


def test_the_content_of_the_padding_changes_nothing(tiny_folder):
    """Rows of 420, 400 and 395 tokens in one batch, packed, and the padding of two different token ids."""
    texts = [("The other text. " * 40)[:length] for length in (419, 399, 394)]
    asked = requests_of("loglikelihood", [(text[:200], text[200:]) for text in texts])
    model = packed(tiny_folder, "k2v2", recent_window=0, batch_size=3)
    found = []
    for token in (0, 77):
        model.tokenizer.pad_token_id = token
        found.append(model.loglikelihood(asked, disable_tqdm=True))

    assert found[0] == found[1]
    assert model._scored_packed


def test_rows_of_a_batch_have_like_lengths(tiny_folder):
    """With more padding, the statistics that the whole batch waits for would have fewer tokens of a short row."""
    model = packed(tiny_folder, "k4v4", batch_size=3)
    lengths = (700, 690, 680, 679, 668, 600, 599)
    batches = model._batches([(1,) * length for length in lengths], None)
    assert [[len(row) for row in batch] for batch in batches] == [[700, 690, 680], [679, 668], [600, 599]]

    type(model.model)._is_stateful, kept = True, type(model.model)._is_stateful
    try:
        assert max(map(len, model._batches([(1,) * length for length in lengths], None))) == 1
    finally:
        type(model.model)._is_stateful = kept


def test_texts_too_short_to_be_packed_are_named(tiny_folder, pairs, monkeypatch):
    said = []
    monkeypatch.setattr("turboquant_hf.evaluation.harness.lm_eval.logger.warning", said.append)
    model = packed(tiny_folder, "k4v4")

    model.loglikelihood(requests_of("loglikelihood", pairs[:1]), disable_tqdm=True)
    assert len(said) == 1 and "0 of 5 scored tokens" in said[0] and "packs nothing before 256 tokens" in said[0]

    model.loglikelihood(requests_of("loglikelihood", [(CONTEXTS[1] + CONTEXTS[2], " end")]), disable_tqdm=True)
    assert len(said) == 1


def test_generation_goes_through_the_cache_too(tiny_folder, monkeypatch):
    made = []
    model = packed(tiny_folder, "k3v3", recent_window=64)
    generate = type(model.model).generate

    def spy(self, *args, **options):
        made.append((options["cache_implementation"], options["cache_config"]))
        return generate(self, *args, **options)

    monkeypatch.setattr(type(model.model), "generate", spy)
    asked = requests_of("generate_until", [("tell me ", {"until": ["\n"], "max_gen_toks": 4})])
    assert len(model.generate_until(asked, disable_tqdm=True)) == 1
    assert made == [("turboquant", {"preset": "k3v3", "recent_window": 64})]


def test_the_attention_is_switched_unless_it_is_named(tiny_folder):
    assert packed(tiny_folder, "k4v4").model.config._attn_implementation == "turboquant"
    model = packed(tiny_folder, load_preset("k4v4"), attn_implementation="sdpa")
    assert model.model.config._attn_implementation == "sdpa"
    asked = requests_of("generate_until", [("tell me ", {"until": ["\n"], "max_gen_toks": 4})])
    model.generate_until(asked, disable_tqdm=True)
    assert model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk=0"),
        ({"preset": "k9v9"}, "preset='k9v9'"),
        ({"preset": "k4v4", "peft": "an/adapter"}, "peft='an/adapter'"),
        ({"preset": "k4v4", "recent_window": -1}, "recent_window=-1"),
    ],
)
def test_invalid_options_are_named_in_the_error(tiny_folder, options, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantLM(str(tiny_folder), device="cpu", **options)


def test_a_model_that_is_not_packed_is_refused(tiny_folder, monkeypatch):
    monkeypatch.setattr("turboquant_hf.cache.TurboQuantCache.packed_layers", [])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer whose cache is packed"):
        packed(tiny_folder, "k4v4")


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: false}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with two tasks over two texts: `rolling` and `generating`; a process of its own."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": (word + " and so on, ") * 40}) + "\n" for word in ("one", "another")))
    rolling = {"name": "rolling", "kind": "loglikelihood_rolling", "metric": "bits_per_byte"}
    generating = {"name": "generating", "kind": "generate_until", "metric": "exact_match"}
    for task in (rolling | {"text": ""}, generating | {"text": "{{text}}"}):
        aggregation = "mean" if task["metric"] == "exact_match" else "bits_per_byte"
        (tmp_path / f"{task['name']}.yaml").write_text(TASK.format(data=data, aggregation=aggregation, **task))
    yield tmp_path
    defaults.clear_cache_defaults()


def harness(tasks, folder, model: str, task: str, run=()) -> dict:
    """The results of one run of the harness's command line under `turboquant-hf run`."""
    words = ["--tasks", task, "--include_path", str(tasks), "--device", "cpu", "--output_path", str(tasks / "out.json")]
    arguments = f"pretrained={folder},dtype=float32"
    assert cli.main(["run", *run, "lm_eval", "--model", model, "--model_args", arguments, *words]) == 0
    (written,) = tasks.glob("out_*.json")
    results = json.loads(written.read_text())
    written.unlink()
    return results


@pytest.mark.slow
def test_its_command_line_reads_log_likelihoods_through_the_cache(tasks, tiny_folder, capsys):
    def bits(model, *run):
        results = harness(tasks, tiny_folder, model, "rolling", run=run)
        return results["results"]["rolling"]["bits_per_byte,none"], results["config"].get("turboquant_preset")

    plain, _ = bits("hf", "--cache", "turboquant")
    assert "use --model turboquant" in capsys.readouterr().err  # one pass reads no cache
    coarse, name = bits("turboquant", "--preset", "k2v2", "--cache-config", "recent_window=0")
    assert name == "k2v2" and abs(coarse - plain) > 1e-3
    assert "use --model turboquant" not in capsys.readouterr().err


@pytest.mark.slow
def test_its_own_model_generates_with_the_cache_that_the_run_names(tasks, tiny_folder):
    harness(tasks, tiny_folder, "hf", "generating", run=["--cache", "turboquant", "--preset", "k3v3"])
    assert defaults.cache_defaults().calls == 2
