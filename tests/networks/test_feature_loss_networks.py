"""Golden values, shapes, parameter counts and keys of the networks of Contrastive Feature Loss.

The golden numbers come from running the published implementation in fp32 on a CPU. Ours runs in fp64, which is the same everywhere.
"""

import pytest
from golden import hashed


def test_the_hash_of_the_golden_weights():
    assert hashed(4, k=0).tolist() == pytest.approx(
        [-0.618678, 0.417896, -0.748671, -0.710526], abs=1e-6
    )
    assert hashed(4, k=3).tolist() == pytest.approx(
        [-0.306958, -0.113298, 0.411765, -0.662986], abs=1e-6
    )
    assert hashed(1000, k=7).double().sum().item() == pytest.approx(-6.330974, abs=1e-5)
