"""PyTorch rules of operators that work entry by entry."""

from graphclone.pytorch.code import DEVICE, Code
from graphclone.pytorch.known import torch_type
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
        "IsInf": "torch.isinf({})",
        "Not": "(~{})",
        "And": "({} & {})",
        "Or": "({} | {})",
        "Xor": "({} ^ {})",
        "BitwiseAnd": "({} & {})",
        "BitwiseOr": "({} | {})",
        "BitwiseXor": "({} ^ {})",
        "BitwiseNot": "(~{})",
        "Equal": "({} == {})",
        "Less": "({} < {})",
        "LessOrEqual": "({} <= {})",
        "Greater": "({} > {})",
        "GreaterOrEqual": "({} >= {})",
        "Identity": "{}",
        "PRelu": "torch.where({0} < 0, {0} * {1}, {0})",
    }
)
rows({"QuickGelu": "({0} * torch.sigmoid(1.702 * {0}))"}, "com.microsoft")


@rule("Where")
def where(op: Op) -> Code:
    """Choose by element; a condition that is one known value must be a tensor too."""
    if op[0].known is not None and op[0].known.ndim == 0:
        condition = Code("torch.tensor({}, device={})", op[0], DEVICE)
        return Code("torch.where({}, {}, {})", condition, op[1], op[2])
    return Code("torch.where({}, {}, {})", *op.inputs)


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
    return Code("torch.pow({}, {})", op[0], op[1])


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
    to = torch_type(op.attribute("to"))
    if op[0].known is not None and op[0].known.ndim == 0:
        return Code("torch.tensor({}, dtype={}, device={})", op[0], to, DEVICE)
    if to == op[0].dtype:
        return Code("{}", op[0])
    return Code("{}.to({})", op[0], to)


@rule("CastLike")
def cast_like(op: Op) -> Code:
    return Code("{}", op[0]) if op[0].dtype == op[1].dtype else Code("{}.to({})", op[0], op[1].dtype)


@rule("Clip")
def clip(op: Op) -> Code:
    low, high = op.attribute("min", op[1]), op.attribute("max", op[2])
    return Code("torch.clamp({}, min={}, max={})", op[0], low, high)


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
    return Code("({} * torch.sigmoid({} * {}))", op[0], float(op.attribute("alpha", 1.702)), op[0])


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


@rule("BitShift")
def bit_shift(op: Op) -> Code:
    return Code("({} << {})" if op.attribute("direction") == "LEFT" else "({} >> {})", op[0], op[1])


@rule("Dropout")
def dropout(op: Op) -> Code:
    """Pass through: exported graphs are in evaluation mode."""
    if len([output for output in op.outputs if output is not None]) > 1:
        raise Unsupported("its mask output has no PyTorch counterpart")
    return Code("{}", op[0])


def _number(op: Op, name: str, default: float) -> float:
    return float(f"{float(op.attribute(name, default)):.7g}")


@rule("Gelu", domain="graphclone")
def gelu_idiom(op: Op) -> Code:
    if op.attribute("approximate") == "none":
        return Code("F.gelu({})", op[0])
    return Code("F.gelu({}, approximate='tanh')", op[0])


rows({"Silu": "F.silu({})", "RotateHalf": "rotate_half({})"}, "graphclone")
