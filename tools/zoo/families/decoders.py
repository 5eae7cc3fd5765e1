"""Decoder-only language models."""

import copy
from dataclasses import replace
from functools import partial

import torch
import transformers

from zoo.family import BATCH, SEQUENCE, Family, Input
from zoo.layout import Layout, Stack, rotary

VOCAB, POSITIONS = 211, 40
INPUTS = {
    "input_ids": Input("ids", (BATCH, SEQUENCE), below=VOCAB),
    "attention_mask": Input("mask", (BATCH, SEQUENCE)),
}
LOGITS = {"logits": (BATCH, SEQUENCE, VOCAB)}
QUERY_SCALE = "(heads * head_dim, (head_dim / full_head_dim) ** 0.5)"
"""Keeps the parent's attention scale where the module computes it from its query's width."""


def _make(model: str, config: str, **sizes):
    settings = getattr(transformers, config)(**sizes)
    return getattr(transformers, model)(settings)


def make(model: str, config: str, **sizes):
    """Return a function that builds the class `model` from the class `config`."""
    return partial(_make, model, config, **sizes)


GPT2 = Family(
    "gpt2",
    make(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_embd=48,
        n_head=3,
        n_inner=112,
        n_layer=5,
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=1,
    ),
    INPUTS,
    LOGITS,
    Layout(
        sizes={"vocab": VOCAB, "hidden": 48, "heads": 3, "head_dim": 16, "ffn": 112},
        rows={
            "transformer.wte.weight": "vocab hidden",
            "transformer.wpe.weight": "_ hidden",
            "transformer.ln_f.*": "hidden",
        },
        stacks=(
            Stack(
                "transformer.h",
                rows={
                    "ln_?.*": "hidden",
                    "attn.c_attn.weight": "hidden (3 heads head_dim)",
                    "attn.c_attn.bias": "(3 heads head_dim)",
                    "attn.c_proj.weight": "(heads head_dim) hidden",
                    "attn.c_proj.bias": "hidden",
                    "mlp.c_fc.weight": "hidden ffn",
                    "mlp.c_fc.bias": "ffn",
                    "mlp.c_proj.weight": "ffn hidden",
                    "mlp.c_proj.bias": "hidden",
                },
                attributes={"attn": {"num_heads": "heads", "head_dim": "head_dim", "split_size": "heads * head_dim"}},
                halves={"attention": "zero attn.c_proj", "ffn": "zero mlp.c_proj"},
            ),
        ),
    ),
)

# Fused (heads, 3, head_dim) projections: NeoX, Bloom.
FUSED_BLOCK = {
    "*layernorm.*": "hidden",
    "*attention.query_key_value.weight": "(heads 3 head_dim) hidden",
    "*attention.query_key_value.bias": "(heads 3 head_dim)",
    "*attention.dense.weight": "hidden (heads head_dim)",
    "*attention.dense.bias": "hidden",
    "mlp.dense_h_to_4h.weight": "ffn hidden",
    "mlp.dense_h_to_4h.bias": "ffn",
    "mlp.dense_4h_to_h.weight": "hidden ffn",
    "mlp.dense_4h_to_h.bias": "hidden",
}
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    num_attention_heads=3,
    intermediate_size=112,
    num_hidden_layers=5,
    max_position_embeddings=POSITIONS,
)
HEADED_SIZES = {"vocab": VOCAB, "hidden": 48, "heads": 3, "head_dim": 16, "ffn": 112}

