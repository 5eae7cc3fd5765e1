"""Model: a graphsurgeon graph with lazy weights and everything else its file said; load it, copy it, save it."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, OperatorSetIdProto, TensorProto
from onnx_graphsurgeon.logger import G_LOGGER

from graphclone import wire
from graphclone.atomic import replacing
from graphclone.canonical import make_explicit
from graphclone.exporter import Exporter, Stored, add_metadata, fill
from graphclone.external import ExternalData
from graphclone.graphs import collection_paused, constants, copy_graph, walk
from graphclone.importer import STANDARD, Importer, entries, legible
from graphclone.layout import Layout
from graphclone.reader import WeightReader, check_model, inlined, opset_of, read_file
from graphclone.roll import roll_loops
from graphclone.sequences import open_sequences
from graphclone.ties import Tie, find_ties
from graphclone.unroll import unroll_loops
from graphclone.weights import Weight, weight_of

EMBEDDED_LIMIT = 1_500_000_000
OLDEST_IR = 4  # before it every initializer had to be a graph input as well

G_LOGGER.severity = G_LOGGER.ERROR


def load(path: str | Path, retie: bool = True) -> "Model":
    """Read a model; its weights stay on disk until they are used.

    path: the .onnx file; external data lies beside it.
    retie: whether `ties` looks for equal matrices.
    Raises: InputError for a file that is missing, damaged, no ONNX model, or names data outside its folder.

    Example:
        >>> from onnx import parser
        >>> text = '<ir_version: 8, opset_import: ["" : 17]> relu (float[3, 5] x) => (float[3, 5] y) { y = Relu(x) }'
        >>> path = getfixture("tmp_path") / "relu.onnx"
        >>> Model.from_proto(parser.parse_model(text)).save(path)
        >>> load(path).graph.nodes[0].op
        'Relu'
    """
    path = Path(path)
    proto, read = read_file(path)
    return Model(proto, read, path, retie)


class Model:
    """Hold one model while it is read and edited.

    graph: the graphsurgeon graph; each constant holds a Weight, functions are inlined, loops over layers unrolled, no
        `Constant` nodes left.
    path: the file it came from, or None.
    external: whether its weights lie, and will be saved, in a file of their own.
    metadata: what the file says of itself (`metadata_props`).
    node_metadata, node_docs, value_metadata: the same of nodes and tensors, by name; saved where the name still exists.
    unused: initializers of the file that nothing reads; saved again unless cleared.
    loops: what was unrolled; saved as a loop again where its layers still are alike.
    aliases: names that were `Identity` of an initializer, and that initializer.
    graph_header: what the file says of its graph alone (`metadata_props`, where torch lists what it exported).
    """

    def __init__(self, proto: ModelProto, read: WeightReader, path: Path | None, retie: bool = True):
        name = f"'{path}'" if path else "the model"
        check_model(proto, name)
        proto = inlined(proto, name)
        importer = Importer(read)
        with collection_paused():
            self.graph = importer.main(proto.graph)
            make_explicit(self.graph)
        self.path = path
        self.external = bool(read.external.mappings)
        self.retie = retie
        self.metadata = entries(proto.metadata_props)
        self.node_metadata = importer.node_metadata
        self.node_docs = importer.node_docs
        self.value_metadata = importer.value_metadata
        self.unused = importer.unused
        self.aliases = importer.aliases
        self._order = importer.order
        self._header, self.graph_header = _headers(proto)
        opsets = [_standard(item) for item in proto.opset_import]
        for graph in walk(self.graph):
            graph.opset = opset_of(proto)
            graph.import_domains = list(opsets)
            graph.ir_version = max(proto.ir_version, OLDEST_IR)
        with collection_paused():
            open_sequences(self.graph, proto)
            self.loops = unroll_loops(self.graph)
        self.graph.producer_name = legible(proto.producer_name)
        self.graph.producer_version = legible(proto.producer_version)

    @staticmethod
    def from_proto(proto: ModelProto, folder: str | Path | None = None, retie: bool = True) -> "Model":
        """Wrap a proto in memory, whose external data lies in `folder`; do not change the proto afterwards."""
        place = Path(folder) if folder is not None else None
        return Model(proto, WeightReader(ExternalData(place), {}), None, retie)

    @property
    def opset(self) -> int:
        """The version of the standard operator set."""
        return self.graph.opset

    @property
    def inputs(self) -> list[gs.Tensor]:
        return self.graph.inputs

    @property
    def outputs(self) -> list[gs.Tensor]:
        return self.graph.outputs

    @property
    def weights(self) -> dict[str, Weight]:
        """The weight of each constant that the graph or a subgraph reads, by name, in order of use."""
        return {constant.name: weight_of(constant) for graph in walk(self.graph) for constant in constants(graph)}

    @functools.cached_property
    def ties(self) -> tuple[Tie, ...]:
        """The matrices that are stored twice, found at the first call; none without `retie`."""
        return find_ties(self.weights) if self.retie else ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the graph and of each weight's name, shape, type and 64 KiB sample, wherever they lie."""
        proto, exporter = self._export()
        digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
        for header, weight in (*exporter.stored, *exporter.inner):
            digest.update(header.SerializeToString(deterministic=True))
            digest.update(weight.sample())
        return digest.hexdigest()

    def copy(self) -> "Model":
        """Copy the graph and all metadata for independent edits; weights are immutable and shared."""
        copied = object.__new__(Model)
        copied.__dict__.update(self.__dict__)
        copied.__dict__.pop("ties", None)
        copied.graph = copy_graph(self.graph)
        copied.metadata = dict(self.metadata)
        copied.node_metadata = {name: dict(value) for name, value in self.node_metadata.items()}
        copied.node_docs = dict(self.node_docs)
        copied.value_metadata = {name: dict(value) for name, value in self.value_metadata.items()}
        copied.unused = dict(self.unused)
        copied.aliases = dict(self.aliases)
        return copied

    def reread(self) -> "Model":
        """Return the model as a reader of its file gets it: loops written back and unrolled again, by those names."""
        rolled = roll_loops(self.graph, self.loops)
        if rolled is self.graph:
            return self
        again = self.copy()
        again.graph = rolled
        again.loops = unroll_loops(rolled)
        return again

    def holding(self, graph: gs.Graph) -> "Model":
        """Return a model of the same opset that holds another graph, and nothing else of this one."""
        graph.opset, graph.import_domains = self.graph.opset, list(self.graph.import_domains or ())
        graph.ir_version = self.graph.ir_version
        held = object.__new__(Model)
        held.__dict__.update(self.__dict__)
        held.__dict__.pop("ties", None)
        held.__dict__.update(
            graph=graph, metadata={}, node_metadata={}, node_docs={}, value_metadata={}, unused={}, aliases={}
        )
        return held

    def to_proto(self, external: bool = False, location: str = "weights.data") -> ModelProto:
        """Return the model as a proto.

        external: the main graph's big weights are not in it, but name ranges of the file `location`. onnxruntime takes
            the weights themselves by name (`SessionOptions.add_external_initializers`), though not those of subgraphs.
            They are those of `weights`: loops stay unrolled.
        """
        proto, exporter = self._export(rolled=not external)
        fill(Layout.of(exporter.stored, location).embedded if external else exporter.stored)
        fill(exporter.inner)
        proto.graph.initializer.extend(header for header, _ in exporter.stored)
        return proto

    def save(self, path: str | Path) -> None:
        """Write the model, or leave everything as it was.

        Weights go to `<name>.data` beside it if they exceed 1.5 GB or the parent's were external; values below 1 KB
        stay in the model file. The same model under the same name gives the same bytes.
        Raises: InputError where the path cannot be written or the disk is full.
        """
        path = Path(path)
        proto, exporter = self._export()
        everything = (*exporter.stored, *exporter.inner)
        external = self.external or sum(weight.nbytes for _, weight in everything) > EMBEDDED_LIMIT
        layout = Layout.of(everything if external else (), f"{path.name}.data")
        if not layout.placed:
            fill(exporter.inner)
            fill(header_and_weight for header_and_weight in exporter.stored if not _is_streamed(header_and_weight[1]))
            with replacing(path) as (file,):
                wire.write(file, proto, _streams(exporter.stored))
            return
        fill(layout.embedded)
        with replacing(path.with_name(f"{path.name}.data"), path) as (data, file):
            layout.write(data)
            wire.write(file, proto, [(header, None) for header, _ in exporter.stored])

    def _export(self, rolled: bool = True) -> tuple[ModelProto, Exporter]:
        exporter = Exporter(self._order, self.node_metadata, self.node_docs, self.value_metadata)
        proto = ModelProto()
        proto.CopyFrom(self._header)
        proto.producer_name = self.graph.producer_name
        proto.producer_version = self.graph.producer_version
        proto.ir_version = max(self.graph.ir_version or 0, OLDEST_IR)
        proto.opset_import.extend(self._opsets())
        add_metadata(proto.metadata_props, self.metadata)
        proto.graph.CopyFrom(self.graph_header)
        graph = roll_loops(self.graph, self.loops) if rolled else self.graph
        exporter.main(graph, self.unused, proto.graph)
        return proto, exporter

    def _opsets(self) -> Iterable[OperatorSetIdProto]:
        """Return the opsets of the file, and version 1 of any other domain that a pass brought in."""
        versions = {item.domain: item.version for item in self.graph.import_domains or ()}
        versions[""] = self.graph.opset
        for graph in walk(self.graph):
            for node in graph.nodes:
                versions.setdefault("" if (node.domain or "") in STANDARD else node.domain, 1)
        return [OperatorSetIdProto(domain=domain, version=version) for domain, version in versions.items()]


def _standard(opset: OperatorSetIdProto) -> OperatorSetIdProto:
    domain = "" if opset.domain in STANDARD else legible(opset.domain)
    return OperatorSetIdProto(domain=domain, version=opset.version)


def _headers(proto: ModelProto) -> tuple[ModelProto, GraphProto]:
    """Return the parts of the model and of its graph that graphsurgeon has no place for."""
    header = ModelProto(domain=legible(proto.domain), doc_string=legible(proto.doc_string))
    header.model_version = proto.model_version
    header.training_info.extend(proto.training_info)
    header.configuration.extend(proto.configuration)
    graph = GraphProto(metadata_props=proto.graph.metadata_props)
    graph.quantization_annotation.extend(proto.graph.quantization_annotation)
    return header, graph


def _is_streamed(weight: Weight) -> bool:
    return weight.onnx_dtype != TensorProto.STRING and weight.nbytes >= wire.SMALL_BYTES


def _streams(stored: Stored) -> list[tuple[TensorProto, Weight | None]]:
    return [(header, weight if _is_streamed(weight) else None) for header, weight in stored]
