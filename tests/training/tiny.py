"""The options of a tiny CUT that takes milliseconds per step."""

TINY = {
    "base_channels": 2,
    "num_blocks": 1,
    "disc_channels": 2,
    "disc_layers": 1,
    "nce_layers": [4, 8, 12],
    "num_patches": 8,
    "projection_dim": 8,
    "batch_size": 2,
    "load_size": 20,
    "crop_size": 16,
    "workers": 0,
    "device": "cpu",
    "steps": 8,
    "log_every": 3,
    "sample_every": 4,
    "sample_count": 2,
    "checkpoint_every": 4,
}
