"""Task (b): a vision transformer on CIFAR-10, patches of 8 x 8, with a class token (arXiv 2010.11929)."""

import io
import itertools
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from train_parent import Attention, Block, Config, Mlp, cosine, optimiser_for, write_onnx

from convergence.task import Say, Task, data_file

BATCH, PATCH, SIDE, CLASSES = 64, 8, 32, 10
TOKENS = (SIDE // PATCH) ** 2 + 1
IMAGES = {"choose": 2000, "report": 4000}
PARENT = Config(vocabulary=CLASSES, context=TOKENS, blocks=8, hidden=96, heads=6, ffn=384)
CHILD = Config(vocabulary=CLASSES, context=TOKENS, blocks=4, hidden=48, heads=3, ffn=192)
MEAN, SPREAD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class FullAttention(Attention):
    """Attention over all tokens; the GPT's looks back only."""

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        batch, time, _ = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # each B H T head_dim
        context = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(context.transpose(1, 2).reshape(batch, time, self.heads * self.head_dim))


class FullBlock(Block):
    def __init__(self, config: Config):
        nn.Module.__init__(self)
        self.norm_1, self.attention = nn.LayerNorm(config.hidden), FullAttention(config)
        self.norm_2, self.mlp = nn.LayerNorm(config.hidden), Mlp(config)


class ViT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.patch = nn.Conv2d(3, config.hidden, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.position = nn.Parameter(torch.randn(1, config.context, config.hidden) * 0.02)
        self.blocks = nn.ModuleList(FullBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocabulary)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = (2 * config.blocks) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=depth * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, pixels: Tensor) -> Tensor:  # B 3 32 32 -> B classes
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # B T-1 D
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class VisionTransformer(Task):
    name, title = "vit", "vision transformer, CIFAR-10"
    layers, widths = 4, "hidden=48 ffn=192 heads=3"
    rates = (4e-3, 2e-3, 8e-3, 1e-3, 1.6e-2)
    outer = ("patch", "position", "cls", "head")
    unit = "nats per image"
    batch_tokens = BATCH * TOKENS

    def make_parent(self, steps: int, say: Say) -> None:
        torch.manual_seed(0)
        model = ViT(PARENT).to(self.device)
        optimiser, generator = optimiser_for(model, 2e-3), torch.Generator().manual_seed(0)
        began = time.perf_counter()
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * cosine(step, steps, warm_up=min(100, steps // 2 + 1))
            inputs, target = self.batch(generator)
            loss = self.loss(model(*inputs), target)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if (step + 1) % 250 == 0:
                seconds = time.perf_counter() - began
                say(f"the ViT's parent: step {step + 1} of {steps}, loss {loss.item():.3f}, {seconds:.0f} s")
        measured = self.evaluate(model, "report")
        say(f"the ViT's parent: validation loss {measured['loss']:.3f}, accuracy {measured['accuracy']:.3f}")
        shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}}
        notes = {"validation_loss": round(measured["loss"], 4), "accuracy": round(measured["accuracy"], 4)}
        example = torch.zeros(2, 3, SIDE, SIDE)
        write_onnx(model.cpu(), (example,), ["pixels"], ["logits"], shapes, notes, self.parent_path)

    def calibration(self, sequences: int, seed: int) -> list[dict[str, np.ndarray]]:
        generator = torch.Generator().manual_seed(1_000 + seed)
        images = sequences * 128 // TOKENS
        return [{"pixels": self.batch(generator)[0][0].cpu().numpy()} for _ in range(max(images // BATCH, 1))]

    def fresh(self) -> nn.Module:
        return ViT(CHILD)

    def batch(self, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        images, labels = self._images("train")
        chosen = torch.randint(len(labels), (BATCH,), generator=generator).numpy()
        flipped = torch.rand(BATCH, generator=generator) < 0.5
        pixels = self._normalised(images[chosen])
        pixels[flipped] = pixels[flipped].flip(-1)
        return (pixels.to(self.device),), torch.from_numpy(labels[chosen].astype(np.int64)).to(self.device)

    def batches(self, split: str) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        images, labels = self._images("test")
        mine = np.flatnonzero((np.arange(len(labels)) % 5 == 0) == (split == "choose"))[: IMAGES[split]]
        found = []
        for at in range(0, len(mine), 250):
            rows = mine[at : at + 250]
            target = torch.from_numpy(labels[rows].astype(np.int64))
            found.append(((self._normalised(images[rows]).to(self.device),), target.to(self.device)))
        return found

    def accuracy(self, outputs: Tensor, target: Tensor) -> float:
        return (outputs.argmax(-1) == target).float().mean().item()

    def _images(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        return _images(self.folder / "data", part)

    @staticmethod
    def _normalised(images: np.ndarray) -> Tensor:  # B 32 32 3, bytes -> B 3 32 32
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        mean, spread = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, SPREAD))
        return ((pixels - mean) / spread).contiguous()


@cache
def _images(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a part's images, uint8 [N, 32, 32, 3], and labels; decoded once, then read from a cache."""
    stored = folder / f"cifar10_{part}.npy"
    with np.load(data_file("cifar10_jpeg.npz")) as packed:
        labels = packed[f"{part}_label"]
        if not stored.exists():
            _decode(packed[f"{part}_jpeg"], packed[f"{part}_offset"], stored)
    return np.load(stored, mmap_mode="r"), labels


def _decode(content: np.ndarray, offsets: np.ndarray, path: Path) -> None:
    from PIL import Image

    images = np.empty((len(offsets) - 1, SIDE, SIDE, 3), np.uint8)
    for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
        images[i] = np.asarray(Image.open(io.BytesIO(content[begin:end].tobytes())).convert("RGB"))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part.npy")
    np.save(unfinished, images)
    unfinished.replace(path)
