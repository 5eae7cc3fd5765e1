"""Task (c): real weights. all-MiniLM-L6-v2, halved, learns to reproduce its parent's sentence embeddings.

A child half as wide still answers with 384 numbers: the parent is exported with one more linear operator after the
pooling, the identity, and each arm makes the child's 192 x 384 matrix in its place like any other weight.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_parent import write_onnx

from convergence.task import REPOSITORY, Say, Task, data_file

BATCH, LENGTH = 64, 32
LINES = {"train": 12_000, "choose": 500, "report": 1_500}
HALF = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 768}


class Embedder(nn.Module):
    """BERT, the mean over tokens that are not padding, a linear operator."""

    def __init__(self, bert: nn.Module, outputs: int):
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(bert.config.hidden_size, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # B T, B T -> B 384
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


class SentenceEncoder(Task):
    name, title = "minilm", "all-MiniLM-L6-v2, halved, on lines of text"
    layers, widths = 3, "hidden=192 ffn=768 heads=6 keep_heads=true"
    rates = (1e-3, 2e-3, 5e-4, 4e-3, 2.5e-4)
    outer = ("embeddings", "head")
    unit = "1 - cosine to the parent's embedding"
    batch_tokens = BATCH * LENGTH
    distillable = False  # to learn from the parent is the task itself

    def make_parent(self, steps: int, say: Say) -> None:
        from transformers import BertModel

        bert = BertModel.from_pretrained(_weights(), add_pooling_layer=False)
        model = Embedder(bert, bert.config.hidden_size)
        with torch.no_grad():
            model.head.weight.copy_(torch.eye(bert.config.hidden_size))
            model.head.bias.zero_()
        batch = torch.export.Dim("batch", min=1)
        shapes = {"input_ids": {0: batch}, "attention_mask": {0: batch}}
        example = (torch.ones(2, LENGTH, dtype=torch.long), torch.ones(2, LENGTH, dtype=torch.long))
        notes = {"validation_loss": 0.0}
        write_onnx(model, example, list(shapes), ["sentence_embedding"], shapes, notes, self.parent_path)
        say("MiniLM's parent: exported")

    def calibration(self, sequences: int, seed: int) -> list[dict[str, np.ndarray]]:
        ids, mask = _lines("train")
        chosen = np.random.default_rng(1_000 + seed).permutation(len(ids))[: sequences * 128 // LENGTH]
        return [
            {"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in np.array_split(chosen, len(chosen) // 16)
        ]

    def fresh(self) -> nn.Module:
        from transformers import AutoConfig, BertModel

        config = AutoConfig.from_pretrained(_weights())
        outputs = config.hidden_size
        config.update(HALF)
        return Embedder(BertModel(config, add_pooling_layer=False), outputs)

    def batch(self, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        ids, mask = _lines("train")
        rows = torch.randint(len(ids), (BATCH,), generator=generator).numpy()
        return self._rows(ids[rows], mask[rows], self._embeddings("train")[rows])

    def batches(self, split: str) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        arrays = (*_lines(split), self._embeddings(split))
        return [self._rows(*(array[at : at + 100] for array in arrays)) for at in range(0, LINES[split], 100)]

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(outputs, target, dim=-1)).mean()

    def _rows(self, ids: np.ndarray, mask: np.ndarray, target: np.ndarray) -> tuple[tuple[Tensor, ...], Tensor]:
        tensors = (torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in (ids, mask, target))
        ids_, mask_, target_ = tensors
        return (ids_, mask_), target_

    def _embeddings(self, split: str) -> np.ndarray:
        return _embeddings(self.parent_path, self.folder / "data" / f"minilm_{split}.npy", split)


def _weights() -> Path:
    """Return the folder of all-MiniLM-L6-v2: in $GRAPHCLONE_DATA, else in ../shared/models."""
    shared = REPOSITORY.parent / "shared" / "models" / "all-MiniLM-L6-v2"
    return shared if shared.exists() else data_file("all-MiniLM-L6-v2")


@cache
def _lines(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a split's lines of Tiny Shakespeare as ids and mask, [N, LENGTH]; lines are dealt out in a fixed order."""
    from tokenizers import Tokenizer

    content = data_file("tinyshakespeare.txt").read_text(encoding="utf-8")
    unique = list(dict.fromkeys(line for line in content.splitlines() if len(line) >= 20))
    order = np.random.default_rng(0).permutation(len(unique))[: sum(LINES.values())]
    bounds = np.cumsum([0, *LINES.values()])
    at = list(LINES).index(split)
    tokenizer = Tokenizer.from_file(str(_weights() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch([unique[i] for i in order[bounds[at] : bounds[at + 1]]])
    return np.array([line.ids for line in encoded]), np.array([line.attention_mask for line in encoded])


@cache
def _embeddings(parent: Path, stored: Path, split: str) -> np.ndarray:
    """Return the parent's embeddings of a split, fp32 [N, 384]; computed once."""
    import onnxruntime

    if not stored.exists():
        session = onnxruntime.InferenceSession(parent, providers=onnxruntime.get_available_providers())
        ids, mask = _lines(split)
        feeds = (
            {"input_ids": ids[at : at + 100], "attention_mask": mask[at : at + 100]} for at in range(0, len(ids), 100)
        )
        values = np.concatenate([session.run(None, feed)[0] for feed in feeds])
        stored.parent.mkdir(parents=True, exist_ok=True)
        unfinished = stored.with_suffix(".part.npy")
        np.save(unfinished, values)
        unfinished.replace(stored)
    return np.load(stored)
