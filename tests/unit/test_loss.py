"""The losses against hand-computed values and the plain formulas; what counts as a positive."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipdist.loss import contrastive_loss, positives, sigmoid_loss

IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
TEXTS = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
SCALE, BIAS = torch.tensor(2.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
ONE_EACH, ALL = torch.eye(2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)


def keys(*rows: tuple[int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 2)


def unit_rows(seed: int, rows: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 16, dtype=dtype, generator=generator), dim=1)


def value_and_gradients(loss: Callable[..., Tensor], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Of images, texts, scale and bias."""
    inputs = [unit_rows(seed, dtype=dtype), unit_rows(seed + 1000, dtype=dtype)]
    inputs += [torch.tensor(20.0, dtype=dtype), torch.tensor(-10.0, dtype=dtype)]
    inputs = [value.requires_grad_() for value in inputs]
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return [value.detach(), *(gradient for gradient in gradients if gradient is not None)]


def test_positives_are_the_row_itself_its_group_and_its_caption() -> None:
    rows = keys((5, 11), (5, 12), (6, 12), (0, 13))
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert positives(rows, rows, 0).int().tolist() == expected, "0 and 2 both answer 1, but not each other"


def test_zero_is_never_a_key() -> None:
    rows = keys((0, 0), (0, 0), (0, 4), (3, 0))
    assert torch.equal(positives(rows, rows, 0), torch.eye(4, dtype=torch.bool))


def test_a_group_is_never_a_caption() -> None:
    rows = keys((7, 1), (2, 7))
    assert torch.equal(positives(rows, rows, 0), torch.eye(2, dtype=torch.bool))


@pytest.mark.parametrize("counts", [[4], [3, 1], [1, 0, 3], [0, 4]])
def test_positives_of_the_ranks_together_are_those_of_one_process(counts: list[int]) -> None:
    rows = keys((5, 11), (5, 12), (6, 12), (0, 11))
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    parts = [positives(rows[start : start + n], rows, start) for start, n in zip(starts, counts, strict=True)]
    assert torch.equal(torch.cat(parts), positives(rows, rows, 0))


def test_contrastive_loss_of_two_pairs_by_hand() -> None:
    """Scores [[2, 1.2], [0, 1.6]]: rows differ by 0.8 and 1.6, columns by 2 and 0.4."""
    by_hand = sum(math.log(1 + math.exp(-gap)) for gap in (0.8, 1.6, 2.0, 0.4)) / 2
    found = contrastive_loss(IMAGES, TEXTS, IMAGES, TEXTS, ONE_EACH, SCALE)
    assert float(found) == pytest.approx(by_hand, abs=1e-14)
    assert by_hand == pytest.approx(0.597472, abs=1e-6)


def test_contrastive_loss_of_a_pair_shown_twice_by_hand() -> None:
    """Both texts are right for both images: half the target on each."""
    rows = [(2.0, 1.2), (0.0, 1.6), (2.0, 0.0), (1.2, 1.6)]
    by_hand = sum(math.log(math.exp(a) + math.exp(b)) - (a + b) / 2 for a, b in rows) / 2
    found = contrastive_loss(IMAGES, TEXTS, IMAGES, TEXTS, ALL, SCALE)
    assert float(found) == pytest.approx(by_hand, abs=1e-14)


def sigmoid_of(images: Tensor, texts: Tensor, mask: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return sigmoid_loss(images, texts, mask, mask.sum(dim=1), mask.sum(dim=0), scale, bias)


def test_sigmoid_loss_of_two_pairs_by_hand() -> None:
    """Scores with the bias [[1, 0.2], [-1, 0.6]]."""
    by_hand = sum(math.log(1 + math.exp(value)) for value in (-1.0, 0.2, -1.0, -0.6))
    assert float(sigmoid_of(IMAGES, TEXTS, ONE_EACH, SCALE, BIAS)) == pytest.approx(by_hand, abs=1e-14)


def test_sigmoid_loss_weighs_positives_by_both_counts() -> None:
    """Row 0 has both texts, row 1 its own: the pair (0, 1) weighs (1/2 + 1/2) / 2, (0, 0) and (1, 1) (1/2 + 1) / 2."""
    mask = torch.tensor([[True, True], [False, True]])
    terms = [0.75 * math.log(1 + math.exp(-1.0)), 0.5 * math.log(1 + math.exp(-0.2))]
    terms += [math.log(1 + math.exp(-1.0)), 0.75 * math.log(1 + math.exp(-0.6))]
    assert float(sigmoid_of(IMAGES, TEXTS, mask, SCALE, BIAS)) == pytest.approx(sum(terms), abs=1e-14)


@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_sigmoid_loss_counts_a_product_shown_n_times_like_n_products(copies: int) -> None:
    """At score 0 every term is log 2, so the loss over log 2 is the sum of weights: n for n x n positives; exactly, in
    the precision of the scores."""
    rows, mask = torch.zeros(copies, 2, dtype=torch.float64), torch.ones(copies, copies, dtype=torch.bool)
    found = sigmoid_of(rows, rows, mask, SCALE, torch.zeros((), dtype=torch.float64))
    assert float(found) / math.log(2) == pytest.approx(copies, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_without_duplicates_contrastive_loss_is_plain_cross_entropy(dtype: torch.dtype, seed: int) -> None:
    """Value and gradients: to the last bit as the formula stands, to rounding as torch fuses it."""
    one_each, right = torch.eye(8, dtype=torch.bool), torch.arange(8)

    def ours(images: Tensor, texts: Tensor, scale: Tensor, _: Tensor) -> Tensor:
        return contrastive_loss(images, texts, images, texts, one_each, scale)

    def plain(images: Tensor, texts: Tensor, scale: Tensor, _: Tensor) -> Tensor:
        directions = [scale * images @ texts.T, scale * texts @ images.T]
        shown, written = [(torch.logsumexp(logits, dim=1) - logits.diagonal()).sum() for logits in directions]
        return (shown + written) / 2

    def fused(images: Tensor, texts: Tensor, scale: Tensor, _: Tensor) -> Tensor:
        directions = [scale * images @ texts.T, scale * texts @ images.T]
        return sum(F.cross_entropy(logits, right, reduction="sum") for logits in directions) / 2

    found = value_and_gradients(ours, dtype, seed)
    assert all(map(torch.equal, found, value_and_gradients(plain, dtype, seed)))
    rounding = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, value_and_gradients(fused, dtype, seed), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_without_duplicates_sigmoid_loss_is_siglip_to_the_last_bit(dtype: torch.dtype, seed: int) -> None:
    one_each = torch.eye(8, dtype=torch.bool)

    def ours(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_of(images, texts, one_each, scale, bias)

    def siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        labels = 2 * one_each.to(dtype) - 1
        return -F.logsigmoid(labels * (scale * images @ texts.T + bias)).sum()

    assert all(map(torch.equal, value_and_gradients(ours, dtype, seed), value_and_gradients(siglip, dtype, seed)))


def test_losses_of_no_rows_are_zero_and_pull_nowhere() -> None:
    """What a rank without rows adds."""
    columns, none, mask = unit_rows(0).requires_grad_(), unit_rows(1)[:0].requires_grad_(), torch.ones(0, 8).bool()
    one_way = contrastive_loss(none, none, columns, columns, mask, SCALE)
    other = sigmoid_loss(none, columns, mask, mask.sum(dim=1), torch.ones(8, dtype=torch.int64), SCALE, BIAS)
    assert (one_way.item(), other.item()) == (0.0, 0.0)
    assert not torch.autograd.grad(one_way + other, columns)[0].any()
