"""Encoder-decoder models."""

from dataclasses import replace

from zoo.families.decoders import INPUTS, OPT_BLOCK, POSITIONS, VOCAB, make
from zoo.family import BATCH, DECODER_SEQUENCE, Family, Input
from zoo.layout import Layout, Stack

DECODER_INPUTS = {
    "decoder_input_ids": Input("ids", (BATCH, DECODER_SEQUENCE), below=VOCAB),
    "decoder_attention_mask": Input("mask", (BATCH, DECODER_SEQUENCE)),
}
LOGITS = {"logits": (BATCH, DECODER_SEQUENCE, VOCAB)}
SIZES = {
    "vocab": VOCAB,
    "hidden": 48,
    "encoder.heads": 3,
    "encoder.head_dim": 16,
    "encoder.ffn": 112,
    "decoder.heads": 4,
    "decoder.head_dim": 12,
    "decoder.cross_heads": 4,
    "decoder.cross_head_dim": 12,
    "decoder.ffn": 104,
}
CONFIG = dict(
    vocab_size=VOCAB,
    d_model=48,
    encoder_attention_heads=3,
    decoder_attention_heads=4,
    encoder_ffn_dim=112,
    decoder_ffn_dim=104,
    encoder_layers=5,
    decoder_layers=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)
SELF = {"self_attn": {"num_heads": "heads", "head_dim": "head_dim"}}
CROSS = {"encoder_attn": {"num_heads": "cross_heads", "head_dim": "cross_head_dim"}}


def cross_block(source: str) -> dict[str, str]:
    """Return the rows of a Bart decoder's cross-attention; `source` is the width of the encoder's states."""
    return {
        "encoder_attn.out_proj.weight": "hidden (cross_heads cross_head_dim)",
        "encoder_attn.out_proj.bias": "hidden",
        "encoder_attn.q_proj.weight": "(cross_heads cross_head_dim) hidden",
        "encoder_attn.[kv]_proj.weight": f"(cross_heads cross_head_dim) {source}",
        "encoder_attn.*_proj.bias": "(cross_heads cross_head_dim)",
    }


def stacks(source: str = "hidden", post_norm: bool = True) -> tuple[Stack, Stack]:
    """Return Bart's encoder and decoder."""

    def bypass(projection: str, norm: str) -> str:
        return f"zero {projection}; identity {norm}" if post_norm else f"zero {projection}"

    halves = {
        "attention": bypass("self_attn.out_proj", "self_attn_layer_norm"),
        "ffn": bypass("fc2", "final_layer_norm"),
    }
    cross = {"cross_attention": bypass("encoder_attn.out_proj", "encoder_attn_layer_norm")}
    return (
        Stack("model.encoder.layers", OPT_BLOCK, SELF, "encoder.", halves, ("config.encoder_layers",)),
        Stack(
            "model.decoder.layers",
            OPT_BLOCK | cross_block(source),
            SELF | CROSS,
            "decoder.",
            halves | cross,
            ("config.decoder_layers",),
        ),
    )


OUTSIDE = {
    "model.shared.weight": "vocab hidden",
    "model.*.embed_tokens.weight": "vocab hidden",
    "model.*.embed_positions.weight": "_ hidden",
    "model.*layernorm_embedding.*": "hidden",
    "lm_head.weight": "vocab hidden",
    "final_logits_bias": "_ vocab",
}

BART = Family(
    "bart",
    make(
        "BartForConditionalGeneration", "BartConfig", **CONFIG, max_position_embeddings=POSITIONS, scale_embedding=True
    ),
    INPUTS | DECODER_INPUTS,
    LOGITS,
    Layout(sizes=SIZES, rows=OUTSIDE, stacks=stacks()),
)

MARIAN = Family(
    "marian",
    make(
        "MarianMTModel",
        "MarianConfig",
        **CONFIG,
        max_position_embeddings=POSITIONS,
        scale_embedding=True,
        decoder_start_token_id=0,
    ),
    INPUTS | DECODER_INPUTS,
    LOGITS,
    Layout(sizes=SIZES, rows=OUTSIDE, stacks=stacks()),
)

