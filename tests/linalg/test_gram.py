"""The forms of the Gram matrix agree with the dense one, whatever the chunks."""

import pytest
import torch
from torch import Tensor

from lightning_ief.linalg import gram
from lightning_ief.linalg.gram import (
    Form,
    InnerProducts,
    OuterProducts,
    Sizes,
    add_pairwise,
    add_products,
    cheapest_form,
    columns_gram,
    dense_gram,
    full_precision,
    mirror,
    pairwise_gram,
)
from tests.helpers import relative_error

N, OUT, IN = 4, 6, 5

Sides = tuple[int, int, int]  # leading size of the left side, of the right side, length; 0 on the left: one-hot rows

TERMS: dict[str, list[Sides]] = {
    "one position": [(1, 1, 1)],
    "several positions": [(1, 1, 3)],
    "one-hot": [(0, 1, 7)],
    "two uses of different lengths": [(1, 1, 3), (1, 1, 2)],
    "one-hot and dense": [(0, 1, 7), (1, 1, 2)],
    "two of one-hot and one dense": [(0, 1, 2), (0, 1, 9), (1, 1, 3)],
    "cotangents on the left": [(3, 1, 2)],
    "cotangents on the right": [(1, 3, 2)],
    "cotangents, one-hot": [(0, 3, 7)],
    "cotangents, uses either way round": [(3, 1, 2), (1, 3, 4), (0, 3, 1)],
}


def terms_of(sides: list[Sides], dtype: torch.dtype) -> list[OuterProducts]:
    return [
        OuterProducts(
            torch.randn(left, N, length, OUT, dtype=dtype) if left else torch.randint(0, OUT, (1, N, length)),
            torch.randn(right, N, length, IN, dtype=dtype),
            OUT,
        )
        for left, right, length in sides
    ]


def rows_of(terms: list[OuterProducts]) -> Tensor:
    """The truth: every sample's gradient, position by position, [R, N, OUT, IN] in float64."""
    cotangents = max(len(side) for term in terms for side in (term.left, term.right))
    rows = torch.zeros(cotangents, N, OUT, IN, dtype=torch.float64)
    for term in terms:
        dense = term.left.is_floating_point()
        left = term.left if dense else torch.nn.functional.one_hot(term.left, OUT)
        for r in range(cotangents):
            a, b = left[r % len(left)].double(), term.right[r % len(term.right)].double()
            rows[r] += torch.stack([sum(torch.outer(a[n, t], b[n, t]) for t in range(a.shape[1])) for n in range(N)])
    return rows


