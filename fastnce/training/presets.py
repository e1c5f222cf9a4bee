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
    # One image of each domain. Widths of the published ngf=10 and ndf=8 at crops of 64 pixels; the image is translated whole.
    "sincut": (
        "cut",
        {
            "generator": "stylegan2",
            "base_channels": 80,
            "num_blocks": 6,
            "discriminator": "stylegan2",
            "disc_channels": 32,
            "gan_mode": "nonsaturating",
            "lambda_r1": 1.0,
            "lambda_identity": 1.0,
            "lambda_nce": 4.0,
            "nce_layers": (0, 2, 4),
            "num_patches": 1,
            "negatives": "batch",
            "lr": 2e-3,
            "beta1": 0.0,
            "beta2": 0.99,
            "batch_size": 16,
            "dataset": "single-image",
            "crop_size": 64,
            "preprocess": "none",
            "epochs": 8,
            "decay_epochs": 8,
        },
    ),
    "dclgan": ("dclgan", {}),
    "simdcl": (
        "dclgan",
        {"lambda_sim": 10.0, "lr_f": 2e-4, "beta1_f": 0.5, "epochs": 100, "decay_epochs": 100},
    ),
    # Baselines in the same loop.
    "cyclegan": ("cyclegan", {}),
    "pix2pix": ("pix2pix", {}),
    # On the same networks: ContraGAN and what it is compared with.
    "contragan": ("contragan", {}),
    "acgan": ("contragan", {"conditioning": "AC"}),
    "projgan": ("contragan", {"conditioning": "PD"}),
    "reacgan": ("contragan", {"conditioning": "D2DCE", "temperature": 0.5, "lambda_cond": 0.5}),
    # The defaults are SimCLR's on CIFAR-10, and SupCon's are the same but for temperature and views (Khosla et al. 2020).
    "simclr": ("representation", {"method": "simclr"}),
    "supcon": ("representation", {"method": "supcon", "temperature": 0.1, "views": "supcon"}),
    # As in the CIFAR-10 demo of MoCo's authors.
    "moco": (
        "representation",
        {
            "method": "moco",
            "temperature": 0.1,
            "encoder": "resnet18",
            "batch_size": 512,
            "lr": 0.06,
            "weight_decay": 5e-4,
            "epochs": 200,
            "warmup_epochs": 0,
        },
    ),
}

# Networks and training for the 32x32 digits of `fastnce data digits-photos`, for some minutes on a CPU.
_DIGITS_PHOTOS: dict[str, object] = {
    "base_channels": 16,
    "num_blocks": 4,
    "disc_channels": 32,
    "disc_layers": 2,
    "disc_norm": "none",
    "disc_antialias": False,
    "init_gain": None,
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
    "measure_every": 200,
    "checkpoint_every": 200,
}
_DIGITS_PATCHES: dict[str, object] = {"nce_layers": (4, 8, 12, 15), "num_patches": 64}

_CUT: dict[str, dict[str, object]] = {
    # The demo: about two minutes on two CPU cores.
    "digits": _DIGITS_PHOTOS | _DIGITS_PATCHES,
    # SinCUT on two photographs of `fastnce data single-photos`, about four minutes on one CPU core.
    "single-photos": {
        "base_channels": 16,
        "num_blocks": 4,
        "disc_channels": 16,
        "num_patches": 16,
        "crop_size": 32,
        "batch_size": 8,
        "ema_decay": 0.99,
        "workers": 0,
        "steps": 1500,
        "log_every": 50,
        "sample_every": 250,
        "checkpoint_every": 250,
    },
}

_DCLGAN: dict[str, dict[str, object]] = {"digits": _DIGITS_PHOTOS | _DIGITS_PATCHES}

_CYCLEGAN: dict[str, dict[str, object]] = {"digits": _DIGITS_PHOTOS}

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

# The built-in sets, for a few minutes on one CPU core.
_SMALL: dict[str, object] = {
    "encoder": "small",
    "encoder_channels": 16,
    "norm_splits": 4,
    "optimizer": "adam",
    "lr": 2e-3,
    "weight_decay": 1e-6,
    "batch_size": 128,
    "warmup_epochs": 5,
    "workers": 0,
    "log_every": 50,
    "sample_every": 500,
    "measure_every": 250,
    "checkpoint_every": 250,
}

_REPRESENTATION: dict[str, dict[str, object]] = {
    "digits": _SMALL
    | {"image_size": 16, "image_channels": 1, "views": "digits-crops", "steps": 1000},
    "photo-crops": _SMALL | {"steps": 150, "sample_every": 150, "measure_every": 50},
    # As published on ImageNet: SimCLR with batches of 4096 for 100 epochs, MoCo v2 for 200.
    "simclr-imagenet": {
        "stem": "imagenet",
        "image_size": 224,
        "views": "simclr",
        "temperature": 0.1,
        "optimizer": "lars",
        "lr": 4.8,
        "weight_decay": 1e-6,
        "batch_size": 4096,
        "epochs": 100,
        "workers": 16,
    },
    "moco-imagenet": {
        "encoder": "resnet50",
        "stem": "imagenet",
        "image_size": 224,
        "views": "moco-v2",
        "temperature": 0.2,
        "queue_size": 65536,
        "key_momentum": 0.999,
        "lr": 0.03,
        "weight_decay": 1e-4,
        "batch_size": 256,
        "epochs": 200,
        "warmup_epochs": 0,
        "workers": 16,
    },
}

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "cut": _CUT,
    "dclgan": _DCLGAN,
    "cyclegan": _CYCLEGAN,
    "pix2pix": {},
    "contragan": _CONTRAGAN,
    "representation": _REPRESENTATION,
}
