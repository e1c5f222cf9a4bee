"""The options of tiny trainings of each system, which take milliseconds per step."""

from fastnce.training import build_config

CLASSES = ("ant", "bee", "cat")

COMMON = {
    "workers": 0,
    "device": "cpu",
    "steps": 8,
    "batch_size": 2,
    "log_every": 3,
    "sample_every": 4,
    "sample_count": 2,
    "checkpoint_every": 4,
}
TRANSLATION = COMMON | {
    "base_channels": 2,
    "disc_channels": 2,
    "disc_layers": 1,
    "load_size": 20,
    "crop_size": 16,
}
PATCHES = {"num_blocks": 1, "nce_layers": [4, 8, 12], "num_patches": 8, "projection_dim": 8}
TINY = TRANSLATION | PATCHES
GENERATION = COMMON | {
    "image_size": 16,
    "num_classes": 3,
    "latent_dim": 6,
    "gen_channels": 4,
    "disc_channels": 4,
    "shared_dim": 4,
    "gen_attention": 0,
    "disc_attention": 0,
    "embed_dim": 8,
    "d_steps": 2,
    "batch_size": 3,
    "ema_start": 2,
    "ema_decay": 0.5,
}
STYLES = COMMON | {
    "image_size": 16,
    "latent_dim": 6,
    "mapping_layers": 2,
    "channels": [6, 5, 4],
    "r1_every": 3,
    "path_every": 2,
    "batch_size": 4,
    "ema_decay": 0.5,
}
INVERSION = COMMON | {
    "generator": "generator",
    "encoder": "small",
    "pyramid": False,
    "image_size": 16,
    "lambda_lpips": 0.0,
    "lambda_id": 0.0,
    "progressive_start": 2,
    "progressive_every": 2,
    "w_pool": 3,
    "r1_every": 3,
    "ema_decay": 0.5,
}
ENCODER = COMMON | {
    "encoder": "small",
    "encoder_channels": 2,
    "image_size": 8,
    "head_dim": 4,
    "projection_dim": 4,
    "queue_size": 10,
    "norm_splits": 2,
    "lr": 0.05,
    "batch_size": 4,
    "warmup_epochs": 1,
}
LABELS = COMMON | {
    "label_classes": 3,
    "dont_care": True,
    "instances": True,
    "base_channels": 2,
    "hidden_channels": 4,
    "disc_channels": 2,
    "disc_layers": 2,
    "critic": "pixel",
    "num_patches": 8,
    "projection_dim": 8,
    "load_size": 36,
    "crop_size": 32,
    "ema_decay": 0.9,
}
# Of a variant: its options, and which of the made data it trains on.
OPTIONS = {
    "cut": (TINY, "data"),
    "fastcut": (TINY, "data"),
    "sincut": (
        COMMON
        | {
            "base_channels": 2,
            "num_blocks": 2,
            "nce_layers": [0, 2, 3],
            "disc_channels": 2,
            "projection_dim": 8,
            "crop_size": 16,
        },
        "single",
    ),
    "dclgan": (TINY, "data"),
    "simdcl": (TINY, "data"),
    # A small pool, so that it is full, and draws, before and after a stop.
    "cyclegan": (TRANSLATION | {"num_blocks": 1, "pool_size": 2}, "data"),
    "pix2pix": (TRANSLATION | {"num_downs": 3, "load_size": 16}, "pairs"),
    "cfl": (LABELS, "labels"),
    "cfl-clean": (LABELS, "labels"),
    "contragan": (GENERATION, "classes"),
    "acgan": (GENERATION, "classes"),
    "projgan": (GENERATION, "classes"),
    "reacgan": (GENERATION, "classes"),
    "stylegan2": (STYLES, "classes"),
    "restyle": (INVERSION, "classes"),
    "restyle-e4e": (INVERSION, "classes"),
    "psp": (INVERSION, "classes"),
    "e4e": (INVERSION, "classes"),
    "simclr": (ENCODER, "classes"),
    "moco": (ENCODER, "classes"),
    "supcon": (ENCODER, "classes"),
}


def config_of(variant, made, out, **changes):
    """The configuration of a tiny run; `made` are the folders of the data by name."""
    options, data = OPTIONS[variant]
    paths = {"data": made[data], "out": out}
    if options.get("generator") in made:
        paths["generator"] = made[options["generator"]]
    return build_config(variant, overrides=options | paths | changes)
