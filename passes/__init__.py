"""The built-in passes: one file, one frozen dataclass, one decision each.

`PASSES` is the built-in entry of the group `graphclone.passes`; a new pass is a new file here and its name below.
"""

from passes.compensate import Compensate
from passes.depth import Depth
from passes.refit import Refit
from passes.rescale import Rescale
from passes.rotate import Rotate
from passes.search import Search
from passes.width import Width

PASSES = (Depth, Search, Width, Rescale, Compensate, Rotate, Refit)

__all__ = ["PASSES", "Compensate", "Depth", "Refit", "Rescale", "Rotate", "Search", "Width"]
