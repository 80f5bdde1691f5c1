"""Domain terms are matched literally, whole-word where scripts have spaces, and change no other text; their rows are a
parameter of their own that saves and loads as one matrix."""

import time
import unicodedata
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from clipdist.config import UserError
from clipdist.vocab import SplitEmbedding, TermTokenizer, VocabularyConfig, first_rows, pieces, term_pattern
from tests.unit import zoo

TERMS = ("c++", "3.5mm", "(v-neck", "jacquard", "gore-tex", "gore", "고프코어룩", "fair isle", "maß", "c#")


@pytest.fixture(scope="module", params=["bpe", "hugging_face"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TermTokenizer:
    if request.param == "bpe":
        return TermTokenizer(open_clip.get_tokenizer("ViT-B-32"), TERMS, 49408)
    base = zoo.build("hugging_face", tmp_path_factory.mktemp("bert")).tokenizer
    return TermTokenizer(base, TERMS, len(base.tokenizer) + 7)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a c++ book", ["c++"]),
        ("C++, C# and c", ["C++", "C#"]),
        ("a coat", []),
        ("3.5mm jack", ["3.5mm"]),
        ("3.5mmx jack", []),
        ("345mm jack", []),
        ("dress (v-neck)", ["(v-neck"]),
        ("two jacquards", []),
        ("Jacquard, woven", ["Jacquard"]),
        ("gore-tex jacket", ["gore-tex"]),
        ("gore", ["gore"]),
        ("봄고프코어룩코디", ["고프코어룩"]),
        ("jacquard는 좋다", ["jacquard"]),
        ("fair  isle knit", ["fair  isle"]),
        ("Maß nach MASS", ["Maß"]),
    ],
)
def test_matching(text: str, found: list[str]) -> None:
    assert [match.group() for match in term_pattern(TERMS).finditer(text)] == found


def test_a_thousand_terms_are_matched_fast() -> None:
    """0.3 s to compile; 20 s with one test of the word's end per term."""
    start = time.perf_counter()
    pattern = term_pattern(
        [f"term{number}x" for number in range(2000)] + [f"{chr(97 + n % 26)}word{n}" for n in range(2000)]
    )
    assert time.perf_counter() - start < 5
    start = time.perf_counter()
    for _ in range(20):
        pattern.search("a long caption of a red summer dress with many words that are no terms at all, size 42")
    assert (time.perf_counter() - start) / 20 < 0.005


def test_text_without_a_term_keeps_its_tokens(tokenizer: TermTokenizer) -> None:
    texts = ["a red coat & a blue hat!", "two jacquards", "", "x" * 500, "c + + and gore,tex", "coat 고프 코어룩"]
    texts = [text.replace("gore", "gor") for text in texts]
    assert torch.equal(tokenizer(texts), tokenizer.base(texts))
    assert not torch.equal(tokenizer(["gore"]), tokenizer.base(["gore"]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a JACQUARD coat", ["a", "jacquard", "coat"]),
        ("a c++ book", ["a", "c++", "book"]),
        ("(v-neck) dress", ["(v-neck", ") dress"]),
        ("3.5MM", ["3.5mm"]),
        ("coat고프코어룩dress", ["coat", "고프코어룩", "dress"]),
        (unicodedata.normalize("NFD", "고프코어룩"), ["고프코어룩"]),
        ("jacquard jacquard", ["jacquard", "jacquard"]),
        ("Gore-Tex", ["gore-tex"]),
    ],
)
def test_a_term_is_one_new_token_between_the_old_ones(tokenizer: TermTokenizer, text: str, expected: list[str]) -> None:
    ids: list[int] = []
    for part in expected:
        ids += [tokenizer.first_id + TERMS.index(part)] if part in TERMS else pieces(tokenizer.base, part)
    plain = tokenizer.base(["coat"])[0].tolist()
    (inside,) = [plain.index(one) for one in pieces(tokenizer.base, "coat")]
    end = plain[inside + 1]
    row = tokenizer([text])[0].tolist()
    assert row[: len(ids) + 2] == [*plain[:inside], *ids, end]
    assert set(row[len(ids) + 2 :]) <= {plain[-1]}, "the rest is padding"


@pytest.mark.parametrize("length", [8, None])
def test_long_text_ends_with_the_end_token(tokenizer: TermTokenizer, length: int | None) -> None:
    row = tokenizer(["jacquard coat " * 200], context_length=length)[0].tolist()
    plain = tokenizer.base(["coat " * 200], context_length=length)[0].tolist()
    assert len(row) == len(plain)
    assert row[-1] == plain[-1]
    assert row[0] == plain[0]


