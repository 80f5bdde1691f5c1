"""What a training run is told, and everything that is wrong with it before hours of work start."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from clipdist import stages
from clipdist.config import Section
from clipdist.interpolate import InterpolateConfig
from clipdist.models import ModelConfig
from clipdist.retrieval import DIRECTIONS, HIGHER_IS_BETTER
from clipdist.stages import LAST_BLOCKS, Part, StageConfig
from clipdist.towers import Towers
from clipdist.vocab import VocabularyConfig


class ValidationConfig(Section):
    """Exact retrieval on held-out pairs, shared by all workers, at the end of every epoch."""

    split: str = "validation"
    """The split to measure on."""
    max_rows: int | None = Field(None, ge=2)
    """At most this many of its pairs, evenly drawn; null: all."""
    every_steps: int | None = Field(None, ge=1)
    """Measure after so many steps of a stage as well; for epochs that take hours."""
    best: str = "text_to_image/hit_rate@10"
    """The metric that chooses the best checkpoint: DIRECTION/METRIC."""
    patience: int | None = Field(None, ge=1)
    """End a stage when the metric has not risen in so many measurements in a row; null: never."""

    @field_validator("best")
    @classmethod
    def _known(cls, best: str) -> str:
        names = [f"{direction}/{name}" for direction in DIRECTIONS for name in HIGHER_IS_BETTER]
        if best not in names:
            raise ValueError(f'expected one of {", ".join(names)}; got "{best}"')
        return best


class SpeedConfig(Section):
    """How fast and with how much memory; the result stays the same within rounding."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the towers; auto: bf16 on GPUs, fp32 on CPUs. The loss is at least fp32 always."""
    tf32: bool = True
    """fp32 products of the towers on tensor cores, on GPUs that have them."""
    fused_adamw: bool = True
    """One kernel for the optimizer's update."""
    channels_last: bool = True
    """Pictures and convolutions in NHWC order."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, several times less memory."""
    compile: bool = False
    """torch.compile of the towers: minutes at the start of each stage, faster steps on GPUs."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per worker that run through the towers at once; null: as many as fit into memory. The loss sees the global
    batch always."""


class CheckpointsConfig(Section):
    """When the training state is saved, besides before every validation."""

    every_steps: int | None = Field(None, ge=1)
    """After so many steps of the run; null: only before validations."""
    every_minutes: float | None = Field(15.0, gt=0)
    """After so many minutes since the last one; null: never."""


class WorkersConfig(Section):
    """How the work is spread. The result does not depend on it (to rounding)."""

    num_workers: int | None = Field(None, ge=1)
    """Training processes; null: one per GPU of the cluster, without GPUs two (or one on a single core)."""
    use_gpu: bool | None = None
    """null: when the cluster has GPUs."""
    decoders: int | None = Field(None, ge=0)
    """Processes per worker that decode pictures ahead; null: beside a GPU all of the worker's cores but one, without
    GPUs one; 0: none."""
    cache_gib: float = Field(8.0, ge=0)
    """Disk per worker for row groups of pairs on a remote store, so that later epochs need not fetch them again."""
    max_restarts: int = Field(3, ge=0)
    """How often workers may fail before the run does. Preempted nodes do not count."""


class TrainConfig(Section):
    """Pairs + a CLIP -> a CLIP of the domain."""

    pairs: str
    """What `prepare` made."""
    output: str
    """Folder or prefix of the run."""
    model: ModelConfig
    """The CLIP to start from."""
    vocabulary: VocabularyConfig = VocabularyConfig()
    """Domain words that become new tokens."""
    stages: tuple[StageConfig, ...] = Field(stages.DEFAULT_STAGES, min_length=1)
    """The schedule, in order."""
    global_batch_size: int = Field(256, ge=2)
    """Pairs per optimizer step over all workers; every pair sees all others of it as negatives."""
    loss: Literal["auto", "contrastive", "sigmoid"] = "auto"
    """auto: sigmoid for models with a logit_bias (SigLIP), else contrastive."""
    gradient_clip: float = Field(1.0, gt=0)
    """The gradient's L2 norm is cut to this."""
    seed: int = Field(0, ge=0)
    """Orders the pairs and chooses captions, crops and dropout."""
    lanes: int | None = Field(None, ge=1)
    """Streams that a global batch is dealt from, each read by one worker; null: 48, or one per worker above that. Runs
    with another number see the pairs in another order."""
    reuse_frozen_features: bool = True
    """Compute a tower's outputs once in stages where nothing of it learns."""
    interpolate: InterpolateConfig | None = None
    """Mix the trained weights with the starting ones as held-out pairs like it best (WiSE-FT); null: no."""
    deterministic: bool = False
    """Only deterministic GPU kernels, so that a resumed run is the same to the bit there too. Slower."""
    validation: ValidationConfig = ValidationConfig()
    """How progress is judged."""
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    """When the training state is saved."""
    speed: SpeedConfig = SpeedConfig()
    """Precision, kernels and memory."""
    log_every_steps: int = Field(10, ge=1)
    """Every so many steps a line in OUTPUT/metrics.jsonl."""
    tensorboard: bool = False
    """Also write curves for TensorBoard, to OUTPUT/tensorboard."""
    workers: WorkersConfig = WorkersConfig()
    """How the work is spread."""

    def batch_size_of(self, stage: StageConfig) -> int:
        return stage.global_batch_size or self.global_batch_size

    def loss_of(self, towers: Towers) -> Literal["contrastive", "sigmoid"]:
        if self.loss == "auto":
            return "contrastive" if towers.logit_bias() is None else "sigmoid"
        return self.loss


