"""`show`, `ops`: what they print, as text and as JSON."""

import json
import os
import pty
import subprocess
import sys

import onnx
import pytest
from onnx import helper


def test_show_is_readable_at_80_columns(cli, model):
    ended = cli("show", model)
    lines = ended.out.splitlines()
    assert ended.code == 0 and not ended.err
    assert "\x1b" not in ended.out and max(map(len, lines)) <= 80
    assert any(line.split()[:3] == ["blocks.*.ffn", "20", "3"] and "each of 3 blocks" in line for line in lines)
    assert any(line.split()[:3] == ["blocks", "blocks.0-2", "3"] and "attention + ffn" in line for line in lines)
    assert "opset 17 · by hand" in ended.out and "batch x sequence x 23" in ended.out


def test_show_says_that_a_model_has_no_attention(cli, graph, model, tmp_path):
    """The decoder of an autoencoder has residual blocks, and is no transformer."""
    path = tmp_path / "decoder.onnx"
    made = graph("""(float[B, 4] latent) => (float[B, 3] y) <float[4, 12] enter, float[12, 20] up, float[20, 12] down,
        float[12, 20] up1, float[20, 12] down1, float[12, 3] leave>
        { x = MatMul(latent, enter)  u = MatMul(x, up)  r = Relu(u)  d = MatMul(r, down)  h = Add(x, d)
          u1 = MatMul(h, up1)  r1 = Relu(u1)  d1 = MatMul(r1, down1)  h1 = Add(h, d1)  y = MatMul(h1, leave) }""")
    made.save(path)
    assert ["attention", "none", "found"] in [line.split() for line in cli("show", path).out.splitlines()]
    assert "none found" not in cli("show", model).out


def test_show_json_describes_dimensions_and_blocks(cli, model):
    value = json.loads(cli("show", model, "--json").out)
    assert set(value) == {"model", "dimensions", "stacks", "ties", "unknown", "fixed"}
    dimensions = {item["name"]: item for item in value["dimensions"]}
    assert set(dimensions["hidden"]) == {
        "name", "size", "role", "aliases", "locked", "weights", "blocks", "stack", "minimum", "step",
    }  # fmt: skip
    assert (dimensions["hidden"]["size"], dimensions["hidden"]["locked"]) == (12, None)
    assert (dimensions["blocks.1.ffn"]["size"], dimensions["blocks.1.ffn"]["blocks"]) == (20, [1])
    assert [dimensions[f"blocks.0.{name}"]["size"] for name in ("heads", "head_dim")] == [3, 4]
    assert dimensions["vocab"]["size"] == 23
    blocks = value["stacks"][""]
    assert [[half["kind"] for half in block["halves"]] for block in blocks] == [["attention", "ffn"]] * 3
    assert [block["entry"] for block in blocks] == ["embedding", "h.0.out", "h.1.out"]
    assert value["unknown"] == [] and value["model"]["parameters"] == 3953
    assert value["model"]["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}


def test_sizes_that_differ_between_blocks_are_a_range_and_a_list(cli, model, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"keep": {"blocks.1.ffn": list(range(8))}}))
    assert cli("apply", plan, model, "-o", tmp_path / "child.onnx", "--no-verify").code == 0
    line = next(line for line in cli("show", tmp_path / "child.onnx").out.splitlines() if "blocks.*.ffn" in line)
    assert "8-20" in line and "sizes 20, 8, 20" in line


def test_signatures_name_the_axes(cli, model):
    lines = cli("show", model, "--signatures").out.splitlines()
    up = next(line for line in lines if "'/h.1.mlp.up'" in line)
    assert up.startswith("MatMul '/h.1.mlp.up': ... m k, ... k n -> ... m n")
    assert "k: hidden" in up and "n: blocks.1.ffn" in up


def test_an_unknown_operator_locks_what_it_touches_and_is_named(cli, proto, tmp_path):
    odd = onnx.ModelProto.FromString(proto.SerializeToString())
    relu = next(node for node in odd.graph.node if node.name == "/h.1.mlp.relu")
    relu.op_type, relu.domain = "Squash", "example.ops"
    odd.opset_import.append(helper.make_opsetid("example.ops", 1))
    odd.graph.value_info.append(helper.make_tensor_value_info(relu.output[0], 1, ["batch", "sequence", 20]))
    onnx.save(odd, tmp_path / "odd.onnx")
    ended = cli("show", tmp_path / "odd.onnx")
    assert ended.code == 0 and "1 node without an axis rule" in ended.out
    value = json.loads(cli("show", tmp_path / "odd.onnx", "--json").out)
    assert value["unknown"] == ["example.ops.Squash node '/h.1.mlp.relu'"]
    locks = [(item["size"], item["locked"]) for item in value["dimensions"] if item["locked"]]
    assert locks == [(20, "no axis rule for example.ops.Squash node '/h.1.mlp.relu'")] * 2


def test_colour_is_for_terminals(model):
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "graphclone", "show", str(model)], stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    printed = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        printed += part
    assert process.wait() == 0 and b"\x1b[" in printed


def test_a_reader_that_stops_reading_ends_it_quietly(model):
    command = f"'{sys.executable}' -m graphclone show '{model}' --signatures | head -1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] in ("0", "141") and not ended.stderr


@pytest.mark.parametrize("command", ["ops", "passes"])
def test_lists(cli, command):
    ended = cli(command)
    assert ended.code == 0
    assert {"ops": "MatMul", "passes": "width"}[command] in ended.out


def test_operators_say_since_when_and_whether_pytorch_has_them(cli):
    lines = {words[0]: words[1:] for line in cli("ops").out.splitlines() if (words := line.split())}
    assert lines["LayerNormalization"][:2] == ["17", "yes"]
    assert lines["Shape"][:2] == ["1", "yes"]
    assert lines["com.microsoft.FusedMatMul"][1] == "yes"
