"""Blocks of streams that are laid out unusually: norms at the end of a block, learned queries, side branches."""

import io
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch

from graphclone.analysis import analyse
from graphclone.calibration.session import open_session
from graphclone.model import Model
from graphclone.plan import Plan
from graphclone.subclone import calibrate, subclone
from graphclone.surgery import apply
from graphclone.verify import verify

Graph = Callable[..., Model]
SHAPES = "int64[4] apart = {0, 0, 3, 4}, int64[3] together = {0, 0, 12}"


class Text:
    """A graph's text while it is written: each method adds nodes and returns the name of what they give."""

    def __init__(self) -> None:
        self.nodes: list[str] = []
        self.weights: list[str] = []

    def node(self, op: str, *inputs: str, attributes: str = "") -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(f"{name} = {op} {attributes}({', '.join(inputs)})")
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(f"float[{', '.join(map(str, shape))}] {name}")
        return name

    def linear(self, x: str, inner: int, outer: int) -> str:
        return self.node("MatMul", x, self.weight(inner, outer))

    def norm(self, x: str, width: int = 12) -> str:
        return self.node("LayerNormalization", x, self.weight(width), self.weight(width))

    def ffn(self, x: str, inner: int) -> str:
        return self.linear(self.node("Relu", self.linear(self.norm(x), 12, inner)), inner, 12)

    def attend(self, x: str, to: str, inner: int = 10) -> str:
        q, k, v = (self.linear(item, 12, inner) for item in (self.norm(x), to, to))
        scores = self.node("MatMul", q, self.node("Transpose", k, attributes="<perm = [0, 2, 1]> "))
        return self.linear(self.node("MatMul", self.node("Softmax", scores), v), inner, 12)

    def add(self, x: str, y: str) -> str:
        return self.node("Add", x, y)

    def model(self, graph: Graph, y: str, head: str = "", constants: str = "") -> Model:
        lines = "\n".join(self.nodes)
        declared = ", ".join([*self.weights, *filter(None, [constants])])
        return graph(
            f"{head or '(float[B, S, 12] x) => (float[B, S, 12] y)'} <{declared}> {{ {lines}\n y = Relu({y}) }}"
        )


def kinds(model: Model) -> dict[str, list[list[str]]]:
    stacks = analyse(model).stacks
    return {stack.prefix: [[half.kind for half in block.halves] for block in stack.blocks] for stack in stacks}


@pytest.mark.parametrize("count", [2, 3])
def test_a_norm_at_the_end_of_each_block_belongs_to_it(graph: Graph, count: int) -> None:
    """A Conformer: half an FFN, attention, another branch, half an FFN, a norm, and no norm behind the blocks."""
    text = Text()
    x = text.linear("x", 12, 12)
    for _ in range(count):
        x = text.add(x, text.ffn(x, 20))
        x = text.add(x, text.attend(x, x))
        x = text.add(x, text.ffn(x, 15))
        x = text.norm(text.add(x, text.ffn(x, 20)))
    model = text.model(graph, x)
    assert kinds(model) == {"": [["ffn", "attention", "ffn", "ffn"]] * count}
    assert verify(apply(model, Plan(blocks={"": (0,)}))).ok
    child = subclone(model, ffn=8, by="first", rescale="none")
    assert sorted(d.size for d in analyse(child).dimensions if d.role == "ffn") == sorted([8, 8, 15] * count)


QUERIES = "float[1, 5, 12] queries, int64[1] zero = {0}, int64[1] one = {1}, int64[2] rest = {1, 1}"


