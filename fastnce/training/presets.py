"""Named sets of option values."""

from __future__ import annotations

# What `fastnce train NAME` starts from: the system, and the values that differ from its defaults.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "cut": ("cut", {}),
    "fastcut": (
        "cut",
        {
            "nce_idt": False,
            "lambda_nce": 10.0,
            "flip_equivariance": True,
            "epochs": 150,
            "decay_epochs": 50,
        },
    ),
}

PRESETS: dict[str, dict[str, object]] = {
    # The demo: 32x32 digits to digits over a photograph, about two minutes on two CPU cores.
    "digits": {
        "base_channels": 16,
        "num_blocks": 4,
        "disc_channels": 32,
        "disc_layers": 2,
        "disc_norm": "none",
        "disc_antialias": False,
        "init_gain": None,
        "nce_layers": (4, 8, 12, 15),
        "num_patches": 64,
        "lr": 4e-4,
        "batch_size": 8,
        "ema_decay": 0.995,
        "load_size": 32,
        "crop_size": 32,
        "flip": False,
        "augment_a": "affine",
        "workers": 0,
        "steps": 1000,
        "log_every": 20,
        "sample_every": 200,
        "sample_count": 16,
        "checkpoint_every": 200,
    },
}