@pytest.mark.parametrize("chunk", [1, 40, 2**23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sides", TERMS.values(), ids=TERMS)
def test_both_forms_are_the_dense_gram(
    sides: list[Sides], dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gram, "_CHUNK", chunk)
    monkeypatch.setattr(gram, "_CACHED", chunk)
    terms = terms_of(sides, dtype)
    rows = rows_of(terms).flatten(2)
    truth = torch.einsum("anp,bmp->anbm", rows, rows)
    tolerance = 1e-14 if dtype == torch.float64 else 3e-7
    for form in (pairwise_gram, columns_gram):
        result = form(terms)
        assert result.dtype == torch.float64
        assert relative_error(result, truth) < tolerance, form.__name__


@pytest.mark.parametrize("sides", TERMS.values(), ids=TERMS)
def test_columns_are_rows_of_the_parameter(sides: list[Sides]):
    for term in terms_of(sides, torch.float64):
        truth = rows_of([term])
        assert relative_error(term.columns(0, OUT), truth) < 1e-14
        assert relative_error(term.columns(2, 5), truth[:, :, 2:5]) < 1e-14


@pytest.mark.parametrize("chunk", [1, 7, 2**23])
def test_dense_gram(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gram, "_CHUNK", chunk)
    rows, other = torch.randn(2, N, 3, 5), torch.randn(3, N + 1, 3, 5)
    a, b = rows.flatten(2).double(), other.flatten(2).double()
    precise = InnerProducts(precise=True)
    assert relative_error(dense_gram(rows, None, precise), torch.einsum("anp,bmp->anbm", a, a)) < 1e-14
    assert relative_error(dense_gram(rows, other, precise), torch.einsum("anp,bmp->anbm", a, b)) < 1e-14


@pytest.mark.parametrize(("rows", "width"), [(7, 5), (7, 9000), (300, 100), (300, 9000), (600, 20)])
@pytest.mark.parametrize("precise", [True, False])
def test_inner_products(rows: int, width: int, precise: bool):
    """Panels, blocks of columns and what is left of them; the error in single precision is as documented."""
    a, b = torch.randn(rows, width), torch.randn(rows + 3, width)
    for other in (None, b):
        truth = a.double() @ (a if other is None else other).double().T
        scale = a.double().norm(dim=1)[:, None] * (a if other is None else other).double().norm(dim=1)
        result = InnerProducts(precise)(a, other)
        assert result.dtype == (torch.float64 if precise or width > 4096 else torch.float32)
        assert (result - truth).norm() / scale.norm() < (1e-14 if precise else 1e-7)
        assert ((result - truth) / scale).abs().max() < (1e-13 if precise else 1e-6)
    assert relative_error(InnerProducts()(a.double()), a.double() @ a.double().T) < 1e-14


@pytest.mark.parametrize(("samples", "positions"), [(5, 1), (5, 3), (300, 1), (40, 30), (700, 1), (1, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_pairs_in_panels_are_the_dense_gram(samples: int, positions: int, with_bias: bool):
    """Rows of a layer of one use, its bias a further column: whole, in panels, and a panel that is cut off."""
    left, right = torch.randn(samples, positions, 3).double(), torch.randn(samples, positions, 4).double()
    rows = torch.einsum("nto,nti->noi", left, right).flatten(1)
    rows = torch.cat([rows, left.sum(1)], dim=1) if with_bias else rows
    before = torch.randn(samples, samples).double()
    gram = before.clone()
    add_pairwise(gram, left, right, with_bias)
    assert relative_error((gram - before).tril(), (rows @ rows.T).tril()) < 1e-13


@pytest.mark.parametrize("size", [1, 7, 256, 257, 600])
def test_lower_triangles_are_added_and_mirrored(size: int):
    rows, gram = torch.randn(size, 9).double(), torch.zeros(size, size).double()
    add_products(gram, rows, InnerProducts())
    gram += torch.randn(size, size).double().triu(1)  # is not read
    mirror(gram)
    assert torch.equal(gram, gram.T)
    assert relative_error(gram, rows @ rows.T) < 1e-14


def test_reduced_precision_that_the_user_allows_stays_out():
    a = torch.randn(64, 512)
    truth = a.double() @ a.double().T
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), full_precision(a.device):
            assert torch.get_float32_matmul_precision() == "highest"
            error = relative_error(InnerProducts()(a), truth)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert error < 1e-6


@pytest.mark.parametrize("form", [pairwise_gram, columns_gram])
def test_float64_accumulation_of_nearly_equal_samples(form):
    """Two float32 samples 1e-4 apart keep their distance, 1e-8 of the entries of K, which float32 sums would lose."""
    left, right = torch.randn(1, 1, 1, 400), torch.randn(1, 1, 1, 300)
    left = torch.cat([left, left * (1 + 1e-4)], 1)
    right = torch.cat([right, right], 1)
    term = OuterProducts(left, right, 400)
    k = form([term], InnerProducts(precise=True))[0, :, 0]
    distance = k[0, 0] + k[1, 1] - 2 * k[0, 1]
    rows = (left[0, :, 0, :, None].double() * right[0, :, 0, None, :].double()).flatten(1)
    assert abs(float(distance / (rows[0] - rows[1]).square().sum()) - 1) < 0.05


@pytest.mark.parametrize(
    ("positions", "height", "width", "expected"),
    [
        (1, 512, 512, Form.PAIRWISE),
        (8, 512, 512, Form.PAIRWISE),
        (64, 1024, 1024, Form.COLUMNS),  # G would be larger than both sides
        (200, 192, 192, Form.KEPT),
    ],
)
def test_the_cheapest_form_is_chosen(positions: int, height: int, width: int, expected: Form):
    assert cheapest_form(Sizes(32, positions, height, width)) is expected