@pytest.mark.parametrize("own", [False, True])
def test_learned_queries_begin_a_stream(graph: Graph, own: bool) -> None:
    """A Perceiver's latents read the input anew in each block; a DETR's queries attend to one another as well."""
    text = Text()
    memory = text.linear("x", 12, 12)
    batch = text.node("Slice", text.node("Shape", "x"), "zero", "one")
    x = text.node("Expand", "queries", text.node("Concat", batch, "rest", attributes="<axis = 0> "))
    for _ in range(3):
        x = text.add(x, text.attend(x, x)) if own else x
        x = text.add(x, text.attend(x, memory))
        x = text.add(x, text.ffn(x, 20))
    model = text.model(graph, text.norm(x), "(float[B, S, 12] x) => (float[B, 5, 12] y)", QUERIES)
    assert kinds(model) == {"": [["attention"] * own + ["cross_attention", "ffn"]] * 3}
    roles = {d.name: d.size for d in analyse(model).dimensions if d.name.startswith("blocks.0.")}
    assert roles["blocks.0.cross_head_dim"] == roles["blocks.0.cross_v_head_dim"] == 10
    assert verify(apply(model, Plan(blocks={"": (0, 2)}))).ok


def test_blocks_in_a_branch_that_another_passes_by(graph: Graph) -> None:
    """A MobileViT's transformer: its output is concatenated with what it started from."""
    text = Text()
    start = text.linear("x", 12, 12)
    x = text.linear(start, 12, 12)
    for _ in range(3):
        x = text.add(x, text.attend(x, x))
        x = text.add(x, text.ffn(x, 20))
    packed = text.linear(text.norm(x), 12, 30)
    both = text.node("Concat", start, text.linear(packed, 30, 12), attributes="<axis = -1> ")
    model = text.model(graph, text.linear(both, 24, 12))
    assert kinds(model) == {"": [["attention", "ffn"]] * 3}


def test_linear_attention_is_attention(graph: Graph) -> None:
    """Keys times values is summed over the sequence, for each head; no softmax tells."""
    text = Text()
    x = text.linear("x", 12, 12)
    for _ in range(2):
        normed = text.norm(x)
        q, k, v = (text.node("Reshape", text.linear(normed, 12, 12), "apart") for _ in range(3))
        state = text.node("Einsum", text.node("Relu", k), v, attributes='<equation = "bshd,bshe->bhde"> ')
        mixed = text.node("Einsum", text.node("Relu", q), state, attributes='<equation = "bshd,bhde->bshe"> ')
        x = text.add(x, text.linear(text.node("Reshape", mixed, "together"), 12, 12))
        x = text.add(x, text.ffn(x, 20))
    model = text.model(graph, text.norm(x), constants=SHAPES)
    assert kinds(model) == {"": [["attention", "ffn"]] * 2}
    names = [d.name for d in analyse(model).dimensions if d.name.startswith("blocks.0.")]
    assert names == ["blocks.0.heads", "blocks.0.head_dim", "blocks.0.v_head_dim", "blocks.0.ffn"]


def test_talking_heads_are_heads(graph: Graph) -> None:
    """Scores are mixed among heads by a convolution of one place before the softmax, and by a matrix behind it."""
    text = Text()
    x = text.linear("x", 12, 12)
    for _ in range(2):
        normed = text.norm(x)
        parts = [text.node("Reshape", text.linear(normed, 12, 12), "apart") for _ in range(3)]
        q, v = (text.node("Transpose", part, attributes="<perm = [0, 2, 1, 3]> ") for part in (parts[0], parts[2]))
        k = text.node("Transpose", parts[1], attributes="<perm = [0, 2, 3, 1]> ")
        scores = text.node(
            "Conv", text.node("MatMul", q, k), text.weight(3, 3, 1, 1), attributes="<kernel_shape = [1, 1]> "
        )
        last = text.node("Transpose", text.node("Softmax", scores), attributes="<perm = [0, 2, 3, 1]> ")
        shares = text.node("Transpose", text.linear(last, 3, 3), attributes="<perm = [0, 3, 1, 2]> ")
        mixed = text.node("Transpose", text.node("MatMul", shares, v), attributes="<perm = [0, 2, 1, 3]> ")
        x = text.add(x, text.linear(text.node("Reshape", mixed, "together"), 12, 12))
        x = text.add(x, text.ffn(x, 20))
    model = text.model(graph, text.norm(x), constants=SHAPES)
    assert kinds(model) == {"": [["attention", "ffn"]] * 2}
    sizes = {d.name[9:]: (d.size, d.role) for d in analyse(model).dimensions if d.name.startswith("blocks.0.")}
    assert [name for name, (_, role) in sizes.items() if role == "heads"] == ["heads", "mixed_heads", "v_heads"]
    assert set(sizes) == {"heads", "mixed_heads", "v_heads", "head_dim", "v_head_dim", "ffn"}
    child = subclone(model, heads=2, by="first", rescale="none")
    assert {d.size for d in analyse(child).dimensions if d.role == "heads"} == {2}


