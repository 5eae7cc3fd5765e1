"""Targets, data, statistics and outputs that cannot be used: exit code 2, one clear message, nothing written."""

import itertools

import numpy as np
import onnx
import pytest

from graphclone.calibration import session

NOT_A_SIZE = "is not a size; write N"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (("--hidden", 13), "hidden: 13 is more than the parent's 12"),
        (("--ffn", 21), "more than the parent's 20"),
        (("--ffn", "[20,20,21]"), "more than the parent's 20"),
        (("--layers", 4), "3"),
        (("--hidden", 0), "give at least 1"),
        (("--hidden", -6), "give at least 1"),
        (("--ffn", "[8,0,8]"), "give at least 1"),
        (("--layers", 0), "at least 1"),
        (("--ffn", "[8,8]"), "one per kept block"),
        (("--ffn", "decoder=8"), "no stack is called 'decoder'"),
        (("--blocks", "0,3"), "run from 0 to 2"),
        (("--blocks", "1,0"), "ascend"),
        (("--hidden", "half"), NOT_A_SIZE),
        (("--hidden", "[6,6,6]"), "give a number: it is one width"),
        (("--ffn", "8,9"), NOT_A_SIZE),
        (("--ffn", "a=8,a=9"), "twice"),
        (("--blocks", "a,b"), "no list of blocks"),
        (("--layers", 2, "--blocks", "0,1"), "not both"),
        (("--hidden", 6, "--by", "mean_ab"), "'mean_ab'"),
        (("--layers", 2, "--blocks-by", "centre"), "centre"),
        (("--hidden", 6, "--rescale", "papr"), "papr"),
        ((), "nothing to cut"),
    ],
    ids=str,
)
def test_targets(refused, model, data, tmp_path, target, message):
    """All of them are found before any sample is measured."""
    assert message in refused("subclone", model, "--data", data, *target, "-o", tmp_path / "child.onnx")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (("--kv-heads", 3), "more than the parent's 2"),
        (("--heads", 4), "4 is no multiple of 3"),
        (("--heads", 5, "--kv-heads", 2), "2 KV heads do not divide 5 heads"),
    ],
    ids=str,
)
def test_kv_heads_that_do_not_divide(refused, grouped, tmp_path, target, message):
    assert message in refused("subclone", grouped, *target, "--by", "first", "-o", tmp_path / "child.onnx")


@pytest.mark.parametrize(
    "metric",
    [
        ("--hidden", 6),
        ("--layers", 2, "--blocks-by", "block_influence"),
        ("--hidden", 6, "--by", "first", "--rescale", "norm_gain"),
    ],
    ids=str,
)
def test_a_metric_that_needs_samples_without_samples(refused, model, tmp_path, metric):
    message = refused("subclone", model, *metric, "-o", tmp_path / "child.onnx")
    assert "--data" in message and "--stats" in message


def test_samples_from_two_places(refused, model, data, tmp_path):
    assert "not both" in refused(
        "subclone", model, "--hidden", 6, "--data", data, "--stats", data, "-o", tmp_path / "child.onnx"
    )


def test_statistics_of_another_parent(cli, refused, model, grouped, data, tmp_path):
    stats = tmp_path / "stats.safetensors"
    assert cli("calibrate", grouped, "--data", data, "-o", stats).code == 0
    message = refused("subclone", model, "--hidden", 6, "--stats", stats, "-o", tmp_path / "child.onnx")
    assert "another model" in message


