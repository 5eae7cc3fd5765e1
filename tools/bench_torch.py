"""Measure a training step of the converted module against the framework's own, in alternating pairs.

    python tools/bench_torch.py --model gpt2                 # GPT-2 124M, 4 x 128 tokens
    python tools/bench_torch.py --model vit --compile        # ViT-B/16, 8 images; both under torch.compile
    python tools/bench_torch.py --model llama --small        # a toy of the same shape, for a busy machine
    python tools/bench_torch.py --model gpt2 --mask --pairs 40 --threads 2
    python tools/bench_torch.py --model llama --device cuda --bf16

Native: the Hugging Face class with sdpa attention, no dropout, random weights. Converted: its export (torch.onnx,
dynamo, opset 18) through `graphclone.to_torch`. A step is forward, cross-entropy, backward and AdamW, on one batch for
both; both must start at the same loss. Time: the median ratio of at least 20 pairs, with its 95 % bootstrap interval;
in one half of the pairs the native module's tensors were allocated first, in the other the converted one's.
Peak memory: weights, gradients and AdamW's moments, and the most that PyTorch allocates on top of them during one step.
"""

import argparse
import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from pairs import compare, interval
from torch import nn
from torch.profiler import ProfilerActivity, profile

import graphclone

LEAST_PAIRS = 20
GOAL = 1.02
RATE = 1e-4


@dataclass(frozen=True)
class Size:
    """What is trained: the framework's class and config, and a batch of `samples`, each of `tokens` if it is text."""

    kind: type
    config: transformers.PretrainedConfig
    samples: int
    tokens: int = 0


