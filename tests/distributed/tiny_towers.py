"""Two small towers in double precision with the methods of `clipdist.towers.Towers`, their data, and what one process
without any of the project's code makes of both: the textbook."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS, TOKENS, VOCABULARY, WIDTH, DIM = 6, 3, 17, 5, 4
WEIGHTS = "weights.safetensors"


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.image_tower = nn.Linear(PIXELS, WIDTH, dtype=torch.float64)
            self.text_tower = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
            self.text_norm = nn.LayerNorm(WIDTH, dtype=torch.float64)
            self.image_projection = nn.Parameter(torch.randn(WIDTH, DIM, dtype=torch.float64))
            self.text_projection = nn.Parameter(torch.randn(WIDTH, DIM, dtype=torch.float64))
        self.register_buffer("mean", torch.tensor(0.5, dtype=torch.float64))  # DDP sends buffers, so there must be one
        self.logit_scale = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-1.2, dtype=torch.float64))


class TinyTowers(nn.Module):
    """Stands in for `Towers`: the same methods, as far as losses and steps use them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.model, self.dropout = TinyModel(), dropout

    def logit_scale(self) -> Tensor:
        return self.model.logit_scale.exp()

    def logit_bias(self) -> Tensor:
        return self.model.logit_bias

    def image_tower_output(self, images: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.model.image_tower(images - self.model.mean)), self.dropout)

    def project_image(self, output: Tensor) -> Tensor:
        return output @ self.model.image_projection

    def text_tower_output(self, tokens: Tensor) -> Tensor:
        return self.model.text_norm(self.model.text_tower(tokens).sum(dim=1))

    def project_text(self, output: Tensor) -> Tensor:
        return output @ self.model.text_projection

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        found: dict[str, list[tuple[str, nn.Parameter]]] = {
            "projections": [], "logit_scale": [], "new_tokens": [], "image_tower": [], "text_tower": [],
        }  # fmt: skip
        for name, parameter in self.model.named_parameters():
            found[part_of(name)].append((name, parameter))
        return found

    def levels(self) -> dict[str, int]:
        return {name: int(part_of(name).endswith("tower")) for name, _ in self.model.named_parameters()}

    def save(self, folder: Path, *, final_path: str, facts: dict[str, Any]) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.model.state_dict(), folder / WEIGHTS)
        return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()

    def load(self, folder: str) -> None:
        self.model.load_state_dict(load_file(Path(folder) / WEIGHTS))


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    kind = name.partition(".")[0]
    if kind.endswith("projection"):
        return "projections"
    return "logit_scale" if kind.startswith("logit") else kind.replace("norm", "tower")


@dataclass(frozen=True)
class Rows:
    """Pairs. `groups` and `captions`: equal numbers are the same product, the same caption; group 0 is none. `taught`:
    what a teacher makes of the images and texts, not normalised."""

    images: Tensor
    tokens: Tensor
    groups: list[int]
    captions: list[int]
    taught: tuple[Tensor, Tensor]

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, rows: list[int]) -> "Rows":
        groups, captions = [self.groups[row] for row in rows], [self.captions[row] for row in rows]
        taught = self.taught[0][rows], self.taught[1][rows]
        return Rows(self.images[rows], self.tokens[rows], groups, captions, taught)

    def keys(self) -> Tensor:
        return torch.tensor([self.groups, self.captions], dtype=torch.int64).T.contiguous()


def make_rows(count: int, duplicates: bool) -> Rows:
    """Random pairs, all different; with `duplicates` they share groups and captions near and far (so that they meet on
    one rank and on two), in chains too: 0 and 4 share a group, 4 and 8 a caption, 0 and 8 nothing."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(count, PIXELS, dtype=torch.float64, generator=generator)
    tokens = torch.randint(VOCABULARY, (count, TOKENS), generator=generator)
    taught = torch.randn(2, count, DIM, dtype=torch.float64, generator=generator)
    rows = Rows(images, tokens, [0] * count, [100 + row for row in range(count)], (taught[0], taught[1]))
    if not duplicates:
        return rows
    groups = [[1, 0, 2, 2, 1, 0, 0, 3, 0][row % 9] for row in range(count)]
    captions = [[100, 101, 102, 103, 104, 105, 101, 107, 104][row % 9] for row in range(count)]
    return replace(rows, groups=groups, captions=captions)


def right_answers(rows: Rows) -> list[set[int]]:
    """P_i: the row itself, those of its group, those with its caption."""
    found = []
    for i in range(len(rows)):
        group = {j for j in range(len(rows)) if rows.groups[i] != 0 and rows.groups[j] == rows.groups[i]}
        found.append({i} | group | {j for j in range(len(rows)) if rows.captions[j] == rows.captions[i]})
    return found


def textbook_loss(towers: TinyTowers, rows: Rows, loss: str, distillation: float = 0.0) -> Tensor:
    """The mean loss of all rows in one process, with `distillation` x the mean distance to the teacher."""
    value = _textbook_loss(towers, rows, loss)
    shown, written = (
        towers.project_image(towers.image_tower_output(rows.images)),
        towers.project_text(towers.text_tower_output(rows.tokens)),
    )
    near = [F.cosine_similarity(*pair) for pair in zip((shown, written), rows.taught, strict=True)]
    return value + distillation * (1 - (near[0] + near[1]) / 2).mean()


def _textbook_loss(towers: TinyTowers, rows: Rows, loss: str) -> Tensor:
    images = F.normalize(towers.project_image(towers.image_tower_output(rows.images)), dim=1)
    texts = F.normalize(towers.project_text(towers.text_tower_output(rows.tokens)), dim=1)
    right = right_answers(rows)
    if loss == "contrastive":
        logits = towers.logit_scale() * images @ texts.T
        if all(len(answers) == 1 for answers in right):
            target = torch.arange(len(rows))
        else:
            target = torch.zeros_like(logits)
            for i, answers in enumerate(right):
                target[i, list(answers)] = 1 / len(answers)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(rows)):
        for j in range(len(rows)):
            score = towers.logit_scale() * (images[i] * texts[j]).sum() + towers.logit_bias()
            if j in right[i]:
                total = total + (1 / len(right[i]) + 1 / len(right[j])) / 2 * torch.log1p(torch.exp(-score))
            else:
                total = total + torch.log1p(torch.exp(score))
    return total / len(rows)
