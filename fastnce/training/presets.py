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
    # On the same networks: ContraGAN and what it is compared with.
    "contragan": ("contragan", {}),
    "acgan": ("contragan", {"conditioning": "AC"}),
    "projgan": ("contragan", {"conditioning": "PD"}),
    "reacgan": ("contragan", {"conditioning": "D2DCE", "temperature": 0.5, "lambda_cond": 0.5}),
}

_CUT: dict[str, dict[str, object]] = {
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

_CONTRAGAN: dict[str, dict[str, object]] = {
    # As published (StudioGAN). The defaults are those of CIFAR-10.
    "cifar10": {},
    "tiny-imagenet": {
        "image_size": 64,
        "num_classes": 200,
        "latent_dim": 100,
        "gen_channels": 80,
        "disc_channels": 80,
        "gen_attention": 3,
        "embed_dim": 768,
        "batch_size": 1024,
        "d_steps": 1,
        "lr_g": 1e-4,
        "lr_d": 4e-4,
        "beta1": 0.0,
        "ema_start": 20_000,
    },
    "imagenet": {
        "image_size": 128,
        "num_classes": 1000,
        "latent_dim": 120,
        "gen_attention": 4,
        "embed_dim": 1536,
        "batch_size": 256,
        "d_steps": 2,
        "lr_g": 5e-5,
        "lr_d": 2e-4,
        "beta1": 0.0,
        "ema_start": 20_000,
        "steps": 200_000,
    },
    # The same with two time scales.
    "imagenet-ttur": {
        "image_size": 128,
        "num_classes": 1000,
        "latent_dim": 120,
        "gen_attention": 4,
        "embed_dim": 1536,
        "batch_size": 256,
        "d_steps": 1,
        "lr_g": 1e-4,
        "lr_d": 4e-4,
        "beta1": 0.0,
        "ema_start": 20_000,
        "steps": 250_000,
    },
    # The built-in digits, 16x16: about three minutes on two CPU cores.
    "digits": {
        "backbone": "sngan",
        "image_size": 16,
        "image_channels": 1,
        "latent_dim": 32,
        "gen_channels": 24,
        "disc_channels": 24,
        "embed_dim": 64,
        "contrast_set": "real",
        "temperature": 0.5,
        "d_steps": 2,
        "lr_g": 1e-3,
        "lr_d": 1e-3,
        "beta1": 0.0,
        "ema_decay": 0.998,
        "ema_start": None,
        "flip": False,
        "workers": 0,
        "steps": 1200,
        "log_every": 50,
        "sample_every": 400,
        "measure_every": 400,
        "checkpoint_every": 400,
    },
}

PRESETS: dict[str, dict[str, dict[str, object]]] = {"cut": _CUT, "contragan": _CONTRAGAN}
