"""PyTorch rules of operators that work entry by entry."""

import torch

from graphclone.pytorch.code import DEVICE, Code
from graphclone.pytorch.known import shortest, torch_type
from graphclone.pytorch.program import Op, Unsupported, Value
from graphclone.pytorch.registry import rows, rule

rows(
    {
        "Add": "({} + {})",
        "Sub": "({} - {})",
        "Mul": "({} * {})",
        "Neg": "(-{})",
        "Abs": "torch.abs({})",
        "Sqrt": "torch.sqrt({})",
        "Reciprocal": "torch.reciprocal({})",
        "Exp": "torch.exp({})",
        "Log": "torch.log({})",
        "Sin": "torch.sin({})",
        "Cos": "torch.cos({})",
        "Tan": "torch.tan({})",
        "Asin": "torch.asin({})",
        "Acos": "torch.acos({})",
        "Atan": "torch.atan({})",
        "Asinh": "torch.asinh({})",
        "Acosh": "torch.acosh({})",
        "Atanh": "torch.atanh({})",
        "Sinh": "torch.sinh({})",
        "Cosh": "torch.cosh({})",
        "Tanh": "torch.tanh({})",
        "Erf": "torch.erf({})",
        "Sigmoid": "torch.sigmoid({})",
        "Softplus": "F.softplus({})",
        "Softsign": "F.softsign({})",
        "Relu": "F.relu({})",
        "Mish": "F.mish({})",
        "HardSwish": "F.hardswish({})",
        "Floor": "torch.floor({})",
        "Ceil": "torch.ceil({})",
        "Round": "torch.round({})",
        "Sign": "torch.sign({})",
        "IsNaN": "torch.isnan({})",
        "Not": "(~{})",
        "And": "({} & {})",
        "Or": "({} | {})",
        "Xor": "({} ^ {})",
        "BitwiseAnd": "({} & {})",
        "BitwiseOr": "({} | {})",
        "BitwiseXor": "({} ^ {})",
        "BitwiseNot": "(~{})",
        "Identity": "{}",
        "PRelu": "torch.where({0} < 0, {0} * {1}, {0})",
    }
)
rows({"QuickGelu": "({0} * torch.sigmoid(1.702 * {0}))"}, "com.microsoft")


@rule("Where")
def where(op: Op) -> Code:
    """Choose by element; a condition that is one known value must be a tensor too.

    Two plain numbers alone would decide the type: float32, int64 or bool.
    """
    condition: Value | Code = op[0]
    if op[0].known is not None and op[0].known.ndim == 0:
        condition = Code("torch.tensor({}, device={})", op[0], DEVICE)
    chosen = Code("torch.where({}, {}, {})", condition, op[1], op[2])
    numbers = op[1].scalar is not None and op[2].scalar is not None
    return Code("{}.to({})", chosen, op[1].dtype) if numbers and op[1].dtype not in DEFAULT_TYPES else chosen


COMPARISONS = {"Equal": "==", "Less": "<", "LessOrEqual": "<=", "Greater": ">", "GreaterOrEqual": ">="}


@rule(*COMPARISONS)
def compare(op: Op) -> Code:
    """Compare; of two sizes, too, the answer is a tensor."""
    answer = Code("({} " + COMPARISONS[op.type] + " {})", op[0], op[1])
    sizes = all(each.known is not None and each.known.ndim == 0 for each in op.inputs)
    return Code("torch.tensor({}, device={})", answer, DEVICE) if sizes else answer


DEFAULT_TYPES = (torch.float32, torch.int64, torch.bool)
"""What torch makes of Python's numbers."""


@rule("IsInf")
def is_inf(op: Op) -> Code:
    positive, negative = bool(op.attribute("detect_positive", 1)), bool(op.attribute("detect_negative", 1))
    if positive == negative:
        return Code("torch.isinf({})" if positive else "torch.zeros_like({}, dtype=torch.bool)", op[0])
    return Code("torch.isposinf({})" if positive else "torch.isneginf({})", op[0])


@rule("Div")
def div(op: Op) -> Code:
    """Divide; integers truncate."""
    if op[0].dtype.is_floating_point or op[1].dtype.is_floating_point:
        return Code("({} / {})", op[0], op[1])
    return Code("torch.div({}, {}, rounding_mode='trunc')", op[0], op[1])


@rule("Mod")
def mod(op: Op) -> Code:
    """Take the remainder with the sign of the divisor, or of the dividend where fmod=1."""
    return Code("torch.fmod({}, {})" if op.attribute("fmod", 0) else "torch.remainder({}, {})", op[0], op[1])


@rule("Pow")
def power(op: Op) -> Code:
    """Raise; the result has the type of the base, which an exponent of a wider type would change."""
    exponent = op[1].scalar
    if not op[0].dtype.is_floating_point and isinstance(exponent, float) and exponent.is_integer() and exponent >= 0:
        return Code("torch.pow({}, {})", op[0], int(exponent))
    raised = Code("torch.pow({}, {})", op[0], op[1])
    narrower = torch.promote_types(op[0].dtype, op[1].dtype) != op[0].dtype
    return Code("{}.to({})", raised, op[0].dtype) if narrower else raised


def _extreme(pair: str, bound: str):
    def run(op: Op) -> Code:
        result: Value | Code = op[0]
        for each in op.inputs[1:]:
            if each.scalar is not None:
                result = Code(f"torch.clamp({{}}, {bound}={{}})", result, each)
            elif isinstance(result, Value) and result.scalar is not None:
                result = Code(f"torch.clamp({{}}, {bound}={{}})", each, result)
            else:
                result = Code(f"{pair}({{}}, {{}})", result, each)
        return result if isinstance(result, Code) else Code("{}", result)

    return run


