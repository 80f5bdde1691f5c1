"""The losses against hand-computed values and the dense formulas; what counts as a positive; what is never computed."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clipdist import loss as loss_module
from clipdist.loss import contrastive_loss, sigmoid_loss
from clipdist.positives import Positives, find_positives

IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
TEXTS = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
SCALE, BIAS = torch.tensor(2.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
ROWS = 8


def keys(*rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


ONE_EACH, BOTH_ALIKE = find_positives(keys((0, 1), (0, 2))), find_positives(keys((7, 1), (7, 2)))
KEYS = {
    "none": torch.zeros(ROWS, 2, dtype=torch.int64),
    "different": torch.arange(1, 2 * ROWS + 1).reshape(ROWS, 2),
    "some": keys((5, 11), (0, 12), (6, 13), (5, 14), (0, 14), (7, 15), (6, 11), (0, 0)),
    "all the same": torch.ones(ROWS, 2, dtype=torch.int64),
}


def right_answers(rows: Tensor) -> Tensor:
    """The definition: bool [B, B]."""
    shared = ((rows[:, None] == rows[None]) & (rows[:, None] != 0)).any(dim=2)
    return shared | torch.eye(len(rows), dtype=torch.bool)


def weights(positives: Positives, rows: int, columns: int, tile: int) -> Tensor:
    """What `positives` gives every pair, tile by tile."""
    found = torch.zeros(rows, columns, dtype=torch.float64)
    for row, column in product(range(0, rows, tile), range(0, columns, tile)):
        inside = slice(row, min(row + tile, rows)), slice(column, min(column + tile, columns))
        i, j, weight = positives.inside(*inside)
        found[i + row, j + column] = weight
    return found


def expected_weights(rows: Tensor) -> Tensor:
    right = right_answers(rows).double()
    share = 1 / right.sum(dim=1)
    return right * (share[:, None] + share) / 2


def test_positives_are_the_row_itself_its_group_and_its_caption() -> None:
    rows = keys((5, 11), (5, 12), (6, 12), (0, 13))
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    found = weights(find_positives(rows), 4, 4, tile=4)
    assert (found > 0).int().tolist() == expected, "0 and 2 both answer 1, but not each other"
    assert found[0, 1].item() == (1 / 2 + 1 / 3) / 2


@pytest.mark.parametrize("rows", [keys((0, 0), (0, 0), (0, 4), (3, 0)), keys((7, 1), (2, 7))])
def test_zero_is_never_a_key_and_a_group_never_a_caption(rows: Tensor) -> None:
    assert torch.equal(weights(find_positives(rows), len(rows), len(rows), 2), torch.eye(len(rows)).double())


@pytest.mark.parametrize("kinds", [0, 1, 2, 3])
@pytest.mark.parametrize("tile", [1, 3, 40])
def test_positives_are_those_of_the_definition(kinds: int, tile: int) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(-3, 4 + 5 * seed, (13, kinds), generator=generator)
        assert torch.equal(weights(find_positives(rows), 13, 13, tile), expected_weights(rows))


@pytest.mark.parametrize("counts", [[8], [3, 5], [1, 0, 7], [0, 4, 4]])
def test_positives_of_the_ranks_together_are_those_of_one_process(counts: list[int]) -> None:
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    for rows in KEYS.values():
        parts = [weights(find_positives(rows, first), n, ROWS, 3) for first, n in zip(starts, counts, strict=True)]
        assert torch.equal(torch.cat(parts), expected_weights(rows))


def test_contrastive_loss_of_two_pairs_by_hand() -> None:
    """Scores [[2, 1.2], [0, 1.6]]: rows differ by 0.8 and 1.6, columns by 2 and 0.4."""
    by_hand = sum(math.log(1 + math.exp(-gap)) for gap in (0.8, 1.6, 2.0, 0.4)) / 2
    assert float(contrastive_loss(IMAGES, TEXTS, ONE_EACH, SCALE)) == pytest.approx(by_hand, abs=1e-14)
    assert by_hand == pytest.approx(0.597472, abs=1e-6)


def test_contrastive_loss_of_a_pair_shown_twice_by_hand() -> None:
    """Both texts are right for both images: half the target on each."""
    rows = [(2.0, 1.2), (0.0, 1.6), (2.0, 0.0), (1.2, 1.6)]
    by_hand = sum(math.log(math.exp(a) + math.exp(b)) - (a + b) / 2 for a, b in rows) / 2
    assert float(contrastive_loss(IMAGES, TEXTS, BOTH_ALIKE, SCALE)) == pytest.approx(by_hand, abs=1e-14)


def test_sigmoid_loss_of_two_pairs_by_hand() -> None:
    """Scores with the bias [[1, 0.2], [-1, 0.6]]."""
    by_hand = sum(math.log(1 + math.exp(value)) for value in (-1.0, 0.2, -1.0, -0.6))
    assert float(sigmoid_loss(IMAGES, TEXTS, ONE_EACH, SCALE, BIAS)) == pytest.approx(by_hand, abs=1e-14)


@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_sigmoid_loss_counts_a_product_shown_n_times_like_n_products(copies: int) -> None:
    """At score 0 every term is log 2, so the loss over log 2 is the sum of weights: n for n x n positives."""
    rows = torch.zeros(copies, 2, dtype=torch.float64)
    positives = find_positives(torch.ones(copies, 1, dtype=torch.int64))
    found = sigmoid_loss(rows, rows, positives, SCALE, torch.zeros((), dtype=torch.float64))
    assert float(found) / math.log(2) == pytest.approx(copies, rel=1e-14)


def unit_rows(seed: int, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 16, dtype=dtype, generator=generator), dim=1)


def make_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images, texts, scale and bias."""
    scalars = [torch.tensor(20.0, dtype=dtype), torch.tensor(-10.0, dtype=dtype)]
    return [value.requires_grad_() for value in (unit_rows(1, dtype=dtype), unit_rows(2, dtype=dtype), *scalars)]


