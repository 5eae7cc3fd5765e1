"""Train a child: an ONNX file through `graphclone.to_torch`, or a checkpoint that `graphclone checkpoint` wrote.

    python tools/train_child.py                                        # a child of the demo's parent, made on the fly
    python tools/train_child.py small.onnx --text corpus.txt --tokenizer gpt2/
    python tools/train_child.py small/ --text corpus.txt               # a checkpoint, with the tokenizer beside it
    python tools/train_child.py --distil tools/demo_data/parent.onnx   # learn from the parent's predictions as well
    python tools/train_child.py --trainer                              # by Hugging Face's Trainer
    torchrun --nproc-per-node 2 tools/train_child.py                   # data parallel: the same batches, the same loss

One file to copy from: the loop is plain PyTorch, and the child an nn.Module like any other. It trains causal language
models, whose output is one distribution a position; another task needs another `Objective` and `Windows`.

Shapes in comments: B batch, T time, V vocabulary.
"""

import argparse
import inspect
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from train_parent import DATA, Text, cosine, optimiser_for

import graphclone

TARGET = {"hidden": 64, "heads": 4, "ffn": 256, "layers": 4}  # the demo's: half of the parent's 128, 8, 512 and 8
TEMPERATURE = 2.0

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets both


# --- model --------------------------------------------------------------------------------------------------------


def open_child(path: Path | None) -> tuple[nn.Module, str | None]:
    """Return the child as a module, and the characters its ids stand for where the file says so."""
    if path is None:
        return small_demo()
    if path.is_dir():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path), None
    model = graphclone.load(path)
    return graphclone.to_torch(model), vocabulary_of(model)


def small_demo() -> tuple[nn.Module, str | None]:
    """Cut the demo's parent to half its width and depth, ranked by the activations of four batches."""
    parent = graphclone.load(DATA / "parent.onnx")
    text = Text((DATA / "tinyshakespeare.txt").read_text(encoding="utf-8"), vocabulary_of(parent))
    generator = torch.Generator().manual_seed(0)
    feeds = [{"ids": text.batch(16, 128, generator)[0].numpy()} for _ in range(4)]
    stats = graphclone.calibrate(parent, feeds, progress=False)
    return graphclone.to_torch(graphclone.subclone(parent, stats, **TARGET)), text.vocabulary


def vocabulary_of(model: graphclone.Model) -> str | None:
    """Return what `tools/train_parent.py` stores in its metadata: the characters, in the order of their ids."""
    stored = model.metadata.get("vocabulary")
    return None if stored is None else json.loads(stored)


