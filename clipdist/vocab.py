"""Domain terms -> new tokens: how they are matched, and their first embedding rows.

Terms are matched literally, case-insensitively, the longest first, as whole words where a script has spaces. Text
without a term keeps exactly its old tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import LongTensor, Tensor, nn

from clipdist.config import Section, UserError

SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR")
"""Unicode name prefixes of scripts in which a term may stand inside a longer word."""


class VocabularyConfig(Section):
    """Words of the domain that become tokens of their own."""

    terms: tuple[str, ...] = Field(())
    """The words or phrases."""
    file: str | None = None
    """A text file with one term per line; `# ` starts a comment."""

    def all_terms(self) -> tuple[str, ...]:
        """Terms of both places, normalised, each once. UserError when the file cannot be read."""
        terms: list[str] = list(self.terms)
        if self.file is not None:
            try:
                lines = Path(self.file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"vocabulary.file: {self.file}: cannot be read: {error}") from None
            terms += [re.sub(r"(^|\s)#.*", "", line) for line in lines]
        terms = [" ".join(term.casefold().split()) for term in terms]
        return tuple(dict.fromkeys(term for term in terms if term))


def term_pattern(terms: Sequence[str]) -> re.Pattern[str]:
    """Matches any term literally; whole words only, unless the term's edge is of a script without spaces."""
    choices = []
    for term in sorted(terms, key=len, reverse=True):
        before = r"(?<!\w)" if _spaced_word(term[0]) else ""
        after = r"(?!\w)" if _spaced_word(term[-1]) else ""
        choices.append(before + re.escape(term).replace(r"\ ", r"\s+") + after)
    return re.compile("|".join(choices) or r"(?!)", re.IGNORECASE)


def _spaced_word(letter: str) -> bool:
    return letter.isalnum() and not unicodedata.name(letter, "").startswith(SPACELESS)


class BpeTokenizer:
    """CLIP's BPE tokenizer with domain terms as new ids after the old ones. Texts -> LongTensor [texts, length]."""

    def __init__(self, base: Callable[..., LongTensor], terms: Sequence[str]) -> None:
        self.base, self.terms = base, tuple(terms)
        self.context_length = int(base.context_length)  # type: ignore[attr-defined]
        self._pattern = term_pattern(terms)
        self._ids = {term: base.vocab_size + index for index, term in enumerate(terms)}  # type: ignore[attr-defined]

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.context_length
        tokens: Tensor = self.base(list(texts), context_length=length)
        for index, text in enumerate(texts):
            if self._pattern.search(text):
                tokens[index] = self._encode(text, length)
        return tokens

    def pieces(self, term: str) -> list[int]:
        """The old ids that the term had."""
        return list(self.base.encode(term))  # type: ignore[attr-defined]

    def _encode(self, text: str, length: int) -> Tensor:
        ids: list[int] = []
        position = 0
        for match in self._pattern.finditer(text):
            ids += self.pieces(text[position : match.start()])
            new = self._ids.get(" ".join(match.group().casefold().split()))
            # Ignoring case matches a few letters (Turkish dotless i) that folding case does not map back.
            ids += [new] if new is not None else self.pieces(match.group())
            position = match.end()
        ids += self.pieces(text[position:])
        start, end = self.base.sot_token_id, self.base.eot_token_id  # type: ignore[attr-defined]
        row = torch.zeros(length, dtype=torch.long)
        kept = [start, *ids[: length - 2], end]
        row[: len(kept)] = torch.tensor(kept)
        return row


def grown_embedding(old: nn.Embedding, pieces: Sequence[Sequence[int]]) -> nn.Embedding:
    """`old` [vocabulary, width] with one more row per term: the mean of its sub-word rows, a start that is already
    near the term's meaning. Old rows are kept to the bit."""
    rows = [old.weight.detach()[list(ids)].mean(dim=0) for ids in pieces]
    weight = torch.cat([old.weight.detach(), *(row[None] for row in rows)])
    grown: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=old.padding_idx)
    return grown