def resolved(config: TrainConfig, towers: Towers, lanes: int) -> TrainConfig:
    """The same run with every stage's size, text length and batch written out."""
    size, length = towers.preprocess.size, towers.text_length
    written_out = tuple(
        stage.model_copy(
            update={
                "image_size": stage.image_size or size,
                "text_length": stage.text_length or length,
                "global_batch_size": config.batch_size_of(stage),
            }
        )
        for stage in config.stages
    )
    return config.model_copy(update={"stages": written_out, "lanes": lanes})


def problems(config: TrainConfig, towers: Towers, train_rows: int) -> tuple[list[str], list[str]]:
    """What is wrong with the stages for this model and these pairs, and what is only strange."""
    wrong, strange = [], []
    names = [stage.name for stage in config.stages]
    for index, stage in enumerate(config.stages):
        where = f"stages.{index} ({stage.name})"
        if stage.name in names[:index] or stage.name in ("start", "interpolated"):
            wrong.append(f"{where}: each stage needs a name of its own, not start or interpolated")
        size = config.batch_size_of(stage)
        if size > train_rows:
            wrong.append(
                f"{where}: a global batch of {size:,} pairs, but there are only {train_rows:,} training pairs; "
                "lower global_batch_size"
            )
        wrong += [f"{where}: {problem}" for problem in _nothing_learns(stage, towers)]
        bad, odd = towers.check_image_size(stage.image_size or towers.preprocess.size)
        wrong += [f"{where}: image_size: {problem}" for problem in bad]
        strange += [f"{where}: image_size: {remark}" for remark in odd]
        if stage.text_length is not None and stage.text_length > towers.text_length:
            wrong.append(
                f"{where}: text_length: {stage.text_length} tokens; the model reads at most {towers.text_length}"
            )
    if config.loss == "sigmoid" and towers.logit_bias() is None:
        wrong.append("loss: sigmoid needs a model with a logit_bias (SigLIP); this one has none")
    return wrong, strange


_TOWER_OF: dict[str, Part] = {"image": "image_tower", "text": "text_tower"}


def _nothing_learns(stage: StageConfig, towers: Towers) -> list[str]:
    parts, levels = towers.parts(), towers.levels()
    found = []
    if "new_tokens" in stage.learns and not parts["new_tokens"]:
        found.append("learns new_tokens, but the model has none; give vocabulary.terms or vocabulary.file")
    for name, match in ((name, LAST_BLOCKS.fullmatch(name)) for name in stage.learns):
        if match:
            blocks = max((levels[one] for one, _ in parts[_TOWER_OF[match[2]]]), default=1) - 1
            if int(match[1]) > blocks:
                found.append(f"learns {name}, but the {match[2]} tower has only {blocks} blocks")
    learning = [
        name for part, members in parts.items() for name, _ in members if stage.level_learns(part, levels[name])
    ]
    if not learning and not found:
        found.append(f"the model has nothing that learns in {', '.join(stage.learns)}")
    return found


def pairs_seen(config: TrainConfig, train_rows: int, stage: int, stage_step: int) -> int:
    """Pairs of all global batches before step `stage_step` of stage number `stage`."""
    seen = 0
    for index, settings in enumerate(config.stages[: stage + 1]):
        size = config.batch_size_of(settings)
        per_epoch = stages.steps_per_epoch(train_rows, size)
        steps = stage_step if index == stage else stages.total_steps(settings, per_epoch)
        epochs, rest = divmod(steps, per_epoch)
        seen += epochs * train_rows + rest * size
    return seen


HARMLESS = (
    *("output", "pairs", "workers", "speed"),
    *("reuse_frozen_features", "checkpoints", "log_every_steps", "tensorboard"),
)
"""Settings that may change between a run and its resumption: they do not change the result (to rounding)."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that make the result what it is."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in HARMLESS}
