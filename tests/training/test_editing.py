"""`fastnce edit` on runs: of stylegan2, whose network is the generator, of restyle, which holds one, and of others."""

import pytest

from fastnce.cli import main


@pytest.mark.parametrize("variant", ["stylegan2", "contragan"])
def test_samples_of_a_run(whole, tmp_path, capsys, variant):
    code = main(["edit", "--run", str(whole(variant)), "--out", str(tmp_path), "--count", "2"])
    if variant == "contragan":
        assert code == 2
        assert "holds no StyleGAN2 generator, so there is no latent" in capsys.readouterr().err
    else:
        assert code == 0 and len(list(tmp_path.glob("000[01]/*.png"))) == 14


def test_a_seed_gives_the_samples_of_generate(whole, tmp_path):
    """However many are generated, and in the middle of the edit, where nothing moves."""
    how = ["--run", str(whole("stylegan2")), "--seed", "3", "--truncation", "0.5"]
    for name, count in (("edit", "2"), ("generate", "1"), ("generate", "4")):
        out = str(tmp_path / f"{name}-{count}")
        assert main([name, *how, "--out", out, "--count", count]) == 0
    for count, number in (("1", 0), ("4", 1)):
        one = tmp_path / f"generate-{count}" / "images" / f"{number:04d}.png"
        assert (tmp_path / f"edit-2/{number:04d}/03.png").read_bytes() == one.read_bytes()


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_inverted_images(whole, data, tmp_path, kind):
    """The latents that `fastnce invert` writes; without a move the image is that of its last step."""
    run = ["--run", str(whole("restyle"))]
    images, inverted = ["--input", str(data / "testA")], tmp_path / "inverted"
    assert main(["invert", *run, *images, "--out", str(inverted), "--latents", kind]) == 0
    latents = ["--latents", str(inverted / f"latents.{kind}")]
    assert main(["edit", *run, *latents, "--out", str(tmp_path / "edited")]) == 0
    last = sorted(path for path in inverted.iterdir() if path.is_dir())[-1]
    for number, path in enumerate(sorted(last.glob("*.png"))):
        middle = tmp_path / "edited" / f"{number:04d}" / "03.png"
        assert middle.read_bytes() == path.read_bytes()
    assert number == 1
