"""The networks that judge the digits sets, trained in small configurations."""

import pytest
import torch
from pictures import scripted

from fastnce.data import LabelledImages
from fastnce.demo import (
    DigitClassifier,
    generation_evaluator,
    load_digit_classifier,
    load_evaluator,
    read_labels,
    recipe_for,
    write_digits,
    write_digits_photos,
    write_photos,
)
from fastnce.demo.judges import EvaluatorBatches
from fastnce.errors import UserError
from fastnce.metrics import class_accuracy

TINY = {"steps": 3, "batch_size": 16, "base_channels": 4, "num_features": 16}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("demo") / "digits", 16)


@pytest.fixture(scope="module")
def digits_photos(tmp_path_factory):
    return write_digits_photos(tmp_path_factory.mktemp("demo") / "digits-photos")


def classifier(root, cache, **settings):
    return load_digit_classifier(root, cache=cache, progress=False, **(TINY | settings))


def evaluator(root, cache, **settings):
    recipe = recipe_for(root, **(TINY | {"photos": ("coffee",)} | settings))
    return load_evaluator(recipe, cache=cache, progress=False)


@pytest.fixture(params=["classifier", "evaluator"])
def load(request, digits, digits_photos):
    """Either network from a cache, with settings."""
    if request.param == "classifier":
        return lambda cache, **settings: classifier(digits, cache, **settings)
    return lambda cache, **settings: evaluator(digits_photos, cache, **settings)


def images_of(root, split):
    """(N, 1, S, S) float32 in [-1, 1], and digits (N,)."""
    size = read_labels(root)["recipe"]["size"]
    images, labels = LabelledImages(root, split, image_size=size, channels=1).all_images()
    return images / 127.5 - 1, labels


def same(one, other) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_training_is_repeatable_and_leaves_the_random_generator_and_the_threads_alone(
    load, tmp_path
):
    threads = torch.get_num_threads()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, other = load(tmp_path / "a"), load(tmp_path / "b")
    assert torch.rand(1) == expected and torch.get_num_threads() == threads
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    assert same(one, other)
    (path,) = (tmp_path / "a").iterdir()
    assert path.name.endswith(f"-{one.name.rsplit('-', 1)[1]}.pt")


def test_it_is_read_from_the_cache_the_next_time(load, tmp_path):
    load(tmp_path)
    (path,) = tmp_path.iterdir()
    state = {name: x + 1 for name, x in torch.load(path).items()}
    torch.save(state, path)
    assert all(torch.equal(x, state[name]) for name, x in load(tmp_path).state_dict().items())


def test_a_damaged_cache_is_trained_again(load, tmp_path):
    good = load(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.warns(UserWarning, match="training again"):
        assert same(load(tmp_path), good)


def test_a_cache_that_cannot_be_written_is_only_a_warning(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="trained anew each time"):
        load(tmp_path / "file")


def test_the_environment_names_the_cache(load, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTNCE_CACHE", str(tmp_path / "here"))
    load(None)
    assert len(list((tmp_path / "here").iterdir())) == 1


def test_settings_and_training_images_make_another_network(load, digits, tmp_path):
    changes = ({}, {"seed": 1}, {"steps": 4}, {"learning_rate": 1e-3})
    assert len({load(tmp_path, **change).name for change in changes}) == len(changes)
    other = write_digits(tmp_path / "digits", 16, seed=1)
    assert classifier(digits, tmp_path).name != classifier(other, tmp_path).name


def test_the_evaluators_recipe_holds_the_training_digits_only(digits_photos):
    recipe, images = recipe_for(digits_photos), read_labels(digits_photos)["images"]
    tested = {label["source"] for name, label in images.items() if name.startswith("test")}
    assert len(recipe.sources) + len(tested) == 1797
    assert not tested & set(recipe.sources)
    assert recipe_for(digits_photos, photos=("china",)).digest() != recipe.digest()


def test_batches_show_what_their_labels_say(digits_photos):
    batches = EvaluatorBatches(recipe_for(digits_photos, batch_size=32, photos=("coffee",)))
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


def test_the_evaluator_tells_photographs_from_none(digits_photos, tmp_path):
    settings = TINY | {"batch_size": 32, "base_channels": 8, "steps": 80, "photos": ("coffee",)}
    network = evaluator(digits_photos, tmp_path, **settings)
    batches = EvaluatorBatches(recipe_for(digits_photos, **settings))
    right = []
    for step in range(10**6, 10**6 + 8):  # images that training has not seen
        images, _, photos = batches(step)
        right.append(network.photo(network(images)).argmax(1) == photos)
    assert torch.cat(right).float().mean() > 0.9  # 0.5 by chance


def test_the_classifier_reads_digits_it_has_not_seen(digits, tmp_path):
    network = classifier(digits, tmp_path, steps=100, batch_size=64, base_channels=16)
    images, labels = images_of(digits, "test")
    probabilities = network.class_probabilities(images)
    assert class_accuracy(probabilities, labels) > 0.95
    features = network(images_of(digits, "train")[0])
    assert features.shape == (1195, 16) and features.min() >= 0
    assert features.var(0).mean().item() == pytest.approx(1, rel=1e-4)


def test_the_classifier_of_images_of_32_pixels(tmp_path):
    large = write_digits(tmp_path / "digits", 32)
    network = classifier(large, tmp_path)
    assert network(images_of(large, "test")[0][:3]).shape == (3, 16)
    with pytest.raises(ValueError, match=r"expected \(N, 1, 32, 32\).*got \(3, 1, 16, 16\)"):
        network(torch.zeros(3, 1, 16, 16))
    with pytest.raises(ValueError, match="image_size=28: expected 16 or 32"):
        DigitClassifier(28)


def test_the_judge_of_generated_images(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTNCE_CACHE", str(tmp_path / "cache"))
    scripted(torch.nn.Flatten(), tmp_path / "net.pt")
    photos = write_photos(tmp_path / "photos", 16, train_count=1, test_count=1)
    (tmp_path / "own").mkdir()
    for root in (photos, tmp_path / "own"):
        with pytest.raises(UserError, match="--extractor FILE, a TorchScript"):
            generation_evaluator(root)
    for root in (photos, digits):
        judge = generation_evaluator(root, tmp_path / "net.pt")
        assert judge.name.startswith("net.pt")
    with pytest.raises(UserError, match="no such folder"):
        generation_evaluator(tmp_path / "nowhere")
    with pytest.raises(UserError, match='is a "photos" set.*fastnce data digits'):
        load_digit_classifier(photos)
    with pytest.raises(UserError, match='is a "photos" set.*compare_folders'):
        recipe_for(photos)
    with pytest.raises(UserError, match=r"no labels\.json.*fastnce data digits-photos"):
        recipe_for(tmp_path / "own")
    assert not (tmp_path / "cache").exists()
    judge = DigitClassifier()
    monkeypatch.setattr("fastnce.demo.judges.load_digit_classifier", lambda *_, **__: judge)
    assert generation_evaluator(digits) is judge and judge.reads_labels