def dense_loss(name: str, rows: Tensor) -> Callable[..., Tensor]:
    """The formula on the whole matrix, by torch's own functions."""
    right, weight = right_answers(rows), expected_weights(rows)

    def contrastive(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits, target = scale * images @ texts.T, (right / right.double().sum(dim=1, keepdim=True)).to(images.dtype)
        return sum(F.cross_entropy(one, target, reduction="sum") for one in (logits, logits.T)) / 2 + 0 * bias

    def sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * images @ texts.T + bias
        return -torch.where(right, weight.to(logits.dtype) * F.logsigmoid(logits), F.logsigmoid(-logits)).sum()

    return contrastive if name == "contrastive" else sigmoid


def our_loss(name: str, rows: Tensor, tile: int | None = None) -> Callable[..., Tensor]:
    positives = find_positives(rows)

    def contrastive(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return contrastive_loss(images, texts, positives, scale, tile=tile) + 0 * bias

    def sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(images, texts, positives, scale, bias, tile=tile)

    return contrastive if name == "contrastive" else sigmoid


def value_and_gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(3 * value, [one for one in inputs if one.requires_grad])]


losses = pytest.mark.parametrize("name", ["contrastive", "sigmoid"])


@losses
@pytest.mark.parametrize("tile", [1, 3, 8, None])
@pytest.mark.parametrize("rows", KEYS.values(), ids=KEYS)
def test_value_and_gradients_are_those_of_the_dense_formula(name: str, rows: Tensor, tile: int | None) -> None:
    for dtype, rounding in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        found = value_and_gradients(our_loss(name, rows, tile), make_inputs(dtype))
        expected = value_and_gradients(dense_loss(name, rows), make_inputs(dtype))
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
    if len(right_answers(rows).nonzero()) > ROWS:  # the control: without its duplicates it is another loss
        other = value_and_gradients(our_loss(name, KEYS["none"]), make_inputs())
        assert abs(other[0] - value_and_gradients(our_loss(name, rows), make_inputs())[0]) > 0.1


@losses
def test_different_keys_are_no_keys_to_the_last_bit(name: str) -> None:
    one, other = (value_and_gradients(our_loss(name, KEYS[kind]), make_inputs()) for kind in ("none", "different"))
    assert all(map(torch.equal, one, other))


@losses
@pytest.mark.parametrize("needed", [c for c in product((False, True), repeat=3) if any(c)])
def test_gradients_of_some_inputs_are_those_of_all(name: str, needed: tuple[bool, ...]) -> None:
    """A frozen tower's gradient is not formed, and the scale's comes from what is."""
    every = value_and_gradients(our_loss(name, KEYS["some"], 3), make_inputs())
    inputs = [value.detach().requires_grad_(asked) for value, asked in zip(make_inputs(), (*needed, True), strict=True)]
    found = value_and_gradients(our_loss(name, KEYS["some"], 3), inputs)
    expected = [every[0], *(g for g, asked in zip(every[1:], (*needed, True), strict=True) if asked)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@losses
def test_without_gradients_none_are_formed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = our_loss(name, KEYS["some"])(*make_inputs()).item()
    monkeypatch.setattr(loss_module._Gradients, "add", lambda *_: pytest.fail("formed a gradient"))
    with torch.no_grad():
        assert our_loss(name, KEYS["some"])(*make_inputs()).item() == expected
    with pytest.raises(pytest.fail.Exception):
        our_loss(name, KEYS["some"])(*make_inputs())


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


@losses
@pytest.mark.parametrize("rows", ["different", "all the same"])
def test_no_matrix_of_all_pairs_is_ever_made(name: str, rows: str) -> None:
    count, tile = 192, 16
    pairs = torch.arange(1, count + 1)[:, None] if rows == "different" else torch.ones(count, 1, dtype=torch.int64)
    found = {}
    for side, loss in (("ours", our_loss(name, pairs, tile)), ("dense", dense_loss(name, pairs))):
        inputs = [unit_rows(1, count), unit_rows(2, count), SCALE.clone(), BIAS.clone()]
        with Largest() as seen:
            loss(*(value.requires_grad_() for value in inputs)).backward()
        found[side] = seen.numbers
    assert found["ours"] <= max(count * 16, 2 * tile * tile)
    assert found["dense"] >= count * count


@losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_is_float32_under_autocast(name: str, dtype: torch.dtype) -> None:
    """At scale 100, scores in bfloat16 would be off by whole units."""
    inputs = [value.detach().to(dtype).requires_grad_() for value in make_inputs()]
    expected = value_and_gradients(our_loss(name, KEYS["some"]), [x.detach().float().requires_grad_() for x in inputs])
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(our_loss(name, KEYS["some"]), inputs)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, [expected[0], *(g.to(dtype) for g in expected[1:])], rtol=0, atol=0)


def test_products_are_exact_whatever_the_process_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, seen, product_of = torch.backends.mkldnn.matmul, [], torch.mm

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(settings.fp32_precision)
        return product_of(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        contrastive_loss(IMAGES.float(), TEXTS.float(), ONE_EACH, SCALE)
        assert (set(seen), settings.fp32_precision) == ({"ieee"}, "bf16")
    finally:
        settings.fp32_precision = before


def test_losses_of_no_rows_are_zero_and_pull_nowhere() -> None:
    """What a rank without rows adds. The columns' sums come from other ranks."""
    columns, none = unit_rows(0).requires_grad_(), unit_rows(1)[:0].requires_grad_()
    positives = find_positives(KEYS["some"], 3)
    one_way = contrastive_loss(none, columns, positives, SCALE, lambda sums: torch.zeros_like(sums))
    other = sigmoid_loss(none, columns, positives, SCALE, BIAS)
    assert (one_way.item(), other.item()) == (0.0, 0.0)
    assert not torch.autograd.grad(one_way + other, columns)[0].any()