def test_the_query_heads_of_one_key_head_are_heads(graph: Graph) -> None:
    text = Text()
    x = text.linear("x", 12, 12)
    for _ in range(2):
        normed = text.norm(x)
        q = text.node("Reshape", text.linear(normed, 12, 12), "apart")
        keys, values = (text.linear(normed, 12, 4) for _ in range(2))
        scores = text.node("Einsum", q, keys, attributes='<equation = "bihd,bjd->bhij"> ')
        mixed = text.node("Einsum", text.node("Softmax", scores), values, attributes='<equation = "bhij,bjd->bihd"> ')
        x = text.add(x, text.linear(text.node("Reshape", mixed, "together"), 12, 12))
        x = text.add(x, text.ffn(x, 20))
    model = text.model(graph, text.norm(x), constants=SHAPES)
    names = [d.name for d in analyse(model).dimensions if d.name.startswith("blocks.0.")]
    assert names == [f"blocks.0.{role}" for role in ("heads", "head_dim", "v_head_dim", "ffn")]


def test_a_learned_token_beside_the_others_takes_part_in_attention(graph: Graph) -> None:
    """Scores are then over a concatenated axis, of which no part is an axis of scores itself."""
    text = Text()
    x = text.node("Concat", text.linear("x", 12, 12), "token", attributes="<axis = 1> ")
    for _ in range(2):
        x = text.add(x, text.attend(x, x))
        x = text.add(x, text.ffn(x, 20))
    head = "(float[2, 6, 12] x) => (float[2, 8, 12] y)"
    model = text.model(graph, text.norm(x), head, "float[2, 2, 12] token")
    assert kinds(model) == {"": [["attention", "ffn"]] * 2}


def test_a_norm_over_a_turned_stream_is_no_break(graph: Graph) -> None:
    """BatchNorm wants channels before positions: the stream is turned, normalised and turned back."""
    text = Text()
    x = text.linear("x", 12, 12)
    for _ in range(2):
        for branch in (text.attend, lambda x, _: text.ffn(x, 20)):
            turned = text.node("Transpose", text.add(x, branch(x, x)), attributes="<perm = [0, 2, 1]> ")
            normed = text.node("BatchNormalization", turned, *(text.weight(12) for _ in range(3)), "variance")
            x = text.node("Transpose", normed, attributes="<perm = [0, 2, 1]> ")
    ones = ", ".join(["1.0"] * 12)
    head = "(float[B, 6, 12] x) => (float[B, 6, 12] y)"
    model = text.model(graph, x, head, f"float[12] variance = {{{ones}}}")
    assert kinds(model) == {"": [["attention", "ffn"]] * 2}
    assert verify(apply(model, Plan(blocks={"": (1,)}))).ok