def test_what_is_no_statistics_file(refused, model, data, tmp_path):
    command = ("subclone", model, "--hidden", 6, "-o", tmp_path / "child.onnx", "--stats")
    assert "no statistics file" in refused(*command, data)
    assert "cannot read statistics" in refused(*command, tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda samples: samples.pop("attention_mask"), "lacks the input 'attention_mask'"),
        (
            lambda samples: samples.update(attention_masc=samples.pop("attention_mask")),
            "did you mean 'attention_mask'?",
        ),
        (
            lambda samples: samples.update(input_ids=samples["input_ids"].astype(np.float32)),
            "has type float32; the model wants int64",
        ),
        (lambda samples: samples.update(input_ids=samples["input_ids"][0]), "of rank 1; the model wants"),
        (lambda samples: samples.update(input_ids=samples["input_ids"].astype(str)), "give numbers"),
        (lambda samples: samples.update({k: v[:0] for k, v in samples.items()}), "holds no samples"),
        (lambda samples: samples.update(attention_mask=samples["attention_mask"][:5]), "holds 5 samples"),
        (lambda samples: samples.update(input_ids=samples["input_ids"] + 23), "ids run from 0 to 22"),
    ],
    ids=["missing", "misspelt", "dtype", "rank", "text", "empty", "uneven", "range"],
)
@pytest.mark.parametrize("command", [("calibrate",), ("subclone", "--hidden", 6)], ids=["calibrate", "subclone"])
def test_data(refused, model, samples, data, tmp_path, change, message, command):
    change(samples)
    np.savez(data, **samples)
    assert message in refused(command[0], model, *command[1:], "--data", data, "-o", tmp_path / "out")


def test_what_is_no_data(refused, model, data, tmp_path, tmp_path_factory):
    command = ("calibrate", model, "-o", tmp_path / "out", "--data")
    assert "no data at" in refused(*command, tmp_path / "absent.npz")
    assert "as data" in refused(*command, model)
    assert "holds no batches" in refused(*command, tmp_path_factory.mktemp("empty"))
    data.write_bytes(data.read_bytes()[:200])
    assert "cannot read" in refused(*command, data)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_nan_or_inf_in_activations_names_the_first_tensor(refused, proto, data, tmp_path, value):
    bad = onnx.ModelProto.FromString(proto.SerializeToString())
    weight = next(item for item in bad.graph.initializer if item.name == "h.1.mlp.down.weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[:, 3] = value
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(bad, tmp_path / "bad.onnx")
    for command in ("calibrate",), ("subclone", "--hidden", 6):
        message = refused(command[0], tmp_path / "bad.onnx", *command[1:], "--data", data, "-o", tmp_path / "out")
        assert "'h.1.out' holds NaN or Inf" in message


@pytest.fixture
def without_cuda(monkeypatch):
    session.resolve_provider.cache_clear()
    monkeypatch.setattr(session, "_cuda_works", lambda: False)
    yield
    session.resolve_provider.cache_clear()


@pytest.mark.parametrize("command", [("calibrate",), ("subclone", "--hidden", 6)], ids=["calibrate", "subclone"])
def test_cuda_asked_and_absent(refused, without_cuda, model, data, tmp_path, command):
    message = refused(command[0], model, *command[1:], "--data", data, "--provider", "cuda", "-o", tmp_path / "out")
    assert "CUDA was asked for" in message and "write cpu or auto" in message


@pytest.mark.parametrize(
    ("command", "place"),
    [
        *itertools.product(("subclone", "apply", "calibrate", "run"), ("notes.txt/out", "absent/out", ".")),
        ("torch", "notes.txt/out"),  # the others it makes
    ],
)
def test_output_that_cannot_be_written(refused, model, data, tmp_path, command, place):
    (tmp_path / "notes.txt").write_text("a regular file")
    (tmp_path / "plan.json").write_text('{"keep": {"hidden": [0]}}')
    options = {
        "subclone": (model, "--hidden", 6, "--data", data),
        "apply": (tmp_path / "plan.json", model),
        "calibrate": (model, "--data", data),
        "run": ("width{ffn=10 by=first}", model),
        "torch": (model,),
    }
    message = refused(command, *options[command], "-o", tmp_path / place)
    assert "cannot write" in message or "cannot make the folder" in message


def test_a_plan_that_cannot_be_written_is_found_before_the_child_is(refused, model, tmp_path):
    (tmp_path / "notes.txt").write_text("a regular file")
    plan = tmp_path / "notes.txt" / "plan.json"
    refused("subclone", model, "--hidden", 6, "--by", "first", "-o", tmp_path / "child.onnx", "--plan-out", plan)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("widht{hidden=6}", "did you mean 'width'?"),
        ("width{hiden=6}", "did you mean 'hidden'?"),
        ("width{hidden=6", "}"),
        ("", "empty"),
    ],
    ids=str,
)
def test_pipelines(refused, model, tmp_path, pipeline, message):
    assert message in refused("run", pipeline, model, "-o", tmp_path / "child.onnx")
