"""Cut a character GPT to half its width and depth, then race it against the same small model from random weights.

    ./tools/demo                        # makes the environment, then runs this file; 5 minutes on 2 CPU cores
    ./tools/demo --steps 200 --seeds 1  # a glance

The parent is tools/demo_data/parent.onnx (tools/train_parent.py made it). Both children have one architecture, see the
same batches in the same order, and each gets its own best learning rate of one grid, since subcloned weights want a
lower one (arXiv 2312.09299, table 1). Everything it reports is measured in this run and written to demo-output/.
"""

import argparse
import copy
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from demo_page import write_page, write_png
from race import BATCH, EVERY, RATES, Arm, race, steps_to, validation_windows, verdict
from rich.console import Console
from rich.table import Table
from torch import nn
from train_parent import DATA, GPT, Config, Text, validate

import graphclone

TARGET = {"hidden": 64, "heads": 4, "ffn": 256, "layers": 4}  # half of the parent's 128, 8, 512 and 8

console = Console()


@torch.no_grad()
def write_text(module: nn.Module, text: Text, context: int, length: int = 280) -> str:
    """Let `module` continue a line break for `length` characters, sampled with a fixed seed."""
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = text.encode("\n\n").tolist()
    for _ in range(length):
        window = torch.tensor([ids[-context:]], device=device)
        likely = torch.softmax(module(window)[0, -1].float().cpu() / 0.8, dim=-1)
        ids.append(int(torch.multinomial(likely, 1, generator=generator)))
    return text.decode(ids).strip()


def calibration_batches(text: Text, context: int, count: int = 16, size: int = 16) -> list[dict[str, np.ndarray]]:
    """Draw feeds of the parent's input: ids [size, context] from the training text."""
    generator = torch.Generator().manual_seed(0)
    return [{"ids": text.batch(size, context, generator)[0].numpy()} for _ in range(count)]


def fresh_start(module: nn.Module, config: Config, seed: int) -> nn.Module:
    """Return a copy of `module` with the weights of a newly built GPT of that size, matched by parameter name."""
    torch.manual_seed(seed)
    fresh = copy.deepcopy(module)
    weights = GPT(config).state_dict()
    unmatched = set(weights) ^ {name for name, _ in fresh.named_parameters()}
    if unmatched:
        raise SystemExit(f"the child's parameters and the original's differ in name: {', '.join(sorted(unmatched))}")
    fresh.load_state_dict(weights, strict=False)  # buffers are not parameters and stay
    return fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help=f"training steps of each run, a multiple of {EVERY}")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best learning rate, averaged")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    options = parser.parse_args()
    if options.steps < EVERY or options.steps % EVERY or options.seeds < 1:
        parser.error(f"--steps must be a positive multiple of {EVERY}, and --seeds at least 1")
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)

    console.rule("1. The parent, as ONNX")
    parent = graphclone.load(DATA / "parent.onnx")
    config = Config(**json.loads(parent.metadata["config"]))
    characters = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    text = Text(characters, json.loads(parent.metadata["vocabulary"]))

    console.print(shape(config))

    console.rule("2. Calibrate")
    stats = graphclone.calibrate(parent, calibration_batches(text, config.context))

    console.rule("3. Subclone to half the width and half the depth, and verify")
    small = replace(config, hidden=TARGET["hidden"], heads=TARGET["heads"], ffn=TARGET["ffn"], blocks=TARGET["layers"])
    console.print(shape(small))
    child = graphclone.subclone(parent, stats, **TARGET)
    child.save(options.out / "child.onnx")
    report = graphclone.verify(child)
    console.print(str(report), highlight=False)
    if not report.ok:
        raise SystemExit(1)

    console.rule(f"4. To PyTorch, and train on {device}")
    whole, module = graphclone.to_torch(parent).to(device), graphclone.to_torch(child).to(device)
    starts = {
        "subcloned": lambda seed: copy.deepcopy(module),
        "random": lambda seed: fresh_start(module, small, seed),
    }
    arms, modules = race(starts, text, config.context, options.steps, options.seeds, console)

    console.rule("5. Result")
    subcloned, random = arms
    target = random.mean[-1]
    reached = steps_to(subcloned.steps, subcloned.mean, target)
    result = {
        "arms": [{**asdict(arm), "rate": arm.rate, "steps": arm.steps, "mean": arm.mean} for arm in arms],
        "parent_loss": validate(whole, validation_windows(text, config.context, device)),
        "parent_parameters": sum(parameter.numel() for parameter in whole.parameters()),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "target": target,
        "reached": reached,
        "steps_to_target": {arm.name: steps_to(arm.steps, arm.mean, target) for arm in arms},
        "steps": options.steps,
        "seeds": options.seeds,
        "rates": RATES,
        "batch": BATCH * config.context,
        "machine": machine(device),
        "samples": {name: write_text(module, text, config.context) for name, module in modules.items()},
        "verdict": verdict(reached, target, options.steps),
    }
    console.print(table(arms, result))
    console.print(result["verdict"], style="bold")
    write_png(arms, result, options.out / "curves.png")
    write_page(arms, result, options.out / "demo.html")
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} s in all. {options.out}/: curves.png, demo.html, result.json, child.onnx")


def shape(config: Config) -> str:
    """Say how large a GPT is.

    Example:
        >>> shape(Config())
        '8 blocks, hidden 128, 8 heads of 16, FFN 512'
    """
    heads = f"{config.heads} heads of {config.head_dim}"
    return f"{config.blocks} blocks, hidden {config.hidden}, {heads}, FFN {config.ffn}"


def machine(device: str) -> str:
    """Name what the race ran on, for the page."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}"


def table(arms: list[Arm], result: dict) -> Table:
    """Lay the arms out for the terminal, one row each."""
    seeds = f"mean of {result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    view = Table(title=f"Validation loss, nats per character, {seeds}")
    view.add_column("start")
    for heading in (
        "parameters",
        "best rate",
        "untrained",
        f"after {result['steps']}",
        f"steps to {result['target']:.3f}",
    ):
        view.add_column(heading, justify="right")
    for arm in arms:
        reached = result["steps_to_target"][arm.name]
        shown = "not reached" if reached is None else f"{reached:.0f}"
        first, last = f"{arm.mean[0]:.3f}", f"{arm.mean[-1]:.3f}"
        view.add_row(arm.name, f"{result['parameters']:,}", f"{arm.rate:g}", first, last, shown)
    view.add_row("parent", f"{result['parent_parameters']:,}", "", "", f"{result['parent_loss']:.3f}", "", style="dim")
    return view


if __name__ == "__main__":
    main()
