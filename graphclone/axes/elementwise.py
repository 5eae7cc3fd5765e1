"""Axis rules of operators that act entry by entry and broadcast."""

from graphclone.axes.registry import rule
from graphclone.op import Op

UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
    Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Bernoulli RandomNormalLike RandomUniformLike""".split()

BROADCASTING = """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max
    Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor""".split()


def broadcasting(op: Op) -> str:
    """Every input broadcasts against every other."""
    return ", ".join(["..."] * len(op.node.inputs)) + " -> ..."


def unary(op: Op) -> str:
    """The first input passes; the others (bounds, ratios, seeds) are scalars."""
    return ", ".join(["..."] + ["."] * (len(op.node.inputs) - 1)) + " -> " + ", ".join(["..."] * op.output_count)


rule(UNARY, unary)
rule(BROADCASTING, broadcasting)
rule(["Identity", "Cast"], "... -> ...", moves=True)
rule("CastLike", "..., . -> ...", moves=True)
rule(["BiasAdd", "BiasGelu", "FastGelu", "Gelu", "QuickGelu"], broadcasting, domain="com.microsoft")
