"""Towers of open_clip: encoded as open_clip does, cut at the projection, saved and loaded in plain open_clip."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clipdist import models
from clipdist.config import UserError
from clipdist.models import ModelConfig
from clipdist.towers import Towers

TEXTS = ["a red dress", "two black shoes on a white table", ""]
TINY_TIMM = {
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}
TINY_RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}
TINY_SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 64,
    },
    "text_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 1, "proj_bias": True},
}


@pytest.fixture(params=["vit", "timm", "resnet"])
def model(request: pytest.FixtureRequest, tiny_clip: str, tmp_path: Path) -> Towers:
    if request.param == "vit":
        return models.load(ModelConfig(name=tiny_clip))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"timm": TINY_TIMM, "resnet": TINY_RESNET}[request.param]))
    return models.load(ModelConfig(name=str(path)))


def pixels(model: Towers, rows: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(0)
    size = model.preprocess.size
    return torch.from_numpy(rng.integers(0, 256, (rows, size, size, 3), np.uint8))


def test_tower_output_then_projection_is_what_open_clip_encodes(model: Towers) -> None:
    shown, tokens = pixels(model), model.tokenise(TEXTS)
    normalised = (
        (shown.float() / 255 - torch.tensor(model.preprocess.mean)) / torch.tensor(model.preprocess.std)
    ).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.model.encode_image(normalised), model.model.encode_text(tokens)
        image = model.project_image(model.image_tower_output(shown))
        text = model.project_text(model.text_tower_output(tokens))
    torch.testing.assert_close(image, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, expected[1], rtol=1e-4, atol=1e-5)


def test_taking_the_projection_off_changes_the_output_and_is_undone(tiny_clip: str) -> None:
    model = models.load(ModelConfig(name=tiny_clip))
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    assert model.image_tower_output(pixels(model)).shape[1] == 64  # the tower's width, not embed_dim
    assert model.text_tower_output(model.tokenise(TEXTS)).shape[1] == 32
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_parameter_is_in_one_part_and_projections_are_found(model: Towers) -> None:
    parts = model.parts()
    names = [name for parameters in parts.values() for name, _ in parameters]
    assert sorted(names) == sorted(name for name, _ in model.model.named_parameters())
    assert {name for name, _ in parts["logit_scale"]} == {"logit_scale"}
    projections = {name.removeprefix("text.") for name, _ in parts["projections"]}
    assert "text_projection" in projections
    assert len(projections) >= 2


def test_siglip_has_its_attention_pooling_as_projection_and_a_bias(tmp_path: Path) -> None:
    path = tmp_path / "siglip.json"
    path.write_text(json.dumps(TINY_SIGLIP | {"embed_dim": 192}))
    model = models.load(ModelConfig(name=str(path)))
    parts = model.parts()
    assert {name for name, _ in parts["logit_scale"]} == {"logit_scale", "logit_bias"}
    assert any("attn_pool" in name for name, _ in parts["projections"])
    assert not model.images_reusable  # its pooling cannot be taken off


def test_preprocessing_is_open_clips(tiny_clip: str, tmp_path: Path) -> None:
    model = models.load(ModelConfig(name=tiny_clip))
    model.save(tmp_path / "saved", final_path=str(tmp_path / "saved"))
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'saved'}")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8))
    shown = torch.from_numpy(model.preprocess(picture))[None]
    ours = ((shown - model.mean) / model.std).permute(0, 3, 1, 2)[0]
    torch.testing.assert_close(ours, transform(picture), rtol=1e-5, atol=1e-5)
    other = transform(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert not torch.allclose(ours, other, atol=1e-2)


def test_saved_checkpoint_loads_in_plain_open_clip_and_here_also_after_moving(model: Towers, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    model.save(folder, final_path=str(folder))
    plain = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.no_grad():
        expected = model.model.encode_text(model.tokenise(TEXTS))
        assert torch.equal(plain.encode_text(tokens), expected)
    shutil.move(folder, tmp_path / "moved")
    again = models.load(ModelConfig(name=str(tmp_path / "moved")))
    state = again.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.model.state_dict().items())
    assert again.preprocess == model.preprocess


def test_new_tokens_pool_at_the_real_end_of_text(tiny_clip: str, tmp_path: Path) -> None:
    model = models.load(ModelConfig(name=tiny_clip))
    plain, before = "a jumper with buttons", model.model.state_dict()["token_embedding.weight"].clone()
    with torch.no_grad():
        old = model.text_embeddings(model.tokenise([plain]))
        added = model.add_terms(["fairisle", "gore-tex", "dress"])
        assert list(added) == ["fairisle", "gore-tex"]  # "dress" is one token already
        assert torch.equal(model.text_embeddings(model.tokenise([plain])), old)
        first, second = model.text_embeddings(
            model.tokenise(["a fairisle jumper with buttons", "a fairisle jumper with zippers"])
        )
    assert not torch.allclose(first, second, atol=1e-4), "text after a new token must matter"
    rows = model.model.token_embedding.weight
    assert torch.equal(rows[: len(before)], before)
    pieces = open_clip.get_tokenizer("ViT-B-32").encode("fairisle")
    torch.testing.assert_close(rows[49408], before[pieces].mean(0))
    model.save(tmp_path / "grown", final_path=str(tmp_path / "grown"))
    again = models.load(ModelConfig(name=str(tmp_path / "grown")))
    assert torch.equal(again.tokenise(["a Fairisle jumper"]), model.tokenise(["a fairisle jumper"]))
    assert again.terms == ("fairisle", "gore-tex")
    plain_model = open_clip.create_model(f"local-dir:{tmp_path / 'grown'}").eval()
    with torch.no_grad():
        tokens = model.tokenise(["a fairisle jumper with buttons"])
        torch.testing.assert_close(plain_model.encode_text(tokens), model.model.encode_text(tokens))


def test_without_pooling_at_the_end_the_text_after_a_new_token_would_be_lost(tiny_clip: str) -> None:
    """The control of the test above: open_clip's own pooling, at the highest id."""
    model = models.load(ModelConfig(name=tiny_clip))
    model.add_terms(["fairisle"])
    model.model.text_pool_type = "argmax"
    with torch.no_grad():
        first, second = model.text_embeddings(
            model.tokenise(["a fairisle jumper with buttons", "a fairisle jumper with zippers"])
        )
    assert torch.equal(first, second)


def test_unknown_models_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean.*ViT-B-32"):
        models.locate("ViT-B-23")
    with pytest.raises(UserError, match="neither a folder"):
        models.locate(str(tmp_path / "nowhere"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"embed_dim": 3}')
    with pytest.raises(UserError, match="vision_cfg and text_cfg"):
        models.load(ModelConfig(name=str(broken)))
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(ModelConfig(name="ViT-B-32", pretrained="no-such-tag"))


def test_terms_can_be_added_to_a_model_that_has_some(tiny_clip: str, tmp_path: Path) -> None:
    model = models.load(ModelConfig(name=tiny_clip))
    model.add_terms(["fairisle"])
    model.save(tmp_path / "one", final_path=str(tmp_path / "one"))
    again = models.load(ModelConfig(name=str(tmp_path / "one")))
    text = ["a fairisle jumper"]
    old = again.tokenise(text)
    assert list(again.add_terms(["fairisle", "kurtadupatta"])) == ["kurtadupatta"]
    assert torch.equal(again.tokenise(text), old)
    assert 49409 in again.tokenise(["one kurtadupatta"])[0].tolist()
