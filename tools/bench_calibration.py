"""Measure what calibration costs: an instrumented forward against a plain one, in alternating pairs.

    python tools/bench_calibration.py [--pairs 20] [--threads 2] [--no-spans] [--model FILE]

GPT-2 size (12 blocks of 768, batch 4 x 128 tokens, random weights, no language head: its cost would flatter the ratio).
Statistics of all dimensions and of all blocks and half blocks, as `graphclone calibrate` takes them.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from pairs import compare, interval

from graphclone.analysis import analyse
from graphclone.calibration.data import Batch
from graphclone.calibration.masks import mask_inputs
from graphclone.calibration.meter import Meter, Question
from graphclone.calibration.session import open_session, resolve_provider
from graphclone.model import load
from graphclone.taps import all_taps, spans

BATCH, TOKENS = 4, 128


class Stream(torch.nn.Module):
    """GPT-2 up to its final norm, with masks and without a cache."""

    def __init__(self, config: transformers.GPT2Config):
        super().__init__()
        self.transformer = transformers.GPT2Model(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state


def export(path: Path) -> None:
    """Write GPT-2 with random weights as ONNX."""
    torch.manual_seed(0)
    model = Stream(transformers.GPT2Config(use_cache=False)).eval()
    example = torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    names = ["input_ids", "attention_mask"]
    program = torch.onnx.export(
        model, example, dynamo=True, opset_version=18, input_names=names, dynamic_shapes=(sizes, sizes), verbose=False
    )
    program.save(str(path), external_data=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--no-spans", action="store_true")
    parser.add_argument("--model", type=Path, help="an export of GPT-2 to use instead of making one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or Path(folder) / "gpt2.onnx"
        if options.model is None:
            export(path)
        model = load(path)
        analysis = analyse(model)
        taps = all_taps(analysis)
        blocks = () if options.no_spans else spans(analysis)
        ids = np.random.default_rng(0).integers(0, 50257, (BATCH, TOKENS))
        batch = Batch({"input_ids": ids, "attention_mask": np.ones_like(ids)}, BATCH, "batch 0")
        provider = resolve_provider(options.provider)
        session = open_session(model, provider=provider, threads=options.threads)
        question = Question(taps, blocks, (), mask_inputs(model), provider, options.threads)
        meter = Meter(model, question, batch)
        plain, instrumented = compare(
            lambda: session.run(None, batch.feeds), lambda: meter.read(batch), max(options.pairs, 1)
        )
    ratios = instrumented / plain
    low, high = interval(ratios)
    print(f"GPT-2 12x768, batch {BATCH} x {TOKENS} tokens, {provider}: {len(taps)} taps, {len(blocks)} spans")
    print(f"plain {np.median(plain) * 1e3:.0f} ms, instrumented {np.median(instrumented) * 1e3:.0f} ms")
    print(f"ratio {np.median(ratios):.4f}, the median of {len(ratios)} pairs; 95 % interval {low:.4f} to {high:.4f}")
    print("limit 1.15, goal 1.05")


if __name__ == "__main__":
    main()
