"""`turboquant-hf run`: programs that do not import this package run in this process."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DynamicCache

from turboquant_hf import TurboQuantCache, cli
from turboquant_hf.cache import defaults

SCRIPT = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)
options = json.loads(sys.argv[1])
output = LlamaForCausalLM(config).eval().generate(
    torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, do_sample=False, return_dict_in_generate=True, **options
)
cache = output.get("cache", output.get("past_key_values"))
preset = getattr(cache, "preset", None)
found = [type(cache).__name__, preset and preset.name, preset and preset.recent_window]
open(sys.argv[2], "w").write(json.dumps([found, __name__, sys.argv[3:]]))
"""


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """Restore what a program may change in its process."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    defaults.clear_cache_defaults()


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "client.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The lines that are logged once per process."""
    lines = []
    monkeypatch.setattr(defaults.logger, "warning_once", lines.append)
    return lines


def answer(tmp_path):
    return json.loads((tmp_path / "out").read_text())


def run(*words) -> int:
    return cli.main(["run", *map(str, words)])


NAMED = '{"cache_implementation": "turboquant"}'
OWN_PRESET = '{"cache_implementation": "turboquant", "cache_config": {"preset": "k8v4"}}'
OWN_WINDOW = '{"cache_implementation": "turboquant", "cache_config": {"recent_window": 32}}'


@pytest.mark.parametrize(
    ("options", "call", "expected"),
    [
        ([], NAMED, ["TurboQuantCache", "k4v4", 128]),
        ([], "{}", ["DynamicCache", None, None]),
        (["--preset", "k3v3"], NAMED, ["TurboQuantCache", "k3v3", 128]),
        (["--preset", "k3v3"], "{}", ["DynamicCache", None, None]),
        (["--preset", "k3v3", "--cache-config", "recent_window=64"], NAMED, ["TurboQuantCache", "k3v3", 64]),
        (["--preset", "k3v3", "--cache-config", "recent_window=64"], OWN_PRESET, ["TurboQuantCache", "k8v4", 128]),
        (["--preset", "k3v3", "--cache-config", "recent_window=64"], OWN_WINDOW, ["TurboQuantCache", "k3v3", 32]),
        (["--cache", "turboquant", "--preset", "k3v3"], "{}", ["TurboQuantCache", "k3v3", 128]),
        (["--cache", "turboquant_static"], "{}", ["TurboQuantStaticCache", "k4v4", 128]),
        (["--cache", "turboquant_static"], NAMED, ["TurboQuantCache", "k4v4", 128]),
        (["--cache", "turboquant"], '{"cache_implementation": "dynamic"}', ["DynamicCache", None, None]),
        (["--cache", "turboquant"], '{"use_cache": false}', ["NoneType", None, None]),
    ],
)
def test_a_call_gets_what_it_names_and_the_defaults_for_the_rest(script, tmp_path, said, options, call, expected):
    assert run(*options, script, call, tmp_path / "out") == 0
    assert answer(tmp_path)[0] == expected
    assert bool(said) == (expected[0] == "DynamicCache")


def test_arguments_behind_the_program_are_passed_to_it(script, tmp_path):
    words = ["--preset", "theirs", "--", "-m", "x", "--cache=theirs"]
    assert run("--", "python", script, NAMED, tmp_path / "out", *words) == 0
    assert answer(tmp_path) == [["TurboQuantCache", "k4v4", 128], "__main__", words]


def test_a_preset_file_is_found_from_another_folder(script, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("preset: k2v2\nname: own\n")
    monkeypatch.chdir(tmp_path)
    script.write_text(f"import os; os.chdir({str(script.parent.parent)!r})\n{SCRIPT}")
    assert run("--preset", "own.yaml", script, NAMED, tmp_path / "out") == 0
    assert answer(tmp_path)[0][1] == "own"


def test_modules_run_by_name(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["-m", "client"], ["python", "-m", "client"], [sys.executable, "-m", "client"]):
        assert run(*words, NAMED, tmp_path / "out", "last") == 0
        assert answer(tmp_path) == [["TurboQuantCache", "k4v4", 128], "__main__", ["last"]]
        (tmp_path / "out").unlink()


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3), (True, 1)])
def test_installed_commands_run_with_their_exit_status(monkeypatch, returned, status):
    seen = []

    class Point:
        @staticmethod
        def load():
            return lambda: seen.append(sys.argv) or returned

    monkeypatch.setattr(metadata, "entry_points", lambda group, name: [Point] if name == "client-of-tests" else [])
    assert run("client-of-tests", "--flag", "x") == status
    assert seen == [["client-of-tests", "--flag", "x"]]


