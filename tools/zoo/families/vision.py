"""Image encoders."""

from types import MethodType

from zoo.families.decoders import make
from zoo.family import BATCH, Family, Input
from zoo.layout import Layout, Stack

IMAGE, PATCH, LABELS = 24, 8, 13
INPUTS = {"pixel_values": Input("floats", (BATCH, 3, IMAGE, IMAGE))}
LOGITS = {"logits": (BATCH, LABELS)}
SIZES = dict(
    hidden_size=48,
    num_attention_heads=4,
    intermediate_size=112,
    num_hidden_layers=5,
    image_size=IMAGE,
    patch_size=PATCH,
    num_labels=LABELS,
)
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

DEIT = Family(
    "deit",
    make("DeiTForImageClassificationWithTeacher", "DeiTConfig", **SIZES),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES,
        rows=outside("deit"),
        stacks=(Stack("deit.layers", rows=VIT_BLOCK, attributes=VIT_ATTRIBUTES, halves=VIT_HALVES),),
    ),
    extra={},
)

BEIT = Family(
    "beit",
    make("BeitForImageClassification", "BeitConfig", **SIZES, use_relative_position_bias=True),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES,
        rows=outside("beit") | {"beit.pooler.layernorm.*": "hidden"},
        stacks=(
            Stack(
                "beit.layers",
                rows=VIT_BLOCK
                | {"lambda_?": "hidden", "relative_position_bias.relative_position_bias_table": "_ heads"},
                attributes=VIT_ATTRIBUTES,
                halves=VIT_HALVES,
            ),
        ),
    ),
    extra={},
)

DINOV2 = Family(
    "dinov2",
    make("Dinov2ForImageClassification", "Dinov2Config", **(SIZES | {"mlp_ratio": 3})),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES | {"ffn": 144},
        rows={"dinov2.embeddings.mask_token": "_ hidden"} | outside("dinov2") | {"classifier.weight": "_ (2 hidden)"},
        stacks=(
            Stack(
                "dinov2.encoder.layer",
                rows=VIT_BLOCK | {"norm?.*": "hidden", "layer_scale?.lambda1": "hidden"},
                attributes=VIT_ATTRIBUTES,
                halves=VIT_HALVES,
            ),
        ),
    ),
    extra={},
)


def staged(rows: dict[str, str], stage: int) -> dict[str, str]:
    """Return a block's rows with the hidden size of a stage, `hidden_<stage>`."""
    return {name: pattern.replace("hidden", f"hidden_{stage}") for name, pattern in rows.items()}


SWIN = Family(
    "swin",
    make(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=32,
        patch_size=4,
        embed_dim=24,
        depths=[2, 4],
        num_heads=[2, 3],
        window_size=4,
        mlp_ratio=3.0,
        num_labels=LABELS,
    ),
    {"pixel_values": Input("floats", (BATCH, 3, 32, 32))},
    LOGITS,
    Layout(
        sizes={"hidden_0": 24, "hidden_1": 48}
        | {f"blocks.{i}.{name}": size for i in (0, 1) for name, size in {"heads": 2, "head_dim": 12, "ffn": 72}.items()}
        | {"heads": 3, "head_dim": 16, "ffn": 144},
        rows={
            "swin.embeddings.patch_embeddings.projection.weight": "hidden_0 _ _ _",
            "swin.embeddings.*": "hidden_0",
            "swin.encoder.layers.0.downsample.reduction.weight": "hidden_1 (4 hidden_0)",
            "swin.encoder.layers.0.downsample.norm.*": "(4 hidden_0)",
            "swin.layernorm.*": "hidden_1",
            "classifier.weight": "_ hidden_1",
            "classifier.bias": "_",
        },
        stacks=tuple(
            Stack(
                f"swin.encoder.layers.{stage}.blocks",
                rows=staged(VIT_BLOCK, stage)
                | {"attention.relative_position_bias.relative_position_bias_table": "_ heads"},
                attributes=VIT_ATTRIBUTES,
                halves=VIT_HALVES,
                depth=(),
                start=start,
            )
            for stage, start in ((0, 0), (1, 2))
        ),
    ),
    extra={},
)

REDUCTION = {
    "attention.sequence_reduction.sequence_reduction.weight": "ffn_0 hidden_0 _ _",
    "attention.sequence_reduction.*": "ffn_0",
    "attention.[kv]_proj.weight": "(heads head_dim) ffn_0",
}


