"""Models by name: found or refused with a hint, and what a saved folder gives back."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

from clipdist import models
from clipdist.config import UserError
from clipdist.models import ModelConfig
from tests.unit import zoo

TEXTS = ["a red coat", "a fairisle coat", "gore-tex"]


@pytest.mark.parametrize("family", ["vit", "vit_custom_text", "siglip", "hugging_face"])
def test_a_saved_model_with_terms_comes_back_and_its_new_tokens_apart(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    model.add_terms(["fairisle", "gore-tex"])
    model.text_length = 12
    folder = tmp_path / "saved"
    digest = model.save(folder, final_path=str(folder), facts={"step": 7})
    again = models.load(ModelConfig(name=str(folder)))
    assert (again.terms, again.text_length) == (model.terms, 12)
    assert again.identity() == model.identity()
    assert [[name for name, _ in members] for members in again.parts().values()] == [
        [name for name, _ in members] for members in model.parts().values()
    ]
    tokens = model.tokenise(TEXTS)
    assert torch.equal(again.tokenise(TEXTS), tokens)
    with torch.no_grad():
        assert torch.equal(again.text_embeddings(tokens), model.text_embeddings(tokens))
        assert torch.equal(again.image_embeddings(zoo.pixels(model)), model.image_embeddings(zoo.pixels(model)))
    assert models.locate(str(folder)).weights_sha256() == digest
    assert json.loads((folder / "clipdist.json").read_text())["step"] == 7
    assert list(again.add_terms(["kurta", "fairisle"])) == ["kurta"]


@pytest.mark.parametrize("family", ["vit", "vit_custom_text"])
def test_plain_open_clip_loads_a_grown_model(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    model.add_terms(["fairisle"])
    folder = tmp_path / "saved"
    model.save(folder, final_path=str(folder))
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    plain.eval()
    whole = model.tokenizer(TEXTS, context_length=model.text_length)
    with torch.no_grad():
        expected = model.text_embeddings(model.tokenise(TEXTS))
        torch.testing.assert_close(plain.encode_text(whole, normalize=True), expected, rtol=1e-5, atol=1e-6)


def test_weights_without_a_record_have_no_digest(tmp_path: Path, tiny_clip: str) -> None:
    assert models.locate(tiny_clip).weights_sha256() is None
    assert models.locate("ViT-B-32").folder is None


def test_a_run_means_its_best_checkpoint(tmp_path: Path) -> None:
    model = zoo.build("vit", tmp_path)
    best = tmp_path / "run" / "checkpoints" / "01-all-000010"
    model.save(best, final_path=str(best))
    with pytest.raises(UserError, match="neither a folder"):
        models.locate(str(tmp_path / "run"))
    (tmp_path / "run" / "stamp.json").write_text("{}")
    with pytest.raises(UserError, match="this training run is not finished"):
        models.locate(str(tmp_path / "run"))
    (tmp_path / "run" / "result.json").write_text(json.dumps({"best": "checkpoints/01-all-000010"}))
    assert models.locate(str(tmp_path / "run")).folder == str(best)
    assert models.load(ModelConfig(name=str(tmp_path / "run"))).dim == 32


def test_a_name_that_is_nearly_right_is_told() -> None:
    with pytest.raises(UserError, match=r'"ViT-B-23" is neither .*did you mean .*ViT-B-32'):
        models.locate("ViT-B-23")


def test_broken_weights_are_refused_without_a_traceback(tmp_path: Path) -> None:
    model = zoo.build("vit", tmp_path)
    folder = tmp_path / "saved"
    model.save(folder, final_path=str(folder))
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded: "):
        models.load(ModelConfig(name=str(folder)))