def logits_of(module: nn.Module, ids: Tensor) -> Tensor:  # B T -> B T V
    """Run a Hugging Face model, or a converted module whose forward takes the graph's inputs in order."""
    if hasattr(module, "config"):
        return module(input_ids=ids).logits
    feeds: list[Tensor] = []
    for name in inspect.signature(module.forward).parameters:
        if "mask" in name:
            feeds.append(torch.ones_like(ids))
        elif "position" in name:
            feeds.append(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        elif "past" in name or "cache" in name:
            raise SystemExit(f"input '{name}' is a cache, which training has no use for: export the model without one")
        else:
            feeds.append(ids)
    output = module(*feeds)
    return output[0] if isinstance(output, tuple) else output


class Objective(nn.Module):
    """A child and what it should learn: the next token, and half of it from a parent's predictions where there is one.

    Distillation is arXiv 1503.02531, section 2: KL to the parent at a temperature, times its square.
    """

    def __init__(self, child: nn.Module, parent: nn.Module | None = None):
        super().__init__()
        self.child = child
        self._parent = (parent,)  # in a tuple, so that it is neither trained, nor saved, nor synchronised

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = logits_of(self.child, input_ids).flatten(0, 1).float()  # BT V
        truth = F.cross_entropy(logits, labels.flatten())
        (parent,) = self._parent
        if parent is None or not self.training:
            return {"loss": truth}
        with torch.no_grad():
            wanted = logits_of(parent, input_ids).flatten(0, 1).float()  # BT V
        if wanted.shape != logits.shape:
            raise SystemExit(f"parent and child differ in vocabulary: {wanted.shape[-1]} and {logits.shape[-1]}")
        ours, theirs = (F.log_softmax(part / TEMPERATURE, dim=-1) for part in (logits, wanted))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * TEMPERATURE**2
        return {"loss": 0.5 * truth + 0.5 * divergence}


# --- data ---------------------------------------------------------------------------------------------------------


class Windows(Dataset):
    """Windows of a text, each its ids [T] and the next ids [T]; at random places, or spread evenly."""

    def __init__(self, ids: Tensor, context: int, count: int, seed: int | None = None):
        if len(ids) <= context + 1:
            raise SystemExit(f"the text has {len(ids)} tokens, too few for a context of {context}; lower --context")
        self.ids, self.context = ids, context
        last = len(ids) - context - 1
        if seed is None:
            self.starts = torch.linspace(0, last, count).long().tolist()
        else:
            self.starts = torch.randint(last + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.ids[self.starts[index] : self.starts[index] + self.context + 1]
        return {"input_ids": window[:-1], "labels": window[1:]}


def tokens(options: argparse.Namespace, vocabulary: str | None) -> tuple[Tensor, Tensor]:
    """Return the text's ids, 90 % to train on and the rest to validate: by a tokenizer, or a character each."""
    characters = options.text.read_text(encoding="utf-8")
    folder = options.tokenizer
    if folder is None and options.model is not None and list(options.model.glob("tokenizer*")):
        folder = options.model
    if folder is None:
        text = Text(characters, vocabulary)
        return text.train, text.validation
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(characters)["input_ids"])
    return ids.tensor_split([int(0.9 * len(ids))])


# --- training -----------------------------------------------------------------------------------------------------


def train(objective: Objective, data: Windows, options: argparse.Namespace, device: torch.device) -> None:
    """Train in place, on this process's part of every batch."""
    optimiser = optimiser_for(objective, options.rate)
    schedule = LambdaLR(optimiser, lambda step: cosine(step, options.steps, options.steps // 10))
    model = DistributedDataParallel(objective) if WORLD > 1 else objective
    mine = [slice(step * options.batch + RANK, (step + 1) * options.batch, WORLD) for step in range(options.steps)]
    batches = DataLoader(data, batch_sampler=[range(len(data))[part] for part in mine])
    for step, batch in enumerate(batches):
        loss = model(**{name: part.to(device) for name, part in batch.items()})["loss"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if RANK == 0 and (step + 1) % max(options.steps // 10, 1) == 0:
            print(f"step {step + 1:>5}   loss {loss.item():.4f}", flush=True)


def train_by_trainer(objective: Objective, data: Windows, options: argparse.Namespace, device: torch.device) -> None:
    """Train in place by Hugging Face's Trainer, which shuffles the same windows and starts its own DDP."""
    try:
        import accelerate  # noqa: F401
        from transformers import Trainer, TrainingArguments
    except ImportError as error:
        raise SystemExit(f"--trainer: {error}; pip install transformers accelerate") from None
    optimiser = optimiser_for(objective, options.rate)
    schedule = LambdaLR(optimiser, lambda step: cosine(step, options.steps, options.steps // 10))
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch // WORLD,
        max_grad_norm=1.0,
        logging_steps=max(options.steps // 10, 1),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        seed=options.seed,
    )
    Trainer(objective, arguments, train_dataset=data, optimizers=(optimiser, schedule)).train()


@torch.no_grad()
def validate(objective: Objective, data: Windows, options: argparse.Namespace, device: torch.device) -> float:
    """Return the mean cross-entropy in nats a token; every process takes its part of the windows."""
    objective.eval()
    part = range(RANK, len(data), WORLD)
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of windows
    for batch in DataLoader(torch.utils.data.Subset(data, part), batch_size=options.batch):
        loss = objective(**{name: piece.to(device) for name, piece in batch.items()})["loss"]
        size = len(batch["labels"])
        total += torch.tensor([loss.item() * size, size], dtype=torch.float64, device=device)
    objective.train()
    if WORLD > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def save(child: nn.Module, folder: Path) -> None:
    """Write the weights under the original names; a Hugging Face model with its config."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(child, "save_pretrained"):
        child.save_pretrained(folder)
    else:
        save_model(child, str(folder / "model.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="a child (.onnx) or a checkpoint's folder")
    parser.add_argument("--text", type=Path, default=DATA / "tinyshakespeare.txt")
    parser.add_argument("--tokenizer", type=Path, help="its folder; without one, a character is a token")
    parser.add_argument("--distil", type=Path, metavar="PARENT.onnx", help="learn from this model's predictions too")
    parser.add_argument("--trainer", action="store_true", help="train by Hugging Face's Trainer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="windows a step, over all processes")
    parser.add_argument("--context", type=int, default=128, help="tokens a window")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("child-output"), help="a folder for the trained weights")
    options = parser.parse_args()
    if options.batch % WORLD:
        parser.error(f"--batch {options.batch} does not divide among {WORLD} processes")

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if WORLD > 1:
        dist.init_process_group("nccl" if gpu else "gloo")
    torch.manual_seed(options.seed)
    child, vocabulary = open_child(options.model)
    parent = options.distil and graphclone.to_torch(graphclone.load(options.distil)).eval().to(device)
    objective = Objective(child, parent).to(device).train()
    ids, held_out = tokens(options, vocabulary)
    data = Windows(ids, options.context, options.steps * options.batch, options.seed)
    unseen = Windows(held_out, options.context, 64)

    before = validate(objective, unseen, options, device)
    (train_by_trainer if options.trainer else train)(objective, data, options, device)
    after = validate(objective, unseen, options, device)
    if RANK == 0:
        save(child, options.out)
        count = sum(parameter.numel() for parameter in child.parameters())
        print(f"{count:,} parameters: validation loss {before:.4f} -> {after:.4f}, written to {options.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