rule("Max")(_extreme("torch.maximum", "min"))
rule("Min")(_extreme("torch.minimum", "max"))


@rule("Sum")
def total(op: Op) -> Code:
    return Code("(" + " + ".join(["{}"] * len(op.inputs)) + ")", *op.inputs)


@rule("Mean")
def mean(op: Op) -> Code:
    return Code("((" + " + ".join(["{}"] * len(op.inputs)) + f") / {len(op.inputs)})", *op.inputs)


@rule("Cast")
def cast(op: Op) -> Code:
    """Convert; a conversion between the graph's own float type and itself is no operation."""
    return _converted(op[0], torch_type(op.attribute("to")))


@rule("CastLike")
def cast_like(op: Op) -> Code:
    return _converted(op[0], op[1].dtype)


def _converted(value: Value, to: torch.dtype) -> Code:
    if value.known is not None and value.known.ndim == 0:
        return Code("torch.tensor({}, dtype={}, device={})", value, to, DEVICE)
    return Code("{}", value) if to == value.dtype else Code("{}.to({})", value, to)


@rule("Clip")
def clip(op: Op) -> Code:
    """Clamp between numbers; bounds that are tensors one after the other, so that the upper one counts."""
    low, high = op.attribute("min", op[1]), op.attribute("max", op[2])
    if low is None and high is None:
        return Code("{}", op[0])
    if all(not isinstance(bound, Value) or bound.scalar is not None for bound in (low, high)):
        return Code("torch.clamp({}, min={}, max={})", op[0], low, high)
    result: Value | Code = op[0]
    for bound, function, word in ((low, "torch.maximum", "min"), (high, "torch.minimum", "max")):
        if isinstance(bound, Value) and bound.scalar is None:
            result = Code(function + "({}, {})", result, bound)
        elif bound is not None:
            result = Code("torch.clamp({}, " + word + "={})", result, bound)
    return result


@rule("Gelu")
def gelu(op: Op) -> Code:
    return Code("F.gelu({}, approximate={})", op[0], op.attribute("approximate", "none"))


@rule("Gelu", domain="com.microsoft")
def contrib_gelu(op: Op) -> Code:
    return Code("F.gelu({})", op[0])


@rule("BiasGelu", domain="com.microsoft")
def bias_gelu(op: Op) -> Code:
    return Code("F.gelu({} + {})", op[0], op[1])


@rule("FastGelu", domain="com.microsoft")
def fast_gelu(op: Op) -> Code:
    summed = op[0] if op[1] is None else Code("{} + {}", op[0], op[1])
    return Code("F.gelu({}, approximate='tanh')", summed)


@rule("QuickGelu", domain="com.microsoft")
def quick_gelu(op: Op) -> Code:
    return Code("({} * torch.sigmoid({} * {}))", op[0], _number(op, "alpha", 1.702), op[0])


@rule("LeakyRelu")
def leaky_relu(op: Op) -> Code:
    return Code("F.leaky_relu({}, {})", op[0], _number(op, "alpha", 0.01))


@rule("Elu")
def elu(op: Op) -> Code:
    return Code("F.elu({}, {})", op[0], _number(op, "alpha", 1.0))


@rule("Celu")
def celu(op: Op) -> Code:
    return Code("F.celu({}, {})", op[0], _number(op, "alpha", 1.0))


@rule("ThresholdedRelu")
def thresholded_relu(op: Op) -> Code:
    return Code("F.threshold({}, {}, 0.0)", op[0], _number(op, "alpha", 1.0))


@rule("Selu")
def selu(op: Op) -> Code:
    alpha, gamma = _number(op, "alpha", 1.6732632), _number(op, "gamma", 1.0507010)
    return Code("({} * F.elu({}, {}))", gamma, op[0], alpha)


@rule("HardSigmoid")
def hard_sigmoid(op: Op) -> Code:
    alpha, beta = _number(op, "alpha", 0.2), _number(op, "beta", 0.5)
    return Code("torch.clamp({} * {} + {}, 0.0, 1.0)", alpha, op[0], beta)


@rule("Swish")
def swish(op: Op) -> Code:
    alpha = _number(op, "alpha", 1.0)
    return Code("F.silu({})", op[0]) if alpha == 1 else Code("({} * torch.sigmoid({} * {}))", op[0], alpha, op[0])


@rule("BitShift")
def bit_shift(op: Op) -> Code:
    return Code("({} << {})" if op.attribute("direction") == "LEFT" else "({} >> {})", op[0], op[1])


@rule("Dropout")
def dropout(op: Op) -> Code:
    """Pass through: exported graphs are in evaluation mode."""
    if len([output for output in op.outputs if output is not None]) > 1:
        raise Unsupported("its mask output has no PyTorch counterpart")
    if op[2] is not None and op[2].scalar is not False:
        raise Unsupported("the graph was exported in training mode; export it in evaluation mode")
    return Code("{}", op[0])


def _number(op: Op, name: str, default: float) -> float:
    return shortest(op.attribute(name, default))


@rule("Gelu", domain="graphclone")
def gelu_idiom(op: Op) -> Code:
    if op.attribute("approximate") == "none":
        return Code("F.gelu({})", op[0])
    return Code("F.gelu({}, approximate='tanh')", op[0])


rows({"Silu": "F.silu({})", "RotateHalf": "rotate_half({})"}, "graphclone")