def test_a_stream_that_is_not_turned_back_at_its_end(graph: Graph) -> None:
    """A SqueezeBERT's convolutions want channels before positions, and an export leaves out a turn and its undoing."""
    text = Text()
    x = text.node("Transpose", text.linear("x", 12, 12), attributes="<perm = [0, 2, 1]> ")
    for number in range(6):
        branch = text.node("Conv", x, text.weight(12, 12, 1), attributes="<kernel_shape = [1]> ")
        if number % 2 == 0:
            scores = text.node("MatMul", text.node("Transpose", branch, attributes="<perm = [0, 2, 1]> "), x)
            shares = text.node("Transpose", text.node("Softmax", scores), attributes="<perm = [0, 2, 1]> ")
            values = text.node("Conv", x, text.weight(12, 12, 1), attributes="<kernel_shape = [1]> ")
            branch = text.node("MatMul", values, shares)
        turned = text.node("Transpose", text.add(x, branch), attributes="<perm = [0, 2, 1]> ")
        normed = text.norm(turned)
        x = text.node("Transpose", normed, attributes="<perm = [0, 2, 1]> ")
    model = text.model(graph, normed)
    assert kinds(model) == {"": [["attention", "ffn"]] * 3}
    for blocks in ((0, 1), (1, 2)):
        child = apply(model, Plan(blocks={"": blocks}))
        assert kinds(child) == {"": [["attention", "ffn"]] * 2}
        assert verify(child).ok
    data = np.random.default_rng(0).standard_normal((4, 6, 12), np.float32)
    assert calibrate(model, {"x": data}, provider="cpu", progress=False).spans


