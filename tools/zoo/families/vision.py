"""Image encoders."""

from zoo.families.decoders import make
from zoo.family import BATCH, Family, Input
from zoo.layout import Layout, Stack

IMAGE, PATCH, LABELS = 24, 8, 13
INPUTS = {"pixel_values": Input("floats", (BATCH, 3, IMAGE, IMAGE))}
LOGITS = {"logits": (BATCH, LABELS)}
SIZES = dict(hidden_size=48, num_attention_heads=4, intermediate_size=112, num_hidden_layers=5, image_size=IMAGE,
             patch_size=PATCH, num_labels=LABELS)
LAYOUT_SIZES = {"hidden": 48, "heads": 4, "head_dim": 12, "ffn": 112}

VIT_BLOCK = {
    "attention.[qkv]_proj.weight": "(heads head_dim) hidden",
    "attention.[qkv]_proj.bias": "(heads head_dim)",
    "attention.o_proj.weight": "hidden (heads head_dim)",
    "attention.o_proj.bias": "hidden",
    "layernorm_*": "hidden",
    "mlp.fc1.weight": "ffn hidden",
    "mlp.fc1.bias": "ffn",
    "mlp.fc2.weight": "hidden ffn",
    "mlp.fc2.bias": "hidden",
}
VIT_ATTRIBUTES = {"attention": {"num_attention_heads": "heads", "head_dim": "head_dim"}}
VIT_HALVES = {"attention": "zero attention.o_proj", "ffn": "zero mlp.fc2"}


def outside(base: str) -> dict[str, str]:
    """Return the rows of a ViT outside its blocks."""
    return {
        f"{base}.embeddings.patch_embeddings.projection.weight": "hidden _ _ _",
        f"{base}.embeddings.patch_embeddings.projection.bias": "hidden",
        f"{base}.embeddings.*token*": "_ _ hidden",
        f"{base}.embeddings.position_embeddings": "_ _ hidden",
        f"{base}.layernorm.*": "hidden",
        "classifier.weight": "_ hidden",
        "classifier.bias": "_",
        "*_classifier.weight": "_ hidden",
        "*_classifier.bias": "_",
    }


VIT = Family(
    "vit",
    make("ViTForImageClassification", "ViTConfig", **SIZES),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES,
        rows=outside("vit"),
        stacks=(Stack("vit.layers", rows=VIT_BLOCK, attributes=VIT_ATTRIBUTES, halves=VIT_HALVES),),
    ),
    extra={},
)

FAMILIES = (VIT,)
