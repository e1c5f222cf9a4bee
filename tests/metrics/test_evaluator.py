"""The evaluator, trained in a tiny configuration."""

import pytest
import torch

from fastnce.data import read_labels, write_digits_photos, write_photos
from fastnce.errors import UserError
from fastnce.metrics import load_evaluator, recipe_for
from fastnce.metrics.evaluator import EvaluatorBatches

TINY = {
    "steps": 3,
    "batch_size": 32,
    "base_channels": 8,
    "num_features": 16,
    "photos": ("coffee",),
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits_photos(tmp_path_factory.mktemp("demo") / "digits")


@pytest.fixture
def recipe(digits):
    return recipe_for(digits, **TINY)


def load(recipe, cache):
    return load_evaluator(recipe, cache=cache, progress=False)


def test_the_recipe_holds_the_training_digits_only(digits, recipe):
    images = read_labels(digits)["images"]
    tested = {label["source"] for name, label in images.items() if name.startswith("test")}
    assert len(recipe.sources) + len(tested) == 1797
    assert not tested & set(recipe.sources)


def test_batches_show_what_their_labels_say(recipe):
    batches = EvaluatorBatches(recipe)
    images, digits, photos = batches(0)
    assert images.shape == (32, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert digits.min() >= 0 and digits.max() <= 9 and set(photos.tolist()) == {0, 1}
    # The corners hold no ink: noise about black on plain images, the photograph on the others.
    corners = images[:, :, :2, :2].mean((1, 2, 3))
    assert corners[photos == 1].max() < -0.6
    assert corners[photos == 0].mean() > -0.6
    again = batches(0)
    assert all(torch.equal(x, y) for x, y in zip((images, digits, photos), again, strict=True))
    assert not torch.equal(images, batches(1)[0])


def test_it_is_trained_once_and_then_read(recipe, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    trained = load(recipe, tmp_path)
    assert torch.get_num_threads() == threads
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())
    files = list(tmp_path.iterdir())
    assert [path.name for path in files] == [f"evaluator-{recipe.digest()}.pt"]
    assert recipe.digest() in trained.name

    monkeypatch.setattr("fastnce.metrics.evaluator.train_evaluator", None)  # would fail if called
    cached = load(recipe, tmp_path)
    images = EvaluatorBatches(recipe)(0)[0]
    assert torch.equal(cached(images), trained(images))


def test_training_is_repeatable_and_learns(digits, tmp_path):
    recipe = recipe_for(digits, **(TINY | {"steps": 80}))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, other = load(recipe, tmp_path / "a"), load(recipe, tmp_path / "b")
    assert torch.rand(1) == expected
    for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    right = []
    for step in range(10**6, 10**6 + 8):  # images that training has not seen
        images, _, photos = EvaluatorBatches(recipe)(step)
        right.append(one.photo(one(images)).argmax(1) == photos)
    assert torch.cat(right).float().mean() > 0.9  # 0.5 by chance


def test_a_damaged_cache_is_trained_again(recipe, tmp_path):
    good = load(recipe, tmp_path)
    path = tmp_path / f"evaluator-{recipe.digest()}.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.warns(UserWarning, match="training again"):
        again = load(recipe, tmp_path)
    images = EvaluatorBatches(recipe)(0)[0]
    assert torch.equal(again(images), good(images))


def test_a_cache_that_cannot_be_written_is_only_a_warning(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="trained anew each time"):
        load(recipe, tmp_path / "file")


def test_the_environment_names_the_cache(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTNCE_CACHE", str(tmp_path / "here"))
    load(recipe, None)
    assert len(list((tmp_path / "here").iterdir())) == 1


def test_every_setting_changes_the_digest(digits, recipe):
    changes = [{"seed": 1}, {"steps": 4}, {"photos": ("china",)}, {"version": 2}]
    digests = {recipe_for(digits, **(TINY | change)).digest() for change in changes}
    assert len(digests | {recipe.digest()}) == len(changes) + 1
    assert recipe_for(digits, **TINY).digest() == recipe.digest()


def test_other_sets_are_refused_with_the_way_out(tmp_path):
    root = write_photos(tmp_path / "photos", 16, train_count=1, test_count=1)
    with pytest.raises(UserError, match='is a "photos" set.*compare_folders'):
        recipe_for(root)
    (tmp_path / "own").mkdir()
    with pytest.raises(UserError, match=r"no labels\.json.*fastnce data digits-photos"):
        recipe_for(tmp_path / "own")
