"""Calibration: run a model with onnxruntime over sample data, and count what passes need to know of its activations."""
