"""Domain terms are matched literally, whole-word where scripts have spaces, and change no other text."""

import open_clip
import pytest
import torch

from clipdist.config import UserError
from clipdist.vocab import TermTokenizer, VocabularyConfig, term_pattern

TERMS = ("c++", "3.5mm", "(v-neck", "jacquard", "gore-tex", "gore", "고프코어룩", "fair isle")


@pytest.fixture(scope="module")
def tokenizer() -> TermTokenizer:
    return TermTokenizer(open_clip.get_tokenizer("ViT-B-32"), TERMS, 49408)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a c++ book", ["c++"]),
        ("a coat", []),
        ("3.5mm jack", ["3.5mm"]),
        ("345mm jack", []),
        ("dress (v-neck)", ["(v-neck"]),
        ("two jacquards", []),
        ("Jacquard, woven", ["Jacquard"]),
        ("gore-tex jacket", ["gore-tex"]),
        ("gore", ["gore"]),
        ("봄고프코어룩코디", ["고프코어룩"]),
        ("fair  isle knit", ["fair  isle"]),
    ],
)
def test_matching(text: str, found: list[str]) -> None:
    assert [match.group() for match in term_pattern(TERMS).finditer(text)] == found


def test_text_without_a_term_keeps_its_tokens(tokenizer: TermTokenizer) -> None:
    texts = ["a red coat & a blue hat!", "two jacquards", "", "x" * 500]
    assert torch.equal(tokenizer(texts), tokenizer.base(texts))


def test_a_term_is_one_new_token_between_the_old_ones(tokenizer: TermTokenizer) -> None:
    row = tokenizer(["a JACQUARD coat"])[0].tolist()
    ids = tokenizer.base.encode
    assert row[: row.index(tokenizer.base.eot_token_id)] == [
        tokenizer.base.sot_token_id, *ids("a"), 49408 + TERMS.index("jacquard"), *ids("coat"),
    ]  # fmt: skip


def test_long_text_ends_with_the_end_token(tokenizer: TermTokenizer) -> None:
    row = tokenizer(["jacquard " * 200])[0].tolist()
    assert len(row) == 77
    assert row[-1] == tokenizer.base.eot_token_id


def test_terms_come_from_both_places_each_once(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "terms.txt"
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
