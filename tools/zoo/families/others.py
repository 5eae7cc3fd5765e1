"""Audio encoders and state-space models."""

import numpy as np
from torch.nn.utils import parametrize

from zoo.families.decoders import VOCAB, make
from zoo.family import BATCH, SAMPLES, Family, Input
from zoo.layout import Layout, Stack

GROUPS, CHARACTERS = 4, 31


def _fold_weight_norm(model) -> None:
    """Make the normed weight a plain one, as exporters do: its norm is the parent's, not that of the kept entries."""
    parametrize.remove_parametrizations(model.wav2vec2.encoder.pos_conv_embed.conv, "weight")


def _within(kept: np.ndarray, size: int) -> np.ndarray:
    """Return the kept entries of each group; a grouped convolution wants the same ones in each."""
    width = size // GROUPS
    groups = [kept[kept // width == group] % width for group in dict.fromkeys((kept // width).tolist())]
    if not all(np.array_equal(groups[0], group) for group in groups):
        raise ValueError(f"hidden is {GROUPS} groups of {width}: keep the same entries in each kept group")
    return groups[0]


WAV2VEC2 = Family(
    "wav2vec2",
    make(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        vocab_size=CHARACTERS,
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=112,
        num_hidden_layers=5,
        conv_dim=[20, 24, 28],
        conv_kernel=[10, 3, 3],
        conv_stride=[5, 2, 2],
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=GROUPS,
    ),
    {"input_values": Input("floats", (BATCH, SAMPLES))},
    {"logits": (BATCH, "frames", CHARACTERS)},
    Layout(
        sizes={"hidden": 48, "heads": 3, "head_dim": 16, "ffn": 112, "stem_0": 20, "stem_1": 24, "stem_2": 28},
        rows={
            "wav2vec2.masked_spec_embed": "hidden",
            "wav2vec2.feature_extractor.conv_layers.0.conv.weight": "stem_0 _ _",
            "wav2vec2.feature_extractor.conv_layers.0.*": "stem_0",
            "wav2vec2.feature_extractor.conv_layers.1.conv.weight": "stem_1 stem_0 _",
            "wav2vec2.feature_extractor.conv_layers.2.conv.weight": "stem_2 stem_1 _",
            "wav2vec2.feature_projection.layer_norm.*": "stem_2",
            "wav2vec2.feature_projection.projection.weight": "hidden stem_2",
            "wav2vec2.feature_projection.projection.bias": "hidden",
            "wav2vec2.encoder.pos_conv_embed.conv.weight": "hidden within _",
            "wav2vec2.encoder.pos_conv_embed.conv.bias": "hidden",
            "wav2vec2.encoder.layer_norm.*": "hidden",
            "lm_head.weight": "_ hidden",
            "lm_head.bias": "_",
        },
        attributes={"wav2vec2.encoder.pos_conv_embed.conv": {"groups": "hidden // within", "in_channels": "hidden"}},
        stacks=(
            Stack(
                "wav2vec2.encoder.layers",
                rows={
                    "*layer_norm.*": "hidden",
                    "attention.out_proj.weight": "hidden (heads head_dim)",
                    "attention.out_proj.bias": "hidden",
                    "attention.*_proj.weight": "(heads head_dim) hidden",
                    "attention.*_proj.bias": "(heads head_dim)",
                    "feed_forward.intermediate_dense.weight": "ffn hidden",
                    "feed_forward.intermediate_dense.bias": "ffn",
                    "feed_forward.output_dense.weight": "hidden ffn",
                    "feed_forward.output_dense.bias": "hidden",
                },
                attributes={"attention": {"num_heads": "heads", "head_dim": "head_dim"}},
                halves={
                    "attention": "zero attention.out_proj; identity layer_norm",
                    "ffn": "zero feed_forward.output_dense; identity final_layer_norm",
                },
            ),
        ),
        derived={"within": ("hidden", _within, lambda size: size // GROUPS)},
        before=_fold_weight_norm,
    ),
    extra={},
)

LENGTH = 7  # the scan is unrolled at export
MAMBA = Family(
    "mamba",
    make(
        "MambaForCausalLM",
        "MambaConfig",
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=5,
        state_size=8,
        time_step_rank=5,
        expand=2,
        use_mambapy=False,
    ),
    {"input_ids": Input("ids", (BATCH, LENGTH), below=VOCAB), "attention_mask": Input("mask", (BATCH, LENGTH))},
    {"logits": (BATCH, LENGTH, VOCAB)},
    Layout(
        sizes={"vocab": VOCAB, "hidden": 48, "ffn": 96, "inner": 8, "ffn_0": 5},
        rows={"backbone.embeddings.weight": "vocab hidden", "backbone.norm_f.weight": "hidden"},
        stacks=(
            Stack(
                "backbone.layers",
                rows={
                    "norm.weight": "hidden",
                    "mixer.A_log": "ffn inner",
                    "mixer.D": "ffn",
                    "mixer.conv1d.weight": "ffn _ _",
                    "mixer.conv1d.bias": "ffn",
                    "mixer.in_proj.weight": "(2 ffn) hidden",
                    "mixer.x_proj.weight": "(ffn_0 + inner + inner) ffn",
                    "mixer.dt_proj.weight": "ffn ffn_0",
                    "mixer.dt_proj.bias": "ffn",
                    "mixer.out_proj.weight": "hidden ffn",
                },
                attributes={
                    "mixer": {"intermediate_size": "ffn", "ssm_state_size": "inner", "time_step_rank": "ffn_0"}
                },
                halves={"ffn": "zero mixer.out_proj"},
            ),
        ),
    ),
    gain=0.8,  # its states grow exponentially
)

FAMILIES = (WAV2VEC2, MAMBA)
