"""A transformer of three blocks, written by hand, small enough to run every command on it in no time."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphclone.cli import main

HIDDEN, HEADS, HEAD_DIM, FFN, VOCAB, BLOCKS = 12, 3, 4, 20, 23, 3


class TinyTransformer:
    """Pre-norm, `input_ids` and a mask in, logits out.

    groups: KV heads, each of which serves three queries, if not as many as there are heads. table: whether one table
    multiplies the queries of all blocks, which couples their head dims as a rotary table does. slopes: whether ALiBi's
    slopes multiply the mask's bias, one for each head.
    """

    def __init__(self, groups: int = HEADS, table: bool = False, slopes: bool = False, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.groups = groups
        self.table = table
        self.slopes = slopes
        self.heads = groups if groups == HEADS else groups * 3
        self.nodes: list = []
        self.initializers: list = []

    def weight(self, name: str, *shape: int) -> str:
        value = self.random.standard_normal(shape) / np.sqrt(shape[0])
        return self.constant(name, value.astype(np.float32))

    def constant(self, name: str, value) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, *inputs: str, name: str, **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"/{name}", **attributes))
        return name

    def norm(self, x: str, name: str) -> str:
        scale = self.constant(f"{name}.weight", 1 + self.random.standard_normal(HIDDEN).astype(np.float32) / 8)
        bias = self.constant(f"{name}.bias", self.random.standard_normal(HIDDEN).astype(np.float32) / 8)
        return self.node("LayerNormalization", x, scale, bias, name=name, axis=-1)

    def split(self, x: str, name: str, heads: int) -> str:
        """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]"""
        shape = self.constant(f"{name}.shape", [0, 0, heads, HEAD_DIM])
        x = self.node("Reshape", x, shape, name=f"{name}.split")
        return self.node("Transpose", x, name=f"{name}.heads", perm=[0, 2, 1, 3])

    def repeated(self, x: str, name: str) -> str:
        """Repeat each KV head for its queries."""
        if self.groups == self.heads:
            return x
        x = self.node("Unsqueeze", x, self.constant(f"{name}.axis", [2]), name=f"{name}.unsqueezed")
        x = self.node("Expand", x, self.constant(f"{name}.times", [1, 1, 3, 1, 1]), name=f"{name}.expanded")
        return self.node(
            "Reshape", x, self.constant(f"{name}.flat", [0, self.heads, -1, HEAD_DIM]), name=f"{name}.repeated"
        )

    def attention(self, x: str, bias: str, base: str) -> str:
        widths = {"q": self.heads, "k": self.groups, "v": self.groups}
        q, k, v = (
            self.split(
                self.node(
                    "MatMul", x, self.weight(f"{base}.{part}.weight", HIDDEN, heads * HEAD_DIM), name=f"{base}.{part}"
                ),
                f"{base}.{part}",
                heads,
            )
            for part, heads in widths.items()
        )
        if self.table:
            q = self.node("Mul", q, "table.heads", name=f"{base}.q.turned")
        k, v = self.repeated(k, f"{base}.k"), self.repeated(v, f"{base}.v")
        turned = self.node("Transpose", k, name=f"{base}.turned", perm=[0, 1, 3, 2])
        scores = self.node("MatMul", q, turned, name=f"{base}.scores")
        scores = self.node("Mul", scores, self.constant(f"{base}.scale", np.float32(0.5)), name=f"{base}.scaled")
        scores = self.node("Add", scores, bias, name=f"{base}.masked")
        weights = self.node("Softmax", scores, name=f"{base}.softmax", axis=-1)
        mixed = self.node("MatMul", weights, v, name=f"{base}.mixed")
        mixed = self.node("Transpose", mixed, name=f"{base}.back", perm=[0, 2, 1, 3])
        joined = self.constant(f"{base}.joined.shape", [0, 0, self.heads * HEAD_DIM])
        mixed = self.node("Reshape", mixed, joined, name=f"{base}.joined")
        return self.node(
            "MatMul", mixed, self.weight(f"{base}.o.weight", self.heads * HEAD_DIM, HIDDEN), name=f"{base}.o"
        )

    def feed_forward(self, x: str, base: str) -> str:
        x = self.node("MatMul", x, self.weight(f"{base}.up.weight", HIDDEN, FFN), name=f"{base}.up")
        bias = self.constant(f"{base}.up.bias", self.random.standard_normal(FFN).astype(np.float32) / 8)
        x = self.node("Relu", self.node("Add", x, bias, name=f"{base}.biased"), name=f"{base}.relu")
        return self.node("MatMul", x, self.weight(f"{base}.down.weight", FFN, HIDDEN), name=f"{base}.down")

    def build(self) -> onnx.ModelProto:
        x = self.node("Gather", self.weight("embedding.weight", VOCAB, HIDDEN), "input_ids", name="embedding")
        mask = self.node("Cast", "attention_mask", name="mask", to=TensorProto.FLOAT)
        mask = self.node("Sub", mask, self.constant("one", np.float32(1)), name="mask.shifted")
        mask = self.node("Mul", mask, self.constant("large", np.float32(1e4)), name="mask.bias")
        bias = self.node("Unsqueeze", mask, self.constant("mask.axes", [1, 2]), name="bias")
        if self.slopes:
            slopes = np.array([2**-4, 2**-8, 2**-2], np.float32).reshape(1, 3, 1, 1)
            bias = self.node("Mul", bias, self.constant("slopes", slopes), name="alibi")
        if self.table:
            table = self.node("Gather", self.weight("table.weight", VOCAB, HEAD_DIM), "input_ids", name="table")
            self.node("Unsqueeze", table, self.constant("table.axes", [1]), name="table.heads")
        for i in range(BLOCKS):
            base = f"h.{i}"
            x = self.node(
                "Add", x, self.attention(self.norm(x, f"{base}.ln_1"), bias, f"{base}.attn"), name=f"{base}.mid"
            )
            x = self.node("Add", x, self.feed_forward(self.norm(x, f"{base}.ln_2"), f"{base}.mlp"), name=f"{base}.out")
        x = self.node("MatMul", self.norm(x, "ln_f"), self.weight("head.weight", HIDDEN, VOCAB), name="logits")
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [
                helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"])
                for n in ("input_ids", "attention_mask")
            ],
            [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", "sequence", VOCAB])],
            self.initializers,
        )
        opset = [helper.make_opsetid("", 17)]
        return helper.make_model(graph, producer_name="by hand", opset_imports=opset, ir_version=8)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def proto() -> onnx.ModelProto:
    """The tiny transformer."""
    return TinyTransformer().build()


@pytest.fixture(scope="session")
def grouped_proto() -> onnx.ModelProto:
    """The same with two KV heads and three queries for each."""
    return TinyTransformer(groups=2).build()


@pytest.fixture
def model(proto, tmp_path) -> Path:
    """A file of the tiny transformer; its folder is empty but for it."""
    return saved(proto, tmp_path / "model.onnx")


@pytest.fixture
def grouped(grouped_proto, tmp_path) -> Path:
    return saved(grouped_proto, tmp_path / "grouped.onnx")


@pytest.fixture
def coupled(tmp_path) -> Path:
    """A file of the tiny transformer with one table for the heads of all blocks."""
    return saved(TinyTransformer(table=True).build(), tmp_path / "coupled.onnx")


@pytest.fixture
def alibi(tmp_path) -> Path:
    """A file of the tiny transformer with a slope for each head."""
    return saved(TinyTransformer(slopes=True).build(), tmp_path / "alibi.onnx")


@pytest.fixture
def samples() -> dict[str, np.ndarray]:
    """Twelve sequences of six tokens, some padded."""
    mask = np.ones((12, 6), np.int64)
    mask[::3, 4:] = 0
    return {"input_ids": np.random.default_rng(1).integers(0, VOCAB, (12, 6)), "attention_mask": mask}


@pytest.fixture
def data(samples, tmp_path_factory) -> Path:
    """A .npz file of the samples, in a folder of its own."""
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    np.savez(path, **samples)
    return path


@pytest.fixture
def cli(capfd):
    """Run a command in this process."""

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        return Ended(code, printed.out, printed.err)

    return run


@pytest.fixture
def refused(cli, tmp_path):
    """Run a command that must end with exit code 2, one clear message, and no new file; return the message."""

    def run(*arguments: object) -> str:
        before = files(tmp_path)
        ended = cli(*arguments)
        assert ended.code == 2, ended
        assert ended.err.startswith("error: ") and len(re.findall("^error: ", ended.err, re.MULTILINE)) == 1, ended.err
        assert "Traceback" not in ended.err
        assert files(tmp_path) == before
        return ended.err

    return run


@pytest.fixture
def start():
    """Start a command as a process of its own; it is ended with the test."""
    processes = []

    def run(*arguments: object, code: str | None = None) -> subprocess.Popen:
        command = [sys.executable, *(["-c", code] if code else ["-m", "graphclone"]), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=_hear_signals,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()


def saved(proto: onnx.ModelProto, path: Path, **options) -> Path:
    onnx.save(proto, path, **options)
    return path


def files(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _hear_signals() -> None:
    """Let the child hear Ctrl-C: a test run in the background of a script is started with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
