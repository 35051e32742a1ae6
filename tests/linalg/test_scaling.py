"""Scaling by powers of two, which changes no digit."""

import pytest
import torch

from lightning_ief.linalg.scaling import (
    normalised,
    normalised_direction,
    power_of_two,
    sample_scale,
    upcast,
    wide,
)


def test_powers_of_two():
    given = torch.tensor([0.0, 0.75, 1.0, 3.0, 4.0, 1e-30, 1e30])
    found = power_of_two(given)
    assert found[0] == 1 and bool((given[1:] < found[1:]).all()) and bool((found[1:] <= 2 * given[1:]).all())
    assert bool((found.log2() == found.log2().round()).all())
    assert power_of_two(torch.tensor(3.0, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_slices_get_a_size_of_about_one_and_keep_their_digits(dtype, kept):
    x = torch.randn(4, 3, 5).double() * torch.tensor([0.25, 1.0, 3.0, 8.0])[:, None, None]
    x[1, 1] = 0.0
    x = x.to(dtype)
    found, scales = normalised(x, kept)
    assert found.dtype == dtype and scales.dtype == torch.float64 and scales.shape == x.shape[:kept]
    assert torch.equal(found.double() * scales.view(*scales.shape, *(1,) * (3 - kept)), x.double())
    largest = found.abs().reshape(*x.shape[:kept], -1).amax(-1)
    assert bool(((largest == 0) | (largest >= 0.5) & (largest < 1)).all())


def test_a_factor_is_the_size_aimed_at():
    x, factor = torch.tensor([3e-6, -1e-6]), torch.tensor(1024.0)
    found, scale = normalised(x, 0, factor)
    assert 512 <= float(found.abs().max()) < 1024
    assert torch.equal(found.double() * scale, x.double())


def test_what_is_not_finite_is_left_alone():
    x = torch.tensor([[1.0, torch.inf], [4.0, 1.0], [torch.nan, 1.0]])
    found, scales = normalised(x, 1)
    assert scales.tolist() == [1.0, 8.0, 1.0]
    assert torch.equal(found.nan_to_num(7.0), (x / scales[:, None]).float().nan_to_num(7.0))


def test_scales_of_samples_and_directions():
    assert [float(sample_scale(torch.tensor(64.0), n)) for n in (1, 2, 3, 32, 33)] == [64, 32, 16, 2, 1]
    d, parameters = {"w": torch.full((2,), 1e-7)}, {"w": torch.zeros(2, dtype=torch.float16)}
    found, length = normalised_direction(d, parameters, in_fp16=True)
    assert found["w"].dtype == torch.float16 and 0.5 <= float(found["w"].float().norm()) <= 1
    assert torch.allclose(found["w"].float() * length, d["w"], rtol=1e-3)
    plain, length = normalised_direction(d, {"w": torch.zeros(2)}, in_fp16=False)
    assert length == 1 and plain["w"] is d["w"]


def test_dtypes_that_hold_enough():
    for dtype, expected in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert wide(dtype) == expected
        x = torch.ones(2, dtype=dtype)
        assert upcast(x).dtype == expected and (upcast(x) is x) == (dtype == expected)
