"""Weights between start and end: exact where they must be, in the middle elsewhere; which alpha is best."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from clipdist.config import UserError, load
from clipdist.interpolate import InterpolateConfig, best_alpha, interpolated

ALPHAS = InterpolateConfig().alphas


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in (("w", (7, 5)), ("b", (5,)))}
    found["scale"] = torch.randn((), generator=draw).to(dtype)
    return found


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_ends_are_exact_and_the_rest_lies_between(dtype: torch.dtype) -> None:
    start, end = weights(0, dtype), weights(1, dtype)
    assert bits(interpolated(start, end, 0.0)) == bits(start)
    assert bits(interpolated(start, end, 1.0)) == bits(end)
    for alpha in ALPHAS:
        for name, found in interpolated(start, end, alpha).items():
            expected = (1 - alpha) * start[name].double() + alpha * end[name].double()
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_what_did_not_change_is_the_ends_to_the_bit() -> None:
    """Frozen tensors, and frozen rows of a changed tensor; the control is the formula as it is usually written."""
    start, end = weights(0), weights(1)
    end["b"] = start["b"].clone()
    end["w"][:6] = start["w"][:6]
    moved = False
    for alpha in ALPHAS:
        found = interpolated(start, end, alpha)
        assert bits({"b": found["b"], "w": found["w"][:6]}) == bits({"b": end["b"], "w": end["w"][:6]})
        moved |= not torch.equal((1 - alpha) * start["w"][:6] + alpha * end["w"][:6], end["w"][:6])
    assert moved, "control: the plain formula moves frozen numbers"


def test_integers_and_masks_are_the_ends() -> None:
    start = {"batches": torch.tensor(3), "mask": torch.tensor([0.0, -torch.inf]), "used": torch.tensor([True])}
    end = {"batches": torch.tensor(8), "mask": torch.tensor([0.0, -torch.inf]), "used": torch.tensor([False])}
    for alpha in (0.0, 0.4, 1.0):
        assert bits(interpolated(start, end, alpha)) == bits(end)


def test_parameters_of_a_model_are_left_alone_and_need_no_gradient() -> None:
    first, last = nn.Linear(3, 2), nn.Linear(3, 2)
    before = bits({name: parameter.detach().clone() for name, parameter in last.named_parameters()})
    found = interpolated(dict(first.named_parameters()), dict(last.named_parameters()), 0.5)
    assert not any(tensor.requires_grad for tensor in found.values())
    first.load_state_dict(found)
    assert bits({name: parameter.detach() for name, parameter in last.named_parameters()}) == before


def test_every_tensor_that_does_not_fit_is_named() -> None:
    start, end = weights(0), weights(1)
    start["w"], start["old"], end["new"] = torch.zeros(7, 4), torch.zeros(1), torch.zeros(1)
    with pytest.raises(UserError) as caught:
        interpolated(start, end, 0.5)
    assert len(caught.value.problems) == 3
    told = {problem.split(":")[0]: problem for problem in caught.value.problems}
    assert set(told) == {"w", "old", "new"}
    assert "[7, 4] at the start, [7, 5] after training" in told["w"]
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="0 to 1"):
            interpolated(end, end, alpha)


def test_the_best_alpha_has_the_highest_mean_over_the_sets() -> None:
    assert best_alpha({0.0: [0.1], 0.5: [0.4], 1.0: [0.3]}) == 0.5
    assert best_alpha({0.0: [0.1, 0.9], 0.5: [0.4, 0.7], 1.0: [0.6, 0.1]}) == 0.5
    assert best_alpha({0.0: [0.1], 0.5: [0.4], 1.0: [0.6]}) == 1.0  # without the general set


def test_of_equal_ones_the_more_trained_is_taken() -> None:
    assert best_alpha({1.0: [0.2], 0.7: [0.5], 0.3: [0.5], 0.0: [0.2]}) == 0.7
    assert best_alpha({0.4: [0.1, 0.2, 0.3], 0.6: [0.3, 0.2, 0.1]}) == 0.6
    assert sum([0.1, 0.2, 0.3]) != sum([0.3, 0.2, 0.1]), "control: a running sum sees a difference where there is none"


@pytest.mark.parametrize("scores", [{}, {0.0: []}, {0.0: [1.0], 1.0: [1.0, 2.0]}, {0.5: [float("nan")], 1.0: [0.1]}])
def test_scores_that_cannot_be_compared_are_refused(scores: dict[float, list[float]]) -> None:
    with pytest.raises(ValueError, match=r"same sets|finite"):
        best_alpha(scores)


def test_alphas_are_sorted_shares() -> None:
    assert ALPHAS == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
    assert InterpolateConfig(alphas=(1, 0.5, 0.5, 0)).alphas == (0, 0.5, 1)
    assert load(InterpolateConfig, None, ["alphas=[0.8, 0.2]"]).config.alphas == (0.2, 0.8)
    with pytest.raises(UserError, match=r"1\.5 is no share of the trained weights"):
        load(InterpolateConfig, None, ["alphas=[0, 1.5]"])
    with pytest.raises(ValidationError):
        InterpolateConfig(alphas=())
