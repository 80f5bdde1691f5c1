"""Memory is estimated from what autograd keeps: exactly, before anything overflows."""

import pytest
import torch
from torch import nn

from clipdist.memory import SHARE_FOR_ACTIVATIONS, free_bytes, rows_that_fit, saved_bytes, used_bytes

CPU = torch.device("cpu")
WIDTH = 50


def network(depth: int = 3) -> nn.Module:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.Sigmoid())))


def test_saved_bytes_are_those_of_the_activations() -> None:
    model = network(3)
    # A Linear keeps its input, a Sigmoid its output, which is the next input; the model's input needs to be kept too.
    for rows in (1, 4, 10):
        inputs = torch.randn(rows, WIDTH)
        assert saved_bytes(lambda inputs=inputs: model(inputs)) == 4 * rows * WIDTH * 4  # type: ignore[misc]


def test_parameters_do_not_count_and_nothing_is_kept_without_gradients() -> None:
    model = network()
    with torch.no_grad():
        assert saved_bytes(lambda: model(torch.randn(9, WIDTH))) == 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert saved_bytes(lambda: model(torch.randn(9, WIDTH))) == 0


def test_a_tensor_that_is_kept_twice_counts_once() -> None:
    weight = torch.ones(WIDTH, requires_grad=True)
    shown = torch.randn(WIDTH)
    assert saved_bytes(lambda: (weight * shown, weight * shown)) == WIDTH * 4


def test_checkpointed_blocks_keep_their_inputs_alone() -> None:
    model = network(8)
    shown = torch.randn(16, WIDTH)
    whole = saved_bytes(lambda: model(shown))
    less = saved_bytes(lambda: torch.utils.checkpoint.checkpoint(model, shown, use_reentrant=False))
    assert less < whole / 4


def test_rows_that_fit_fill_their_share_of_what_is_left() -> None:
    model, per_row = network(3), 4 * WIDTH * 4

    def forward(rows: int) -> torch.Tensor:
        found: torch.Tensor = model(torch.randn(rows, WIDTH))
        return found

    free = 1_000_000
    assert rows_that_fit(forward, 0, free) == int(free * SHARE_FOR_ACTIVATIONS) // per_row
    assert rows_that_fit(forward, 400_000, free) == int(600_000 * SHARE_FOR_ACTIVATIONS) // per_row
    assert rows_that_fit(forward, 0, 2 * free) == pytest.approx(2 * rows_that_fit(forward, 0, free), abs=1)
    assert rows_that_fit(forward, 0, per_row) == 0, "not even one"
    assert rows_that_fit(forward, 2 * free, free) == 0, "the optimizer alone does not fit"


def test_a_model_that_keeps_nothing_takes_any_number_of_rows() -> None:
    assert rows_that_fit(lambda rows: None, 0, 2**30) > 2**28


def test_free_memory_is_shared_by_the_processes_of_a_machine() -> None:
    alone = free_bytes(CPU, 1)
    assert 0 < used_bytes(CPU) < 2**42
    assert 0 < alone < 2**44
    assert free_bytes(CPU, 8) == pytest.approx(alone / 8, rel=0.3)
