"""`calibrate`, `subclone`, `run`, `verify`, `torch`: from a parent and samples to a child that trains."""

import json
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from graphclone.calibration.statistics import Statistics

SMALL = ("--hidden", 6, "--ffn", 10, "--heads", 2, "--layers", 2)


def shapes(path):
    return {item.name: tuple(item.dims) for item in onnx.load(path).graph.initializer}


def rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_the_main_job(cli, model, data, samples, tmp_path):
    child = tmp_path / "child.onnx"
    ended = cli("subclone", model, "--data", data, *SMALL, "-o", child, "--plan-out", tmp_path / "plan.json")
    assert ended.code == 0, ended
    shown = rows(ended.out)
    assert shown["measured"] == "12 samples, 64 tokens on cpu".split() or shown["measured"][-1] == "cuda"
    assert shown["hidden"][:2] == ["12", "6"] and shown["blocks.*.heads"][:2] == ["3", "2"]
    assert shown["blocks"] == ["3", "2", "keeps", "0-1"]
    assert shown["verified"][1:3] == ["checks", "passed,"] and shown["written"] == [str(child)]
    assert shapes(child)["h.1.attn.q.weight"] == (6, 8)
    session = onnxruntime.InferenceSession(str(child), providers=["CPUExecutionProvider"])
    assert session.run(None, samples)[0].shape == (12, 6, 23)
    assert json.loads((tmp_path / "plan.json").read_text())["blocks"] == [0, 1]
    again = cli("apply", tmp_path / "plan.json", model, "-o", tmp_path / "again.onnx")
    assert again.code == 0 and not again.err
    assert shapes(tmp_path / "again.onnx") == shapes(child)
    assert cli("verify", child, "--parent", model, "--plan", tmp_path / "plan.json", "--data", data).code == 0


def test_statistics_are_measured_once_and_give_the_same_child(cli, model, data, tmp_path):
    stats = tmp_path / "stats.safetensors"
    ended = cli("calibrate", model, "--data", data, "-o", stats, "--batch-size", 4, "--batches", 2)
    assert ended.code == 0 and rows(ended.out)["measured"][:2] == ["8", "samples,"]
    assert Statistics.load(stats).samples == 8
    kept = []
    for source in (("--stats", stats), ("--data", data, "--batch-size", 4, "--batches", 2)):
        plan = tmp_path / "plan.json"
        out = ("-o", tmp_path / "a.onnx", "--plan-out", plan)
        assert cli("subclone", model, *source, *SMALL, "--recipe", "paper", *out).code == 0
        kept.append(json.loads(plan.read_text()))
    assert kept[0] == kept[1]


def test_with_samples_the_recipe_is_best_else_the_papers(cli, model, data, tmp_path):
    plan, child, stats = tmp_path / "plan.json", tmp_path / "child.onnx", tmp_path / "stats.safetensors"
    assert cli("calibrate", model, "--data", data, "-o", stats).code == 0
    fitted = {}
    for source in (("--data", data), ("--stats", stats)):
        assert cli("subclone", model, *source, *SMALL, "-o", child, "--plan-out", plan).code == 0
        fitted[source[0]] = json.loads(plan.read_text())
    assert fitted["--data"]["replace"] and not fitted["--data"]["scale"]
    assert fitted["--stats"]["scale"] and not fitted["--stats"]["replace"]


def test_a_dry_run_writes_no_model_and_needs_no_output(cli, model, tmp_path):
    before = set(tmp_path.iterdir())
    ended = cli("subclone", model, *SMALL, "--by", "first", "--dry-run")
    assert ended.code == 0 and set(tmp_path.iterdir()) == before
    shown = rows(ended.out)
    assert shown["blocks.*.ffn"][:2] == ["20", "10"] and shown["parameters"][0] == "3,953"
    assert "dry run: no model was written" in ended.out and "verified" not in ended.out


def test_targets_per_block_and_listed_blocks(cli, model, tmp_path):
    child = tmp_path / "child.onnx"
    ended = cli("subclone", model, "--ffn", "[8, 4]", "--blocks", "0,2", "--by", "uniform", "-o", child)
    assert ended.code == 0, ended
    assert shapes(child)["h.0.mlp.up.weight"] == (12, 8) and shapes(child)["h.1.mlp.up.weight"] == (12, 4)
    line = next(line for line in ended.out.splitlines() if line.startswith("blocks.*.ffn"))
    assert line.split()[1:4] == ["20", "4-8", "8,"]


def test_native_constants_are_found_impossible_before_samples_are_measured(refused, alibi, data, tmp_path):
    targets = ("--heads", 2, "--by", "uniform", "--native-constants")
    message = refused("subclone", alibi, "--data", data, *targets, "-o", tmp_path / "child.onnx")
    assert "'slopes' at Mul node '/alibi'" in message


