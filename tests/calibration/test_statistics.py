"""Check that statistics survive files, and that files of other models and damaged ones do not pass."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from graphclone.calibration.statistics import MomentSums, SpanSums, Statistics, TapSums
from graphclone.calibration.taps import Moment, Span, Tap
from graphclone.errors import InputError


@pytest.fixture
def statistics():
    random = np.random.default_rng(0)
    value, absolute, square = random.normal(size=(3, 6)) ** 2
    return Statistics(
        parent="f" * 64,
        provider="cpu",
        batches=2,
        samples=13,
        tokens=57,
        data="d" * 64,
        taps={("/h.0/Add", 2): TapSums(3, 57.0, value, absolute, square)},
        spans={"blocks.0": SpanSums("a", "b", 57.0, 3.5, 0.25)},
        moments={("gelu", 1): MomentSums(2, 57.0, random.normal(size=(5, 5)))},
    )


def test_accessors(statistics):
    sums = statistics.taps["/h.0/Add", 2]
    assert np.array_equal(statistics.mean("/h.0/Add"), sums.value / 57)
    assert np.array_equal(statistics.mean_abs(Tap("/h.0/Add", -1)), sums.absolute / 57)
    assert np.array_equal(statistics.mean_square(Tap("/h.0/Add", 2)), sums.square / 57)
    assert statistics.ratio(Span("blocks.0", "a", "b")) == 3.5 / 57
    assert statistics.cosine("blocks.0") == 1 - 0.25 / 57


def test_variance_is_never_negative():
    one = np.ones(2)
    assert (Statistics("f", "cpu", taps={("t", 0): TapSums(1, 1.0, one + 1e-9, one, one)}).variance("t") == 0).all()


def test_round_trip(statistics, tmp_path):
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    for name in ("parent", "provider", "batches", "samples", "tokens", "data", "interrupted"):
        assert getattr(loaded, name) == getattr(statistics, name)
    for name in ("mean", "mean_abs", "mean_square"):
        assert np.allclose(getattr(loaded, name)("/h.0/Add"), getattr(statistics, name)("/h.0/Add"), rtol=1e-15, atol=0)
    assert loaded.ratio("blocks.0") == pytest.approx(statistics.ratio("blocks.0"), rel=1e-15)
    assert loaded.cosine("blocks.0") == pytest.approx(statistics.cosine("blocks.0"), rel=1e-15)
    assert np.allclose(loaded.second_moment("gelu"), statistics.second_moment("gelu"), rtol=1e-15)
    statistics.save(tmp_path / "t.safetensors")
    assert (tmp_path / "s.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()


def test_empty_statistics_survive_a_file_too(tmp_path):
    Statistics("f", "cpu", samples=3).save(tmp_path / "s")
    assert Statistics.load(tmp_path / "s").samples == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:40], lambda b: b"", lambda b: b"no such thing" * 9])
def test_a_damaged_file(statistics, tmp_path, damage):
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="is no statistics file, or a damaged one"):
        Statistics.load(path)


def test_another_safetensors_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": np.ones(3)}, path)
    with pytest.raises(InputError, match="is no statistics file"):
        Statistics.load(path)
    save_file({"w": np.ones(3)}, path, {"graphclone": json.dumps({"format": "graphclone.statistics/9"})})
    with pytest.raises(InputError, match=r"holds graphclone.statistics/9, and this graphclone reads"):
        Statistics.load(path)
    save_file({"w": np.ones(3)}, path, {"graphclone": json.dumps(["format"])})
    with pytest.raises(InputError, match="is no statistics file"):
        Statistics.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read statistics from .*No such file.*check the path"):
        Statistics.load(tmp_path / "s.safetensors")


def test_a_path_that_cannot_be_written(statistics, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        statistics.save(tmp_path / "file" / "s.safetensors")


def test_statistics_of_another_parent(attention, statistics):
    with pytest.raises(InputError, match=r"measured on another model .*run graphclone calibrate on this one"):
        statistics.check(attention())


def test_what_was_not_measured(statistics):
    with pytest.raises(InputError, match="no statistics of 'gelu'"):
        statistics.mean("gelu")
    with pytest.raises(InputError, match=r"no statistics of '/h.0/Add' over axis 1"):
        statistics.mean(Tap("/h.0/Add", 1))
    with pytest.raises(InputError, match=r"no span 'blocks.1'"):
        statistics.ratio("blocks.1")
    with pytest.raises(InputError, match="no second moments of 'x'"):
        statistics.second_moment(Moment("x"))


def test_merging_what_does_not_belong_together(statistics):
    with pytest.raises(InputError, match="statistics of two models"):
        statistics.merge(Statistics("g", "cpu", batches=1))
    with pytest.raises(InputError, match=r"measured different tensors: only one of them has .*/h.0/Add"):
        statistics.merge(Statistics("f" * 64, "cpu", batches=1))
    assert statistics.merge(Statistics("f" * 64, "cpu")).samples == 13
