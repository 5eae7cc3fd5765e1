"""PyTorch rules of operators that choose between graphs when they run."""

from graphclone.pytorch.code import Code
from graphclone.pytorch.program import Op, Unsupported
from graphclone.pytorch.registry import rule


@rule("If")
def choose(op: Op) -> Code:
    """Refuse: a module has one way through, and which of two one would train is not in the graph."""
    raise Unsupported(
        f"'{op[0].name:.80}' chooses one of its two graphs when the model runs, and a module has one; convert an "
        "export of one of them: for a merged decoder the decoder_model.onnx beside it, which has no cache"
    )
