"""Errors for the clients of a web server, with a stand-in for starlette's exception."""

import sys
import types

import pytest
import torch

from turboquant_hf.cache import serving


class HTTPException(Exception):
    """A stand-in for starlette's exception, from which its middleware makes an answer."""

    def __init__(self, status_code, detail=None, headers=None):
        self.status_code, self.detail, self.headers = status_code, detail, headers

    def __str__(self):
        return f"{self.status_code}: {self.detail}"


@pytest.fixture
def served(monkeypatch) -> list[str]:
    """Make the process look as if starlette were loaded; gives the errors that are logged."""
    lines, module = [], types.ModuleType("starlette.exceptions")
    module.HTTPException = HTTPException
    monkeypatch.setitem(sys.modules, "starlette.exceptions", module)
    monkeypatch.setattr(serving.logger, "error", lines.append)
    return lines


def test_continuous_batching_is_answered_and_logged_in_one_sentence(llama, served):
    llama.generation_config.cache_implementation = "turboquant"
    with pytest.raises(HTTPException) as caught:
        llama.init_continuous_batching()
    error = caught.value
    assert isinstance(error, ValueError) and error.status_code == 400
    assert error.detail == str(error) == serving.NO_CONTINUOUS_BATCHING
    assert served == [f"turboquant_hf: {error}"]


def test_an_invalid_cache_config_is_answered_and_logged(llama, served):
    options = {"cache_implementation": "turboquant", "cache_config": {"preset": "k9v9"}}
    with pytest.raises(HTTPException, match="^preset='k9v9' is not supported") as caught:
        llama.generate(torch.ones(1, 4, dtype=torch.long), **options)
    assert served == [f"turboquant_hf: {caught.value}"]


def test_without_a_server_errors_stay_as_they_are(llama, monkeypatch):
    monkeypatch.delitem(sys.modules, "starlette.exceptions", raising=False)
    llama.generation_config.cache_implementation = "turboquant"
    with pytest.raises(ValueError, match="continuous batching") as caught:
        llama.init_continuous_batching()
    assert type(caught.value) is ValueError


def test_a_server_answers_its_client(llama):
    fastapi = pytest.importorskip("fastapi", reason="fastapi is not installed")
    testclient = pytest.importorskip("fastapi.testclient", reason="httpx is not installed", exc_type=ImportError)
    llama.generation_config.cache_implementation = "turboquant"
    app = fastapi.FastAPI()

    @app.get("/")
    async def complete():
        llama.init_continuous_batching()

    answer = testclient.TestClient(app, raise_server_exceptions=False).get("/")
    assert answer.status_code == 400
    assert answer.json() == {"detail": serving.NO_CONTINUOUS_BATCHING}
