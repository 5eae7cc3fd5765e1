"""Build tiny transformers of many families, their ONNX exports, and their smaller selves cut in the framework itself.

The zoo is the judge of the engine, so it may know families by name; the engine may not.

>>> import zoo
>>> zoo.family("gpt2").layout.sizes["hidden"]
48
"""

from zoo.choose import choose, dimensions
from zoo.export import export
from zoo.families import FAMILIES, family
from zoo.feeds import feeds
from zoo.native import native
from zoo.plans import plans

__all__ = ["FAMILIES", "choose", "dimensions", "export", "family", "feeds", "native", "plans"]
