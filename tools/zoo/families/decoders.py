"""Decoder-only language models."""

from functools import partial

import transformers

from zoo.family import BATCH, SEQUENCE, Family, Input
from zoo.layout import Layout, Stack

VOCAB, POSITIONS = 211, 40
INPUTS = {
    "input_ids": Input("ids", (BATCH, SEQUENCE), below=VOCAB),
    "attention_mask": Input("mask", (BATCH, SEQUENCE)),
}
LOGITS = {"logits": (BATCH, SEQUENCE, VOCAB)}


def _make(model: str, config: str, **sizes):
    settings = getattr(transformers, config)(**sizes)
    return getattr(transformers, model)(settings)


def make(model: str, config: str, **sizes):
    """Return a function that builds the class `model` from the class `config`."""
    return partial(_make, model, config, **sizes)


GPT2 = Family(
    "gpt2",
    make("GPT2LMHeadModel", "GPT2Config", n_embd=48, n_head=3, n_inner=112, n_layer=5, vocab_size=VOCAB,
         n_positions=POSITIONS, bos_token_id=1, eos_token_id=1),
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
SIZES = dict(vocab_size=VOCAB, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=10,
             intermediate_size=112, num_hidden_layers=5, max_position_embeddings=POSITIONS,
             pad_token_id=0, bos_token_id=1, eos_token_id=1)
GROUPED_LAYOUT = Layout(
    sizes=GROUPED_SIZES,
    rows=OUTSIDE,
    stacks=(
        Stack("model.layers", rows={"*layernorm.weight": "hidden", **ATTENTION, **GATED}, attributes=GROUPED,
              halves=HALVES),
    ),
    coupled=("hidden", "vocab", "head_dim"),
)

LLAMA = Family("llama", make("LlamaForCausalLM", "LlamaConfig", **SIZES), INPUTS, LOGITS, GROUPED_LAYOUT)

FAMILIES = (GPT2, LLAMA)
