"""Benchmarks of the fused ops against plain PyTorch and the published eager forms: ``python -m benchmarks --help``."""
