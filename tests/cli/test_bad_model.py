"""Model files that cannot be used: exit code 2, one clear message, nothing written."""

import json

import onnx
import pytest

from graphclone.cli import main


@pytest.fixture(params=["show", "apply", "verify", "torch", "calibrate", "subclone"])
def command(request, tmp_path, data):
    """Every command that reads a model; called with the model's path it returns the arguments."""
    (tmp_path / "plan.json").write_text(json.dumps({"keep": {"hidden": [0]}}))
    options = {
        "show": lambda path: [path],
        "apply": lambda path: [tmp_path / "plan.json", path, "-o", tmp_path / "out.onnx"],
        "verify": lambda path: [path],
        "torch": lambda path: [path, "-o", tmp_path / "out"],
        "calibrate": lambda path: [path, "--data", data, "-o", tmp_path / "out.safetensors"],
        "subclone": lambda path: [path, "--hidden", 6, "--by", "first", "-o", tmp_path / "out.onnx"],
    }
    return lambda path: [request.param, *options[request.param](path)]


def test_no_file(refused, command, tmp_path):
    assert "no file at" in refused(*command(tmp_path / "absent.onnx"))


def test_not_onnx(refused, command, tmp_path):
    (tmp_path / "notes.onnx").write_text("These are notes, not a model.")
    assert "is not an ONNX model" in refused(*command(tmp_path / "notes.onnx"))


def test_truncated(refused, command, model):
    model.write_bytes(model.read_bytes()[:-3000])
    assert "truncated ONNX file" in refused(*command(model))


@pytest.fixture
def external(proto, tmp_path):
    """A model whose weights lie in `weights.bin` beside it."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    path = tmp_path / "external.onnx"
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    return path


def test_missing_external_data(refused, command, external):
    (external.parent / "weights.bin").unlink()
    message = refused(*command(external))
    assert "cannot find external data 'weights.bin'" in message and "copy it beside external.onnx" in message


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "link.bin"])
def test_external_data_outside_the_folder(refused, command, external, tmp_path_factory, location):
    outside = tmp_path_factory.mktemp("outside") / "weights.bin"
    outside.write_bytes((external.parent / "weights.bin").read_bytes())
    (external.parent / "link.bin").symlink_to(outside)
    proto = onnx.load(external, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    external.write_bytes(proto.SerializeToString())
    message = refused(*command(external))
    assert f"refusing external data '{location}'" in message


def test_too_old(refused, command, proto, tmp_path):
    old = onnx.ModelProto.FromString(proto.SerializeToString())
    old.opset_import[0].version = 8
    onnx.save(old, tmp_path / "old.onnx")
    assert "opset 8" in refused(*command(tmp_path / "old.onnx"))


def test_an_operator_that_onnxruntime_lacks_can_be_shown_and_cut_but_not_run(cli, refused, proto, tmp_path):
    odd = onnx.ModelProto.FromString(proto.SerializeToString())
    relu = next(node for node in odd.graph.node if node.name == "/h.1.mlp.relu")
    relu.op_type, relu.domain = "Squash", "example.ops"
    odd.opset_import.append(onnx.helper.make_opsetid("example.ops", 1))
    odd.graph.value_info.append(onnx.helper.make_tensor_value_info(relu.output[0], 1, ["batch", "sequence", 20]))
    onnx.save(odd, tmp_path / "odd.onnx")
    (tmp_path / "plan.json").write_text(json.dumps({"keep": {"hidden": [0, 1, 2]}}))
    assert "onnxruntime cannot run" in refused("verify", tmp_path / "odd.onnx")
    assert cli("show", tmp_path / "odd.onnx").code == 0
    ended = cli("apply", tmp_path / "plan.json", tmp_path / "odd.onnx", "-o", tmp_path / "child.onnx")
    assert ended.code == 0 and "the child is not verified, because onnxruntime cannot run" in ended.err
    assert (tmp_path / "child.onnx").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["show"],
        ["show", "a.onnx", "--colour"],
        ["subclone", "a.onnx"],
        ["calibrate", "a.onnx", "-o", "b"],
    ],
    ids=" ".join,
)
def test_wrong_usage(capsys, arguments):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "--help" in printed.err and not printed.out
