"""Towers of open_clip, of every family: encoded as open_clip does, cut at the projection, grown by terms, shortened,
and with switches that change speed or memory but no number."""

import copy
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from clipdist.config import UserError
from clipdist.stages import PARTS
from clipdist.towers import Towers
from tests.unit import zoo

torch.set_num_threads(1)
TEXTS = ["a red coat", "a book and a dress of mm", "c"]
FAMILIES = [*zoo.CONFIGS, "hugging_face"]
PLAIN, OTHER = "a fairisle coat with red", "a fairisle coat with book"


@pytest.fixture(scope="module", params=FAMILIES)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """One model per family for tests that change nothing."""
    return zoo.build(request.param, tmp_path_factory.mktemp("model"))


def test_tower_output_then_projection_is_what_open_clip_encodes(shared: Towers) -> None:
    shown, tokens = zoo.pixels(shared), shared.tokenise(TEXTS)
    mean, std = torch.tensor(shared.preprocess.mean), torch.tensor(shared.preprocess.std)
    normalised = ((shown.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        whole = shared.tokenizer(TEXTS, context_length=shared.text_length)
        expected = shared.model.encode_image(normalised), shared.model.encode_text(whole)
        outputs = shared.image_tower_output(shown), shared.text_tower_output(tokens)
        projected = shared.project_image(outputs[0]), shared.project_text(outputs[1])
    torch.testing.assert_close(projected[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projected[1], expected[1], rtol=1e-4, atol=1e-5)
    for reusable, output, features in zip(
        (shared.images_reusable, shared.texts_reusable), outputs, expected, strict=True
    ):
        assert (output.shape == features.shape and torch.allclose(output, features, atol=1e-4)) is not reusable


def test_every_parameter_that_learns_is_in_one_part(shared: Towers) -> None:
    parts = shared.parts()
    assert tuple(parts) == PARTS
    names = Counter(name for parameters in parts.values() for name, _ in parameters)
    fixed = {"visual.positional_embedding"} if shared.model_config["vision_cfg"].get("pos_embed_type") else set()
    assert set(names) == {name for name, _ in shared.model.named_parameters()} - fixed
    assert set(names.values()) == {1}
    assert {name for name, _ in parts["logit_scale"]} - {"logit_bias"} == {"logit_scale"}
    assert parts["new_tokens"] == []
    projections = {name.removeprefix("text.") for name, _ in parts["projections"]}
    assert {"text_projection", "proj.weight"} & projections
    assert any(name.startswith("visual.") for name in projections)


BLOCKS = {"resnet": 5, "timm_convolutions": 4, "timm_convnext": 9, "timm_vit": 6, "timm_classifier": 6, "siglip": 9}


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_count_blocks_from_the_output(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    levels, parts = model.levels(), model.parts()
    assert list(levels) == [name for parameters in parts.values() for name, _ in parameters]
    assert all(levels[name] == 0 for part in ("projections", "logit_scale") for name, _ in parts[part])
    blocks = {"image_tower": BLOCKS.get(family, 2), "text_tower": 2}
    for part, count in blocks.items():
        found = {levels[name] for name, _ in parts[part]}  # type: ignore[index]
        assert found | {0} == set(range(count + 2)), "0, the blocks, and what stands before them"
        first = {name for name, _ in parts[part] if levels[name] == count + 1}  # type: ignore[index]
        assert any("embed" in name or "conv1" in name or "stem" in name for name in first)
        assert not any(".norm." in name or "ln_final" in name or "ln_post" in name for name in first)


def test_levels_of_a_transformer_in_full(tmp_path: Path) -> None:
    levels = zoo.build("vit", tmp_path).levels()
    expected = {
        "visual.conv1.weight": 3, "visual.class_embedding": 3, "visual.positional_embedding": 3, "visual.ln_pre.bias": 3,
        "visual.transformer.resblocks.0.ln_1.weight": 2, "visual.transformer.resblocks.1.ln_1.weight": 1,
        "visual.ln_post.weight": 0, "visual.proj": 0, "logit_scale": 0, "token_embedding.weight": 3,
        "positional_embedding": 3, "transformer.resblocks.0.ln_1.weight": 2, "ln_final.weight": 0,
    }  # fmt: skip
    assert {name: levels[name] for name in expected} == expected


def test_only_attention_pooling_cannot_be_taken_off(shared: Towers) -> None:
    hidden = type(shared.visual).__name__ == "ModifiedResNet" or hasattr(
        getattr(shared.visual, "trunk", None), "attn_pool"
    )
    pooled = hidden and (not hasattr(shared.visual, "trunk") or shared.visual.trunk.attn_pool is not None)
    assert shared.images_reusable is not pooled
    assert shared.texts_reusable


def test_preprocessing_is_open_clips(tmp_path: Path) -> None:
    model = zoo.build("vit", tmp_path)
    model.save(tmp_path / "saved", final_path=str(tmp_path / "saved"))
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'saved'}")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8))
    shown = torch.from_numpy(model.preprocess(picture))[None]
    ours = ((shown - model.mean) / model.std).permute(0, 3, 1, 2)[0]
    torch.testing.assert_close(ours, transform(picture), rtol=1e-5, atol=1e-5)
    other = transform(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert not torch.allclose(ours, other, atol=1e-2)


@pytest.mark.parametrize("family", ["vit", "vit_custom_text", "hugging_face", "siglip"])
def test_new_tokens_are_a_parameter_of_their_own(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    rows = model._embedding().weight.detach().clone()
    with torch.no_grad():
        plain = model.text_embeddings(model.tokenise(["a coat with buttons"]))
        added = model.add_terms(["fairisle", "gore-tex", "dress"])
        assert list(added) == ["fairisle", "gore-tex"], "dress is one token already"
        assert torch.equal(model.text_embeddings(model.tokenise(["a coat with buttons"])), plain)
        first, second = model.text_embeddings(model.tokenise([PLAIN, OTHER]))
    assert not torch.allclose(first, second, atol=1e-4), "text after a new token must matter"
    ((name, new),) = model.parts()["new_tokens"]
    assert name.endswith(".new")
    assert new.shape == (2, rows.shape[1])
    assert (model.model.state_dict()[name.replace(".new", ".weight")][: len(rows)] == rows).all()
    assert int(model.tokenise(["fairisle"]).max()) == len(rows), "ids are rows, also behind padded ones"
    _, gradients = zoo.gradients(model, [PLAIN, "gore-tex", "a"])
    assert gradients[name].abs().sum(1).gt(0).all()
    assert list(model.add_terms(["fairisle", "Gore-Tex", "kurta"])) == ["kurta"]
    ((again, more),) = model.parts()["new_tokens"]
    assert again == name
    assert torch.equal(more[:2], new)
    assert int(model.tokenise(["kurta"]).max()) == len(rows) + 2
    assert model.levels()[name] == max(level for key, level in model.levels().items() if not key.startswith("visual."))


def test_without_pooling_at_the_end_the_text_after_a_new_token_would_be_lost(tmp_path: Path) -> None:
    """The control of the test above: open_clip's own pooling, at the highest id."""
    model = zoo.build("vit", tmp_path)
    model.add_terms(["fairisle"])
    model.model.text_pool_type = "argmax"
    with torch.no_grad():
        first, second = model.text_embeddings(model.tokenise([PLAIN, OTHER]))
    assert torch.equal(first, second)


def test_a_word_that_the_tokenizer_does_not_know_becomes_a_token(tmp_path: Path) -> None:
    model = zoo.build("hugging_face", tmp_path)
    unknown = model.tokenise(["고프코어룩"])
    assert model.tokenizer.tokenizer.unk_token_id in unknown
    assert list(model.add_terms(["고프코어룩"])) == ["고프코어룩"]
    assert model.tokenizer.base.tokenizer.unk_token_id not in model.tokenise(["봄고프코어룩"])[0, 2:].tolist()


def test_padding_behind_all_texts_is_left_out_where_it_changes_nothing(shared: Towers) -> None:
    short = ["a coat", "c"]
    whole, tokens = shared.tokenizer(short, context_length=shared.text_length), shared.tokenise(short)
    kept = {True: shared.text_length, False: 8}[hasattr(shared.text, "pool_type") and shared.text.pool_type != "argmax"]
    assert tokens.shape == (2, kept)
    assert torch.equal(whole[:, :kept], tokens)
    with torch.no_grad():
        expected = F.normalize(shared.model.encode_text(whole), dim=-1)
        torch.testing.assert_close(shared.text_embeddings(tokens), expected, rtol=1e-4, atol=1e-5)
        cut = shared.text_embeddings(tokens[:, :2])
    assert not torch.allclose(cut, expected, atol=1e-4), "what is not padding counts"


@pytest.mark.parametrize("family", ["vit", "vit_custom_text", "hugging_face"])
def test_a_shorter_text_length_changes_no_text_that_fits(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    full = model.text_embeddings(model.tokenise(TEXTS))
    model.text_length = 10
    tokens = model.tokenise([*TEXTS, "coat " * 50])
    assert tokens.shape == (4, 10)
    assert tokens[3, -1] in model.tokenise(["a"])[0], "the end token stays"
    torch.testing.assert_close(model.text_embeddings(tokens[:3]), full, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model.text_embeddings(tokens[3:]), full[:1], atol=1e-3)
    table = model.text.transformer.config.max_position_embeddings if family == "hugging_face" else 16
    assert (
        len(model.model.state_dict()["text.transformer.embeddings.position_embeddings.weight"]) == table
        if (family == "hugging_face")
        else len(model.text.positional_embedding) == table
    )
    model.text_length = table
    for wrong in (table + 1, 2):
        with pytest.raises(UserError, match=f"3 to {table} tokens.*got {wrong}"):
            model.text_length = wrong


def test_dropout_is_off_unless_asked_for_and_batch_norm_never_trains(tmp_path: Path) -> None:
    model = zoo.build("timm_convolutions", tmp_path)
    model.visual.head.drop.p = 0.5
    model.train()
    assert not any(module.training for module in model.modules())
    model.dropout = True
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert model.visual.head.drop.training
    assert model.text.training
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.image_embeddings(zoo.pixels(model))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.eval()
    assert not any(module.training for module in model.modules())


def _count_forwards(model: Towers, part: str) -> Counter[str]:
    """Counts how often each module with parameters of its own is called."""
    calls: Counter[str] = Counter()
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d) and part in name:
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


CHECKPOINTED = ["vit", "vit_custom_text", "resnet", "timm_convolutions", "timm_vit", "siglip", "hugging_face"]


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_gradient_checkpointing_changes_no_gradient(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    calls = _count_forwards(model, "")
    loss, expected = zoo.gradients(model, TEXTS)
    assert set(calls.values()) <= {1}
    calls.clear()
    model.gradient_checkpointing(True)
    again, found = zoo.gradients(model, TEXTS)
    assert any(count == 2 for name, count in calls.items() if name.startswith("visual.")), "computed again"
    assert any(count == 2 for name, count in calls.items() if not name.startswith("visual.")), "computed again"
    torch.testing.assert_close(again, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    names = list(model.state_dict())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.testing.assert_close(zoo.gradients(model, TEXTS)[0], loss, msg="a copy must not share the original's blocks")
    model.gradient_checkpointing(False)
    calls.clear()
    zoo.gradients(model, TEXTS)
    assert set(calls.values()) <= {1}
    assert list(model.state_dict()) == names


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("family", ["vit", "timm_classifier"])
def test_compiled_towers_have_the_same_gradients_and_names(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    loss, expected = zoo.gradients(model, TEXTS)
    names = list(model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile()
    assert list(model.state_dict()) == names
    again, found = zoo.gradients(model, TEXTS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "something was compiled in both towers"
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_memory_layout_changes_no_gradient(tmp_path: Path) -> None:
    model = zoo.build("timm_convolutions", tmp_path)
    loss, expected = zoo.gradients(model, TEXTS)
    kernel = next(one for one in model.visual.parameters() if one.ndim == 4 and min(one.shape) > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    model.channels_last(False)
    assert kernel.is_contiguous()
    again, found = zoo.gradients(model, TEXTS)
    torch.testing.assert_close(again, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_one_model_encodes_in_several_threads(tmp_path: Path) -> None:
    model = zoo.build("vit", tmp_path)
    shown, tokens, found = zoo.pixels(model), model.tokenise(TEXTS), []
    with torch.no_grad():
        expected = model.image_embeddings(shown), model.text_embeddings(tokens)

    def encode() -> None:
        with torch.no_grad():
            found.extend((model.image_embeddings(shown), model.text_embeddings(tokens)) for _ in range(10))

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(torch.equal(one, other) for pair in found for one, other in zip(pair, expected, strict=True))
