"""The main job on a real pretrained parent: all-MiniLM-L6-v2 to half of everything."""

import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import graphclone  # noqa: E402

PLACES = [Path(os.environ.get("GRAPHCLONE_DATA", "../shared")), Path("../shared")]
FOLDER = next((p / "models" / "all-MiniLM-L6-v2" for p in PLACES if (p / "models" / "all-MiniLM-L6-v2").is_dir()), None)
pytestmark = pytest.mark.skipif(FOLDER is None, reason="no models/all-MiniLM-L6-v2 in GRAPHCLONE_DATA or ../shared")

TEXTS = [
    "A graph is made of nodes and edges.",
    "The quick brown fox jumps over the lazy dog.",
    "Weights are kept, not lost.",
    "Two cores are enough for a small model.",
    "It rained all day in the old harbour town.",
    "He counted the ships twice.",
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModel.from_pretrained(FOLDER).eval()
    samples = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    size = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    names = ["input_ids", "attention_mask", "token_type_ids"]
    torch.onnx.export(
        model,
        kwargs={name: samples[name] for name in names},
        f=path,
        dynamo=True,
        opset_version=20,
        dynamic_shapes={name: size for name in names},
        external_data=False,
        verbose=False,
    )
    return model, path, {name: samples[name].numpy() for name in names}


def test_a_real_parent_halves_and_trains(exported):
    _, path, samples = exported
    parent = graphclone.load(path)
    feeds = {tensor.name: samples[tensor.name] for tensor in parent.inputs}
    stats = graphclone.calibrate(parent, feeds, provider="cpu", progress=False)
    result = graphclone.plan_subclone(parent, stats, hidden=192, heads=6, ffn=768, layers=3)
    child = result.child

    report = graphclone.verify(child, parent=parent, plan=result.plan)
    assert report.ok, str(report)

    module = graphclone.to_torch(child)
    names = dict(module.named_parameters())
    small = transformers.BertConfig.from_pretrained(
        FOLDER, hidden_size=192, num_attention_heads=6, intermediate_size=768, num_hidden_layers=3
    )
    native = dict(transformers.BertModel(small).named_parameters())
    missing = {name for name in native if name not in names}
    assert not set(names) - set(native)
    assert all(name.startswith("pooler.") for name in missing)  # an export of hidden states alone has no pooler
    assert all(weight.shape == native[name].shape for name, weight in names.items())

    outputs = module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    assert first.shape[-1] == 192 and torch.isfinite(first).all()
    first.square().mean().backward()
    for name, weight in module.named_parameters():
        assert "pooler" in name or torch.isfinite(weight.grad).all(), name
