"""Tiny random-weight models of many architectures, with the anatomy that a person reads in their modeling source.

Every row was written down from transformers 5.23's `modeling_*.py` (what a block's `__init__` builds and what its
`forward` does with it), not from what normtune finds. A row states only what differs from the Llama row.
Names are relative to a block unless they are full module names.

Left out: recurrent_gemma, rwkv (neither trains in this transformers: the cache of the first refuses, the second
modifies a tensor in place that its backward needs); models with timm towers (gemma3n) or CUDA-only kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from stubs import randomized

IMAGE, VIDEO, IMAGE_START, IMAGE_END = 99, 98, 97, 96
RMS_EPS, LAYER_EPS = 3e-6, 2e-5  # no model's default, so that a guess does not pass
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {**HEADS, **TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
BASE = {**SIZES, "max_position_embeddings": 64, "rms_norm_eps": RMS_EPS}
LN_BASE = {**SIZES, "max_position_embeddings": 64, "layer_norm_eps": LAYER_EPS}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "layer_norm_epsilon": LAYER_EPS, **TOKENS}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MAMBA = {**TOKENS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "layer_norm_epsilon": RMS_EPS}
LINEAR_THEN_FULL = ["linear_attention", "full_attention"]

Leaves = tuple[str, ...] | list[tuple[str, ...]]  # one tuple for all blocks, or one per block

QKVO = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
OUT = (*QKVO[:3], "self_attn.out_proj")
QK = ("self_attn.q_norm", "self_attn.k_norm")
QK_LAYER = ("self_attn.q_layernorm", "self_attn.k_layernorm")
LATENT_NORMS = ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")
AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
FOUR = tuple(f"{place}_layernorm" for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"))


@dataclass(frozen=True)
class Row:
    """One architecture: its config and what `anatomy` and `formula` must say about it.

    Attributes:
        split: q, k, v, o projections inside a block, an absent one as ""; empty where they are not four layers.
        mlp: None where it is a matter of taste which of several small matrices belong to it.
        fused: the projection that gives q, k and v at once.
        formula, eps, compute: of the norms on the residual stream; where `compute` is empty, RMSNorms with a plain gain
            round before the gain is multiplied (as Llama's), and the others at the end.
        vision, connector: roots; a connector inside the vision module counts as connector alone.
        vision_norms: inside the first root (a star is the index of a layer), or full names.
        loose: parameters beside LLM, encoder and connector that belong to no module of their own.
    """

    kind: str
    config: dict[str, Any]
    blocks: str = "model.layers"
    norms: Leaves = ("input_layernorm", "post_attention_layernorm")
    qk_norms: Leaves = ()
    split: Leaves = QKVO
    fused: Leaves = ()
    mlp: Leaves | None = ("mlp",)
    final_norm: str = "model.norm"
    embed: str = "model.embed_tokens"
    head: str = "lm_head"
    formula: str = "rms*g"
    eps: float = RMS_EPS
    compute: str = ""
    vision: tuple[str, ...] = ()
    vision_norms: tuple[str, ...] = ()
    connector: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    batch: Callable[[torch.Generator], dict[str, torch.Tensor]] | None = None
    count: int = 2  # blocks

    @property
    def computes(self) -> str:
        return self.compute or ("float32, gain rounded" if self.formula == "rms*g" else "float32")

    @property
    def routed(self) -> bool:
        """Whether it has a mixture of experts."""
        return "experts" in str(self.config)

    def full(self, leaves: Leaves) -> list[str]:
        """Full module names in every block."""
        per_block = leaves if isinstance(leaves, list) else [leaves] * self.count
        return [f"{self.blocks}.{i}.{leaf}" for i, found in enumerate(per_block) for leaf in found if leaf]

    def projection(self, role: str) -> list[str]:
        """Full names of one of q, k, v, o."""
        per_block = self.split if isinstance(self.split, list) else [self.split] * self.count
        at = "qkvo".index(role)
        return self.full([found[at : at + 1] for found in per_block])


def llama_like(kind: str, config: dict[str, Any] | None = None, **expected: Any) -> Row:
    return Row(kind, {**BASE, **(config or {})}, **expected)


def layer_norm(kind: str, config: dict[str, Any] | None = None, **expected: Any) -> Row:
    return Row(kind, {**LN_BASE, **(config or {})}, **{"formula": "layernorm*g+b", "eps": LAYER_EPS, **expected})


def gpt_like(kind: str, config: dict[str, Any] | None = None, **expected: Any) -> Row:
    names = {"blocks": "transformer.h", "norms": ("ln_1", "ln_2"), "final_norm": "transformer.ln_f"}
    names |= {"embed": "transformer.wte", "formula": "layernorm*g+b", "eps": LAYER_EPS}
    return Row(kind, {**GPT, **(config or {})}, **{**names, **expected})


def falcon(config: dict[str, Any], **expected: Any) -> Row:
    sizes = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Row(
        "falcon", {**sizes, "layer_norm_epsilon": LAYER_EPS, **config}, blocks="transformer.h", split=(),
        fused=("self_attention.query_key_value",), final_norm="transformer.ln_f", embed="transformer.word_embeddings",
        formula="layernorm*g+b", eps=LAYER_EPS, **expected,
    )  # fmt: skip


# fmt: off
TEXT: dict[str, Row] = {
    "llama": llama_like("llama"),
    "mistral": llama_like("mistral"),
    "qwen2": llama_like("qwen2"),
    "qwen3": llama_like("qwen3", qk_norms=QK),
    "phi3": llama_like("phi3", split=(), fused=("self_attn.qkv_proj",)),
    "granite": llama_like("granite"),
    "smollm3": llama_like("smollm3"),
    "helium": llama_like("helium", compute="float32"),
    "ernie4_5": llama_like("ernie4_5"),
    # Norms after attention and MLP instead of before
    "olmo2": llama_like("olmo2", norms=AFTER, qk_norms=QK, compute="float32"),
    "olmo3": llama_like("olmo3", norms=AFTER, qk_norms=QK, compute="float32"),
    "exaone4": llama_like(
        "exaone4", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        norms=AFTER, qk_norms=QK,
    ),
    "apertus": llama_like("apertus", norms=("attention_layernorm", "feedforward_layernorm"), qk_norms=QK),
    "glm4": llama_like("glm4", norms=(*FOUR[:2], "post_self_attn_layernorm", "post_mlp_layernorm")),
    # A norm inside attention and one inside the MLP: the second belongs to the MLP
    "bitnet": llama_like("bitnet", qk_norms=("self_attn.attn_sub_norm",)),
    # Residual weights beside the norms are bare parameters of the block; a fifth linear layer in attention
    "doge": llama_like("doge", qk_norms=QK),
    "diffllama": llama_like("diffllama"),  # its norm inside attention has no gain
    "moshi": llama_like(  # each projection is wrapped in a module, and attention holds its own rotary embedding
        "moshi", {"ffn_dim": 64, "num_codebooks": 2, "audio_vocab_size": 20}, compute="float32",
        split=tuple(f"{name}.linear" for name in QKVO),
    ),
    "gemma": llama_like("gemma", formula="rms*(1+g)"),
    "gemma2": llama_like("gemma2", norms=FOUR, formula="rms*(1+g)"),
    "gemma3_text": llama_like("gemma3_text", norms=FOUR, qk_norms=QK, formula="rms*(1+g)"),
    "gemma4_text": llama_like(  # later blocks take k and v from earlier ones
        "gemma4_text",
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
         "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 100},
        norms=(*FOUR, "post_per_layer_input_norm"), count=4, compute="float32", qk_norms=[QK, QK, QK[:1], QK[:1]],
        split=[QKVO, QKVO, (QKVO[0], "", "", QKVO[3]), (QKVO[0], "", "", QKVO[3])], mlp=None,
    ),
    # Mixtures of experts: the router and the experts belong to the MLP
    "mixtral": llama_like("mixtral", LOCAL_EXPERTS),
    "qwen3_moe": llama_like("qwen3_moe", {**EXPERTS, "mlp_only_layers": [1]}, qk_norms=QK),
    "olmoe": llama_like("olmoe", EXPERTS, qk_norms=QK),
    "gpt_oss": llama_like("gpt_oss", LOCAL_EXPERTS, compute="float32"),
    "llama4_text": llama_like(  # its norm of q and k has no gain
        "llama4_text", {**LOCAL_EXPERTS, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2},
        mlp=("feed_forward",),
    ),
    "glm4_moe": llama_like("glm4_moe", {**ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True}, qk_norms=QK),
    "phimoe": llama_like("phimoe", LOCAL_EXPERTS, formula="layernorm*g+b"),
    "afmoe": llama_like(  # a gate as wide as the output projection, registered after it
        "afmoe", {**EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1}, qk_norms=QK, compute="float32",
        norms=(*FOUR[:2], "pre_mlp_layernorm", "post_mlp_layernorm"),
    ),
    "dbrx": Row(
        "dbrx",
        {**TOKENS, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
         "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
         "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
        blocks="transformer.blocks",
        norms=("norm_attn_norm.norm_1", "norm_attn_norm.norm_2"), mlp=("ffn",), split=(),
        fused=("norm_attn_norm.attn.Wqkv",), final_norm="transformer.norm_f", embed="transformer.wte",
        formula="layernorm*g", eps=1e-5,
    ),
    # Latent attention: low-rank factors, so neither four projections nor one fused projection
    "deepseek_v3": llama_like(
        "deepseek_v3", {**ROUTED, **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1},
        qk_norms=LATENT_NORMS, split=(),
    ),
    # Norms with a gate of their own, which is a small MLP; an indexer with a norm inside attention
    "axk2": llama_like(
        "axk2",
        {**LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "gated_norm_rank": 4,
         "moe_intermediate_size": 32, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "head_dim": 8},
        norms=[("input_layernorm.norm", "post_attention_layernorm"),
               ("input_layernorm.norm", "post_attention_layernorm.norm")],
        qk_norms=(*LATENT_NORMS, "self_attn.indexer.k_norm"), split=(),
    ),
    # Two attentions, two MLPs and four norms per block, in lists, and one mixture of experts
    "longcat_flash": Row(
        "longcat_flash",
        {**TOKENS, **LATENT, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
         "head_dim": 8, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 2,
         "rms_norm_eps": RMS_EPS},
        norms=tuple(f"{name}_layernorm.{i}" for name in ("input", "post_attention") for i in (0, 1)),
        qk_norms=tuple(f"self_attn.{i}.{name}_a_layernorm" for i in (0, 1) for name in ("q", "kv")),
        split=(), mlp=("mlp", "mlps"),
    ),
    # LayerNorm
    "opt": layer_norm(
        "opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, blocks="model.decoder.layers", split=OUT,
        mlp=("fc1", "fc2"), norms=("self_attn_layer_norm", "final_layer_norm"), eps=1e-5,
        final_norm="model.decoder.final_layer_norm", embed="model.decoder.embed_tokens",
    ),
    "xglm": layer_norm(
        "xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}, split=OUT, mlp=("fc1", "fc2"),
        norms=("self_attn_layer_norm", "final_layer_norm"), final_norm="model.layer_norm", eps=1e-5,
    ),
    "phi": layer_norm(
        "phi", norms=("input_layernorm",), split=(*QKVO[:3], "self_attn.dense"), final_norm="model.final_layernorm",
    ),
    "phi_qk": layer_norm(
        "phi", {"qk_layernorm": True}, norms=("input_layernorm",), split=(*QKVO[:3], "self_attn.dense"),
        qk_norms=QK_LAYER, final_norm="model.final_layernorm",
    ),
    "persimmon": layer_norm(
        "persimmon", {"qk_layernorm": True}, split=(), fused=("self_attn.query_key_value",), qk_norms=QK_LAYER,
        final_norm="model.final_layernorm",
    ),
    "starcoder2": layer_norm("starcoder2", {"norm_epsilon": LAYER_EPS}),
    "stablelm": layer_norm("stablelm"),
    "stablelm_qk": layer_norm(  # one LayerNorm without bias per head
        "stablelm", {"qk_layernorm": True, "use_parallel_residual": True}, norms=("input_layernorm",),
        qk_norms=(*(f"{QK_LAYER[0]}.norms.{i}" for i in range(4)), *(f"{QK_LAYER[1]}.norms.{i}" for i in range(2))),
    ),
    "cohere": layer_norm("cohere", norms=("input_layernorm",), formula="layernorm*g"),
    "cohere_qk": layer_norm(  # gains of q and k are (heads, head size)
        "cohere", {"use_qk_norm": True}, norms=("input_layernorm",), qk_norms=QK, formula="layernorm*g",
    ),
    "cohere2": layer_norm("cohere2", norms=("input_layernorm",), formula="layernorm*g"),
    "nemotron": layer_norm(  # 1 + g is rounded
        "nemotron", {"norm_eps": LAYER_EPS}, formula="layernorm*(1+g)+b", compute="input",
    ),
    "modernbert-decoder": layer_norm(  # no norm before the first attention; a layer with a norm before the head
        "modernbert-decoder", {"norm_eps": LAYER_EPS, "cls_token_id": 1, "sep_token_id": 2},
        norms=[("mlp_norm",), ("attn_norm", "mlp_norm")], split=(*(f"attn.{x}_proj" for x in "qkv"), "attn.Wo"),
        final_norm="model.final_norm", embed="model.embeddings.tok_embeddings", head="decoder", formula="layernorm*g",
    ),
    "gpt_neox": layer_norm(
        "gpt_neox", blocks="gpt_neox.layers", split=(), fused=("attention.query_key_value",),
        final_norm="gpt_neox.final_layer_norm", embed="gpt_neox.embed_in",
    ),
    "bloom": layer_norm(  # the norm after its embedding is not on the residual stream and not the final norm
        "bloom", {"n_layer": 2, "n_head": 4, "layer_norm_epsilon": LAYER_EPS}, blocks="transformer.h", split=(),
        fused=("self_attention.query_key_value",), final_norm="transformer.ln_f", embed="transformer.word_embeddings",
    ),
    "falcon": falcon({}, norms=("input_layernorm",)),  # one head for k and v
    "falcon_sequential": falcon({"parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon_new": falcon({"new_decoder_architecture": True, "num_kv_heads": 2}, norms=("ln_attn", "ln_mlp")),
    "mpt": Row(
        "mpt",
        {**TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "layer_norm_epsilon": LAYER_EPS},
        blocks="transformer.blocks", norms=("norm_1", "norm_2"), split=(), fused=("attn.Wqkv",), mlp=("ffn",),
        final_norm="transformer.norm_f", embed="transformer.wte",
        formula="layernorm*g", eps=LAYER_EPS,
    ),
    "gpt2": gpt_like("gpt2", split=(), fused=("attn.c_attn",)),
    "gpt_bigcode": gpt_like("gpt_bigcode", split=(), fused=("attn.c_attn",)),
    "gptj": gpt_like(
        "gptj", {"rotary_dim": 4}, norms=("ln_1",), split=(*(f"attn.{x}_proj" for x in "qkv"), "attn.out_proj"),
    ),
    "codegen": gpt_like("codegen", {"rotary_dim": 4}, norms=("ln_1",), split=(), fused=("attn.qkv_proj",)),
    "gpt_neo": gpt_like(
        "gpt_neo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        split=(*(f"attn.attention.{x}_proj" for x in "qkv"), "attn.attention.out_proj"),
    ),
    # Mixers instead of attention, or beside it: norms inside them are like qk_norms
    "mamba": Row(
        "mamba", {**MAMBA, "time_step_rank": 4}, blocks="backbone.layers", norms=("norm",), split=(), mlp=(),
        final_norm="backbone.norm_f", embed="backbone.embeddings",
    ),
    "mamba2": Row(
        "mamba2", {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1}, blocks="backbone.layers", norms=("norm",),
        qk_norms=("mixer.norm",), split=(), mlp=(), final_norm="backbone.norm_f", embed="backbone.embeddings",
    ),
    "nemotron_h": Row(  # one norm and one of mixer, attention, MLP per block
        "nemotron_h",
        {**SIZES, "num_hidden_layers": 3, "hybrid_override_pattern": "M*-", "mamba_num_heads": 4, "mamba_head_dim": 16,
         "ssm_state_size": 8, "n_groups": 1, "layer_norm_epsilon": RMS_EPS},
        norms=("norm",), qk_norms=[("mixer.norm",), (), ()], count=3, final_norm="model.norm_f",
        split=[(), tuple(f"mixer.{letter}_proj" for letter in "qkvo"), ()], mlp=[(), (), ("mixer",)],
        embed="model.embeddings", compute="float32",
    ),
    "jamba": llama_like(
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
         "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
        norms=("input_layernorm", "pre_ff_layernorm"), split=[(), QKVO], mlp=("feed_forward",),
        qk_norms=[("mamba.dt_layernorm", "mamba.b_layernorm", "mamba.c_layernorm"), ()],
        final_norm="model.final_layernorm",
    ),
    "bamba": llama_like(
        "bamba", {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
        norms=("input_layernorm", "pre_ff_layernorm"), split=[(), QKVO], mlp=("feed_forward",),
        qk_norms=[("mamba.norm",), ()], final_norm="model.final_layernorm",
    ),
    # Blocks 1 and 2 share the parameters of an attention block whose input is twice as wide
    "zamba2": Row(
        "zamba2",
        {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
         "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4,
         "max_position_embeddings": 64, "rms_norm_eps": RMS_EPS},
        norms=[("input_layernorm",), *[("mamba_decoder.input_layernorm", "shared_transformer.input_layernorm",
                                        "shared_transformer.pre_ff_layernorm")] * 2],
        qk_norms=[("mamba.norm",), ("mamba_decoder.mamba.norm",), ("mamba_decoder.mamba.norm",)], count=3,
        split=[(), *[tuple(f"shared_transformer.self_attn.{x}_proj" for x in "qkvo")] * 2], mlp=None,
        final_norm="model.final_layernorm"
    ),
    "falcon_h1": llama_like(  # a mixer and attention side by side
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_rms_norm": True},
        norms=("input_layernorm", "pre_ff_layernorm"), qk_norms=("mamba.norm",), mlp=("feed_forward",),
        final_norm="model.final_layernorm",
    ),
    "lfm2": llama_like(  # the norm named after the embedding is the final norm
        "lfm2", {"layer_types": ["conv", "full_attention"], "norm_eps": RMS_EPS}, norms=("operator_norm", "ffn_norm"),
        qk_norms=[(), QK_LAYER], split=[(), OUT], mlp=("feed_forward",), final_norm="model.embedding_norm",
    ),
    "qwen3_next": llama_like(  # q_proj gives q and a gate
        "qwen3_next",
        {**EXPERTS, "layer_types": LINEAR_THEN_FULL, "shared_expert_intermediate_size": 32, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        qk_norms=[("linear_attn.norm",), QK], split=[(), QKVO], formula="rms*(1+g)",
    ),
    "minimax": llama_like(
        "minimax", {**LOCAL_EXPERTS, "layer_types": LINEAR_THEN_FULL, "block_size": 8},
        qk_norms=[("self_attn.norm",), ()], split=[(), QKVO], fused=[("self_attn.qkv_proj",), ()],
    ),
}
# fmt: on

# Every image is 32 x 32 with patches of 8: 16 patches, 4 tokens where a connector merges 2 x 2
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2}
MROPE = {
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    },
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}  # fmt: skip
QFORMER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "encoder_hidden_size": 16,
}  # fmt: skip
TOWER_NORMS = ("encoder.layers.*.layer_norm1", "encoder.layers.*.layer_norm2", "post_layernorm")


def words(generator: torch.Generator, image: int, *, start: tuple[int, ...] = (), end: tuple[int, ...] = ()) -> Any:
    """Two rows of 10 words with `image` image tokens after the third; labels too."""
    ids = torch.randint(3, 90, (2, 10), generator=generator)
    inner = torch.tensor([*start, *[IMAGE] * image, *end], dtype=torch.long).expand(2, -1)
    ids = torch.cat([ids[:, :3], inner, ids[:, 3:]], dim=1)
    return {"input_ids": ids, "labels": ids}


def square(image: int, shape: tuple[int, ...] = (2, 3, 32, 32), **more: Any) -> Callable[[torch.Generator], Any]:
    """One image per row that becomes `image` tokens; `more` are tensors."""

    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {**words(generator, image), "pixel_values": torch.randn(shape, generator=generator), **more}

    return batch


def patches(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two images as 4 x 4 flat patches of 2 frames; 2 x 2 patches become a token."""
    text = words(generator, 4, start=(IMAGE_START,), end=(IMAGE_END,))
    return {
        **text,
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (text["input_ids"] == IMAGE).int(),
    }


def tiles(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One image of one tile per row, which every word may look at."""
    return {
        **words(generator, 0),
        "pixel_values": torch.randn(2, 1, 1, 3, 32, 32, generator=generator),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 10, 1, 1, dtype=torch.long),
    }


def positions(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two images as 4 x 4 flat patches with their places; 2 x 2 patches become a token."""
    text = words(generator, 4)
    place = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    return {
        **text,
        "pixel_values": torch.rand(2, 16, 3 * 8 * 8, generator=generator),
        "image_position_ids": place.expand(2, -1, -1),
        "mm_token_type_ids": (text["input_ids"] == IMAGE).int(),
    }


def with_types(token_types: Callable[[torch.Tensor], torch.Tensor], image: int) -> Callable[[torch.Generator], Any]:
    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        found = square(image)(generator)
        return {**found, "token_type_ids": token_types(found["input_ids"]).int()}

    return batch


def mllm(kind: str, text: str, tower: dict[str, Any], config: dict[str, Any], **expected: Any) -> Row:
    """Llama-like text model under `model.language_model`, tower under `model.vision_tower`."""
    llm = expected.pop("llm", "model.language_model")
    text_config = {**BASE, "model_type": text, **expected.pop("text_config", {})}
    names = {"blocks": f"{llm}.layers", "final_norm": f"{llm}.norm", "embed": f"{llm}.embed_tokens"}
    names |= {"vision": ("model.vision_tower",), "connector": ("model.multi_modal_projector",)}
    return Row(
        kind, {"text_config": text_config, "vision_config": tower, "image_token_id": IMAGE, **config},
        **{**names, **expected},
    )  # fmt: skip


def qwen_vl(kind: str, tower: dict[str, Any], **expected: Any) -> Row:
    names = {"vision": ("model.visual",), "connector": ("model.visual.merger",), "batch": patches}
    names |= {"vision_norms": ("blocks.*.norm1", "blocks.*.norm2"), "text_config": MROPE}
    return mllm(kind, f"{kind}_text", {**QWEN_TOWER, **tower}, QWEN_TOKENS, **{**names, **expected})


# fmt: off
MLLM: dict[str, Row] = {
    "llava": mllm(
        "llava", "llama", {**TOWER, "model_type": "clip_vision_model"}, {"image_seq_length": 16},
        vision_norms=("pre_layrnorm", *TOWER_NORMS), batch=square(16),
    ),
    # A 32 x 64 image: the whole as 16 tokens, its two halves as 4 rows of 8 tokens and a newline
    "llava_next": mllm(
        "llava_next", "mistral", {**TOWER, "model_type": "clip_vision_model"},
        {"image_grid_pinpoints": [[32, 64], [64, 32]]}, vision_norms=("pre_layrnorm", *TOWER_NORMS),
        loose=("model.image_newline",),
        batch=square(16 + 4 * 9, (2, 3, 3, 32, 32), image_sizes=torch.tensor([[32, 64]] * 2)),
    ),
    "idefics3": mllm(
        "idefics3", "llama", TOWER, {"scale_factor": 2}, llm="model.text_model", vision=("model.vision_model",),
        connector=("model.connector",), vision_norms=TOWER_NORMS, batch=square(4, (2, 1, 3, 32, 32)),
    ),
    "smolvlm": mllm(
        "smolvlm", "llama", TOWER, {"scale_factor": 2}, llm="model.text_model", vision=("model.vision_model",),
        connector=("model.connector",), vision_norms=TOWER_NORMS, batch=square(4, (2, 1, 3, 32, 32)),
    ),
    "paligemma": mllm(
        "paligemma", "gemma",
        {**TOWER, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        {"projection_dim": 32}, vision_norms=TOWER_NORMS, formula="rms*(1+g)", batch=with_types(torch.ones_like, 16),
    ),
    "gemma3": mllm(  # the connector has a norm and a bare matrix
        "gemma3", "gemma3_text", {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        {"image_token_index": IMAGE, "mm_tokens_per_image": 4}, norms=FOUR, qk_norms=QK, vision_norms=TOWER_NORMS,
        formula="rms*(1+g)", batch=with_types(lambda ids: ids == IMAGE, 4),
    ),
    "qwen2_vl": qwen_vl("qwen2_vl", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": qwen_vl(
        "qwen2_5_vl",
        {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 32,
         "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": qwen_vl(  # one more merger for the features of an inner layer
        "qwen3_vl",
        {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 16,
         "deepstack_visual_indexes": [0]},
        qk_norms=QK, connector=("model.visual.merger", "model.visual.deepstack_merger_list"),
    ),
    "qwen3_5": qwen_vl(
        "qwen3_5",
        {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 16},
        text_config={**MROPE, "layer_types": LINEAR_THEN_FULL, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                     "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        qk_norms=[("linear_attn.norm",), QK], split=[(), QKVO], formula="rms*(1+g)",
    ),
    "glm4v": qwen_vl(  # a convolution inside the tower already gives the LLM's width
        "glm4v",
        {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "image_size": 32},
        norms=(*FOUR[:2], "post_self_attn_layernorm", "post_mlp_layernorm"),
        vision_norms=("blocks.*.norm1", "blocks.*.norm2", "post_conv_layernorm", "post_layernorm"),
    ),
    "internvl": mllm(  # lambda_1 and lambda_2 of its tower are bare parameters
        "internvl", "qwen2", {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]}, {},
        vision_norms=("encoder.layer.*.layernorm_before", "encoder.layer.*.layernorm_after"), batch=square(4),
    ),
    "mistral3": mllm(
        "mistral3", "mistral", {**TOWER, "model_type": "pixtral", "head_dim": 8}, {"spatial_merge_size": 2},
        vision_norms=("ln_pre", "transformer.layers.*.attention_norm", "transformer.layers.*.ffn_norm"),
        batch=square(4, image_sizes=torch.tensor([[32, 32]] * 2)),
    ),
    "mllama": mllm(  # the LLM looks at the image in blocks with cross-attention; no image tokens
        "mllama", "mllama_text_model",
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 2,
         "attention_heads": 2, "image_size": 32, "patch_size": 8, "vision_output_dim": 32, "max_num_tiles": 1,
         "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]},
        {"image_token_index": IMAGE}, text_config={"cross_attention_layers": [1]}, batch=tiles,
        qk_norms=[(), ("cross_attn.q_norm", "cross_attn.k_norm")],
        split=[QKVO, tuple(f"cross_attn.{letter}_proj" for letter in "qkvo")], vision=("model.vision_model",),
        vision_norms=("layernorm_pre", "layernorm_post",
                      *(f"{place}transformer.layers.*.{name}_layernorm"
                        for place in ("", "global_") for name in ("input", "post_attention"))),
    ),
    "gemma4": mllm(  # its tower cuts patches with a Linear and has four norms per block
        "gemma4", "gemma4_text",
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 8, "patch_size": 8, "pooling_kernel_size": 2,
         "position_embedding_size": 16, "rms_norm_eps": RMS_EPS},
        {"audio_config": None}, text_config={"layer_types": ["sliding_attention", "full_attention"],
                                             "hidden_size_per_layer_input": 0},
        norms=FOUR, qk_norms=QK, connector=("model.embed_vision",), batch=positions, compute="float32",
        vision_norms=(*(f"encoder.layers.*.{name}" for name in FOUR),
                      *(f"encoder.layers.*.{name}" for name in QK)),
    ),
    "gemma4_audio": mllm(  # a tower with convolutions for sound beside one without for images
        "gemma4", "gemma4_text",
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 8, "patch_size": 8, "pooling_kernel_size": 2,
         "position_embedding_size": 16, "rms_norm_eps": RMS_EPS},
        {"audio_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "subsampling_conv_channels": [4, 2], "output_proj_dims": 16}},
        text_config={"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0},
        norms=FOUR, qk_norms=QK, vision=("model.vision_tower", "model.audio_tower"), batch=positions,
        connector=("model.embed_vision", "model.embed_audio"), compute="float32",
        vision_norms=(*(f"encoder.layers.*.{name}" for name in FOUR),
                      *(f"encoder.layers.*.{name}" for name in QK),
                      *(f"model.audio_tower.subsample_conv_projection.layer{i}.norm" for i in (0, 1)),
                      *(f"model.audio_tower.layers.*.{part}.{place}_layer_norm"
                        for part in ("feed_forward1", "feed_forward2") for place in ("pre", "post")),
                      "model.audio_tower.layers.*.lconv1d.pre_layer_norm",
                      "model.audio_tower.layers.*.lconv1d.conv_norm",
                      *(f"model.audio_tower.layers.*.norm_{place}" for place in ("pre_attn", "post_attn", "out"))),
    ),
    "blip-2": mllm(  # two connectors, the first with blocks of its own
        "blip-2", "opt", TOWER, {"num_query_tokens": 4, "qformer_config": QFORMER, "image_token_index": IMAGE},
        text_config={**LN_BASE, "ffn_dim": 64, "word_embed_proj_dim": 32}, llm="language_model.model.decoder",
        norms=("self_attn_layer_norm", "final_layer_norm"), split=OUT, mlp=("fc1", "fc2"),
        final_norm="language_model.model.decoder.final_layer_norm", head="language_model.lm_head",
        formula="layernorm*g+b", eps=1e-5, vision=("vision_model",), vision_norms=TOWER_NORMS,
        connector=("qformer", "language_projection"), loose=("query_tokens",), batch=square(4),
    ),
    "llama4": mllm(  # its tower cuts patches with a Linear; an adapter inside the tower keeps the tower's width
        "llama4", "llama4_text",
        {**TOWER, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16,
         "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5},
        {"image_token_index": IMAGE, "boi_token_index": IMAGE_START, "eoi_token_index": IMAGE_END},
        text_config={**LOCAL_EXPERTS, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2},
        llm="language_model.model", head="language_model.lm_head", mlp=("feed_forward",), batch=square(4),
        vision=("vision_model",), connector=("multi_modal_projector",),
        vision_norms=("layernorm_pre", "model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm",
                      "layernorm_post"),
    ),
}
# fmt: on

ZOO: dict[str, Row] = {**TEXT, **MLLM}

# Of every kind of norm, attention, MLP, mixture, state space and encoder one at least
COMMON = (
    "llama", "qwen3", "phi3", "olmo2", "glm4", "diffllama", "gemma2", "mixtral", "gpt_oss", "llama4_text", "dbrx",
    "deepseek_v3", "opt", "stablelm_qk", "cohere2", "nemotron", "gpt_neox", "bloom", "falcon_new", "mpt", "gpt2",
    "gptj", "mamba2", "jamba", "falcon_h1", "qwen3_next", "llava", "paligemma", "qwen2_5_vl", "mllama", "gemma4",
    "blip-2",
)  # fmt: skip

# Norms without a learned gain: nothing for normtune to train
GAINLESS: dict[str, Row] = {"olmo": llama_like("olmo"), "nanochat": llama_like("nanochat")}


def beyond_common(name: str) -> list[pytest.MarkDecorator]:
    """Marks of a row of a test that takes long: those of the zoo beyond COMMON are slow tests."""
    assert set(COMMON) <= set(ZOO)
    return [] if name in COMMON else [pytest.mark.slow]


def common_first() -> list[Any]:
    """Parameters of a test that takes long, by name."""
    return [pytest.param(name, marks=beyond_common(name)) for name in ZOO]


def skeleton(name: str) -> Any:
    """The model with unset weights, on whatever device is the default one."""
    row = {**ZOO, **GAINLESS}[name]
    auto = AutoModelForImageTextToText if row.vision else AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(row.kind, **row.config))


def model(name: str, seed: int = 0) -> Any:
    """The model in fp32, eval mode, every tensor random: zeros, ones and tiny matrices would hide mistakes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = skeleton(name)
        for parameter in made.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return randomized(made, seed)


def batch(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """A small input with labels; an MLLM's goes through its vision encoder and connector."""
    generator = torch.Generator().manual_seed(seed)
    row = {**ZOO, **GAINLESS}[name]
    found = words(generator, 0) if row.batch is None else row.batch(generator)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}