GPT_NEOX = Family(
    "gpt_neox",
    make(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        **SIZES,
        bos_token_id=1,
        eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    INPUTS,
    LOGITS,
    Layout(
        sizes=HEADED_SIZES,
        rows={
            "gpt_neox.embed_in.weight": "vocab hidden",
            "gpt_neox.final_layer_norm.*": "hidden",
            "lm_head.weight": "vocab hidden",
            "embed_out.weight": "vocab hidden",
            "gpt_neox.rotary_emb.*inv_freq": "pairs",
        },
        stacks=(
            Stack(
                "gpt_neox.layers",
                rows=FUSED_BLOCK,
                attributes={"attention": {"head_size": "head_dim", "rotary_ndims": "rotary"}},
                halves={"attention": "zero attention.dense", "ffn": "zero mlp.dense_4h_to_h"},
            ),
        ),
        coupled=("hidden", "vocab", "head_dim"),
        derived=rotary(8),
    ),
)

OPT_BLOCK = {
    "*layer_norm.*": "hidden",
    "self_attn.out_proj.weight": "hidden (heads head_dim)",
    "self_attn.out_proj.bias": "hidden",
    "self_attn.*_proj.weight": "(heads head_dim) hidden",
    "self_attn.*_proj.bias": "(heads head_dim)",
    "fc1.weight": "ffn hidden",
    "fc1.bias": "ffn",
    "fc2.weight": "hidden ffn",
    "fc2.bias": "hidden",
}
OPT = Family(
    "opt",
    make(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=VOCAB,
        hidden_size=48,
        num_attention_heads=3,
        ffn_dim=112,
        num_hidden_layers=5,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    ),
    INPUTS,
    LOGITS,
    Layout(
        sizes=HEADED_SIZES,
        rows={
            "model.decoder.embed_tokens.weight": "vocab hidden",
            "model.decoder.embed_positions.weight": "_ hidden",
            "model.decoder.final_layer_norm.*": "hidden",
        },
        stacks=(
            Stack(
                "model.decoder.layers",
                rows=OPT_BLOCK,
                attributes={"self_attn": {"num_heads": "heads", "head_dim": "head_dim"}},
                halves={"attention": "zero self_attn.out_proj", "ffn": "zero fc2"},
            ),
        ),
    ),
)


def _slice_alibi(model, cut) -> None:
    """Let the smaller model take the kept heads' slopes out of the parent's."""
    transformer, heads = model.transformer, cut.full("heads")
    kept, whole = torch.from_numpy(cut.kept("heads", "", 0)), transformer.build_alibi_tensor

    def build(attention_mask, num_heads, dtype):
        alibi = whole(attention_mask, heads, dtype).unflatten(0, (-1, heads))
        return alibi[:, kept].flatten(0, 1)

    transformer.build_alibi_tensor = build


BLOOM = Family(
    "bloom",
    make(
        "BloomForCausalLM",
        "BloomConfig",
        vocab_size=VOCAB,
        hidden_size=48,
        n_head=3,
        n_layer=5,
        bos_token_id=1,
        eos_token_id=1,
    ),
    INPUTS,
    LOGITS,
    Layout(
        sizes=HEADED_SIZES | {"ffn": 192},
        rows={
            "transformer.word_embeddings.weight": "vocab hidden",
            "transformer.word_embeddings_layernorm.*": "hidden",
            "transformer.ln_f.*": "hidden",
        },
        stacks=(
            Stack(
                "transformer.h",
                rows=FUSED_BLOCK,
                attributes={"self_attention": {"num_heads": "heads", "head_dim": "head_dim"}},
                halves={"attention": "zero self_attention.dense", "ffn": "zero mlp.dense_4h_to_h"},
            ),
        ),
        coupled=("hidden", "vocab", "heads"),
        after=_slice_alibi,
    ),
)

FALCON = Family(
    "falcon",
    make(
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=VOCAB,
        hidden_size=48,
        num_attention_heads=3,
        num_hidden_layers=5,
        ffn_hidden_size=112,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=1,
    ),
    INPUTS,
    LOGITS,
    Layout(
        sizes=HEADED_SIZES,
        rows={
            "transformer.word_embeddings.weight": "vocab hidden",
            "transformer.ln_f.*": "hidden",
            "transformer.rotary_emb.*inv_freq": "pairs",
        },
        stacks=(
            Stack(
                "transformer.h",
                rows={"self_attention.query_key_value.weight": "((heads + 2) head_dim) hidden"} | FUSED_BLOCK,
                attributes={
                    "self_attention": {"num_heads": "heads", "head_dim": "head_dim"},
                    "self_attention.query_key_value": {"scaled_rows": QUERY_SCALE},
                },
                halves={"attention": "zero self_attention.dense", "ffn": "zero mlp.dense_4h_to_h"},
            ),
        ),
        coupled=("hidden", "vocab", "head_dim"),
        derived=rotary(),
    ),
)
ATTENTION = {
    "self_attn.q_proj.weight": "(kv_heads queries_per_kv head_dim) hidden",
    "self_attn.q_proj.bias": "(kv_heads queries_per_kv head_dim)",
    "self_attn.[kv]_proj.weight": "(kv_heads head_dim) hidden",
    "self_attn.[kv]_proj.bias": "(kv_heads head_dim)",
    "self_attn.o_proj.weight": "hidden (kv_heads queries_per_kv head_dim)",
    "self_attn.o_proj.bias": "hidden",
    "self_attn.[qk]_norm.weight": "head_dim",
}
GATED = {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden", "mlp.down_proj.weight": "hidden ffn"}
GROUPED = {"self_attn": {"head_dim": "head_dim", "num_key_value_groups": "queries_per_kv"}}
OUTSIDE = {
    "model.embed_tokens.weight": "vocab hidden",
    "model.norm.weight": "hidden",
    "lm_head.weight": "vocab hidden",
    "model.rotary_emb.*inv_freq": "pairs",
}
HALVES = {"attention": "zero self_attn.o_proj", "ffn": "zero mlp.down_proj"}
GROUPED_SIZES = {"vocab": VOCAB, "hidden": 48, "kv_heads": 3, "queries_per_kv": 2, "head_dim": 10, "ffn": 112}
GROUPED_CONFIG = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    intermediate_size=112,
    num_hidden_layers=5,
    max_position_embeddings=POSITIONS,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)


def grouped(
    name: str, model: str, config: str, rows=None, attributes=None, halves=None, sizes=None, **settings
) -> Family:
    """Return a family of Llama's shape: grouped queries, RoPE, RMSNorm, gated FFN.

    rows, attributes, halves: of a block, before or in place of Llama's.
    """
    block = Stack(
        "model.layers",
        rows={**(rows or {}), "*layernorm.weight": "hidden", **ATTENTION, **GATED},
        attributes=attributes or GROUPED,
        halves=halves or HALVES,
    )
    layout = Layout(
        sizes=GROUPED_SIZES | (sizes or {}),
        rows=OUTSIDE,
        stacks=(block,),
        coupled=("hidden", "vocab", "head_dim"),
        derived=rotary(),
    )
    return Family(name, make(model, config, **(GROUPED_CONFIG | settings)), INPUTS, LOGITS, layout)


LLAMA = grouped("llama", "LlamaForCausalLM", "LlamaConfig")
MISTRAL = grouped("mistral", "MistralForCausalLM", "MistralConfig", sliding_window=4)
QWEN2 = grouped("qwen2", "Qwen2ForCausalLM", "Qwen2Config")
QWEN3 = grouped("qwen3", "Qwen3ForCausalLM", "Qwen3Config")

TWO_TABLES = {
    "model.rotary_emb.sliding_attention*inv_freq": "blocks.0.pairs",
    "model.rotary_emb.full_attention*inv_freq": "blocks.1.pairs",
}

# Norms on both sides of each half: without its output the half still adds norm(0) = 0.
GEMMA2 = grouped("gemma2", "Gemma2ForCausalLM", "Gemma2Config", query_pre_attn_scalar=24, sliding_window=4)
GEMMA3 = grouped(
    "gemma3",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    query_pre_attn_scalar=24,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
)
GEMMA3 = replace(
    GEMMA3,
    layout=replace(
        GEMMA3.layout,
        rows=TWO_TABLES | OUTSIDE,
        coupled=("hidden", "vocab"),
        block_groups={"head_dim": ((0, 2, 4), (1, 3))},
    ),
)

PHI3 = grouped(
    "phi3",
    "Phi3ForCausalLM",
    "Phi3Config",
    rows={
        "self_attn.qkv_proj.weight": "((kv_heads queries_per_kv + kv_heads + kv_heads) head_dim) hidden",
        "mlp.gate_up_proj.weight": "(2 ffn) hidden",
    },
    attributes={
        "self_attn": {
            "head_dim": "head_dim",
            "num_key_value_groups": "queries_per_kv",
            "num_key_value_heads": "kv_heads",
            "config.num_attention_heads": "kv_heads * queries_per_kv",
        }
    },
)


def _keep_whole(model) -> None:
    """Keep the parent's rotary embedding beside the one that is cut; it is no submodule."""
    rotary_embedding = model.model.rotary_emb
    rotary_embedding.__dict__["whole"] = copy.deepcopy(rotary_embedding)


def _slice_rotations(model, cut) -> None:
    """Let the smaller model take what is kept of the parent's cosines and sines, computed anew for each length."""
    rotary_embedding, kept = model.model.rotary_emb, torch.from_numpy(cut.kept("head_dim", "", 0))
    whole = rotary_embedding.whole
    rotary_embedding.forward = lambda x, position_ids: tuple(table[..., kept] for table in whole(x, position_ids))


def scaled(kind: str, positions: int = 32, **settings) -> Family:
    """Return Llama with rotary embeddings of another kind."""
    given = {"rope_type": kind, "rope_theta": 10000.0, **settings}
    family = grouped(
        f"llama_{kind}", "LlamaForCausalLM", "LlamaConfig", max_position_embeddings=positions, rope_parameters=given,
        num_hidden_layers=2,
    )  # fmt: skip
    return replace(family, layout=replace(family.layout, before=_keep_whole, after=_slice_rotations))


SHORT, LONG = [1.0, 1.1, 1.3, 1.6, 2.0], [1.0, 1.5, 2.5, 4.0, 6.0]
ROTATIONS = (
    scaled("linear", factor=2.0),
    scaled("dynamic", positions=4, factor=2.0),
    scaled("yarn", factor=4.0, original_max_position_embeddings=8),
    scaled("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8),
    scaled("longrope", factor=4.0, short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=6),
)
"""Llama with the rotary embeddings that frameworks scale for longer texts; too alike to be families of the survey."""

CAPPED = replace(
    grouped("gemma2_capped", "Gemma2ForCausalLM", "Gemma2Config", query_pre_attn_scalar=24, sliding_window=4,
            attn_logit_softcapping=10.0, final_logit_softcapping=48.0, num_hidden_layers=2),
    layout=GEMMA2.layout,
)  # fmt: skip
"""Gemma 2 with caps that equal its head size and its hidden size."""

FAMILIES = (GPT2, LLAMA, GPT_NEOX, OPT, BLOOM, FALCON, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)
