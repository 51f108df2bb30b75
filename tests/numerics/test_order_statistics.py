import pytest
import torch

from sparse_peft.numerics import order_statistics, uniform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pieces", [1, 7])
def test_ranks_are_those_of_the_sorted_numbers(dtype, pieces):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat(
        [
            torch.rand(500, generator=generator, dtype=dtype)
            * 10.0 ** torch.randint(-30, 30, (500,), generator=generator),
            torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, torch.finfo(dtype).tiny, torch.inf], dtype=dtype),
        ]
    )
    ordered = numbers.sort().values
    ranks = [1, 2, 3, 100, 101, 300, len(numbers) - 1, len(numbers)]
    found = order_statistics(lambda: numbers.chunk(pieces), ranks)
    assert [float(number) for number in found] == [float(ordered[rank - 1]) for rank in ranks]
    assert all(number.dtype == dtype and number.shape == () for number in found)


def test_nan_comes_last_and_ranks_are_checked():
    numbers = torch.tensor([float("nan"), 2.0, 1.0])
    assert [float(n) for n in order_statistics(lambda: [numbers], [1, 2])] == [1.0, 2.0]
    assert order_statistics(lambda: [numbers], [3])[0].isnan()
    with pytest.raises(ValueError, match=r"ranks=\[4\].*3 numbers"):
        order_statistics(lambda: [numbers], [4])


def test_uniform_numbers_depend_on_seed_and_name_alone():
    numbers = uniform(100_000, seed=3, name="layer")
    assert numbers.dtype == torch.float32 and bool(((numbers >= -1) & (numbers < 1)).all())
    assert abs(float(numbers.mean())) < 0.01 and abs(float(numbers.square().mean()) - 1 / 3) < 0.01
    assert abs(float((numbers[1:] * numbers[:-1]).mean())) < 0.01
    assert torch.equal(uniform(50, seed=3, name="layer"), numbers[:50])
    assert not torch.equal(uniform(50, seed=4, name="layer"), numbers[:50])
    assert not torch.equal(uniform(50, seed=3, name="other"), numbers[:50])
    # the same on every machine and with every version
    assert (numbers[:3] * 2**23).int().tolist() == KNOWN


KNOWN = [5010721, -3822991, -1907245]
