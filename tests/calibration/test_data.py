"""Check every form data may have, and every way it may not fit."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from graphclone.calibration.data import open_data
from graphclone.errors import InputError

TEXT = """(int64[{b}, s] ids, float[{b}, s, 3] x, int32[1, s] positions) => (float[{b}, s, 3] y)
{{ p = Cast<to = 1>(positions) q = Cast<to = 1>(ids) y = Identity(x) }}"""
SINGLE = "(float[{b}, 5] x) => (float[{b}, 5] y) {{ y = Identity(x) }}"


@pytest.fixture
def model(graph):
    return graph(TEXT.format(b="b"))


@pytest.fixture
def static(graph):
    return graph(TEXT.format(b=4))


@pytest.fixture
def single(graph):
    return graph(SINGLE.format(b="b"))


@pytest.fixture
def arrays():
    return {
        "ids": np.arange(70).reshape(10, 7),
        "x": np.arange(210, dtype=np.float32).reshape(10, 7, 3),
        "positions": np.arange(7, dtype=np.int32)[None],
    }


def write(arrays, path):
    np.savez(path, **arrays) if path.suffix == ".npz" else save_file(arrays, path)
    return path


def sizes(batches):
    return [(batch.samples, len(batch.feeds["ids"])) for batch in batches]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ""])
def test_stored_samples_are_cut_into_batches(model, arrays, tmp_path, suffix):
    source = write(arrays, tmp_path / f"data{suffix}") if suffix else arrays
    batches = open_data(source, model, batch_size=4)
    assert batches.total == 3 and sizes(batches) == [(4, 4), (4, 4), (2, 2)]
    for start, batch in zip((0, 4, 8), batches, strict=True):
        assert np.array_equal(batch.feeds["ids"], arrays["ids"][start : start + 4])
        assert np.array_equal(batch.feeds["x"], arrays["x"][start : start + 4])
        assert np.array_equal(batch.feeds["positions"], arrays["positions"])
    assert sizes(open_data(source, model)) == [(8, 8), (2, 2)]
    assert sizes(open_data(source, model, batches=1)) == [(8, 8)]


def test_a_static_batch_is_filled_with_the_last_sample(static, arrays):
    batches = list(open_data(arrays, static))
    assert sizes(batches) == [(4, 4), (4, 4), (2, 4)]
    assert np.array_equal(batches[2].feeds["ids"], arrays["ids"][[8, 9, 9, 9]])
    assert np.array_equal(batches[2].feeds["positions"], arrays["positions"])


def test_a_static_batch_of_one(graph, arrays):
    batches = list(open_data(arrays, graph(TEXT.format(b=1))))
    assert sizes(batches) == [(1, 1)] * 10
    assert all(batch.feeds["positions"].shape == (1, 7) for batch in batches)


def test_each_file_of_a_folder_is_a_ready_batch(model, arrays, tmp_path):
    write(arrays, tmp_path / "b.npz")
    write({name: value[:3] for name, value in arrays.items()}, tmp_path / "a.safetensors")
    (tmp_path / "notes.txt").write_text("not data")
    batches = open_data(tmp_path, model)
    assert batches.total == 2 and sizes(batches) == [(3, 3), (10, 10)]
    assert "a.safetensors" in next(iter(batches)).where


def test_npy_serves_a_single_input(single, model, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((9, 5), np.float32))
    assert [batch.samples for batch in open_data(tmp_path / "x.npy", single)] == [8, 1]
    assert [batch.samples for batch in open_data(tmp_path, single)] == [9]
    with pytest.raises(InputError, match=r"bare array, but the model has several inputs.*'ids', 'x', 'positions'"):
        open_data(tmp_path / "x.npy", model)


def test_ready_batches_from_any_iterable(model, arrays):
    feeds = {name: torch.from_numpy(value) for name, value in arrays.items()}
    assert sizes(open_data([feeds, feeds], model)) == [(10, 10)] * 2
    batches = open_data((feeds for _ in range(3)), model, batches=2)
    assert batches.total is None and sizes(batches) == [(10, 10)] * 2
    listed = open_data([feeds], model)
    assert sizes(listed) == sizes(listed)
    assert open_data(listed, model, batches=1).total == 1


def test_samples_from_any_iterable(graph, arrays):
    model = graph("(int64[b, s] ids, float[b, s, 3] x) => (float[b, s, 3] y) { y = Identity(x) }")
    rows = [{"ids": list(map(int, arrays["ids"][i])), "x": arrays["x"][i]} for i in range(10)]
    batches = open_data(rows, model, batch_size=4)
    assert batches.total == 3 and sizes(batches) == [(4, 4), (4, 4), (2, 2)]
    assert np.array_equal(next(iter(batches)).feeds["ids"], arrays["ids"][:4])
    rows[1]["ids"] = rows[1]["ids"][:3]
    with pytest.raises(InputError, match=r"samples 0 to 3 have 'ids' of shapes \[3\] and \[7\]; pad them"):
        list(open_data(rows, model, batch_size=4))
    del rows[5]["x"]
    with pytest.raises(InputError, match="sample 5 lacks the input 'x'"):
        list(open_data([rows[0]] * 5 + rows[5:], model))


def test_datasets_may_have_other_columns(graph, arrays):
    class Dataset(list):
        column_names = ("ids", "text")

    model = graph("(int64[b, s] ids) => (int64[b, s] y) { y = Identity(ids) }")
    rows = [{"ids": list(map(int, row)), "text": "abc"} for row in arrays["ids"]]
    assert sizes(open_data(Dataset(rows), model)) == [(8, 8), (2, 2)]
    with pytest.raises(InputError, match="holds 'text', which is no input"):
        open_data(rows, model)
    with pytest.raises(InputError, match="batch 0 lacks the input 'ids'"):
        open_data(Dataset([{"text": "abc"}]), model)


def test_bare_arrays_for_a_single_input(single):
    assert [batch.samples for batch in open_data([np.zeros((2, 5), np.float32), torch.zeros(3, 5)], single)] == [2, 3]
    assert [batch.samples for batch in open_data(np.zeros((9, 5), np.float32), single)] == [8, 1]


def test_numbers_are_cast_where_nothing_is_lost(model, arrays):
    arrays["ids"] = arrays["ids"].astype(np.uint8)
    arrays["x"] = arrays["x"].astype(np.float64)
    arrays["positions"] = torch.arange(7)[None]
    feeds = next(iter(open_data([arrays], model))).feeds
    assert [feeds[name].dtype for name in ("ids", "x", "positions")] == [np.int64, np.float32, np.int32]
    arrays["x"] = torch.ones(10, 7, 3, dtype=torch.bfloat16)
    assert next(iter(open_data([arrays], model))).feeds["x"].dtype == np.float32


def without(name):
    return lambda arrays: arrays.pop(name)


def setting(name, value):
    return lambda arrays: arrays.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("x"), r"lacks the input 'x' \(float32 \[b, s, 3\]\); add an array of that name"),
        (setting("idss", np.zeros(3)), "holds 'idss', which is no input of the model; did you mean 'ids'"),
        (
            setting("zebra", np.zeros(3)),
            "holds 'zebra', which is no input of the model; it has 'ids', 'x', 'positions'",
        ),
        (setting("ids", np.zeros((10, 7))), r"'ids' .* has type float64; the model wants int64: .*astype\('int64'\)"),
        (setting("x", np.zeros((10, 7, 3), int)), "'x' .* has type int64; the model wants float32"),
        (setting("x", np.full((10, 7, 3), "a")), "'x' .* has type <U1; give numbers"),
        (setting("positions", np.full((1, 7), 2**40)), "'positions' .* holds values from 1099511627776 .*int32 cannot"),
        (
            setting("x", np.zeros((10, 7), np.float32)),
            r"'x' .* has shape \[10, 7\], of rank 2; the model wants .* rank 3",
        ),
        (setting("x", np.zeros((10, 7, 2), np.float32)), "'x' .* has size 2 at axis 2; .* exported for exactly 3"),
        (setting("ids", np.zeros((0, 7), int)), "'ids' .* (holds no samples|is empty)"),
        (setting("ids", np.zeros((10, 0), int)), "'ids' .* is empty"),
    ],
)
@pytest.mark.parametrize("form", ["mapping", "npz", "folder", "batches"])
def test_what_does_not_fit(model, arrays, tmp_path, change, message, form):
    change(arrays)
    if form in ("npz", "folder"):
        np.savez(tmp_path / "data.npz", **arrays)
    source = {"mapping": arrays, "npz": tmp_path / "data.npz", "folder": tmp_path, "batches": [arrays]}[form]
    with pytest.raises(InputError, match=message):
        list(open_data(source, model))


def test_sample_counts_must_agree(model, arrays):
    arrays["x"] = arrays["x"][:9]
    with pytest.raises(InputError, match="'x' in the data holds 9 samples, but 'ids' holds 10"):
        open_data(arrays, model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.npz", b"PK\x03\x04 not really", "cannot read"),
        ("data.npz", b"", "cannot read"),
        ("data.npy", b"garbage", "cannot read"),
        ("data.safetensors", b"\xff" * 40, "cannot read"),
        ("data.txt", b"1 2 3", "give a .npz, .npy or .safetensors file"),
    ],
)
def test_damaged_files(single, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_data(tmp_path / name, single)


def test_pickles_are_not_opened(single, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot read"):
        open_data(tmp_path / "data.npz", single)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere.npz", {}, "no data at 'nowhere.npz'; check the path"),
        (".", {}, "the folder '.' holds no batches"),
        ([], {}, "the data is empty; give at least one batch"),
        (7, {}, "cannot read int as data"),
        ({"x": np.zeros((2, 5), np.float32)}, {"batch_size": 0}, "--batch-size 0"),
        ({"x": np.zeros((2, 5), np.float32)}, {"batches": 0}, "--batches 0"),
    ],
)
def test_no_data(single, tmp_path, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        open_data(source, single, **options)


def test_a_batch_size_that_a_static_model_cannot_take(static, arrays):
    with pytest.raises(InputError, match="--batch-size 3: the model's batch is fixed to 4"):
        open_data(arrays, static, batch_size=3)
