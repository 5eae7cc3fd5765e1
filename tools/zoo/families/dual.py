"""Models with an image tower and a text tower."""

import torch
from torch import nn

from zoo.families.decoders import INPUTS, OPT_BLOCK, POSITIONS, VOCAB, make
from zoo.family import BATCH, Family, Input
from zoo.layout import Layout, Stack

TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    num_attention_heads=3,
    intermediate_size=112,
    num_hidden_layers=5,
    max_position_embeddings=POSITIONS,
    pad_token_id=0,
    bos_token_id=1,
)
IMAGE = dict(intermediate_size=104, num_hidden_layers=4, num_attention_heads=4, image_size=24, patch_size=8)
BOTH = {
    "input_ids": INPUTS["input_ids"],
    "pixel_values": Input("floats", (BATCH, 3, 24, 24)),
    "attention_mask": INPUTS["attention_mask"],
}
LOGITS = {"logits_per_image": (BATCH, BATCH), "text_embeds": (BATCH, "head_0"), "image_embeds": (BATCH, "head_0")}
BLOCK = {
    "layer_norm?.*": "hidden",
    "mlp.fc1.weight": "ffn hidden",
    "mlp.fc1.bias": "ffn",
    "mlp.fc2.weight": "hidden ffn",
    "mlp.fc2.bias": "hidden",
} | OPT_BLOCK
SIZES = {
    "vocab": VOCAB,
    "text.hidden": 48,
    "text.heads": 3,
    "text.head_dim": 16,
    "text.ffn": 112,
    "vision.heads": 4,
    "vision.ffn": 104,
}
OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "vocab text.hidden",
    "text_model.embeddings.position_embedding.weight": "_ text.hidden",
    "text_model.final_layer_norm.*": "text.hidden",
    "vision_model.embeddings.class_embedding": "vision.hidden",
    "vision_model.embeddings.patch_embedding.weight": "vision.hidden _ _ _",
    "vision_model.embeddings.patch_embedding.bias": "vision.hidden",
    "vision_model.embeddings.position_embedding.weight": "_ vision.hidden",
    "vision_model.pre_layrnorm.*": "vision.hidden",
    "vision_model.post_layernorm.*": "vision.hidden",
    "logit_*": "_",
}


def tower(name: str) -> Stack:
    """Return the stack of a tower, `text` or `vision`."""
    return Stack(
        f"{name}_model.encoder.layers",
        rows=BLOCK,
        attributes={"self_attn": {"num_heads": "heads", "head_dim": "head_dim"}},
        prefix=f"{name}.",
        halves={"attention": "zero self_attn.out_proj", "ffn": "zero mlp.fc2"},
        depth=(f"{name}_model:config.num_hidden_layers",),
    )


CLIP = Family(
    "clip",
    make(
        "CLIPModel",
        "CLIPConfig",
        text_config=TEXT | {"eos_token_id": 2},
        vision_config=IMAGE | {"hidden_size": 60},
        projection_dim=28,
    ),
    BOTH,
    LOGITS,
    Layout(
        sizes=SIZES | {"vision.hidden": 60, "vision.head_dim": 15, "head_0": 28},
        rows=OUTSIDE
        | {"visual_projection.weight": "head_0 vision.hidden", "text_projection.weight": "head_0 text.hidden"},
        stacks=(tower("text"), tower("vision")),
        coupled=("vocab", "head_0"),
    ),
    extra={},
)


class PoolingAttention(nn.Module):
    """Multi-head attention of one query whose input, heads and output may differ in width.

    The query's input and the states share one packed weight, so they are one dimension.
    """

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.scale = whole.num_heads, whole.head_dim**-0.5
        for name, weight, bias in zip("qkv", whole.in_proj_weight.chunk(3), whole.in_proj_bias.chunk(3), strict=True):
            linear = nn.Linear(*reversed(weight.shape))
            linear.weight.data, linear.bias.data = weight.data.clone(), bias.data.clone()
            self.add_module(name, linear)
        self.out_proj = whole.out_proj

    def forward(self, query, key, value):
        """Return the attended values, [batch, 1, width], and None in the place of the weights."""
        query, key, value = (
            linear(tensor).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, tensor in ((self.q, query), (self.k, key), (self.v, value))
        )
        context = torch.softmax(query @ key.transpose(-1, -2) * self.scale, -1) @ value
        return self.out_proj(context.transpose(1, 2).flatten(2)), None


def _split_pooling(model: nn.Module) -> None:
    model.vision_model.head.attention = PoolingAttention(model.vision_model.head.attention)


SIGLIP = Family(
    "siglip",
    make(
        "SiglipModel",
        "SiglipConfig",
        text_config=TEXT | {"projection_size": 44},
        vision_config=IMAGE | {"hidden_size": 44},
    ),
    BOTH,
    {name: tuple("projection" if size == "head_0" else size for size in shape) for name, shape in LOGITS.items()},
    Layout(
        sizes=SIZES
        | {
            "vision.hidden": 44,
            "vision.head_dim": 11,
            "projection": 44,
            "pool_heads": 4,
            "pool_head_dim": 11,
            "pool_ffn": 104,
        },
        rows=OUTSIDE
        | {
            "text_model.head.weight": "projection text.hidden",
            "text_model.head.bias": "projection",
            "vision_model.head.probe": "_ _ vision.hidden",
            "vision_model.head.attention.q.weight": "(pool_heads pool_head_dim) vision.hidden",
            "vision_model.head.attention.[kv].weight": "(pool_heads pool_head_dim) vision.hidden",
            "vision_model.head.attention.[qkv].bias": "(pool_heads pool_head_dim)",
            "vision_model.head.attention.out_proj.weight": "projection (pool_heads pool_head_dim)",
            "vision_model.head.attention.out_proj.bias": "projection",
            "vision_model.head.layernorm.*": "projection",
            "vision_model.head.mlp.fc1.weight": "pool_ffn projection",
            "vision_model.head.mlp.fc1.bias": "pool_ffn",
            "vision_model.head.mlp.fc2.weight": "projection pool_ffn",
            "vision_model.head.mlp.fc2.bias": "projection",
        },
        attributes={"vision_model.head.attention": {"num_heads": "pool_heads"}},
        stacks=(tower("text"), tower("vision")),
        coupled=("vocab", "projection"),
        before=_split_pooling,
    ),
    extra={},
)

FAMILIES = (CLIP, SIGLIP)