def _free_reduction(model) -> None:
    """Let the reduced keys and values be of another width than the hidden states, as they are in the graph."""

    def reduce(self, states, height, width):
        image = self.sequence_reduction(states.transpose(1, 2).unflatten(2, (height, width)))
        return self.layer_norm(image.flatten(2).transpose(1, 2))

    for block in model.segformer.stages[0].blocks:
        block.attention.sequence_reduction.forward = MethodType(reduce, block.attention.sequence_reduction)


SEGFORMER = Family(
    "segformer",
    make(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[2, 3],
        hidden_sizes=[24, 40],
        num_attention_heads=[2, 4],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[3, 4],
        decoder_hidden_size=36,
        num_labels=LABELS,
    ),
    {"pixel_values": Input("floats", (BATCH, 3, 32, 32))},
    {"logits": (BATCH, LABELS, 8, 8)},
    Layout(
        sizes={"hidden_0": 24, "hidden_1": 40, "head_0": 36, "head_1": 36, "head_2": 36, "ffn_0": 24}
        | {f"blocks.{i}.{name}": size for i in (0, 1) for name, size in {"heads": 2, "head_dim": 12, "ffn": 72}.items()}
        | {"heads": 4, "head_dim": 10, "ffn": 160},
        before=_free_reduction,
        rows={
            "segformer.stages.0.patch_embeddings.proj.weight": "hidden_0 _ _ _",
            "segformer.stages.0.*": "hidden_0",
            "segformer.stages.1.patch_embeddings.proj.weight": "hidden_1 hidden_0 _ _",
            "segformer.stages.1.*": "hidden_1",
            "decode_head.linear_projections.0.proj.weight": "head_0 hidden_0",
            "decode_head.linear_projections.0.proj.bias": "head_0",
            "decode_head.linear_projections.1.proj.weight": "head_1 hidden_1",
            "decode_head.linear_projections.1.proj.bias": "head_1",
            "decode_head.linear_fuse.weight": "head_2 (head_1 + head_0) _ _",
            "decode_head.batch_norm.*": "head_2",
            "decode_head.classifier.weight": "_ head_2 _ _",
            "decode_head.classifier.bias": "_",
        },
        stacks=tuple(
            Stack(
                f"segformer.stages.{stage}.blocks",
                rows=(REDUCTION if stage == 0 else {})
                | {"mlp.dwconv.dwconv.weight": "ffn _ _ _", "mlp.dwconv.dwconv.bias": "ffn"}
                | staged(VIT_BLOCK, stage),
                attributes=VIT_ATTRIBUTES,
                halves=VIT_HALVES,
                depth=(),
                start=start,
            )
            for stage, start in ((0, 0), (1, 2))
        ),
    ),
    extra={},
)

CONVNEXT = Family(
    "convnext",
    make(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        depths=[2, 3],
        hidden_sizes=[24, 40],
        num_stages=2,
        image_size=32,
        patch_size=4,
        num_labels=LABELS,
    ),
    {"pixel_values": Input("floats", (BATCH, 3, 32, 32))},
    LOGITS,
    Layout(
        sizes={"hidden_0": 24, "hidden_1": 40, "blocks.0.ffn": 96, "blocks.1.ffn": 96, "ffn": 160},
        rows={
            "convnext.embeddings.patch_embeddings.weight": "hidden_0 _ _ _",
            "convnext.embeddings.*": "hidden_0",
            "convnext.encoder.stages.1.downsampling_layer.0.*": "hidden_0",
            "convnext.encoder.stages.1.downsampling_layer.1.weight": "hidden_1 hidden_0 _ _",
            "convnext.encoder.stages.1.downsampling_layer.1.bias": "hidden_1",
            "convnext.layernorm.*": "hidden_1",
            "classifier.weight": "_ hidden_1",
            "classifier.bias": "_",
        },
        stacks=tuple(
            Stack(
                f"convnext.encoder.stages.{stage}.layers",
                rows=staged(
                    {
                        "layer_scale_parameter": "hidden",
                        "dwconv.weight": "hidden _ _ _",
                        "dwconv.bias": "hidden",
                        "layernorm.*": "hidden",
                        "pwconv1.weight": "ffn hidden",
                        "pwconv1.bias": "ffn",
                        "pwconv2.weight": "hidden ffn",
                        "pwconv2.bias": "hidden",
                    },
                    stage,
                ),
                halves={"ffn": "zero pwconv2"},
                depth=(),
                start=start,
            )
            for stage, start in ((0, 0), (1, 2))
        ),
    ),
    extra={},
)

FAMILIES = (VIT, DEIT, BEIT, DINOV2, SWIN, SEGFORMER, CONVNEXT)
