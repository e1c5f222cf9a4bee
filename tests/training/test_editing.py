"""`fastnce edit` on runs: of stylegan2, whose network is the generator, of restyle, which holds one, and of others."""

import pytest

from fastnce.cli import main


@pytest.mark.parametrize("variant", ["stylegan2", "contragan"])
def test_runs(whole, tmp_path, capsys, variant):
    code = main(["edit", "--run", str(whole(variant)), "--out", str(tmp_path), "--count", "2"])
    if variant == "contragan":
        assert code == 2
        assert "holds no StyleGAN2 generator, so there is no latent" in capsys.readouterr().err
    else:
        assert code == 0 and len(list(tmp_path.glob("000[01]/*.png"))) == 14
