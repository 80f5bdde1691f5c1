"""Domain terms -> new tokens: how they are matched, and the embedding rows that they get.

Terms are matched literally, case-insensitively, the longest first, as whole words where a script has spaces. Text
without a term keeps exactly its old tokens. New rows are a parameter of their own: masking the gradient of one joined
matrix would let weight decay and momentum move the old rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clipdist.config import Section, UserError

SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
    "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"  # Hangul: particles are written onto the word
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Letters of scripts in which a term may stand inside a longer word, as ranges of a character class."""

Start = Literal["mean", "normal"]


class VocabularyConfig(Section):
    """Words of the domain that become tokens of their own."""

    terms: tuple[str, ...] = Field(())
    """The words or phrases."""
    file: str | None = None
    """A text file with one term per line; `# ` starts a comment. `clipdist vocab` proposes one."""
    start: Start = "mean"
    """First rows of the new tokens. mean: of the rows of the pieces that a token replaces; normal: drawn with the mean
    and the standard deviation of the old matrix."""

    def all_terms(self) -> tuple[str, ...]:
        """Terms of both places, normalised, each once. UserError when the file cannot be read."""
        terms: list[str] = list(self.terms)
        if self.file is not None:
            try:
                lines = Path(self.file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"vocabulary.file: {self.file}: cannot be read: {error}") from None
            terms += [re.sub(r"(^|\s)#.*", "", line) for line in lines]
        unique = {key(term): " ".join(_composed(term).lower().split()) for term in reversed(terms)}
        return tuple(unique[one] for one in dict.fromkeys(key(term) for term in terms) if one)


def key(term: str) -> str:
    """Equal for spellings of one term: letter case, spaces and Unicode composition do not count."""
    return " ".join(_composed(term).casefold().split())


def term_pattern(terms: Iterable[str]) -> re.Pattern[str]:
    """Matches any term literally; whole words only, unless the term's edge is of a script without spaces. Terms are
    grouped by their first letter, or a thousand terms would take a millisecond per caption, and those that end alike
    share the test for the word's end, which takes 5 ms to compile."""
    by_first: dict[str, list[str]] = {}
    for term in sorted(terms, key=len, reverse=True):
        by_first.setdefault(term[0], []).append(term)
    choices = [
        (rf"(?<![^\W{SPACELESS}])" if _spaced(first) else "") + re.escape(first) + f"(?:{_rests(members)})"
        for first, members in by_first.items()
    ]
    return re.compile("|".join(choices) or r"(?!)", re.IGNORECASE)


def _rests(terms: Sequence[str]) -> str:
    """Any of the terms without its first letter, in this order."""
    runs = []
    for spaced, members in groupby(terms, key=lambda term: _spaced(term[-1])):
        any_of = "|".join(re.escape(term[1:]).replace(r"\ ", r"\s+") for term in members)
        runs.append(f"(?:{any_of})" + (rf"(?![^\W{SPACELESS}])" if spaced else ""))
    return "|".join(runs)


def _spaced(letter: str) -> bool:
    return re.fullmatch(rf"[^\W_{SPACELESS}]", letter) is not None


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


class TermTokenizer:
    """A model's tokenizer with domain terms as new ids from `first_id` on. Texts -> int64 [texts, length].

    `base` is open_clip's BPE tokenizer or its wrapper of a Hugging Face one. Terms do not become AddedTokens there:
    these strip or normalise their surroundings, take a "+" for a word edge, and know no script without spaces."""

    def __init__(self, base: Any, terms: Sequence[str], first_id: int) -> None:
        self.base, self.terms, self.first_id = base, tuple(terms), first_id
        self.context_length = int(base.context_length)
        self._pattern = term_pattern(terms)
        self._ids = {key(term): first_id + index for index, term in enumerate(terms)}
        self._before, self._after, self._padding, self._left = _frame(base)

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.context_length
        tokens: Tensor = self.base(list(texts), context_length=length)
        for index, text in enumerate(texts):
            if self._pattern.search(_composed(text)):
                tokens[index] = self._encode(_composed(text), length)
        return tokens

    def _encode(self, text: str, length: int) -> Tensor:
        ids: list[int] = []
        position = 0
        for match in self._pattern.finditer(text):
            ids += pieces(self.base, text[position : match.start()])
            new = self._ids.get(key(match.group()))
            # Ignoring case matches a few letters (Turkish dotless i) that folding case does not map back.
            ids += [new] if new is not None else pieces(self.base, match.group())
            position = match.end()
        ids += pieces(self.base, text[position:])
        kept = [*self._before, *ids[: length - len(self._before) - len(self._after)], *self._after]
        row = torch.full((length,), self._padding, dtype=torch.long)
        row[length - len(kept) if self._left else 0 :][: len(kept)] = torch.tensor(kept)
        return row


