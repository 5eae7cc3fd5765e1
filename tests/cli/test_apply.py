"""`apply`: a plan file becomes a child, or a message."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest


def written(path, **plan):
    path.write_text(json.dumps(plan))
    return path


def outputs(path, feeds):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def test_apply_cuts_what_is_named_and_says_so(cli, model, samples, tmp_path):
    plan = written(
        tmp_path / "plan.json",
        keep={"hidden": [0, 2, 3, 5, 8, 11], "blocks.*.ffn": list(range(0, 20, 2)), "blocks.0.heads": [0, 2]},
        blocks=[0, 2],
    )
    child = tmp_path / "child.onnx"
    ended = cli("apply", plan, model, "-o", child)
    assert ended.code == 0, ended
    rows = {line.split()[0]: line.split()[1:] for line in ended.out.splitlines() if line.strip()}
    assert rows["hidden"][:2] == ["12", "6"] and rows["blocks.*.ffn"][:2] == ["20", "10"]
    assert rows["blocks"] == ["3", "2", "keeps", "0,", "2"]
    assert rows["parameters"][0] == "3,953"
    assert "verified" in ended.out and f"written   {child}" in ended.out
    shapes = {item.name: tuple(item.dims) for item in onnx.load(child).graph.initializer}
    assert shapes["embedding.weight"] == (23, 6) and shapes["h.1.mlp.up.weight"] == (6, 10)
    assert outputs(child, samples)[0].shape == (12, 6, 23)


def test_an_interface_that_changes_is_shown(cli, model, tmp_path):
    plan = written(tmp_path / "plan.json", keep={"vocab": list(range(9))})
    ended = cli("apply", plan, model, "-o", tmp_path / "child.onnx", "--no-verify")
    line = next(line for line in ended.out.splitlines() if line.startswith("logits"))
    assert "batch x sequence x 23" in line and "batch x sequence x 9" in line


def test_a_plan_that_keeps_everything_changes_nothing(cli, model, samples, tmp_path):
    plan = written(tmp_path / "plan.json", keep={"hidden": list(range(12))})
    ended = cli("apply", plan, model, "-o", tmp_path / "child.onnx")
    assert ended.code == 0 and "nothing is cut" in ended.out
    assert np.array_equal(outputs(model, samples)[0], outputs(tmp_path / "child.onnx", samples)[0])


def test_the_same_plan_twice_gives_the_same_bytes(cli, model, tmp_path):
    plan = written(tmp_path / "plan.json", keep={"hidden": [1, 4, 7]})
    contents = []
    for _ in range(2):
        assert cli("apply", plan, model, "-o", tmp_path / "child.onnx", "--no-verify").code == 0
        contents.append((tmp_path / "child.onnx").read_bytes())
    assert contents[0] == contents[1]


def test_a_plan_of_another_parent_is_applied_where_its_names_fit(cli, model, tmp_path):
    plan = written(
        tmp_path / "plan.json",
        parent="0" * 64,
        keep={"hidden": [0, 1, 2], "decoder.blocks.0.ffn": [0]},
        drop=["blocks.9.ffn"],
    )
    ended = cli("apply", plan, model, "-o", tmp_path / "child.onnx")
    assert ended.code == 0 and (tmp_path / "child.onnx").exists()
    warning = " ".join(ended.err.split())
    assert "made for another model" in warning and "decoder.blocks.0.ffn, blocks.9.ffn" in warning


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"keep": {"hiden": [0]}}, "did you mean 'hidden'?"),
        ({"keep": {"hidden": []}}, "keeps nothing"),
        ({"keep": {"hidden": [0, 12]}}, "run from 0 to 11"),
        ({"keep": {"hidden": [-1]}}, "run from 0 to 11"),
        ({"keep": {"hidden": [3, 3]}}, "twice"),
        ({"keep": {"hidden": 6}}, "list of whole numbers"),
        ({"blocks": [1, 0]}, "must ascend"),
        ({"blocks": [0, 3]}, "run from 0 to 2"),
        ({"blocks": []}, "at least one block"),
        ({"drop": ["blocks.0.mlp"]}, "no half block is called 'blocks.0.mlp'"),
        ({"scale": {"absent": 2.0}}, "'absent'"),
        ({"replace": {"head.weight": "absent.safetensors#x"}}, "cannot read replace['head.weight']"),
        ({"replace": {"head.weight": "../outside.safetensors#x"}}, "not a file beside the plan"),
        ({"keeps": {}}, "unknown key 'keeps'"),
        ({"format": "graphclone.plan/9", "keep": {}}, "graphclone.plan/9"),
        ({}, "decides nothing"),
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_is_refused(refused, model, tmp_path, plan, message):
    written(tmp_path / "plan.json", **plan)
    assert message in refused("apply", tmp_path / "plan.json", model, "-o", tmp_path / "child.onnx")


def test_unequal_aliases_are_refused(cli, refused, coupled, tmp_path):
    plan = written(tmp_path / "plan.json", keep={"blocks.0.head_dim": [0, 1], "blocks.2.head_dim": [0, 2]})
    message = refused("apply", plan, coupled, "-o", tmp_path / "child.onnx")
    assert "'blocks.0.head_dim' and 'blocks.2.head_dim' are one dimension" in message
    written(plan, keep={"blocks.0.head_dim": [0, 1], "blocks.2.head_dim": [0, 1]})
    assert cli("apply", plan, coupled, "-o", tmp_path / "child.onnx").code == 0
    line = next(line for line in cli("show", coupled).out.splitlines() if "blocks.*.head_dim" in line)
    assert "one for all 3 blocks" in line


def test_native_constants_where_a_table_forbids_them(cli, refused, alibi, tmp_path):
    """The framework gives two heads the slopes 2 ** -4 and 2 ** -8, which are those of the first two of three."""
    plan = written(tmp_path / "plan.json", keep={"blocks.0.heads": [0, 2]})
    message = refused("apply", plan, alibi, "-o", tmp_path / "child.onnx", "--native-constants")
    assert "'slopes' at Mul node '/alibi'" in message and "leave out --native-constants" in message
    assert cli("apply", plan, alibi, "-o", tmp_path / "child.onnx").code == 0
    written(plan, keep={"blocks.0.heads": [0, 1]})
    assert cli("apply", plan, alibi, "-o", tmp_path / "child.onnx", "--native-constants").code == 0


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_what_is_no_plan_is_refused(refused, model, tmp_path, text):
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    assert "plan" in refused("apply", tmp_path / "plan.json", model, "-o", tmp_path / "child.onnx")
    assert "cannot read the plan" in refused("apply", tmp_path / "none.json", model, "-o", tmp_path / "child.onnx")
