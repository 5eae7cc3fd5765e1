"""Open an onnxruntime session on a model in memory, on the device asked for."""

import contextlib
import functools
import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as native

from graphclone.errors import InputError
from graphclone.exporter import fill
from graphclone.model import Model
from graphclone.precision import is_low, raised
from graphclone.weights import Weight

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
SETTINGS = {"cuda": {"use_tf32": "0"}, "cpu": {}}  # onnxruntime's default rounds factors of products to 10 bits
OPTIMIZATION = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
ERRORS_ONLY = 3
FATAL_ONLY = 4
RUNTIME_ERRORS = (
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.NotImplemented,
    native.RuntimeException,
    native.EPFail,
)


@functools.cache
def resolve_provider(provider: str = "auto") -> str:
    """Return the device that sessions will really use, 'cuda' or 'cpu'.

    provider: 'cuda', 'cpu', or 'auto' for CUDA where it works and else the CPU.
    A list of available providers names CUDA on machines without a GPU too, so a tiny session is asked instead.
    Raises: InputError where CUDA is asked for and absent.

    Example:
        >>> resolve_provider("cpu")
        'cpu'
    """
    if provider not in ("auto", *PROVIDERS):
        raise InputError(f"no provider is called '{provider}'; write auto, cuda or cpu")
    if provider == "cpu" or _cuda_works():
        return "cpu" if provider == "cpu" else "cuda"
    if provider == "auto":
        return "cpu"
    raise InputError(
        "CUDA was asked for, but onnxruntime cannot use it here: the GPU, its driver, CUDA, cuDNN or the "
        "onnxruntime-gpu package is missing; write cpu or auto instead"
    )


def open_session(
    model: Model,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    outputs: Sequence[str] | None = None,
    mem_reuse: bool = False,
    optimize: str = "all",
    arena: bool = True,
) -> onnxruntime.InferenceSession:
    """Return a session on the model as it is in memory; nothing is written, and the model is not changed.

    provider: 'cpu', 'cuda' or 'auto'.
    threads: threads of one operator; 1 makes results repeatable bit by bit. Default: one per core.
    outputs: tensors that become outputs after the graph's own.
    mem_reuse: whether onnxruntime plans which buffers to reuse. Without, graphs of 10,000 nodes open twenty times
        faster, and GPT-2 takes no more time or memory (1.41 against 1.52 GB): buffers are freed after use anyway.
    arena: whether freed buffers are kept for the next run; without, a session of few large tensors holds much less.
    optimize: 'all' for speed, 'basic' without fusions that round differently, 'none'.
    Raises: InputError where onnxruntime cannot run the model.

    Example:
        >>> open_session(model, threads=1).run(None, feeds)[0].shape
        (2, 5, 65)
    """
    device = resolve_provider(provider)
    proto = model.to_proto(external=True)
    _add_outputs(proto, outputs or ())
    arrays = _outside(proto, {**model.unused, **model.weights})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.graph_optimization_level = OPTIMIZATION[optimize]
    options.enable_mem_reuse = mem_reuse
    options.enable_cpu_mem_arena = arena
    if threads:
        options.intra_op_num_threads = threads
    options.add_external_initializers(list(arrays), list(arrays.values()))
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, [(PROVIDERS[device], SETTINGS[device])]
        )
    except (*RUNTIME_ERRORS, ValueError) as error:
        raise InputError(f"onnxruntime cannot run {describe(model)}: {first_line(error)}") from error
    session.graphclone_weights = arrays  # onnxruntime reads these arrays in place, so they live as long as it does
    return session


def runnable(model: Model, provider: str = "cpu") -> Model:
    """Return the model, or a copy in fp32 where it computes in 16 bits that onnxruntime has no kernels for."""
    if not is_low(model):
        return model
    try:
        open_session(model, provider=provider)
    except InputError:
        return raised(model)
    return model


def describe(model: Model) -> str:
    """Return how messages call a model: `'gpt2.onnx'`, or `the model`."""
    return f"'{model.path}'" if model.path else "the model"


def first_line(error: BaseException) -> str:
    """Return what an onnxruntime error says, without its codes and stack."""
    lines = str(error).strip().splitlines()
    return lines[0].rpartition("[ONNXRuntimeError] : ")[2] if lines else type(error).__name__


def _cuda_works() -> bool:
    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        return False
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [value], [])
    graph.output.append(ValueInfoProto(name="y"))
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    with _quiet():
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=list(PROVIDERS.values()))
    return PROVIDERS["cuda"] in session.get_providers()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let onnxruntime look for CUDA's libraries, also those that pip installed, without a page of warnings."""
    onnxruntime.set_default_logger_severity(FATAL_ONLY)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            onnxruntime.preload_dlls()
        yield
    finally:
        onnxruntime.set_default_logger_severity(ERRORS_ONLY)


def _add_outputs(proto: ModelProto, names: Sequence[str]) -> None:
    known = {output.name for output in proto.graph.output}
    tensors = {name for node in proto.graph.node for name in node.output}
    tensors.update(item.name for item in (*proto.graph.input, *proto.graph.initializer))
    for name in names:
        if name not in tensors:
            raise InputError(f"cannot read '{name}': the graph has no such tensor outside its subgraphs")
        if name not in known:
            proto.graph.output.append(ValueInfoProto(name=name))
            known.add(name)


def _outside(proto: ModelProto, weights: Mapping[str, Weight]) -> dict[str, onnxruntime.OrtValue]:
    """Return the arrays that the main graph's initializers name; put the others, and those of subgraphs, into it."""
    _embed_inner(proto.graph, weights)
    named = [tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    values = {tensor.name: _value(weights[tensor.name]) for tensor in named}
    for tensor in named:
        if values[tensor.name] is None:
            _embed(tensor, weights)
    return {name: value for name, value in values.items() if value is not None}


def _embed_inner(graph: GraphProto, weights: Mapping[str, Weight]) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                for tensor in inner.initializer:
                    _embed(tensor, weights)
                _embed_inner(inner, weights)


def _embed(tensor: TensorProto, weights: Mapping[str, Weight]) -> None:
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
        fill([(tensor, weights[tensor.name])])


def _value(weight: Weight) -> onnxruntime.OrtValue | None:
    """Wrap a weight's memory without a copy; None for types that onnxruntime takes only inside a proto."""
    if weight.onnx_dtype == TensorProto.BFLOAT16:
        raw = np.ascontiguousarray(weight.load()).view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, weight.onnx_dtype)
    if weight.dtype.isbuiltin != 1:
        return None
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(weight.load()))
