"""The truncated factors against the full SVD, whatever the spectrum and the shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pkt.config import WHOLE_BELOW
from pkt.factorization import HASHED, factorize, leading_triplets, orthogonal_factors
from pkt.records import Factors, Split

torch.set_num_threads(1)
F64 = torch.float64
RANK = 16
I = torch.arange(1, 401, dtype=F64)  # noqa: E741
SPECTRA = {
    "harmonic": 1 / I,
    "square": 1 / I**2,
    "slow": I**-0.25,
    "exponential": 10 ** (-I / 8),
    "steep": 10 ** (-I / 3),
    "clustered": torch.cat([torch.full((20,), 3.0, dtype=F64), torch.full((380,), 2.9, dtype=F64)]),
    "one large": torch.cat([torch.tensor([1e4], dtype=F64), torch.linspace(1, 0.9, 399).double()]),
    "rank 5": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=F64),
    "rank 5, equal": torch.full((5,), 3.0, dtype=F64),
    "rank 1": torch.tensor([2.0], dtype=F64),
    "rank 16": torch.full((16,), 1e-3, dtype=F64),
}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_spectrum(sigma: Tensor, rows: int, columns: int) -> Tensor:
    left = torch.linalg.qr(gaussian(rows, len(sigma), seed=1))[0]
    return (left * sigma) @ torch.linalg.qr(gaussian(columns, len(sigma), seed=2))[0].T


def check(weight: Tensor, made: Factors, rank: int, split: Split = "paper") -> None:
    """σ_i to 1e-4 of each, down to the noise of float32; the residual law; signs; both splits."""
    exact = weight.double()
    sigma = torch.linalg.svdvals(exact)
    rank = min(rank, *weight.shape)
    assert made.a.shape == (rank, weight.shape[1])
    assert made.b.shape == (weight.shape[0], rank)
    assert made.a.dtype == made.b.dtype == torch.float32
    assert bool(made.a.isfinite().all() and made.b.isfinite().all())
    noise = 1e-6 * float(sigma[0])
    found = torch.tensor(made.singular_values, dtype=F64)
    torch.testing.assert_close(found, sigma[:rank], rtol=1e-4, atol=noise)
    a, b = made.a.double(), made.b.double()
    best = float(sigma[rank:].square().sum().sqrt())
    room = 20 * noise + 1e-12
    assert float(torch.linalg.norm(exact - b @ a)) == pytest.approx(best, rel=1e-4, abs=room)
    assert made.residual == pytest.approx(best, rel=1e-4, abs=room)
    assert made.norm == pytest.approx(float(torch.linalg.norm(exact)), rel=1e-9)
    gram_a, gram_b = a @ a.T, b.T @ b
    if split == "paper":
        wanted_a, wanted_b = torch.eye(rank, dtype=F64), torch.diag(sigma[:rank] ** 2)
    else:
        wanted_a = wanted_b = torch.diag(sigma[:rank])
    scale = float(sigma[0])
    torch.testing.assert_close(gram_b, wanted_b, rtol=1e-3, atol=1e-4 * max(scale, scale**2))
    solid = sigma[:rank] > 100 * noise  # rows of σ = 0 are free
    torch.testing.assert_close(
        gram_a[solid][:, solid], wanted_a[solid][:, solid], rtol=1e-3, atol=1e-4 * max(scale, 1)
    )
    for column in range(rank):
        if solid[column]:
            magnitude = b[:, column].abs()
            near = magnitude >= magnitude.max() * (1 - 1e-6)
            assert bool((b[near, column] > 0).any()), "the largest entry of each column"


@pytest.mark.parametrize("split", ["paper", "balanced"])
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_equal_the_full_svd(name: str, split: Split) -> None:
    sigma = SPECTRA[name]
    for rows, columns in ((500, 430), (430, 500)):
        assert min(rows, columns) > WHOLE_BELOW
        weight = with_spectrum(sigma, rows, columns).float()
        check(weight, factorize(weight, RANK, split), RANK, split)


def test_a_flat_spectrum_equals_the_full_svd() -> None:
    """The hardest case for a power iteration: neighbours differ by less than a percent."""
    weight = gaussian(1500, 1200).float()
    check(weight, factorize(weight, RANK, "paper"), RANK)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("apart", [False, True])
def test_rows_that_repeat_equal_the_full_svd(dtype: torch.dtype, apart: bool) -> None:
    """As keys and values of grouped heads do, cut off within a head: some rows once more."""
    distinct = with_spectrum(SPECTRA["slow"], 450, 420).to(dtype)
    rows = torch.arange(1200) % 450 if apart else torch.arange(1200) // 3
    check(distinct[rows], factorize(distinct[rows], RANK, "paper"), RANK)


def test_rows_that_begin_alike_are_not_the_same() -> None:
    weight = gaussian(450, 2 * HASHED).float()
    weight[:, :HASHED] = weight[0, :HASHED]
    check(weight, factorize(weight, RANK, "paper"), RANK)


@pytest.mark.parametrize("kinds", [1, 3, RANK])
def test_fewer_kinds_of_rows_than_directions_wanted(kinds: int) -> None:
    weight = gaussian(kinds, 420).float()[torch.arange(450) % kinds]
    check(weight, factorize(weight, RANK, "paper"), RANK)


@pytest.mark.parametrize("rank", [1, 2, 16, 64, 110])
def test_every_rank(rank: int) -> None:
    weight = with_spectrum(SPECTRA["slow"], 450, 420).float()
    check(weight, factorize(weight, rank, "paper"), rank)


@pytest.mark.parametrize(
    "shape",
    [(1, 7), (7, 1), (1, 1), (1, 3000), (3000, 1), (3, 5), (40, 30), (2000, 20), (20, 2000)],
)
@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_small_and_thin_shapes(shape: tuple[int, int], split: Split) -> None:
    weight = gaussian(*shape).float()
    check(weight, factorize(weight, RANK, split), RANK, split)


@pytest.mark.parametrize("shape", [(6, 5), (500, 430), (430, 500)])
@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_zero_stays_zero(shape: tuple[int, int], split: Split) -> None:
    made = factorize(torch.zeros(shape), 4, split)
    assert made.singular_values == (0.0,) * 4 or max(made.singular_values) < 1e-30
    assert (made.residual, made.norm) == (0.0, 0.0)
    assert bool(made.a.isfinite().all() and made.b.isfinite().all())
    assert not bool((made.b @ made.a).any())


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_other_element_types(dtype: torch.dtype) -> None:
    """The stored values are what is factored: rounding is the checkpoint's, not ours."""
    for shape in ((60, 50), (450, 400)):
        weight = (gaussian(*shape) / 20).to(dtype)
        check(weight, factorize(weight, RANK, "paper"), RANK)


