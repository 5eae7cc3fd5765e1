"""Run parts of models side by side in one session, and gather Gram matrices there; activations stay on the device."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphclone.calibration.session import open_session
from graphclone.errors import InputError
from graphclone.graphs import copy_part
from graphclone.model import Model
from graphclone.weights import Weight

Feeds = Mapping[str, np.ndarray]
MASK = "mask/"
FLOAT = 1  # onnx.TensorProto.FLOAT


class Stream:
    """A model as it runs over batches: its feeds, and the tensors computed so far, which stay where they were computed.

    feeds: one mapping of inputs per batch; replace `model`'s weights as you like between two runs. masks: {input that
    marks padding: what it holds where a token is real}.

    Example:
        stream = Stream("parent", model, feeds); stream.hold("h.3.out"); stream.hold("h.4.out")
    """

    def __init__(
        self,
        name: str,
        model: Model,
        feeds: Sequence[Feeds],
        provider: str = "cpu",
        masks: Mapping[str, bool] | None = None,
    ):
        self.name = name
        self.model = model
        self.feeds = feeds
        self.provider = provider
        self.masks = dict(masks or {})
        self.held: dict[str, list] = {}

    def afresh(self) -> "Stream":
        """Return a stream of the same model that holds nothing."""
        return Stream(self.name, self.model, self.feeds, self.provider, self.masks)

    def hold(self, tensor: str) -> None:
        """Compute a tensor of every batch, from what is held and the inputs, and keep it."""
        if tensor in self.held or any(tensor == item.name for item in self.model.inputs):
            return
        joint = Joint([self])
        joint.give("held", joint.tensor(self, tensor))
        session = joint.open()
        self.held[tensor] = [run(session, batch, device=True)[0] for batch in joint.batches()]

    def forget(self, tensor: str) -> None:
        """Let go of a held tensor."""
        self.held.pop(tensor, None)


class Joint:
    """One graph made of parts of several streams, and of operators on top of them.

    Example:
        joint = Joint([parent, child])
        joint.give("gap", joint.op("Sub", joint.tensor(parent, "y"), joint.tensor(child, "y")))
        session = joint.open()
        gaps = [run(session, batch)[0] for batch in joint.batches()]
    """

    def __init__(self, streams: Sequence[Stream]):
        self.streams = {stream.name: stream for stream in streams}
        self._wanted: dict[str, dict[str, gs.Tensor]] = {name: {} for name in self.streams}
        self._nodes: list[gs.Node] = []
        self._inputs: list[gs.Variable] = []
        self._outputs: list[gs.Variable] = []
        self._bound: list[str] = []
        self._count = 0

    def tensor(self, stream: Stream, name: str) -> gs.Tensor:
        """Return a stream's tensor, to build on."""
        wanted = self._wanted[stream.name]
        if name not in wanted:
            wanted[name] = gs.Variable(f"{stream.name}/{name}")
        return wanted[name]

    def mask(self, name: str) -> gs.Tensor:
        """Return the input of the model that marks real tokens, as a column [rows, 1] of booleans."""
        given = next((item for item in self._inputs if item.name == MASK + name), None)
        if given is None:
            given = gs.Variable(MASK + name, np.dtype(np.bool_), [None, 1])
            self._inputs.append(given)
        return given

    def given(self, name: str, dtype: type, shape: Sequence[int]) -> gs.Variable:
        """Return a new input, which whoever runs the session feeds beside each of `batches`."""
        self._inputs.append(gs.Variable(name, np.dtype(dtype), list(shape)))
        return self._inputs[-1]

    def op(self, kind: str, *inputs: gs.Tensor, **attributes) -> gs.Variable:
        """Add an operator and return its output."""
        self._count += 1
        output = gs.Variable(f"joint/{self._count}")
        self._nodes.append(gs.Node(kind, f"joint/{self._count}", attributes, list(inputs), [output]))
        return output

    def constant(self, values: object, dtype: type = np.int64) -> gs.Constant:
        self._count += 1
        return gs.Constant(f"joint/{self._count}", Weight.of(np.asarray(values, dtype)))

    def rows(self, tensor: gs.Tensor, width: int, channels_at_one: bool = False) -> gs.Variable:
        """Return a tensor as fp32 rows [T, width]: of [..., width], or of [B, width, ...] with `channels_at_one`."""
        if channels_at_one:
            flat = self.op("Reshape", tensor, self.constant([0, width, -1]))  # [B, width, positions]
            tensor = self.op("Transpose", flat, perm=[0, 2, 1])
        return self.op("Cast", self.op("Reshape", tensor, self.constant([-1, width])), to=FLOAT)

    def unfolded(
        self, tensor: gs.Tensor, channels: int, window: Mapping[str, object], kernel: Sequence[int]
    ) -> gs.Variable:
        """Return the patches a convolution reads, as rows [T, channels * kernel]: a convolution with unit vectors."""
        size = int(np.prod(kernel))
        units = np.tile(np.eye(size).reshape(size, 1, *kernel), (channels, *[1] * (len(kernel) + 1)))
        cast = self.op("Cast", tensor, to=FLOAT)
        patches = self.op("Conv", cast, self.constant(units, np.float32), **{**window, "group": channels})
        return self.rows(patches, channels * size, channels_at_one=True)

    def projected(self, rows: gs.Tensor, onto: np.ndarray | None) -> gs.Tensor:
        """Return rows [T, N'] of rows [T, N]: on kept positions, in a new basis [N, N'], or as they are."""
        if onto is None:
            return rows
        if onto.ndim == 1:
            return self.op("Gather", rows, self.constant(onto), axis=1)
        return self.op("MatMul", rows, self.constant(onto, np.float32))

    def ones(self, rows: gs.Tensor) -> gs.Variable:
        """Return a column of ones [T, 1], as many as there are rows."""
        size = self.op("Add", self.op("Mul", self.op("Shape", rows), self.constant([1, 0])), self.constant([0, 1]))
        return self.op("ConstantOfShape", size, value=gs.Constant("", np.ones(1, np.float32)))

    def gram(self, parts: Sequence[gs.Tensor | None], mask: str | None = None) -> gs.Variable:
        """Return Z'Z of all parts' columns side by side; None is a column of ones, `mask` leaves rows out."""
        first = next(part for part in parts if part is not None)
        rows = self.op("Concat", *(self.ones(first) if part is None else part for part in parts), axis=1)
        if mask is not None:
            rows = self.op("Where", self.mask(mask), rows, self.constant(0.0, np.float32))
        return self.op("MatMul", self.op("Transpose", rows, perm=[1, 0]), rows)

    def give(self, name: str, tensor: gs.Tensor) -> None:
        """Make a tensor an output."""
        output = gs.Variable(name)
        self._nodes.append(gs.Node("Identity", f"{name}/given", {}, [tensor], [output]))
        self._outputs.append(output)

    def open(self):
        """Return the session, on the streams' device; it is fed by `batches`."""
        nodes: list[gs.Node] = []
        inputs = list(self._inputs)
        for stream in self.streams.values():
            wanted = self._wanted[stream.name]
            part, found = self._part(stream, wanted)
            nodes += part
            known = {item.name for item in stream.model.inputs} | stream.held.keys()
            inputs += [self._start(found[name]) for name in found if name in known and not found[name].inputs]
            nodes += [gs.Node("Identity", f"{t.name}/taken", {}, [found[name]], [t]) for name, t in wanted.items()]
            for name, tensor in wanted.items():
                tensor.name = f"{stream.name}/taken/{name}"
        used = {id(tensor) for node in (*nodes, *self._nodes) for tensor in node.inputs}
        inputs = [tensor for tensor in inputs if id(tensor) in used or tensor.outputs]
        given = {tensor.name for tensor in self._inputs if not tensor.name.startswith(MASK)}
        self._bound = [tensor.name for tensor in inputs if tensor.name not in given]
        first = next(iter(self.streams.values()))
        graph = gs.Graph(nodes=[*nodes, *self._nodes], inputs=inputs, outputs=self._outputs, name="joint")
        return open_session(first.model.holding(graph), provider=first.provider, mem_reuse=True, arena=False)

    def _part(self, stream: Stream, wanted: Mapping[str, gs.Tensor]) -> tuple[list[gs.Node], dict[str, gs.Tensor]]:
        try:
            return copy_part(stream.model.graph, list(wanted), stream.held, f"{stream.name}/")
        except KeyError as error:
            raise InputError(f"the main graph computes no tensor {error}") from None

    def _start(self, tensor: gs.Variable) -> gs.Variable:
        tensor.dtype = tensor.dtype or np.dtype(np.float32)
        tensor.shape = None if tensor.shape is None else [None] * len(tensor.shape)
        return tensor

    def batches(self):
        """Yield per batch what the session is fed: arrays, and held tensors where they are."""
        count = len(next(iter(self.streams.values())).feeds)
        for number in range(count):
            batch: dict[str, object] = {}
            for name in self._bound:
                owner, _, rest = name.partition("/")
                if name.startswith(MASK):
                    masked = next(stream for stream in self.streams.values() if rest in stream.masks)
                    real = (np.asarray(masked.feeds[number][rest]) != 0) == masked.masks[rest]
                    batch[name] = real.reshape(-1, 1)
                else:
                    stream = self.streams[owner]
                    batch[name] = stream.held[rest][number] if rest in stream.held else stream.feeds[number][rest]
            yield batch


def run(session, batch: Mapping[str, object], device: bool = False) -> list:
    """Return a session's outputs: as arrays, or with `device` as values that stay where they were computed."""
    binding = session.io_binding()
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        else:
            binding.bind_ortvalue_input(name, value)
    where = "cuda" if device and session.get_providers()[0].startswith("CUDA") else "cpu"
    for output in session.get_outputs():
        binding.bind_output(output.name, where)
    session.run_with_iobinding(binding)
    return binding.get_outputs() if device else binding.copy_outputs_to_cpu()