FRAMES, MELS = 40, 9
WHISPER = Family(
    "whisper",
    make(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **CONFIG,
        max_source_positions=FRAMES // 2,
        max_target_positions=30,
        num_mel_bins=MELS,
        decoder_start_token_id=1,
    ),
    {"input_features": Input("floats", (BATCH, MELS, FRAMES))} | DECODER_INPUTS,
    LOGITS,
    Layout(
        sizes=SIZES | {"stem_0": 48},
        rows={
            "model.encoder.conv1.weight": "stem_0 _ _",
            "model.encoder.conv1.bias": "stem_0",
            "model.encoder.conv2.weight": "encoder.hidden stem_0 _",
            "model.encoder.conv2.bias": "encoder.hidden",
            "model.encoder.embed_positions.weight": "_ encoder.hidden",
            "model.encoder.layer_norm.*": "encoder.hidden",
            "model.decoder.embed_tokens.weight": "vocab decoder.hidden",
            "model.decoder.embed_positions.weight": "_ decoder.hidden",
            "model.decoder.layer_norm.*": "decoder.hidden",
        },
        stacks=stacks("encoder.hidden", post_norm=False),
        coupled=("vocab", "stem_0"),
    ),
)

T5_FFN = {
    "layer.*.DenseReluDense.wi*.weight": "ffn hidden",
    "layer.*.DenseReluDense.wo.weight": "hidden ffn",
    "layer.*.layer_norm.weight": "hidden",
}
T5_SELF = {
    "layer.0.SelfAttention.[qkv].weight": "(heads head_dim) hidden",
    "layer.0.SelfAttention.o.weight": "hidden (heads head_dim)",
    "layer.0.SelfAttention.relative_attention_bias.weight": "_ heads",
}
T5_ATTRIBUTES = {
    "layer.0.SelfAttention": {
        "n_heads": "heads",
        "key_value_proj_dim": "head_dim",
        "inner_dim": "heads * head_dim",
    }
}


def _own_cross_bias(model) -> None:
    """Let each cross-attention make its own zero bias, instead of passing on one with the first block's heads."""
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.register_forward_pre_hook(
            lambda _, positional, named: (positional, named | {"position_bias": None}), with_kwargs=True
        )


T5_FIRST = ("layer.0.SelfAttention.relative_attention_bias",)
T5 = Family(
    "t5",
    make(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCAB,
        d_model=48,
        d_kv=10,
        num_heads=3,
        d_ff=112,
        num_layers=5,
        num_decoder_layers=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        pad_token_id=0,
        decoder_start_token_id=0,
    ),
    INPUTS | DECODER_INPUTS,
    LOGITS,
    Layout(
        sizes={
            "vocab": VOCAB,
            "hidden": 48,
            "heads": 3,
            "head_dim": 10,
            "cross_heads": 3,
            "cross_head_dim": 10,
            "ffn": 112,
        },
        rows={
            "shared.weight": "vocab hidden",
            "*.embed_tokens.weight": "vocab hidden",
            "*.final_layer_norm.weight": "hidden",
            "lm_head.weight": "vocab hidden",
        },
        stacks=(
            Stack(
                "encoder.block",
                rows=T5_SELF | T5_FFN,
                attributes=T5_ATTRIBUTES,
                prefix="encoder.",
                halves={"attention": "zero layer.0.SelfAttention.o", "ffn": "zero layer.1.DenseReluDense.wo"},
                depth=("config.num_layers", "encoder:config.num_layers"),
                first=T5_FIRST,
            ),
            Stack(
                "decoder.block",
                rows=T5_SELF
                | {
                    "layer.1.EncDecAttention.[qkv].weight": "(cross_heads cross_head_dim) hidden",
                    "layer.1.EncDecAttention.o.weight": "hidden (cross_heads cross_head_dim)",
                }
                | T5_FFN,
                attributes=T5_ATTRIBUTES
                | {
                    "layer.1.EncDecAttention": {
                        "n_heads": "cross_heads",
                        "key_value_proj_dim": "cross_head_dim",
                        "inner_dim": "cross_heads * cross_head_dim",
                    }
                },
                prefix="decoder.",
                halves={
                    "attention": "zero layer.0.SelfAttention.o",
                    "cross_attention": "zero layer.1.EncDecAttention.o",
                    "ffn": "zero layer.2.DenseReluDense.wo",
                },
                depth=("config.num_decoder_layers", "decoder:config.num_layers"),
                first=T5_FIRST,
            ),
        ),
        stack_coupled=("heads", "cross_heads"),  # by the position bias, and a bias of zeros
        before=_own_cross_bias,
    ),
    gain=0.9,  # its attention is not scaled by the head's size
)

T5_APART = replace(T5, name="t5_apart", layout=replace(T5.layout, stack_coupled=("heads",)))
"""T5 whose cross-attention is cut block by block: its bias is a zero, whatever a graph makes of it."""

FAMILIES = (T5, BART, MARIAN, WHISPER)
