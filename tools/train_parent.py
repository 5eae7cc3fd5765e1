"""Train the demo's parent, a character GPT on Tiny Shakespeare, and export it to ONNX.

    python tools/train_parent.py                    # writes tools/demo_data/parent.onnx, half an hour on one core

Plain PyTorch and nothing of graphclone: this file plays the part of "any framework". The model is GPT-2 (Radford et al.
2019) in small: pre-norm blocks, learned positions, GELU; unlike GPT-2 its head is not tied to its embedding.

Shapes in comments: B batch, T time (at most `context`), D hidden, H heads, V vocabulary.
"""

import argparse
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
DATA = HERE / "demo_data"


# --- data ---------------------------------------------------------------------------------------------------------


def find_text() -> Path:
    """Return the path of Tiny Shakespeare: in $GRAPHCLONE_DATA, in ../shared/data, else the copy the demo ships."""
    folders = [os.environ.get("GRAPHCLONE_DATA"), HERE.parent.parent / "shared" / "data", DATA]
    for folder in folders:
        if folder and (path := Path(folder) / "tinyshakespeare.txt").is_file():
            return path
    raise SystemExit("no tinyshakespeare.txt; set GRAPHCLONE_DATA to the folder that holds it")


class Text:
    """Characters as integers, the first 90 % to train on and the rest to validate.

    Example:
        >>> text = Text("hello hello hello hello ")
        >>> text.vocabulary, text.encode("hole").tolist()
        (' ehlo', [2, 4, 3, 1])
        >>> text.decode([2, 4, 3, 1])
        'hole'
    """

    def __init__(self, characters: str, vocabulary: str | None = None):
        self.vocabulary = vocabulary or "".join(sorted(set(characters)))
        self._index = {character: i for i, character in enumerate(self.vocabulary)}
        ids = self.encode(characters)
        split = int(0.9 * len(ids))
        self.train, self.validation = ids[:split], ids[split:]

    def encode(self, characters: str) -> Tensor:
        return torch.tensor([self._index[character] for character in characters])

    def decode(self, ids) -> str:
        return "".join(self.vocabulary[int(i)] for i in ids)

    def batch(self, size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw `size` random windows of the training text: inputs and next characters, both [B, T]."""
        starts = torch.randint(len(self.train) - context, (size,), generator=generator)
        windows = torch.stack([self.train[start : start + context + 1] for start in starts])  # B T+1
        return windows[:, :-1], windows[:, 1:]

    def validation_windows(self, count: int, context: int) -> tuple[Tensor, Tensor]:
        """Return `count` windows spread evenly over the validation text, always the same ones, both [B, T]."""
        starts = torch.linspace(0, len(self.validation) - context - 1, count).long()
        windows = torch.stack([self.validation[start : start + context + 1] for start in starts])  # B T+1
        return windows[:, :-1], windows[:, 1:]


# --- model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    vocabulary: int = 65
    context: int = 128
    blocks: int = 8
    hidden: int = 128
    heads: int = 8
    head_dim: int = 16
    ffn: int = 512


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        width = config.heads * config.head_dim
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv = nn.Linear(config.hidden, 3 * width)
        self.out = nn.Linear(width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        batch, time, _ = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # each B H T head_dim
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(context.transpose(1, 2).reshape(batch, time, self.heads * self.head_dim))


class Mlp(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.hidden, config.ffn)
        self.down = nn.Linear(config.ffn, config.hidden)

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(config.hidden), Attention(config)
        self.norm_2, self.mlp = nn.LayerNorm(config.hidden), Mlp(config)

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.hidden)
        self.position = nn.Embedding(config.context, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self._initialise(config)

    def _initialise(self, config: Config) -> None:
        """Draw matrices from N(0, 1/fan_in), the residual's writers divided by sqrt(2 blocks) (GPT-2, section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.startswith(("token", "position")):
                nn.init.normal_(parameter, std=config.hidden**-0.5)
            elif parameter.dim() == 2:
                writes_residual = name.endswith(("out.weight", "down.weight"))
                depth = (2 * config.blocks) ** -0.5 if writes_residual else 1.0
                nn.init.normal_(parameter, std=depth * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:  # B T -> B T V
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# --- training -----------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per character."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, windows: tuple[Tensor, Tensor]) -> float:
    model.eval()
    chunks = zip(*(part.split(64) for part in windows), strict=True)
    losses = [(loss_of(model, inputs, targets).item(), len(inputs)) for inputs, targets in chunks]
    model.train()
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def optimiser_for(model: nn.Module, rate: float, decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) that decays matrices and leaves norms and biases alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=True)


def cosine(step: int, steps: int, warm_up: int) -> float:
    """The learning rate's factor at `step`: linear warm-up, then a cosine down to 10 % (arXiv 1608.03983).

    Example:
        >>> [round(cosine(step, 100, 10), 2) for step in (0, 9, 55, 99)]
        [0.1, 1.0, 0.55, 0.1]
    """
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(model: GPT, text: Text, options: argparse.Namespace, config: Config) -> float:
    """Train in place; return the final validation loss. Ctrl-C stops early and keeps what was learnt."""
    generator = torch.Generator().manual_seed(options.seed)
    optimiser = optimiser_for(model, options.rate)
    windows = text.validation_windows(128, config.context)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=options.steps)
        for step in range(options.steps):
            for group in optimiser.param_groups:
                group["lr"] = options.rate * cosine(step, options.steps, warm_up=100)
            loss = loss_of(model, *text.batch(options.batch, config.context, generator))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if (step + 1) % 250 == 0:
                progress.print(f"step {step + 1}: train {loss.item():.3f}, validation {validate(model, windows):.3f}")
                torch.save(model.state_dict(), options.checkpoint)
            progress.update(bar, advance=1, description=f"loss {loss.item():.3f}")
    return validate(model, text.validation_windows(800, config.context))


