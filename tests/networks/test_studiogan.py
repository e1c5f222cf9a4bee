"""Checkpoints in StudioGAN's layout, made here; a file with code in it does not run it."""

import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

from fastnce.errors import UserError
from fastnce.networks import BigGANDiscriminator, BigGANGenerator, load_studiogan


def checkpoint(network, prefix=""):
    """As StudioGAN writes it, but for entries of plain values."""
    optimizer = torch.optim.Adam(network.parameters(), eps=1e-6)
    state = network.state_dict(prefix=prefix)
    network(*inputs(network)).sum().backward()
    optimizer.step()
    return {
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "run_name": "CIFAR10-ContraGAN",
        "step": 80_000,
        "aa_p": None,
        "best_fid": np.float64(8.065),
        "lecam_emas": {"D_real": 0.0},
    }


class Logits(BigGANDiscriminator):
    """A discriminator that gives one tensor."""

    def forward(self, images, labels):
        return super().forward(images, labels).adversarial


def networks():
    return BigGANGenerator(16, 30, 4, 8), Logits(16, 4, 8, conditioning="none")


def inputs(network):
    labels = torch.tensor([0, 3])
    if isinstance(network, BigGANGenerator):
        return torch.linspace(-1, 1, 60).reshape(2, 30), labels
    return torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16), labels


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model=G-best-weights-step=80000.pth"


@pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_loads(path, which, prefix, zipped):
    source, target = networks()[which], networks()[which]
    torch.save(checkpoint(source, prefix), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match="scalar"):
        torch.load(path)  # what load_studiogan is for
    target.load_state_dict(load_studiogan(path))
    source.eval(), target.eval()
    assert torch.equal(source(*inputs(source)), target(*inputs(source)))


def test_the_scalar_of_either_numpy(path):
    """NumPy 1 and 2 call the module of `scalar` numpy.core and numpy._core."""
    for numpy in (b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"):
        torch.save({"state_dict": {"x": torch.ones(1)}, "best_fid": np.float64(1)}, path)
        rewrite(path, re.compile(rb"cnumpy\._?core\.multiarray"), numpy)
        assert load_studiogan(path)["x"] == 1


def rewrite(path, pattern, text):
    """Replaces what `pattern` finds once in the files of the archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    changed = {name: pattern.sub(text, content) for name, content in members.items()}
    assert sum(len(pattern.findall(content)) for content in members.values()) == 1
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in members:
            archive.writestr(name, changed[name])


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(path, zipped):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "was-run"),)

    for content in (
        {"state_dict": {}, "best_fid": Malicious()},
        {"state_dict": Malicious()},
        {"state_dict": {}, "best_fid": np.ones(2)},  # more than the scalar
    ):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="holds objects other than tensors and plain values"):
            load_studiogan(path)
        assert not (path.parent / "was-run").exists()
    assert np.dtype not in torch.serialization.get_safe_globals()
    pickle.loads(pickle.dumps(Malicious()))  # it would have worked
    assert (path.parent / "was-run").exists()


@pytest.mark.parametrize(
    "content",
    [torch.ones(2), {"model": {}}, {"state_dict": [1]}, {"state_dict": {"x": 1}}, {}],
    ids=str,
)
def test_other_files(path, content):
    torch.save(content, path)
    with pytest.raises(UserError, match=r"step=80000\.pth: is no StudioGAN checkpoint: expected"):
        load_studiogan(path)


def test_damaged_and_missing_files(path):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_studiogan(path)
    torch.save({"state_dict": {"x": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="is damaged, or holds"):
        load_studiogan(path)
