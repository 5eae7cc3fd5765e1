"""Export families from the command line: `python -m zoo dynamo18 gpt2 llama` (no names: all of them), and compare."""

import sys
import time

import numpy as np
import onnx
import onnxruntime
import torch

from zoo.export import export
from zoo.families import FAMILIES, family
from zoo.feeds import feeds


def difference(name: str, path, batch: int, seq: int) -> float:
    """Return the largest relative difference between an export and the framework's model on a padded batch."""
    inputs = feeds(name, batch, seq, padded=True, seed=1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    known = {each.name for each in session.get_inputs()}
    got = session.run(None, {key: value for key, value in inputs.items() if key in known})
    with torch.no_grad():
        want = family(name).build()(*map(torch.from_numpy, inputs.values()))
    return max(float(np.abs(a - b.numpy()).max() / np.abs(b.numpy()).max()) for a, b in zip(got, want, strict=True))


def main() -> None:
    route, *names = sys.argv[1:]
    for name in names or FAMILIES:
        start = time.time()
        try:
            path = export(name, route)
            seconds, nodes = time.time() - start, len(onnx.load(path).graph.node)
            sizes, note = ((2, 7), (3, 9), (1, 6)), ""
            try:
                found = [difference(name, path, *each) for each in sizes]
            except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
                found, note = [difference(name, path, 1, seq) for seq in (7, 9)], f"batch 1 only: {str(error)[-90:]}"
            shown = " ".join(f"{each:.1e}" for each in found)
            print(f"{name:12} {route:9} {nodes:5} nodes {seconds:5.1f} s  {shown} {note}", flush=True)
        except Exception as error:  # report and go on: this is a survey
            print(f"{name:12} {route:9} FAILED {type(error).__name__}: {' '.join(str(error).split())[:600]}")


if __name__ == "__main__":
    main()
