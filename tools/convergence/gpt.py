"""Task (a): a character GPT on Tiny Shakespeare, the demo's model and data at 8 blocks of 96."""

from argparse import Namespace
from functools import cache

import numpy as np
import torch
import train_parent
from torch import Tensor, nn
from train_parent import GPT, Config, Text

from convergence.task import Say, Task

BATCH, WINDOWS = 8, {"choose": 256, "report": 512}
PARENT = Config(blocks=8, hidden=96, heads=6, ffn=384)
CHILD = Config(blocks=4, hidden=48, heads=3, ffn=192)


class CharacterGPT(Task):
    name, title = "gpt", "character GPT, Tiny Shakespeare"
    layers, widths = 4, "hidden=48 ffn=192 heads=3"
    rates = (8e-3, 4e-3, 1.6e-2, 2e-3, 3.2e-2)
    outer = ("token", "position", "head")
    unit = "nats per character"
    batch_tokens = BATCH * PARENT.context

    @property
    def text(self) -> Text:
        return _text()

    def make_parent(self, steps: int, say: Say) -> None:
        torch.manual_seed(0)
        model = GPT(PARENT).to(self.device)
        self.parent_path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = self.parent_path.with_suffix(".pt")
        options = Namespace(seed=0, rate=4e-3, steps=steps, batch=BATCH, checkpoint=checkpoint)
        loss = train_parent.train(model, self.text, options, PARENT)
        say(f"the GPT's parent: validation loss {loss:.3f} after {steps} steps")
        train_parent.export(model.cpu(), PARENT, self.text, loss, self.parent_path)

    def calibration(self, sequences: int, seed: int) -> list[dict[str, np.ndarray]]:
        generator = torch.Generator().manual_seed(1_000 + seed)
        sizes = [min(16, sequences - done) for done in range(0, sequences, 16)]
        return [{"ids": self.text.batch(size, PARENT.context, generator)[0].numpy()} for size in sizes]

    def fresh(self) -> nn.Module:
        return GPT(CHILD)

    def batch(self, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        ids, following = self.text.batch(BATCH, PARENT.context, generator)
        return (ids.to(self.device),), following.to(self.device)

    def batches(self, split: str) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        return [((ids.to(self.device),), target.to(self.device)) for ids, target in _windows(split)]


@cache
def _text() -> Text:
    return Text(train_parent.find_text().read_text(encoding="utf-8"))


@cache
def _windows(split: str) -> list[tuple[Tensor, Tensor]]:
    """Deal the validation windows out: of every three, one to choose by and two to report."""
    total = sum(WINDOWS.values())
    inputs, targets = _text().validation_windows(total, PARENT.context)
    mine = (torch.arange(total) % 3 == 0) == (split == "choose")
    return list(zip(inputs[mine].split(32), targets[mine].split(32), strict=True))
