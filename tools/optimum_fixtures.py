"""Write tests/fixtures/optimum: tiny decoders with a KV cache, exported by optimum, with the framework's own outputs.

Needs an environment of its own, for optimum has no release for the transformers that the tests use:

    python -m venv ENV && ENV/bin/pip install "transformers==4.57.1" "optimum-onnx[onnxruntime]" "torch==2.13.0"
    ENV/bin/python tools/optimum_fixtures.py

Each folder holds optimum's files under their usual names (`model.onnx`; `encoder_model.onnx`, `decoder_model.onnx`,
`decoder_with_past_model.onnx`, `decoder_model_merged.onnx`) and `expected.npz`: `input:NAME`, `output:logits`.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from optimum.exporters.onnx import onnx_export_from_model

sys.path.insert(0, str(Path(__file__).parent))
from zoo.family import perturb

FOLDER = Path(__file__).parent.parent / "tests" / "fixtures" / "optimum"
VOCAB, HIDDEN, FFN, POSITIONS = 61, 32, 56, 24
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
DECODER = "text-generation-with-past"
SEQ2SEQ = "text2text-generation-with-past"
MODELS = {
    "gpt2": (
        DECODER,
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB, n_embd=HIDDEN, n_head=4, n_inner=FFN, n_layer=3, n_positions=POSITIONS, **SPECIAL
            )
        ),
    ),
    "llama": (
        DECODER,
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=6,
                intermediate_size=FFN,
                num_hidden_layers=3,
                max_position_embeddings=POSITIONS,
                **SPECIAL,
            )
        ),
    ),
    "t5": (
        SEQ2SEQ,
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCAB,
                d_model=HIDDEN,
                d_kv=6,
                num_heads=4,
                d_ff=FFN,
                num_layers=3,
                num_decoder_layers=2,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=12,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=1,
            )
        ),
    ),
    "bart": (
        SEQ2SEQ,
        lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=VOCAB,
                d_model=HIDDEN,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=FFN,
                decoder_ffn_dim=52,
                encoder_layers=3,
                decoder_layers=2,
                max_position_embeddings=POSITIONS,
                decoder_start_token_id=1,
                **SPECIAL,
            )
        ),
    ),
}


def expected(model: torch.nn.Module, seq2seq: bool) -> dict[str, np.ndarray]:
    """Return ids, mask and logits of a padded batch of two, without a cache."""
    random = np.random.default_rng(0)
    mask = np.ones((2, 7), np.int64)
    mask[1, 5:] = 0
    inputs = {"input_ids": random.integers(2, VOCAB, (2, 7)), "attention_mask": mask}
    if seq2seq:
        inputs["decoder_input_ids"] = random.integers(2, VOCAB, (2, 5))
    with torch.no_grad():
        logits = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}, use_cache=False).logits
    return {f"input:{name}": array for name, array in inputs.items()} | {"output:logits": logits.numpy()}


def main() -> None:
    for name, (task, make) in MODELS.items():
        torch.manual_seed(0)
        model = make()
        perturb(model, gain=0.9 if name == "t5" else 1.5)
        model.eval()
        target = FOLDER / name
        shutil.rmtree(target, ignore_errors=True)
        arrays = expected(model, task == SEQ2SEQ)  # first: the exporter changes the model's config
        onnx_export_from_model(model, target, task=task, opset=18, do_validation=False)
        np.savez_compressed(target / "expected.npz", **arrays)
        for file in target.iterdir():
            if file.suffix not in (".onnx", ".npz"):
                file.unlink()


if __name__ == "__main__":
    main()
