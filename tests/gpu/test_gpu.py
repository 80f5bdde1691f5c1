"""What only a GPU can show; skipped with a reason elsewhere."""

import pytest
import torch

from clipdist import models
from clipdist.models import ModelConfig
from clipdist.optimizer import set_learning
from clipdist.stages import StageConfig
from clipdist.step import Batch, GlobalLoss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("autocast", "tolerance"), [(None, 1e-3), (torch.bfloat16, 5e-2)])
def test_loss_and_gradient_of_one_step_are_the_cpus(
    tiny_clip: str, autocast: torch.dtype | None, tolerance: float
) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = models.load(ModelConfig(name=tiny_clip)).to(device)
        set_learning(model, StageConfig(name="all", learns=("all",), steps=1, learning_rate=1e-3))
        pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        tokens = model.tokenise([f"a thing of kind {number}" for number in range(8)])
        keys = torch.arange(1, 17).reshape(8, 2)
        batch = Batch(pixels.to(device), tokens.to(device), keys.to(device), rows=8, global_rows=8)
        objective = GlobalLoss(model, "contrastive", autocast if device == "cuda" else None)
        loss = objective.value(objective(batch), batch)
        loss.backward()
        found[device] = (loss.item(), model.model.visual.proj.grad.cpu())
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=tolerance)
    difference = (found["cuda"][1] - found["cpu"][1]).norm() / found["cpu"][1].norm()
    assert difference < tolerance
