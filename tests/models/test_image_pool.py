"""The pool of earlier translations."""

import torch

from fastnce.systems.two_way import ImagePool


def numbered(*numbers: int) -> torch.Tensor:
    return torch.stack([torch.full((3, 2, 2), float(number)) for number in numbers])


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].int().tolist()


def test_until_it_is_full_everything_comes_back():
    pool = ImagePool(5)
    assert numbers(pool(numbered(1, 2, 3))) == [1, 2, 3]
    assert numbers(pool(numbered(4))) == [4]
    assert numbers(torch.stack(pool.images)) == [1, 2, 3, 4]


def test_then_half_come_from_it_and_are_replaced():
    torch.manual_seed(0)
    pool = ImagePool(10)
    pool(numbered(*range(10)))
    kept, from_pool = set(range(10)), 0
    for number in range(10, 1010):
        (given,) = numbers(pool(numbered(number)))
        if given == number:  # passed by: the pool stays as it was
            assert number not in kept
        else:
            from_pool += 1
            kept = kept - {given} | {number}
        assert set(numbers(torch.stack(pool.images))) == kept
    assert 450 < from_pool < 550


def test_every_place_is_drawn():
    torch.manual_seed(0)
    pool = ImagePool(4)
    pool(numbered(0, 1, 2, 3))
    places = set()
    for number in range(4, 104):
        before = numbers(torch.stack(pool.images))
        pool(numbered(number))
        after = numbers(torch.stack(pool.images))
        places |= {i for i in range(4) if before[i] != after[i]}
    assert places == {0, 1, 2, 3}


def test_without_a_pool_images_pass_without_gradient():
    images = numbered(1, 2).requires_grad_()
    assert torch.equal(ImagePool(0)(images), images)
    assert not ImagePool(0)(images).requires_grad
    assert not ImagePool(3)(images).requires_grad


def test_what_it_keeps_does_not_change_with_the_batch():
    images = numbered(1)
    pool = ImagePool(1)
    pool(images)
    images += 1
    assert numbers(torch.stack(pool.images)) == [1]


def test_the_state_dict_carries_it_on():
    torch.manual_seed(0)
    pool = ImagePool(3)
    pool(numbered(*range(6)))
    state, rng = pool.state_dict(), torch.get_rng_state()
    expected = [numbers(pool(numbered(number))) for number in range(6, 30)]
    other = ImagePool(3)
    other.load_state_dict(state)
    torch.set_rng_state(rng)
    assert [numbers(other(numbered(number))) for number in range(6, 30)] == expected
    assert len({number for (number,) in expected}) > 10
