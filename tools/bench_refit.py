"""Measure what `refit` costs: GPT-2 124M to half its width and depth, and the solves alone by width.

    python tools/bench_refit.py [--tokens 32768] [--pipeline TEXT] [--model FILE] [--solves-only] [--no-solves]

GPT-2 at its full size (12 blocks of 768, language head tied, random weights) goes to 6 blocks of 384. Memory is the
peak of the process above what it holds with the model loaded and all its weights read. Solves are those of one matrix
d x d with the Gram matrices at hand, in double precision.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import graphclone
from graphclone.analysis import analyse
from graphclone.pipeline import Pipeline
from passes.ridge import Moments, Targets, solve

BATCH, TOKENS, VOCABULARY = 8, 512, 50257
HALF = "depth{layers=6 by=uniform},width{hidden=384 ffn=1536 heads=6 by=uniform},refit"
WIDTHS = (768, 1536, 3072)
EXPORT = """
import sys, torch, transformers
torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)).eval()
example = torch.ones(2, 9, dtype=torch.int64)
sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
program = torch.onnx.export(
    model, (), kwargs={"input_ids": example}, dynamo=True, opset_version=18, input_names=["input_ids"],
    dynamic_shapes={"input_ids": sizes}, verbose=False,
)
program.save(sys.argv[1], external_data=True)
"""
"""It runs in a process of its own, so that torch's memory is not counted."""


def status(field: str) -> float:
    """Return a line of /proc/self/status in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e9


def measure(path: Path, pipeline: str, tokens: int) -> None:
    """Run a pipeline on a parent; print seconds, memory and the notes."""
    parent = graphclone.load(path)
    analysis = analyse(parent)
    held = [weight.load() for weight in parent.weights.values()]
    size = sum(float(array.nbytes) for array in held) / 1e9
    checked = sum(float(array.reshape(-1)[::1024].sum()) for array in held)
    assert np.isfinite(checked)
    random = np.random.default_rng(0)
    count = tokens // (BATCH * TOKENS)
    batches = [{"input_ids": random.integers(0, VOCABULARY, (BATCH, TOKENS))} for _ in range(count)]
    Path("/proc/self/clear_refs").write_text("5")
    before, began, spent = status("VmRSS"), time.perf_counter(), time.process_time()
    result = Pipeline.parse(pipeline).run(
        parent, data=batches, analysis=analysis, progress=sys.stderr.isatty(), provider="cpu"
    )
    seconds, busy = time.perf_counter() - began, time.process_time() - spent
    print(f"GPT-2 124M, {len(batches)} x {BATCH} x {TOKENS} tokens: {pipeline}")
    print(f"{seconds:.0f} s, {busy:.0f} s of processor time")
    print(f"peak {status('VmHWM') - before:.2f} GB above the {before:.2f} GB with the model's {size:.2f} GB read")
    for note in result.notes:
        print(f"note {note}")


def solves(repeats: int) -> None:
    """Time one solve per width, and print the exponent of the width by which it grows."""
    medians = []
    for width in WIDTHS:
        random = np.random.default_rng(0)
        x = random.standard_normal((2 * width, width), np.float32)
        rows = np.hstack([x, np.ones((len(x), 1), np.float32), x @ random.standard_normal((width, width), np.float32)])
        moments = Moments(width)
        moments.add(rows.T @ rows, held=False)
        moments.add(rows[: len(rows) // 2].T @ rows[: len(rows) // 2], held=True)
        before = np.zeros((width + 1, width), np.float32)
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            assert solve(moments, Targets.of(width), before, 1e-2, True).weights is not None
            taken.append(time.perf_counter() - began)
        medians.append(float(np.median(taken)))
        print(f"solve, d = {width}: {medians[-1]:.3f} s, the median of {repeats}")
    exponent = np.polyfit(np.log(WIDTHS), np.log(medians), 1)[0]
    print(f"grows as d^{exponent:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--pipeline", default=HALF)
    parser.add_argument("--model", type=Path, help="an export to use instead of making one; its input is input_ids")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--solves-only", action="store_true")
    parser.add_argument("--no-solves", action="store_true")
    options = parser.parse_args()
    if not options.solves_only:
        with tempfile.TemporaryDirectory() as folder:
            path = options.model or Path(folder) / "gpt2.onnx"
            if options.model is None:
                subprocess.run([sys.executable, "-c", EXPORT, str(path)], check=True, stdout=subprocess.DEVNULL)
            measure(path, options.pipeline, options.tokens)
    if not options.no_solves:
        solves(options.repeats)


if __name__ == "__main__":
    main()
