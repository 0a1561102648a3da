"""A hub id that cannot be had is told at once."""

import socket
import time

import pytest
from huggingface_hub import constants

from turboquant_hf.evaluation.harness import hub
from turboquant_hf.evaluation.harness.models import load_config


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setattr(hub, "getproxies", dict)


@pytest.fixture
def nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_a_hub_id_without_a_hub_is_one_sentence_at_once(offline, nobody_listens, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", nobody_listens)
    start = time.perf_counter()
    why = "HF_HUB_OFFLINE" if offline else f"{nobody_listens} cannot be reached"
    with pytest.raises(FileNotFoundError, match=f"model='nope/nope': .* not downloaded before, and {why}"):
        load_config("nope/nope")
    assert time.perf_counter() - start < 2


def test_a_path_that_is_not_there_is_no_hub_id():
    with pytest.raises(FileNotFoundError, match="'/no/such/folder': there is no such folder or file, and it is no hub"):
        load_config("/no/such/folder")


def test_a_hub_that_answers_is_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.check_reachable("nope/nope")
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    hub.check_reachable("nope/nope")


def test_what_was_downloaded_needs_no_hub(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.check_reachable("me/mine")
