"""Another picture size in place: positions are resized, all else stays, and what is saved is what was live."""

from pathlib import Path

import pytest
import torch

from clipdist import image_size, models
from clipdist.config import UserError
from clipdist.models import ModelConfig
from tests.unit import zoo

torch.set_num_threads(1)
FAMILIES = [*zoo.CONFIGS, "hugging_face"]
POSITIONS = {
    "resnet": ["visual.attnpool.positional_embedding"],
    "timm_convolutions": [],
    "timm_convnext": [],
    "timm_vit": ["visual.trunk.pos_embed"],
    "timm_classifier": ["visual.trunk.pos_embed"],
    "siglip": ["visual.trunk.pos_embed"],
    "vit_sin_cos": [],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resized_model_is_the_same_after_saving_and_loading(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    old, size = model.preprocess.size, 2 * model.preprocess.size
    before = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    assert model.check_image_size(size) == ([], [])
    changed = model.set_image_size(size)
    assert changed == POSITIONS.get(family, ["visual.positional_embedding"])
    for name, parameter in model.model.named_parameters():
        if name not in changed and parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    assert model.preprocess.size == size
    shown, tokens = zoo.pixels(model), model.tokenise(["a red coat"])
    with torch.no_grad():
        expected = model.image_embeddings(shown), model.text_embeddings(tokens)
        model.save(tmp_path / "saved", final_path=str(tmp_path / "saved"))
        again = models.load(ModelConfig(name=str(tmp_path / "saved")))
        assert again.preprocess == model.preprocess
        assert again.parts().keys() == model.parts().keys()
        assert torch.equal(again.image_embeddings(shown), expected[0])
        assert torch.equal(again.text_embeddings(again.tokenise(["a red coat"])), expected[1])
    model.set_image_size(old)
    assert model.image_embeddings(zoo.pixels(model)).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_size_changes_not_a_bit(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    before = dict(model.model.named_parameters())
    bits = {name: parameter.detach().clone() for name, parameter in before.items()}
    assert model.set_image_size(model.preprocess.size) == []
    for name, parameter in model.model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, bits[name])


def test_the_class_token_stays_and_the_grid_is_interpolated(tmp_path: Path) -> None:
    model = zoo.build("vit", tmp_path)
    width = model.visual.positional_embedding.shape[1]
    ramp = torch.linspace(0, 1, 4)[:, None, None].expand(4, 4, width).reshape(16, width)  # each row of patches alike
    with torch.no_grad():
        model.visual.positional_embedding[1:] = ramp
    before = model.visual.positional_embedding.detach().clone()
    model.set_image_size(64)
    found = model.visual.positional_embedding.detach()
    assert found.shape == (65, width)
    assert torch.equal(found[0], before[0])
    grid = found[1:].reshape(8, 8, width)
    torch.testing.assert_close(grid, grid[:, :1].expand(8, 8, width))
    assert (grid[1:, 0, 0] >= grid[:-1, 0, 0] - 1e-3).all(), "a ramp stays a ramp, along the same axis"
    assert grid[-1, 0, 0] - grid[0, 0, 0] > 0.8


def test_sizes_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = zoo.build("vit", tmp_path)
    assert model.check_image_size(36)[0] == [
        "image size 36: not a multiple of this image tower's 8 pixels; 32 would be"
    ]
    assert model.check_image_size(16) == (
        [],
        ["image size 16: only 2 x 2 patches of 8 pixels; details get lost"],
    )
    before = model.visual.positional_embedding
    with pytest.raises(UserError, match="not a multiple of this image tower's 8 pixels"):
        model.set_image_size(36)
    assert model.visual.positional_embedding is before
    assert model.preprocess.size == 32


@pytest.mark.parametrize(
    ("family", "stride"), [("vit", 8), ("resnet", 32), ("timm_convolutions", 32), ("timm_vit", 16), ("siglip", 16)]
)
def test_the_stride_is_the_towers(family: str, stride: int, tmp_path: Path) -> None:
    assert image_size.total_stride(zoo.build(family, tmp_path).visual) == stride


def test_a_config_may_ask_for_a_size(tmp_path: Path) -> None:
    zoo.build("vit", tmp_path)
    model = models.load(ModelConfig(name=str(tmp_path / "vit.json"), image_size=64))
    assert model.preprocess.size == 64
    assert model.image_embeddings(zoo.pixels(model)).shape == (3, 32)