@pytest.mark.parametrize("found", [1, 5, RANK - 1])
@pytest.mark.parametrize("whole", [False, True])
def test_fewer_directions_than_the_rank(found: int, whole: bool) -> None:
    """The rest have σ = 0 and rows of A that are orthonormal still, so that they can learn."""
    left, right = gaussian(450, found), gaussian(found, 420)
    if whole:  # integers: every product is exact, and the Gram matrix exactly singular
        left, right = (3 * left).round(), (3 * right).round()
    made = factorize((left @ right).float(), RANK, "paper")
    check((left @ right).float(), made, RANK)
    gram = made.a.double() @ made.a.double().T
    torch.testing.assert_close(gram, torch.eye(RANK, dtype=F64), rtol=0, atol=1e-5)
    assert made.singular_values[found:] == (0.0,) * (RANK - found)


def test_scales_far_from_one() -> None:
    for scale in (1e-12, 1e12):
        weight = (with_spectrum(SPECTRA["harmonic"], 450, 420) * scale).float()
        check(weight, factorize(weight, RANK, "paper"), RANK)


def test_columns_begin_with_a_positive_lead_and_repeat() -> None:
    """−W has the factors −B, A with the signs turned back: B A is −W's, its leads positive."""
    for shape in ((30, 20), (450, 420)):
        weight = gaussian(*shape, seed=3).float()
        first, again = factorize(weight, 4, "paper"), factorize(weight.clone(), 4, "paper")
        assert torch.equal(first.a, again.a)
        assert torch.equal(first.b, again.b)
        mirrored = factorize(-weight, 4, "paper")
        torch.testing.assert_close(mirrored.b, first.b, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mirrored.a, -first.a, rtol=1e-3, atol=1e-3)
        lead = first.b.gather(0, first.b.abs().argmax(0, keepdim=True))
        assert bool((lead > 0).all())


def test_equal_magnitudes_take_the_first() -> None:
    weight = torch.tensor([[-1.0], [1.0], [1.0]])
    made = factorize(weight, 1, "paper")
    torch.testing.assert_close(made.b, torch.tensor([[1.0], [-1.0], [-1.0]]))
    torch.testing.assert_close(made.a, torch.tensor([[-1.0]]))


@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_orthogonal_factors_keep_the_singular_values_alone(split: Split) -> None:
    weight = with_spectrum(SPECTRA["slow"], 450, 420).float()
    sigma = leading_triplets(weight, RANK)[1]
    made = orthogonal_factors(weight, RANK, split, seed=5)
    torch.testing.assert_close(torch.tensor(made.singular_values, dtype=F64), sigma)
    product = made.b.double() @ made.a.double()
    torch.testing.assert_close(torch.linalg.svdvals(product)[:RANK], sigma, rtol=1e-5, atol=1e-7)
    again, other = (orthogonal_factors(weight, RANK, split, seed=s) for s in (5, 6))
    assert torch.equal(again.a, made.a)
    assert torch.equal(again.b, made.b)
    assert not torch.allclose(other.a, made.a, atol=1e-2)
    true = torch.linalg.norm(weight.double() - product)
    assert made.residual == pytest.approx(float(true), rel=1e-6)


def test_orthogonal_factors_have_no_preferred_sign() -> None:
    """QR alone gives every column's first entries one sign; Haar's distribution does not."""
    weight = gaussian(12, 12).float()
    firsts = [orthogonal_factors(weight, 3, "paper", s).a[:, 0].tolist() for s in range(200)]
    means = torch.tensor(firsts).mean(0)
    assert float(means.abs().max()) < 0.1
    assert all(itertools.starmap(lambda x, y, z: x and y and z, firsts))
