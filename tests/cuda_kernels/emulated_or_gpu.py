"""Where the tests of the CUDA kernels run: on a GPU, or on the host with ``FASTNCE_CUDA_EMULATED``; else who imports this is skipped."""

import os

import pytest

from fastnce.backends import cuda

if cuda.available() != "ok":
    pytest.skip(cuda.available(), allow_module_level=True)

DEVICE = "cpu" if os.environ.get("FASTNCE_CUDA_EMULATED") else "cuda"
