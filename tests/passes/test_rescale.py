"""Rescale: what it makes of a norm that normalises nothing."""

import numpy as np

from graphclone.graphs import constants
from graphclone.pipeline import Pipeline
from graphclone.subclone import calibrate
from graphclone.weights import Weight, weight_of

CUT = "width{hidden=8 by=first},rescale{mode=norm_gain}"


def test_norms_of_channels_that_hold_nothing_keep_their_scale(make, samples):
    """A factor of zero would switch them off for good."""
    model = make(bias=False)
    for constant in constants(model.graph):
        if constant.name == "embed":
            constant._values = Weight.of(np.where(np.arange(16) < 8, 0, weight_of(constant).load()).astype(np.float32))
    stats = calibrate(model, samples, provider="cpu", progress=False)
    scale = Pipeline.parse(CUT).plan(model, stats).scale
    assert "norm0.gain" not in scale and all(factor > 0 for factor in scale.values()) and len(scale) == 4