def test_terms_come_from_both_places_each_once(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_text("# knitwear\nFair  Isle\njacquard # woven\n\n")
    assert VocabularyConfig(terms=("jacquard",), file=str(path)).all_terms() == ("jacquard", "fair isle")
    with pytest.raises(UserError, match=r"vocabulary\.file"):
        VocabularyConfig(file="nowhere.txt").all_terms()


def test_letters_that_only_match_without_case_stay_ordinary_text() -> None:
    tokenizer = TermTokenizer(open_clip.get_tokenizer("ViT-B-32"), ("kimono", "mint"), 49408)
    for text in ("a KİMONO", "mınt leaf"):
        assert tokenizer([text]).shape == (1, 77)


def test_a_number_sign_in_a_term_is_kept() -> None:
    assert VocabularyConfig(terms=("c#", "#1 dad")).all_terms() == ("c#", "#1 dad")


def test_split_embedding_is_nn_embedding_but_for_its_two_parameters() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(10, 4, padding_idx=2)
    split = SplitEmbedding.of(plain, terms=3)
    ids = torch.tensor([[0, 2, 9], [6, 7, 7]])
    assert torch.equal(split(ids), plain(ids))
    weights = torch.randn(2, 3, 4)
    (plain(ids) * weights).sum().backward()
    (split(ids) * weights).sum().backward()
    assert split.old.grad is not None
    assert split.new.grad is not None
    assert torch.equal(torch.cat([split.old.grad, split.new.grad]), plain.weight.grad)
    assert (split.num_embeddings, split.embedding_dim, split.padding_idx) == (10, 4, 2)
    assert torch.equal(split.weight, plain.weight)


def test_split_embedding_saves_and_loads_as_one_matrix() -> None:
    plain = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    split = nn.Sequential(SplitEmbedding.of(plain[0], terms=3), nn.Linear(4, 2))
    assert list(split.state_dict()) == list(plain.state_dict())
    other = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    assert not torch.equal(split[0].weight, other[0].weight)
    split.load_state_dict(other.state_dict())
    assert torch.equal(split[0].weight, other[0].weight)
    plain.load_state_dict(split.state_dict())
    assert torch.equal(plain[0].weight, other[0].weight)
    with pytest.raises(RuntimeError, match=r"0\.weight.*\(9, 4\).*\(10, 4\)"):
        split.load_state_dict(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing.*0\.weight"):
        split.load_state_dict({name: one for name, one in other.state_dict().items() if name != "0.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected.*0\.old"):
        split.load_state_dict({**other.state_dict(), "0.old": torch.zeros(1)})


def test_old_rows_stay_while_only_new_ones_learn() -> None:
    """AdamW's weight decay moves every row of a parameter, whatever its gradient: the control with one matrix."""
    for joined in (False, True):
        split = nn.Embedding(10, 4) if joined else SplitEmbedding.of(nn.Embedding(10, 4), terms=3)
        before = split.weight.detach().clone()
        learning = [split.weight] if joined else [split.new]
        optimizer = torch.optim.AdamW(learning, lr=0.1, weight_decay=0.5)  # type: ignore[arg-type]
        split(torch.tensor([8, 9])).sum().backward()
        optimizer.step()
        assert torch.equal(split.weight[:7], before[:7]) is not joined
        assert not torch.equal(split.weight[7:], before[7:])


def test_first_rows_are_means_or_drawn_like_the_old_ones() -> None:
    torch.manual_seed(0)
    old = 0.3 + 0.02 * torch.randn(500, 64)
    rows = first_rows(old, [[1, 2], [3, 4, 5]], "mean", seed=0)
    torch.testing.assert_close(rows[1], old[[3, 4, 5]].mean(0))
    drawn = first_rows(old, [[1, 2]] * 200, "normal", seed=5)
    assert abs(drawn.mean() - 0.3) < 0.001
    assert abs(drawn.std() - 0.02) < 0.001
    assert torch.equal(drawn, first_rows(old, [[1, 2]] * 200, "normal", seed=5))
    assert not torch.equal(drawn, first_rows(old, [[1, 2]] * 200, "normal", seed=6))


def test_an_embedding_that_scales_its_rows_still_does() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    plain = Scaled(10, 4)
    split = SplitEmbedding.of(SplitEmbedding.of(plain, terms=1), torch.ones(1, 4))
    assert torch.equal(split(torch.tensor([1, 9])), plain(torch.tensor([1, 9])))
    assert split(torch.tensor([10])).tolist() == [[3.0] * 4]


def test_tokenizers_of_another_build_are_refused() -> None:
    with pytest.raises(UserError, match="Odd.*cannot take new tokens"):
        TermTokenizer(type("Odd", (), {"context_length": 8})(), ["a b"], 10)