def test_python_scripts_on_the_path_run(script, tmp_path, monkeypatch):
    command = tmp_path / "client-command"
    command.write_text(f"#!{sys.executable}\n{SCRIPT}")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("client-command", NAMED, tmp_path / "out") == 0
    assert answer(tmp_path)[0][0] == "TurboQuantCache"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND: nothing is not supported; allowed: a Python command, a Python file, or -m MODULE"),
        (["python", "-c", "print()"], "COMMAND: -c is not supported"),
        (["no-such-command"], "COMMAND: 'no-such-command' is not supported"),
        (["sh", "-c", "true"], "is not a Python program"),
        (["accelerate", "launch", "x.py"], "accelerate launch -m turboquant_hf.cli run"),
        (["--cache", "dynamic", "x"], "cache='dynamic' is not supported; allowed: turboquant, turboquant_static"),
        (["--preset", "k9v9", "x"], "preset='k9v9' is not supported"),
        (["--cache-config", "window", "x"], "cache-config='window' is not supported; allowed: KEY=VALUE"),
        (["--cache-config", "window=1", "x"], "unknown field 'window'=1"),
        (["--cache-config", "keys={", "x"], "allowed: KEY=VALUE, VALUE in YAML"),
    ],
)
def test_a_program_that_cannot_be_run_is_named_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "x.py").write_text("")
    words = [str(tmp_path / "x.py") if word == "x" else word for word in words]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_errors_of_the_program_are_shown_as_its_own(tmp_path, capsys):
    (tmp_path / "x.py").write_text("raise ValueError('their own')")
    assert run(tmp_path / "x.py") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "ValueError: their own" in error
    (tmp_path / "x.py").write_text("import sys; sys.exit(7)")
    with pytest.raises(SystemExit, match="7"):
        run(tmp_path / "x.py")


def test_options_without_effect_are_named_at_the_end(script, tmp_path, said, capsys):
    assert run("--preset", "k3v3", script, "{}", tmp_path / "out") == 0
    assert "client.py made no TurboQuant cache by generate" in capsys.readouterr().err
    assert run("--preset", "k3v3", script, NAMED, tmp_path / "out") == 0
    assert run(script, "{}", tmp_path / "out") == 0
    assert "made no TurboQuant cache" not in capsys.readouterr().err


def test_caches_of_the_caller_and_of_assistants_are_left_alone(llama, small_llama, said):
    defaults.set_cache_defaults("turboquant", preset="k3v3")
    prompt, made = torch.ones(1, 6, dtype=torch.long), []
    own = DynamicCache(config=llama.config)
    llama.generate(prompt, past_key_values=own, max_new_tokens=2)
    assert own.get_seq_length() >= 7
    assistant = small_llama(seed=1)
    forward = type(assistant).forward

    def spy(self, *args, **options):
        if self is assistant:
            made.append(type(options.get("cache", options.get("past_key_values"))))
        return forward(self, *args, **options)

    type(assistant).forward = spy
    try:
        output = llama.generate(
            prompt, assistant_model=assistant, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
    finally:
        type(assistant).forward = forward
    assert made and TurboQuantCache not in made
    assert isinstance(output.get("cache", output.get("past_key_values")), TurboQuantCache)


def test_continuous_batching_is_refused_where_the_cache_is_the_default(llama):
    defaults.set_cache_defaults("turboquant")
    with pytest.raises(ValueError, match="does not serve continuous batching"):
        llama.init_continuous_batching()
    defaults.clear_cache_defaults()
    llama.init_continuous_batching()


@pytest.mark.slow
def test_a_script_in_a_process_of_its_own(script, tmp_path):
    """Nothing has imported the package before. Without `run`, the script would end in an error."""
    root = Path(cli.__file__).parents[1]
    command = [sys.executable, "-m", "turboquant_hf.cli", "run", script, NAMED, tmp_path / "out"]
    subprocess.run(command, cwd=root, check=True)
    assert answer(tmp_path)[0] == ["TurboQuantCache", "k4v4", 128]
