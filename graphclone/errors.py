"""The errors a reader meets: each says what, where, why, and what to write instead."""


class GraphcloneError(Exception):
    """The base of every error graphclone raises on purpose; `exit_code` is what the command line returns.

    Example:
        >>> InputError("no file at 'gpt2.onnx'; check the path").exit_code
        2
    """

    exit_code = 2


class InputError(GraphcloneError):
    """A model, data or statistics file, or a flag, that cannot be used as it is."""


class CutError(GraphcloneError):
    """A target size, plan or pass that this model does not admit."""


class CheckFailed(GraphcloneError):
    """A verification that ran and found a difference."""

    exit_code = 1
