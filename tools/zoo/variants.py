"""Turn a family's export into what files in the wild have become: 16 bits, few bits, simplified, optimised, fused.

Each variant starts from another route's file; onnxsim and onnxslim are wanted for theirs alone (`pip install onnxsim
onnxslim`), all others come with onnxruntime.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

from zoo.families import family
from zoo.feeds import feeds

BLOCK = 16


@dataclass(frozen=True)
class Variant:
    """make: (family, exported file, where to write). base: the route of the exported file. title: for the table.

    loss: what numbers are rounded to: "" where they are not, fp16, or "few" bits. needs: a package it wants.
    """

    title: str
    base: str
    make: Callable[[str, Path, Path], None]
    loss: str = ""
    needs: str = ""


def _to_fp16(keep: bool) -> Callable[[str, Path, Path], None]:
    def make(name: str, source: Path, target: Path) -> None:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep), target)

    return make


def _static(per_channel: bool, operators: bool = False) -> Callable[[str, Path, Path], None]:
    def make(name: str, source: Path, target: Path) -> None:
        from onnxruntime import quantization as few

        class Reader(few.CalibrationDataReader):
            def __init__(self) -> None:
                wanted = {tensor.name for tensor in onnx.load(source).graph.input}
                both = [feeds(name, 2, length, padded=True) for length in (9, 7)]
                self.left = [{key: value for key, value in each.items() if key in wanted} for each in both]

            def get_next(self):
                return self.left.pop() if self.left else None

        few.quantize_static(
            source,
            target,
            Reader(),
            quant_format=few.QuantFormat.QOperator if operators else few.QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=few.QuantType.QUInt8,
            weight_type=few.QuantType.QInt8,
            extra_options={"CalibTensorRangeSymmetric": False},
        )

    return make


def _dynamic(name: str, source: Path, target: Path) -> None:
    from onnxruntime import quantization as few

    few.quantize_dynamic(source, target, per_channel=True, weight_type=few.QuantType.QInt8)


def _blockwise(quantized_operators: bool, symmetric: bool) -> Callable[[str, Path, Path], None]:
    def make(name: str, source: Path, target: Path) -> None:
        from onnxruntime import quantization as few
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        form = few.QuantFormat.QOperator if quantized_operators else few.QuantFormat.QDQ
        given = onnx.load(source)
        quantizer = MatMulNBitsQuantizer(given, block_size=BLOCK, is_symmetric=symmetric, quant_format=form)
        quantizer.process()
        onnx.save(quantizer.model.model, target)

    return make


def _onnxsim(name: str, source: Path, target: Path) -> None:
    simplified, _ = importlib.import_module("onnxsim").simplify(onnx.load(source))
    onnx.save(simplified, target)


def _onnxslim(name: str, source: Path, target: Path) -> None:
    onnx.save(importlib.import_module("onnxslim").slim(onnx.load(source)), target)


def _optimised(level: str) -> Callable[[str, Path, Path], None]:
    def make(name: str, source: Path, target: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(target)
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return make


FUSED_LIKE = {"t5": "t5", "bart": "bart", "marian": "bart", "whisper": "bart", "gpt2": "gpt2", "clip": "clip"}
_ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "olmoe", "qwen3_moe")
FUSED_LIKE |= dict.fromkeys(_ROTARY, "gpt2")
"""What onnxruntime's optimizer takes a family for; for all others, BERT."""


def fuse(name: str, source: Path, target: Path, separate: bool = False) -> None:
    """Let onnxruntime's optimizer for transformers fuse what it finds.

    separate: attention with its own projections of queries, keys and values (MultiHeadAttention).
    """
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    sizes = family(name).layout.sizes
    heads = (
        sizes.get("heads") or sizes.get("encoder.heads") or sizes.get("kv_heads", 0) * sizes.get("queries_per_kv", 0)
    )
    hidden = sizes.get("hidden", 0) if heads else 0
    kind = FUSED_LIKE.get(name, name if name in optimizer.MODEL_TYPES else "bert")
    options = FusionOptions(kind)
    options.use_multi_head_attention = separate
    fused = optimizer.optimize_model(
        str(source),
        model_type=kind,
        num_heads=heads if hidden else 0,
        hidden_size=hidden,
        optimization_options=options,
        opt_level=0,
    )
    fused.save_model_to_file(str(target))


def _separately(name: str, source: Path, target: Path) -> None:
    fuse(name, source, target, separate=True)


VARIANTS: dict[str, Variant] = {
    "fp16": Variant("the same in fp16, inputs and outputs too", "dynamo18", _to_fp16(False), "fp16"),
    "fp16io": Variant("in fp16 between Casts of inputs and outputs", "legacy17", _to_fp16(True), "fp16"),
    "qdq": Variant("quantize_static, QDQ, per tensor", "dynamo18", _static(False), "few"),
    "qdq_channel": Variant("quantize_static, QDQ, per channel", "legacy17", _static(True), "few"),
    "qoperator": Variant("quantize_static, QOperator", "legacy17", _static(False, operators=True), "few"),
    "dynamic8": Variant("quantize_dynamic, per channel", "legacy17", _dynamic, "few"),
    "int4": Variant("MatMulNBits, 4 bits, blocks of 16", "dynamo18", _blockwise(True, True), "few"),
    "int4_offset": Variant("MatMulNBits, 4 bits with zero points", "legacy17", _blockwise(True, False), "few"),
    "int4_qdq": Variant("4 bits, DequantizeLinear in blocks of 16", "dynamo23", _blockwise(False, True), "few"),
    "onnxsim": Variant("onnxsim after the legacy exporter", "legacy17", _onnxsim, needs="onnxsim"),
    "onnxslim": Variant("onnxslim after the dynamo exporter", "dynamo18", _onnxslim, needs="onnxslim"),
    "ort_basic": Variant("saved by onnxruntime, level basic", "legacy17", _optimised("BASIC")),
    "ort_extended": Variant("saved by onnxruntime, level extended", "dynamo18", _optimised("EXTENDED")),
    "ort_all": Variant("saved by onnxruntime, level all", "legacy17", _optimised("ALL")),
    "eager_fused": Variant("onnxruntime's optimizer after eager attention", "legacy17_eager", fuse),
    "eager_mha": Variant("the same with MultiHeadAttention", "legacy17_eager", _separately),
}