def test_widths_outside_blocks_that_equal_hidden_are_cut_and_named(cli, proto, tmp_path):
    pooled = onnx.ModelProto.FromString(proto.SerializeToString())
    weight = np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32)
    pooled.graph.initializer.append(onnx.numpy_helper.from_array(weight, "pooler.weight"))
    last = pooled.graph.node[-1]
    nodes = [
        onnx.helper.make_node("MatMul", [last.input[0], "pooler.weight"], ["pooled"], name="/pooler"),
        onnx.helper.make_node("Tanh", ["pooled"], ["tanh"], name="/tanh"),
    ]
    last.input[0] = "tanh"
    kept = [*pooled.graph.node[:-1], *nodes, last]
    del pooled.graph.node[:]
    pooled.graph.node.extend(kept)
    path = tmp_path / "pooled.onnx"
    onnx.save(pooled, path)
    command = ("subclone", path, "--hidden", 6, "--by", "first", "-o", tmp_path / "child.onnx")
    ended = cli(*command)
    assert ended.code == 0 and "'head_0' (12) equals hidden and is cut with it; --keep-heads leaves it" in ended.out
    assert shapes(tmp_path / "child.onnx")["pooler.weight"] == (6, 6)
    ended = cli(*command, "--keep-heads")
    assert ended.code == 0 and "equals hidden" not in ended.out
    assert shapes(tmp_path / "child.onnx")["pooler.weight"] == (6, 12)


def test_grouped_queries_are_cut_in_whole_groups(cli, grouped, tmp_path):
    child = tmp_path / "child.onnx"
    assert cli("subclone", grouped, "--kv-heads", 1, "--by", "first", "-o", child).code == 0
    assert (shapes(child)["h.0.attn.q.weight"], shapes(child)["h.0.attn.k.weight"]) == ((12, 12), (12, 4))
    assert cli("subclone", grouped, "--heads", 4, "--kv-heads", 2, "--by", "first", "-o", child).code == 0
    assert (shapes(child)["h.0.attn.q.weight"], shapes(child)["h.0.attn.k.weight"]) == ((12, 16), (12, 8))


@pytest.mark.parametrize("suffix", ["", ".txt", ".toml"])
def test_run_takes_a_pipeline_as_text_or_file(cli, model, tmp_path, suffix):
    text = "depth{layers=2},width{ffn=10 by=first}"
    pipeline = text
    if suffix:
        pipeline = tmp_path / f"pipeline{suffix}"
        toml = '[[pass]]\nname = "depth"\nlayers = 2\n[[pass]]\nname = "width"\nffn = 10\nby = "first"\n'
        pipeline.write_text(toml if suffix == ".toml" else text)
    ended = cli("run", pipeline, model, "-o", tmp_path / "child.onnx")
    assert ended.code == 0, ended
    assert shapes(tmp_path / "child.onnx")["h.1.mlp.up.weight"] == (12, 10)


def test_verify_prints_every_check_and_fails_with_1(cli, model, tmp_path):
    ended = cli("verify", model)
    assert ended.code == 0 and re.search(r"^(\d+) of \1 checks passed$", ended.out, re.MULTILINE)
    assert json.loads(cli("verify", model, "--json").out)["ok"] is True
    proto = onnx.load(model)
    proto.graph.initializer[0].raw_data = bytes(len(proto.graph.initializer[0].raw_data))
    onnx.save(proto, tmp_path / "other.onnx")
    (tmp_path / "plan.json").write_text('{"keep": {"hidden": [0, 1, 2]}}')
    assert cli("apply", tmp_path / "plan.json", model, "-o", tmp_path / "child.onnx", "--no-verify").code == 0
    ended = cli(
        "verify", tmp_path / "child.onnx", "--parent", tmp_path / "other.onnx", "--plan", tmp_path / "plan.json"
    )
    assert ended.code == 1 and "FAIL" in ended.out


def test_a_child_that_fails_its_checks_is_not_written(cli, model, tmp_path, monkeypatch):
    from graphclone.verify import Check, Report

    bad = Report((Check("permutation", False, 0.5, 1e-5, "blocks.0.ffn"),))
    monkeypatch.setattr(sys.modules["graphclone.verify"], "verify", lambda *_, **__: bad)
    command = ("subclone", model, *SMALL, "--by", "first", "-o", tmp_path / "child.onnx")
    ended = cli(*command)
    assert ended.code == 1 and not (tmp_path / "child.onnx").exists()
    assert "permutation differs by 5.0e-01 (at most 1.0e-05) at blocks.0.ffn" in ended.err
    assert "nothing was written" in ended.err
    assert cli(*command, "--no-verify").code == 0 and (tmp_path / "child.onnx").exists()


def test_torch_writes_source_and_weights(cli, model, tmp_path):
    ended = cli("torch", model, "-o", tmp_path / "small")
    assert ended.code == 0, ended
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert "model.safetensors" in names and any(name.endswith(".py") for name in names)
    assert all(str(tmp_path / "small" / name) in ended.out for name in names)