# --- export -------------------------------------------------------------------------------------------------------


def export(model: GPT, config: Config, text: Text, loss: float, path: Path) -> None:
    """Write the GPT with dynamic batch and time, and the vocabulary among its metadata."""
    batch, time = torch.export.Dim("batch", min=1), torch.export.Dim("time", min=2, max=config.context)
    notes = {"vocabulary": text.vocabulary, "config": asdict(config), "validation_loss": round(loss, 4)}
    example = (torch.zeros(2, 16, dtype=torch.long),)
    write_onnx(model, example, ["ids"], ["logits"], {"ids": {0: batch, 1: time}}, notes, path)


def write_onnx(
    model: nn.Module,
    example: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    shapes: dict[str, dict],
    notes: dict[str, object],
    path: Path,
) -> None:
    """Write one ONNX file, opset 20, that keeps the parameters' names; `notes` become its metadata.

    The exporter's own optimiser would fold every Linear's transpose into a nameless copy (`val_8`), so it runs here
    without that step.
    """
    import onnx
    from onnxscript.optimizer import optimize_ir

    program = torch.onnx.export(
        model.eval(),
        example,
        dynamo=True,
        opset_version=20,
        optimize=False,
        verbose=False,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=shapes,
    )
    optimize_ir(program.model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    proto = program.model_proto
    for node in proto.graph.node:  # a stack trace names files of this machine
        kept = [entry for entry in node.metadata_props if not entry.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in notes.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA / "parent.onnx")
    parser.add_argument("--checkpoint", type=Path, default=Path("parent.pt"), help="written every 250 steps")
    parser.add_argument("--resume", action="store_true", help="export the checkpoint instead of training")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    text = Text(find_text().read_text(encoding="utf-8"))
    config = Config(vocabulary=len(text.vocabulary))
    model = GPT(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    if options.resume:
        model.load_state_dict(torch.load(options.checkpoint, weights_only=True))
        loss = validate(model, text.validation_windows(800, config.context))
    else:
        loss = train(model, text, options, config)
    export(model, config, text, loss, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, validation loss {loss:.3f}")


if __name__ == "__main__":
    main()
