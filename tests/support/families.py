"""Tiny random models of many families, and the expected behaviour of a packed cache with each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig

VOCAB = 199


@dataclass(frozen=True)
class Family:
    """A model of `kind` (a transformers model type) with small sizes.

    Attributes:
        options: fields of its config; common small sizes are filled in.
        packed: number of layers that a cache packs; None if nothing is packed and a warning says so.
        refused: the text of the error if the model cannot be served, else None.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    packed: int | None = 2
    refused: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.kind


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""Small sizes. There is no eos token, so that every run has the same length."""

HALF_SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "sliding_window": 12,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "init_std": 0.4,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

FAMILIES = [
    Family("llama"),
    Family("llama", {"head_dim": 20}, label="llama-d20"),
    Family("llama", {"num_key_value_heads": 4, "head_dim": 64}, label="llama-mha-d64"),
    Family("llama", {"num_key_value_heads": 1}, label="llama-mqa"),
    Family("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}, label="llama-d256"),
    Family("mistral", {"sliding_window": 12}, packed=None),
    Family("mistral", {"sliding_window": None}, label="mistral-full"),
    Family("mixtral", {"sliding_window": None, **EXPERTS}),
    Family("qwen2"),
    Family("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    Family("qwen3"),
    Family("qwen3_moe", EXPERTS),
    Family("gemma"),
    Family("gemma2", {**HALF_SLIDING, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    Family("gemma3_text", {**HALF_SLIDING, "query_pre_attn_scalar": 16}, label="gemma3"),
    Family(
        "gemma3n_text",
        {
            **HALF_SLIDING,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [48] * 4,
        },
        packed=1,
        label="gemma3n",
    ),
    Family(
        "gemma4_text",
        {
            **HALF_SLIDING,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 32,
            "num_global_key_value_heads": 2,
        },
        packed=1,
        label="gemma4",
    ),
    Family("gpt_oss", {**HALF_SLIDING, **EXPERTS}),
    Family("phi"),
    Family("phi3", {"sliding_window": None, "eos_token_id": None}),
    Family("olmo2"),
    Family("olmo3", HALF_SLIDING),
    Family("granite", {"attention_multiplier": 0.2}),
    Family("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("cohere"),
    Family("cohere2", HALF_SLIDING),
    Family("diffllama"),
    Family("glm", {"partial_rotary_factor": 0.5}),
    Family("glm4", {"partial_rotary_factor": 0.5}),
    Family("smollm3"),
    Family("stablelm"),
    Family("starcoder2", {"sliding_window": None}),
    Family("exaone4", HALF_SLIDING),
    Family("llama4_text", {**EXPERTS, "attention_chunk_size": 12, "num_hidden_layers": 4}, packed=1, label="llama4"),
    Family("gpt_neox"),
    Family("gpt2"),
    Family("gpt2", {"n_embd": 36}, label="gpt2-d9"),
    Family("gpt_bigcode", {"multi_query": True}),
    Family("opt", {"word_embed_proj_dim": 32, "ffn_dim": 32}),
    Family("falcon"),
    Family("bloom"),
    Family("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, packed=None),
    Family("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 512}),
    Family(
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 12},
    ),
    Family(
        "codegen",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 512},
    ),
    Family("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 32}),
    Family("deepseek_v2", {**MLA, "topk_method": "greedy"}, label="deepseek_v2"),
    Family("deepseek_v3", MLA),
    Family(
        "deepseek_v32",
        {**MLA, "index_topk": 12, "index_head_dim": 16, "index_n_heads": 2, "mlp_layer_types": ["dense", "sparse"]},
        packed=None,
    ),
    Family("qwen3_next", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16}),
    Family(
        "jamba",
        {
            **EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "num_hidden_layers": 4,
        },
    ),
    Family(
        "bamba",
        {
            "attn_layer_indices": [1, 3],
            "num_hidden_layers": 4,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    Family("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "block_multiple_of": 8}),
    Family(
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    Family(
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_hidden_layers": 4,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    ),
    Family("mamba", {"state_size": 8}, packed=None, label="mamba"),
    Family(
        "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        auto="AutoModelForSeq2SeqLM",
    ),
    Family("bart", ENCODER_DECODER, auto="AutoModelForSeq2SeqLM"),
    Family(
        "whisper",
        {
            **ENCODER_DECODER,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 256,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        auto="AutoModelForSpeechSeq2Seq",
    ),
]


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def available(family: Family) -> bool:
    """Whether this transformers knows the model type."""
    try:
        AutoConfig.for_model(family.kind)
    except (ValueError, KeyError):
        return False
    return True


def own_attention(model: torch.nn.Module) -> bool:
    """Whether the model has its attention in its own code and cannot switch. This depends on the version."""
    return not model._can_set_attn_implementation()


def build(family: Family, seed: int = 0, **options: Any) -> torch.nn.Module:
    """A tiny random model in eval mode, float32. Sizes that its config lacks are left out."""
    known = AutoConfig.for_model(family.kind)
    sizes = {name: value for name, value in SIZES.items() if name in known.to_dict() or name in known.attribute_map}
    config = AutoConfig.for_model(family.kind, **{**sizes, **family.options, **options})
    torch.manual_seed(seed)
    model = getattr(transformers, family.auto).from_config(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Some families start with weights of zero, or too small for the history to matter.
            if parameter.dim() == 2 and parameter.std() < 0.2 and "lm_head" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def prompt(family: Family, batch: int = 2, length: int = 41, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `generate`: several tiles long for decoders."""
    generator = torch.Generator().manual_seed(seed)
    if family.kind == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator)}
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
