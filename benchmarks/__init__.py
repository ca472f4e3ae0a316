"""Measurements of the kernels, each a command: `python -m benchmarks.attention`."""
