"""Build tiny transformers of many families, their ONNX exports, and their smaller selves cut in the framework itself.

The zoo is the judge of the engine, so it may know families by name; the engine may not.

>>> import zoo
>>> zoo.family("gpt2").layout.sizes["hidden"]
48
"""

from zoo.export import export
from zoo.families import FAMILIES, family
from zoo.feeds import feeds

__all__ = ["FAMILIES", "export", "family", "feeds"]
