"""What a graph is made of: every field is a choice, so that a failing graph can be written down as a test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Writing:
    """How the graph is written. reshape: where a target's sizes come from. cut: how a tensor is taken apart.
    linear: how a projection is written."""

    reshape: str = "constant"
    cut: str = "split"
    linear: str = "matmul"


@dataclass(frozen=True)
class Attention:
    """projection: how queries, keys and values are made. position: how they learn of their place. mixing: what computes
    the scores. repeat: how grouped keys meet their queries. mask: what is added. scale: what scales the scores."""

    projection: str = "separate"
    position: str = "none"
    mixing: str = "composed"
    groups: int = 1
    repeat: str = "expand"
    mask: str = "none"
    scale: str = "divide"
    softmax: str = "fused"


@dataclass(frozen=True)
class FeedForward:
    kind: str = "plain"
    activation: str = "Relu"


@dataclass(frozen=True)
class Block:
    """placement: where the norms are. shared: the previous block once more, with its weights. branch: whether the FFN
    is in an If. detour: what the stream goes through behind the block, and comes out of whole."""

    attention: Attention | None = Attention()
    ffn: FeedForward = FeedForward()
    placement: str = "pre"
    shared: bool = False
    branch: str = "none"
    detour: str = "none"


@dataclass(frozen=True)
class Recipe:
    blocks: tuple[Block, ...] = (Block(),)
    entry: str = "ids"
    norm: str = "fused"
    exit: str = "stream"
    writing: Writing = Writing()
    opset: int = 18
    hidden: int = 12
    heads: int = 3
    head: int = 4
    ffn: int = 10


CHOICES: dict[type, dict[str, tuple]] = {
    Writing: {
        "reshape": ("constant", "zero", "gathered", "sliced", "one_gather", "ranged"),
        "cut": ("split", "slice", "gather"),
        "linear": ("matmul", "transposed", "gemm", "einsum", "dequantized"),
    },
    Attention: {
        "projection": ("separate", "thirds", "by_head", "by_kind", "einsum"),
        "position": (
            "none",
            "halves",
            "halves",
            "interleaved",
            "operator",
            "partial",
            "frequencies",
            "slopes",
            "relative",
            "norm",
        ),
        "mixing": (
            "composed",
            "composed",
            "composed",
            "einsum",
            "Attention",
            "Attention4",
            "MultiHeadAttention",
            "flat",
        ),
        "groups": (1, 1, 2, 3),
        "repeat": ("expand", "tile", "broadcast", "gather", "concat"),
        "mask": ("none", "padding", "causal", "fill", "where", "expanded"),
        "scale": ("divide", "queries", "keys", "shape", "softcap"),
        "softmax": ("fused", "written"),
    },
    FeedForward: {
        "kind": (
            "plain",
            "gated",
            "gated_joint",
            "gated_pairs",
            "gated_strided",
            "pointwise",
            "depthwise",
            "experts",
            "picked_experts",
            "two_paths",
            "flat",
            "low_rank",
        ),
        "activation": ("Relu", "Tanh", "erf", "silu", "cubic"),
    },
    Block: {
        "placement": ("pre", "post", "parallel", "sandwich"),
        "shared": (False, False, True),
        "branch": ("none", "none", "none", "skip", "either"),
        "detour": ("none", "none", "halves", "flat", "transposed", "weighted_half", "padded", "scaled"),
    },
    Recipe: {
        "entry": ("ids", "positions", "ranged_positions", "segments", "floats", "image", "tokens"),
        "norm": (
            "fused",
            "rms",
            "written",
            "rms_written",
            "float_width",
            "float_reciprocal",
            "computed_width",
            "uniform",
            "group",
            "instance",
            "none",
        ),
        "exit": ("stream", "tied", "untied", "first", "mean", "argmax", "both"),
        "opset": (18, 17, 13, 21, 23),
        "hidden": (12, 8, 16, 18, 24),
        "heads": (3, 2, 4),
        "head": (4, 6, 8),
        "ffn": (10, 7, 12, 14, 24),
    },
}
"""What each field of a recipe may be; the first is the simplest."""

GROUPED = ("composed", "Attention", "Attention4")
"""Ways to mix that take fewer heads of keys than of queries."""


def opset_of(recipe: Recipe) -> int:
    """Return the opset of a recipe: that asked for, or the one its operators need."""
    mixings = [block.attention.mixing for block in recipe.blocks if block.attention]
    needs = [23 for mixing in mixings if mixing in ("Attention", "Attention4")]
    return max([recipe.opset, *needs, 21 if recipe.norm == "group" else 0])