def size_of(model: str, small: bool) -> Size:
    """Return the sizes that README's figures are about, or toys of the same shape."""
    if model == "gpt2":
        toy = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 2000} if small else {}
        config = transformers.GPT2Config(**toy, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        return Size(transformers.GPT2LMHeadModel, config, *((2, 64) if small else (4, 128)))
    if model == "vit":
        toy = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
        config = transformers.ViTConfig(**(toy | {"image_size": 96} if small else {}), num_labels=1000)
        return Size(transformers.ViTForImageClassification, config, 4 if small else 8)
    hidden, blocks, heads, vocab = (256, 4, 4, 2000) if small else (768, 12, 12, 32_000)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=max(2, heads // 3),
    )
    return Size(transformers.LlamaForCausalLM, config, *((2, 64) if small else (4, 128)))


class Native(nn.Module):
    """The framework's module, from tensors to logits."""

    def __init__(self, size: Size):
        super().__init__()
        size.config._attn_implementation = "sdpa"
        self.model = size.kind(size.config)
        self.options = {"use_cache": False} if size.tokens else {}

    def forward(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        masks = {} if mask is None else {"attention_mask": mask}
        return self.model(values, **masks, **self.options).logits


def batch_of(size: Size, mask: bool, device: str) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return the inputs and the targets: ids (samples, tokens) and a mask that pads the last quarter of the first
    sample, or pixels (samples, 3, height, width)."""
    random = torch.Generator().manual_seed(0)
    if not size.tokens:
        pixels = torch.randn(size.samples, 3, size.config.image_size, size.config.image_size, generator=random)
        return (pixels.to(device),), torch.randint(size.config.num_labels, (size.samples,), generator=random).to(device)
    ids = torch.randint(size.config.vocab_size, (size.samples, size.tokens), generator=random).to(device)
    masks = torch.ones_like(ids)
    masks[0, -(size.tokens // 4) :] = 0
    return (ids, masks) if mask else (ids,), ids.roll(-1, 1)


def convert(native: Native, inputs: tuple[torch.Tensor, ...]) -> tuple[nn.Module, float]:
    """Export and convert; return the module and the seconds from the file on disk to it."""
    dims = {0: torch.export.Dim("batch")}
    if inputs[0].dim() == 2:
        dims[1] = torch.export.Dim("sequence")
    shapes = tuple(dims for _ in inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program = torch.onnx.export(
            native.eval(), inputs, dynamo=True, opset_version=18, dynamic_shapes=shapes, verbose=False
        )
        program.save(str(path), external_data=True)
        start = time.perf_counter()
        module = graphclone.to_torch(graphclone.load(path))
        return module, time.perf_counter() - start


class Training:
    """One module and its optimiser; a call is a step and returns the loss."""

    def __init__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], targets: torch.Tensor, bf16: bool):
        self.module, self.inputs, self.targets, self.bf16 = module, inputs, targets, bf16
        self.optimiser = torch.optim.AdamW(module.parameters(), lr=RATE)

    def __call__(self) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.targets.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.module(*self.inputs)
            loss = F.cross_entropy(logits.flatten(0, -2), self.targets.flatten())
        loss.backward()
        self.optimiser.step()
        return loss.item()  # waits for the device

    def peak_bytes(self) -> int:
        """Return what one step holds at most: weights, moments and buffers, and what it allocates on top."""
        self.optimiser.zero_grad(set_to_none=True)
        moments = [each for state in self.optimiser.state.values() for each in state.values() if torch.is_tensor(each)]
        held = sum(each.nbytes for each in (*self.module.parameters(), *self.module.buffers(), *moments))
        return held + (self._peak_on_cuda() if self.targets.is_cuda else self._peak_on_cpu())

    def _peak_on_cuda(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return torch.cuda.max_memory_allocated() - before

    def _peak_on_cpu(self) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            self()
        events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return int(np.cumsum([event.nbytes() for event in events]).max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("gpt2", "vit", "llama"), default="gpt2")
    parser.add_argument("--small", action="store_true", help="4 blocks of 256 instead of the full size")
    parser.add_argument("--mask", action="store_true", help="an attention mask with padding as second input")
    parser.add_argument("--compile", action="store_true", help="both under torch.compile")
    parser.add_argument("--bf16", action="store_true", help="both under autocast")
    parser.add_argument("--pairs", type=int, default=LEAST_PAIRS, help=f"at least {LEAST_PAIRS}")
    parser.add_argument("--threads", type=int, help="of PyTorch, on the CPU")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.mask and options.model == "vit":
        parser.error("--mask: images have no attention mask; leave it out, or choose gpt2 or llama")
    if options.threads:
        torch.set_num_threads(options.threads)

    torch.manual_seed(0)
    size = size_of(options.model, options.small)
    native = Native(size)
    inputs, targets = batch_of(size, options.mask, options.device)
    converted, seconds = convert(native, tuple(each.cpu() for each in inputs))
    modules = [module.to(options.device).train() for module in (native, converted)]
    count = sum(each.numel() for each in native.parameters())
    halves, pairs = [], max(options.pairs, LEAST_PAIRS)
    for order in ((0, 1), (1, 0)):  # whose tensors are allocated first can be worth some per cent
        fresh = {which: copy.deepcopy(modules[which]) for which in order}
        if options.compile:
            fresh = {which: torch.compile(module) for which, module in fresh.items()}
        trainings = {which: Training(module, inputs, targets, options.bf16) for which, module in fresh.items()}
        losses = {which: training() for which, training in trainings.items()}
        first, second = losses[0], losses[1]
        if abs(first - second) > (1e-2 if options.bf16 else 1e-4) * abs(first):
            raise SystemExit(f"the losses differ: native {first:.6f}, converted {second:.6f}; nothing was measured")
        theirs, ours = trainings[0], trainings[1]
        halves.append(compare(theirs, ours, pairs // 2))
    times = np.concatenate(halves, axis=1)
    ratios = times[1] / times[0]
    low, high = interval(ratios)
    memory = [training.peak_bytes() for training in (theirs, ours)]
    what = " x ".join(map(str, inputs[0].shape))
    modes = [name for name in ("small", "mask", "compile", "bf16") if getattr(options, name)]
    print(", ".join([f"{options.model}: {count / 1e6:.1f} M parameters, batch {what}, {options.device}", *modes]))
    print(f"converted in {seconds:.2f} s, weights read; both start at loss {first:.5f}")
    print(f"native {np.median(times[0]) * 1e3:.1f} ms, converted {np.median(times[1]) * 1e3:.1f} ms a step")
    print(f"time ratio {np.median(ratios):.4f}, median of {len(ratios)} pairs; 95 % interval {low:.4f} to {high:.4f}")
    native_mb, converted_mb = (each / 1e6 for each in memory)
    print(f"memory ratio {converted_mb / native_mb:.4f}: {native_mb:.1f} MB native, {converted_mb:.1f} MB converted")
    print(f"goal of both {GOAL}")


if __name__ == "__main__":
    main()