def pieces(base: Any, text: str) -> list[int]:
    """The ids of a text without start and end tokens. A space before it counts: some tokenizers write it into the
    token."""
    if not hasattr(base, "tokenizer"):
        return list(base.encode(text))
    cleaned = getattr(base, "clean_fn", str)(text)
    if not cleaned.strip():
        return []
    return list(base.tokenizer.encode((" " if text[:1].isspace() else "") + cleaned, add_special_tokens=False))


def unknown_id(base: Any) -> int | None:
    """What a Hugging Face tokenizer makes of letters that it does not know; CLIP's BPE knows all bytes."""
    return getattr(getattr(base, "tokenizer", None), "unk_token_id", None)


def _frame(base: Any) -> tuple[list[int], list[int], int, bool]:
    """Ids before and after a text, the padding id, whether padding stands on the left. UserError for a tokenizer that
    is built otherwise."""
    if hasattr(base, "encode") and hasattr(base, "eot_token_id"):
        return [base.sot_token_id], [base.eot_token_id], 0, False
    inner: Any = getattr(base, "tokenizer", None)
    known = hasattr(base, "clean_fn") and not base.tokenizer_mode  # else cleaned or framed in a way of its own
    if not known or inner.pad_token_id is None:
        raise UserError(f"vocabulary: the tokenizer of this model ({type(base).__name__}) cannot take new tokens")
    inside, whole = list(inner.encode("a", add_special_tokens=False)), list(inner.encode("a"))
    at = next(at for at in range(len(whole)) if whole[at : at + len(inside)] == inside)
    after = whole[at + len(inside) :]
    if getattr(base, "strip_sep_token", False):
        after = [0 if one == inner.sep_token_id else one for one in after]
    return whole[:at], after, int(inner.pad_token_id), inner.padding_side == "left"


class SplitEmbedding(nn.Module):
    """An embedding whose rows are two parameters: `old` [vocabulary, width] and `new` [terms, width]; the ids of new
    rows follow the old ones. In a state_dict it is one joined `weight`, as of nn.Embedding, whose code may also read
    `weight`, `num_embeddings`, `embedding_dim` and `padding_idx` here."""

    def __init__(self, old: Tensor, new: Tensor, padding_idx: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.old, self.new = nn.Parameter(old), nn.Parameter(new)
        self.padding_idx, self.scale = padding_idx, scale

    @classmethod
    def of(cls, embedding: nn.Module, new: Tensor | None = None, *, terms: int = 0) -> SplitEmbedding:
        """`embedding` with `new` rows more; its last `terms` rows are new ones already."""
        weight = cast(Tensor, embedding.weight).detach()
        own = len(embedding.new) if isinstance(embedding, SplitEmbedding) else terms
        border, scale = len(weight) - own, getattr(embedding, "scale", getattr(embedding, "embed_scale", 1.0))
        rows = weight[border:] if new is None else torch.cat([weight[border:], new.to(weight)])
        return cls(weight[:border].clone(), rows.clone(), cast("int | None", embedding.padding_idx), float(scale))

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.old, self.new])

    @property
    def num_embeddings(self) -> int:
        return len(self.old) + len(self.new)

    @property
    def embedding_dim(self) -> int:
        return self.old.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        border = len(self.old)
        is_new = ids >= border
        old = F.embedding(ids.masked_fill(is_new, self.padding_idx or 0), self.old, self.padding_idx)
        new = F.embedding((ids - border).clamp_min(0), self.new)
        rows = torch.where(is_new[..., None], new, old)
        return rows if self.scale == 1 else rows * self.scale

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        unexpected_keys += [other for other in state_dict if strict and other.startswith(prefix) and other != name]
        found = state_dict.get(name)
        if found is None:
            missing_keys.append(name)
        elif tuple(found.shape) != (self.num_embeddings, self.embedding_dim):
            expected = (self.num_embeddings, self.embedding_dim)
            error_msgs.append(f"{name}: found the shape {tuple(found.shape)}, expected {expected}")
        else:
            with torch.no_grad():
                self.old.copy_(found[: len(self.old)])
                self.new.copy_(found[len(self.old) :])


def first_rows(weight: Tensor, pieces_of: Sequence[Sequence[int]], start: Start, seed: int) -> Tensor:
    """Rows [terms, width] for new tokens beside the old `weight` [vocabulary, width]. mean: of each term's pieces, a
    start that is near its meaning; normal: with the matrix's mean and standard deviation, the same on every rank."""
    old = weight.detach().float().cpu()
    if start == "mean":
        return torch.stack([old[list(ids)].mean(dim=0) for ids in pieces_of])
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(pieces_of), old.shape[1], generator=generator) * old.std() + old.mean()
