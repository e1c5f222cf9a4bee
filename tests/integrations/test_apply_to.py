"""Ours in the place of a library's, and back; with a library made up here, and with the real ones where they are installed."""

import importlib
import sys
import types

import pytest

from fastnce import integrations
from fastnce.integrations import info_nce as ours


class Theirs:
    pass


@pytest.fixture
def theirs(monkeypatch):
    """A library of the name, and a script that has taken a class from it."""
    library, script = types.ModuleType("info_nce"), types.ModuleType("their_script")
    library.InfoNCE = script.Loss = Theirs
    library.info_nce = lambda *_: "theirs"
    monkeypatch.setitem(sys.modules, "info_nce", library)
    monkeypatch.setitem(sys.modules, "their_script", script)
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: {"info-nce-pytorch": "0.1.4"}[name]
    )
    return library, script


@pytest.mark.parametrize("by_name", [True, False])
def test_replaced_said_and_undone(theirs, caplog, by_name):
    library, script = theirs
    function = library.info_nce
    applied = integrations.apply_to("info_nce" if by_name else library)
    assert library.InfoNCE is script.Loss is ours.InfoNCE
    assert library.info_nce is ours.info_nce
    said = caplog.messages[-1]
    assert said == str(applied)
    for word in ("info-nce-pytorch 0.1.4", "InfoNCE (in info_nce)", "Loss (in their_script)"):
        assert word in said
    assert "nothing is left" in str(integrations.apply_to("info_nce"))
    applied.undo()
    assert library.InfoNCE is script.Loss is Theirs
    assert library.info_nce is function


def test_what_was_put_in_since_then_stays(theirs):
    library, _ = theirs
    applied = integrations.apply_to("info_nce")
    library.InfoNCE = str
    applied.undo()
    assert library.InfoNCE is str


def test_an_unknown_version_is_said(theirs, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "9.9")
    with pytest.warns(
        UserWarning, match=r"info-nce-pytorch 9\.9 has not been compared .* 0\.1\.4 has"
    ):
        integrations.apply_to("info_nce")


def test_what_a_version_lacks_is_said(theirs):
    library, _ = theirs
    del library.info_nce
    with pytest.warns(UserWarning, match=r"info_nce has no info_nce"):
        integrations.apply_to("info_nce")
    assert library.InfoNCE is ours.InfoNCE


def test_an_unknown_library():
    with pytest.raises(ValueError, match=r"no integration of 'openclip'. Use one of: .*open_clip"):
        integrations.apply_to("openclip")


@pytest.mark.parametrize(
    "name",
    [
        "open_clip",
        "lightly",
        "info_nce",
        "pytorch_metric_learning",
        "sentence_transformers",
        "transformers",
    ],
)
def test_a_library(library, recwarn, name):
    """Each class in the module that makes it, and in the library's own list of losses; its version is known."""
    ours = importlib.import_module(f"fastnce.integrations.{name}")
    before = {(m, x): getattr(library(m), x) for m, names in ours.STANDS_FOR.items() for x in names}
    applied = integrations.apply_to(name)
    for module, x in before:
        assert getattr(library(module), x) is getattr(ours, x)
    assert {x for _, x in before} == {x.name for x in applied.replaced}
    assert not [w for w in recwarn if "apply_to" in str(w.message)]
    applied.undo()
    assert before == {(m, x): getattr(library(m), x) for m, x in before}


def test_what_a_library_makes(library):
    """open_clip's own function makes ours, and a script's ``from lightly.loss import NTXentLoss`` has it."""
    options = {"distill": False, "siglip": False, "model": "ViT-B-32", "local_loss": True}
    options |= {"gather_with_grad": True, "rank": 0, "world_size": 1, "horovod": False}
    open_clip, loss = library("open_clip"), library("lightly.loss")
    both = [integrations.apply_to(x) for x in ("open_clip", "lightly")]
    try:
        made = open_clip.create_loss(types.SimpleNamespace(**options))
        assert type(made) is integrations.open_clip.ClipLoss and made.local_loss
        assert loss.NTXentLoss is integrations.lightly.NTXentLoss
    finally:
        for applied in both:
            applied.undo()


def test_a_library_that_is_not_there_is_one_line(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "info_nce", None)
    with pytest.raises(ImportError, match=r"apply_to: info_nce cannot be imported: .* Install it"):
        integrations.apply_to("info_nce")
    assert not recwarn.list