class Windowed(torch.nn.Module):
    """A SAM's attention in windows: scores get a number for each row and each column of the window that a key is in."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(12, 36), torch.nn.Linear(12, 12)
        self.rows, self.columns = (torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2))
        self.steps = torch.tensor([[1, 0], [2, 1]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        windows = x.view(batch, 2, 2, 2, 2, 12).permute(0, 1, 3, 2, 4, 5).reshape(-1, 2, 2, 12)
        apart = self.qkv(windows).reshape(-1, 4, 3, 3, 4).permute(2, 0, 3, 1, 4)
        q, k, v = apart.reshape(3, -1, 4, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)).view(-1, 2, 2, 2, 2)
        places = [table[self.steps] for table in (self.rows, self.columns)]
        grid = q.reshape(-1, 2, 2, 4)
        scores = scores + torch.einsum("bhwc,hkc->bhwk", grid, places[0])[..., None]
        scores = scores + torch.einsum("bhwc,wkc->bhwk", grid, places[1])[:, :, :, None]
        mixed = (scores.view(-1, 4, 4).softmax(-1) @ v).view(-1, 3, 2, 2, 4).permute(0, 2, 3, 1, 4)
        joined = self.out(mixed.reshape(-1, 2, 2, 12)).view(batch, 2, 2, 2, 2, 12)
        return x + joined.permute(0, 1, 3, 2, 4, 5).reshape(batch, 4, 4, 12)


def test_the_places_of_a_window_are_no_width_of_values() -> None:
    patches = torch.nn.Conv2d(3, 12, 2, 2)

    class Image(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.blocks = patches, torch.nn.Sequential(Windowed(), Windowed(), Windowed())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(self.patches(x).permute(0, 2, 3, 1))

    file = io.BytesIO()
    torch.onnx.export(Image(), (torch.randn(2, 3, 8, 8),), file, input_names=["x"], dynamic_axes={"x": {0: "batch"}},
                      dynamo=False, opset_version=17)  # fmt: skip
    model = Model.from_proto(onnx.load_from_string(file.getvalue()))
    names = {d.name for d in analyse(model).dimensions if d.name.startswith("blocks.0.")}
    assert names == {"blocks.0.heads", "blocks.0.head_dim"}
    assert verify(subclone(model, head_dim=2, by="first", rescale="none")).ok


def test_two_maps_for_each_head_of_values_are_no_queries_to_cut(graph: Graph) -> None:
    """Differential attention subtracts the second map of each head from the first."""
    text = Text()
    x = text.linear("x", 12, 12)
    for _ in range(2):
        normed = text.norm(x)
        q, k = (text.node("Reshape", text.linear(normed, 12, 30), "pairs") for _ in range(2))
        v = text.node("Reshape", text.linear(normed, 12, 12), "apart")
        scores = text.node("Einsum", q, k, attributes='<equation = "bihcd,bjhcd->bhcij"> ')
        maps = text.node("Softmax", scores)
        first, second = (text.node("Gather", maps, place, attributes="<axis = 2> ") for place in ("none", "other"))
        mixed = text.node("Einsum", text.node("Sub", first, second), v, attributes='<equation = "bhij,bjhd->bihd"> ')
        x = text.add(x, text.linear(text.node("Reshape", mixed, "together"), 12, 12))
        x = text.add(x, text.ffn(x, 20))
    constants = SHAPES + ", int64[5] pairs = {0, 0, 3, 2, 5}, int64 none = {0}, int64 other = {1}"
    model = text.model(graph, text.norm(x), constants=constants)
    sizes = {d.name[9:]: d.size for d in analyse(model).dimensions if d.name.startswith("blocks.0.")}
    assert sizes == {"heads": 3, "head_dim": 5, "v_head_dim": 4, "ffn": 20}
    assert verify(model).ok


@pytest.mark.parametrize("early", [False, True])
def test_a_stream_may_begin_as_rows_that_only_its_addition_restores(graph: Graph, early: bool) -> None:
    """A simplifier lets the projections of the first block read the rows of a product, and the addition its sequence.

    early: the first projection stands before what restores the sequence.
    """
    text = Text()
    rows = text.node("Gemm", text.node("Reshape", "x", "rows"), text.weight(12, 12))
    first = [text.node("Gemm", rows, text.weight(12, 12)) for _ in range(early)]
    stream = text.node("Reshape", rows, "sequence")
    for _ in range(3):
        products = first + [text.node("Gemm", rows, text.weight(12, 12)) for _ in range(3 - len(first))]
        q, k, v = (text.node("Reshape", product, "sequence") for product in products)
        scores = text.node("MatMul", q, text.node("Transpose", k, attributes="<perm = [0, 2, 1]> "))
        mixed = text.linear(text.node("MatMul", text.node("Softmax", scores), v), 12, 12)
        stream = text.norm(text.add(stream, mixed))
        rows, first = text.node("Reshape", stream, "rows"), []
    sizes = "int64[2] rows = {-1, 12}, int64[3] sequence = {2, 5, 12}"
    known = "float[10, 12] t1, float[2, 5, 12] " + ("t3" if early else "t2")
    model = text.model(graph, stream, head="(float[2, 5, 12] x) => (float[2, 5, 12] y)", constants=f"{sizes}, {known}")
    assert kinds(model) == {"": [["attention"]] * 3}
    assert verify(model).ok
    child = apply(model, Plan.from_json({"blocks": [1, 2]}))
    assert len(model.weights) - len(child.weights) == len(["q", "k", "v", "out", "gain", "bias"])


@pytest.mark.parametrize("groups", [[2, 2], [3, 2, 2]])
def test_streams_inside_a_stream_have_blocks_of_their_own(graph: Graph, groups: list[int]) -> None:
    """A SwinIR: each group adds to the stream what its own stream has become, through a matrix."""

    def written(kept: list[list[int]]) -> Model:
        text = Text()
        x = text.linear("x", 12, 12)
        for size, stays in zip(groups, kept, strict=True):
            y = x
            for layer in range(size):
                attended = text.add(y, text.attend(y, y))
                after = text.add(attended, text.ffn(attended, 20))
                y = after if layer in stays else y
            x = text.add(x, text.linear(y, 12, 12))
        return text.model(graph, text.norm(x))

    model = written([list(range(size)) for size in groups])
    assert kinds(model) == {"": [["attention", "ffn"]] * sum(groups)}
    numbers = iter(range(sum(groups)))
    names = [[next(numbers) for _ in range(size)] for size in groups]
    for gone in range(sum(groups)):
        kept = tuple(i for i in range(sum(groups)) if i != gone)
        child = apply(model, Plan(blocks={"": kept}), analyse(model))
        wanted = written([[layer for layer, i in enumerate(group) if i != gone] for group in names])
        x = np.random.default_rng(gone).standard_normal((2, 7, 12)).astype(np.float32)
        found, right = (open_session(each).run(None, {"x": x})[0] for each in (child, wanted))
        assert np.allclose(found, right, atol=1e-5)
