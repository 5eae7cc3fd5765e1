"""FX: what a line of torch's own graph, which its exporter leaves beside an operator, says of the operator's inputs."""

import re

CALL = re.compile(r"target=torch\.ops\.aten\.(?P<target>\w+)\.\w+\]\(args = \((?P<arguments>.*)\), kwargs")
PARAMETER = re.compile(r"%([pbc]_\w+)")
TOP_LEVEL_COMMA = re.compile(r",\s*(?![^\[(]*[\])])")
LAYERS = re.compile(r"linear|addmm|mm|bmm|matmul|embedding|index|conv\w*|(native_)?layer_norm")
"""Functions of torch whose parameters are the weight and bias of one layer."""
SAME_INPUTS = {
    "Add": ("add",), "Sub": ("sub",), "Mul": ("mul",), "Div": ("div",), "MatMul": ("matmul", "mm", "bmm", "linear"),
    "Gemm": ("linear",), "Conv": ("conv1d", "conv2d", "conv3d", "convolution"), "ConvTranspose": ("convolution",),
}  # fmt: skip
"""Functions of torch whose arguments are the inputs of an operator, in order."""
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ANOTHER_LAYOUT = re.compile(
    r"(_unsafe_view|view|reshape|squeeze|unsqueeze|transpose|permute|t|expand|flatten|clone|detach|alias|_to_copy"
    r"|convert_element_type_default|slice|select|val)(_\d+)?"
)
"""What torch and its exporter call results that hold entries of one tensor as they are."""


def target(line: str) -> str:
    """Return the function of torch that a line calls, "" where it calls none.

    Example:
        >>> target("%mm : call_function[target=torch.ops.aten.mm.default](args = (%x, %p_w), kwargs = {})")
        'mm'
    """
    match = CALL.search(line)
    return match["target"] if match else ""


def argument(kind: str, line: str, slot: int, name: str) -> str:
    """Return what a line gives where an operator of this kind reads its input `slot`, called `name`, "" if unknown.

    Example:
        >>> argument("Mul", "[target=torch.ops.aten.mul.Tensor](args = (%x, %add_1), kwargs = {})", 1, "val_3")
        '%add_1'
    """
    match = CALL.search(line)
    arguments = TOP_LEVEL_COMMA.split(match["arguments"]) if match else []
    if f"%{name}" in arguments:
        return f"%{name}"
    return arguments[slot] if slot < len(arguments) and match["target"] in SAME_INPUTS.get(kind, ()) else ""


def is_computed(given: str) -> bool:
    """Tell whether an argument is the result of arithmetic: %add_3, but neither %p_weight nor %transpose_2."""
    return given.startswith("%") and not PARAMETER.fullmatch(given) and not ANOTHER_LAYOUT.fullmatch(given[1:])


def holds_norm(kind: str, line: str) -> bool:
    """Tell whether a linear operator does the work of the batch norm that was behind it, too."""
    return kind in LINEAR and "batch_norm" in target(line)
