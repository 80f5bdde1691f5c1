"""Configs: every mistake at once with its place, where values come from, and a dump that reloads to the same."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field, model_validator

from clipdist.catalog import CatalogConfig, EmbedConfig
from clipdist.config import Section, UserError, differences, dump, explain, flatten, load
from clipdist.evaluate import EvaluateConfig
from clipdist.models import ModelConfig
from clipdist.planning import ColumnsConfig, SplitConfig
from clipdist.prepare import PrepareConfig
from clipdist.recipe import TrainConfig, ValidationConfig
from clipdist.sources import SourceConfig
from clipdist.stages import StageConfig
from clipdist.vocab import VocabularyConfig


class Lap(Section):
    """A part of a race."""

    name: str
    """What it is called."""
    metres: int = Field(400, ge=1)
    """How long it is."""
    weights: dict[str, float] = Field({})
    """Anything."""


class Race(Section):
    """A config with every form of value."""

    output: str
    """Where the results go."""
    pace: float = 1.0
    """Metres per second."""
    lanes: int | None = None
    """How many; null: as the stadium has."""
    indoors: bool = False
    """Whether there is a roof."""
    tags: tuple[str, ...] = ()
    """Words."""
    laps: tuple[Lap, ...] = Field((Lap(name="first"), Lap(name="last", metres=200)), min_length=1)
    """The parts, in order."""
    pause: Lap = Lap(name="pause")
    """The part between."""

    @model_validator(mode="after")
    def _pace_fits(self) -> "Race":
        if self.pace > 10:
            raise ValueError("nobody runs at this pace; choose 10 or less")
        return self


def written(folder: Path, text: str) -> str:
    path = folder / "race.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(folder: Path, text: str, *overrides: str, kind: type[Section] = Race) -> list[str]:
    """What is wrong with a config, with the folder left out."""
    with pytest.raises(UserError) as caught:
        load(kind, written(folder, text), overrides)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
pace: "5"
lanes: true
indoors: 1
outptu: there
tags: one
laps:
- {name: a, metres: 3.0}
- {metres: 0, lenght: 3}
pause:
  name: 7
pace: 2
"""
    found = problems(tmp_path, text, "lanes.x=3", "no value")
    expected = [
        "race.yaml:11: pace: this key stands twice",
        "command line: lanes.x: cannot set 'x' there",
        'command line: "no value": expected key=value',
        "race.yaml: output: required, but not given: Where the results go.",
        "race.yaml:2: lanes: expected a valid integer, got true",
        "race.yaml:3: indoors: expected a valid boolean, got 1",
        "race.yaml:5: tags: expected",
        "race.yaml:7: laps.0.metres: expected a valid integer, got 3.0",
        "race.yaml:8: laps.1.name: required, but not given: What it is called.",
        "race.yaml:8: laps.1.metres: expected greater than or equal to 1, got 0",
        "race.yaml:8: laps.1.lenght: unknown key",
        "race.yaml:10: pause.name: expected a valid string, got 7",
        'race.yaml:4: outptu: unknown key; did you mean "output"?',
    ]
    assert len(found) == len(expected), found
    for start in expected:
        assert any(problem.startswith(start) for problem in found), (start, found)


@pytest.mark.parametrize(
    ("value", "right"),
    [("1e-4", 1e-4), ("-2E3", -2000.0), ("3", 3.0), (".5", 0.5), ("0.25", 0.25), ('"5"', None), ("true", None)],
)
def test_numbers_are_what_people_mean(tmp_path: Path, value: str, right: float | None) -> None:
    text = f"output: o\npace: {value}\n"
    if right is None:
        assert problems(tmp_path, text)[0].startswith("race.yaml:2: pace: expected a valid number, got ")
    else:
        assert load(Race, written(tmp_path, text)).config.pace == right


@pytest.mark.parametrize("value", ["1", "1e3", "2024-01-31", "true", "no"])
def test_a_string_that_is_no_string_in_yaml(tmp_path: Path, value: str) -> None:
    text = f"output: {value}\n"
    if value == "2024-01-31":  # no config holds dates
        assert load(Race, written(tmp_path, text)).config.output == value
    else:
        assert "output: expected a valid string, got " in problems(tmp_path, text)[0]


def test_a_rule_of_a_section_is_told_in_its_own_words(tmp_path: Path) -> None:
    assert problems(tmp_path, "output: o\npace: 11\n") == [
        "race.yaml: config: nobody runs at this pace; choose 10 or less"
    ]


def test_bad_items_are_not_called_too_few(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "output: o\nlaps: [{name: 1}]\n")) == 1
    assert "at least 1 item" in problems(tmp_path, "output: o\nlaps: []\n")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: [\n", "race.yaml:2: not valid YAML"),
        ("output: o\n  pace: 3\n", "race.yaml:2: not valid YAML"),
        ("output: 0b_\n", "not valid YAML"),
        ("just words\n", "race.yaml:1: expected `key: value` lines, got a str"),
        ("- output: o\n", "race.yaml:1: expected `key: value` lines, got a list"),
        ("", "race.yaml: output: required"),
        ("# only a comment\n", "race.yaml: output: required"),
        ("? [a, b]\n: 1\n", "race.yaml:1: not valid YAML"),
        ("tags: &a [*a]\n", "race.yaml: an alias (*name) stands inside its own anchor"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert message in found[0]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(UserError, match="cannot read this config file"):
            load(Race, str(tmp_path / name))


def test_overrides_go_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "output: o\npace: 2\nlaps:\n- {name: a}\n- {name: b, metres: 5}\n")
    overrides = ["laps.1.metres=7", "pause.metres=9", "pause.name=p", "tags=[x, y]", "lanes=", "laps.0.weights.w=1e-3"]
    loaded = load(Race, path, overrides)
    config = loaded.config
    assert config.laps == (Lap(name="a", weights={"w": 1e-3}), Lap(name="b", metres=7))
    assert config.pause == Lap(name="p", metres=9)
    assert (config.tags, config.lanes, config.pace) == (("x", "y"), None, 2.0)
    shown = {line.split()[0]: line for line in explain(loaded).splitlines() if not line.startswith(" ")}
    for key in ("laps.1.metres", "pause.metres", "tags", "lanes", "laps.0.weights"):
        assert "  command line  " in shown[key]
    assert f"  {path}:5  " in shown["laps.1.name"]
    assert "  default  " in shown["laps.0.metres"]
    assert "  default  " in shown["indoors"]


def test_an_override_changes_one_item_of_a_default_list(tmp_path: Path) -> None:
    loaded = load(Race, written(tmp_path, "output: o\n"), ["laps.1.metres=3"])
    assert loaded.config.laps == (Lap(name="first"), Lap(name="last", metres=3))
    train = load(TrainConfig, None, ["pairs=p", "output=o", "model.name=m", "stages.0.epochs=3"]).config
    assert [stage.epochs for stage in train.stages] == [3, 10]
    assert train.stages[1:] == TrainConfig(pairs="p", output="o", model=ModelConfig(name="m")).stages[1:]


@pytest.mark.parametrize(
    "override", ["laps.2.metres=3", "tags.0=x", "pace.x=1", "laps.first.metres=1", "=3", "pace", "laps.².name=x"]
)
def test_overrides_that_fit_nowhere(tmp_path: Path, override: str) -> None:
    found = problems(tmp_path, "output: o\npace: 1\n", override)
    assert all(problem.startswith("command line: ") for problem in found)


def test_a_wrong_override_is_placed_on_the_command_line(tmp_path: Path) -> None:
    found = problems(tmp_path, "output: o\npace: 1\n", "pace=fast", "pause={nam: x}", "laps.0.metres=1.5")
    assert 'command line: pace: expected a valid number, got "fast"' in found
    assert any(line.startswith('command line: pause.nam: unknown key; did you mean "name"?') for line in found)
    assert "command line: laps.0.metres: expected a valid integer, got 1.5" in found


def test_merged_mappings_keep_their_places(tmp_path: Path) -> None:
    text = "output: o\nlaps:\n- &a\n  name: a\n  metres: 3\n- <<: *a\n  name: b\n"
    loaded = load(Race, written(tmp_path, text))
    assert loaded.config.laps == (Lap(name="a", metres=3), Lap(name="b", metres=3))
    assert loaded.origins["laps.1.metres"].endswith(":5")
    assert loaded.origins["laps.1.name"].endswith(":7")


AWKWARD = [
    "plain", "5", "1e-4", "1.5E+3", "true", "no", "~", "null", "", " ", " lead", "2024-01-31", "2024-13-45", "1:30",
    "a: b", "# x", "- x", "[1", "{a", "*a", "&a", "!x", "%x", "@x", "`x", "<<", "=", "'", '"', "\\", "0x_", "._", ".inf",
    "1_000", "tab\there", "line\nbreak\n", "한글 カナ 😀", "word " * 60, "x" * 300, "s3://b/p?q#f%20", "\x07",
]  # fmt: skip


def some_configs(text: str, seed: int) -> list[Section]:
    """One config of every job and form, with this text in every place that takes one."""
    draw = random.Random(seed)
    rate, share = 10 ** draw.uniform(-12, 3), draw.choice([0.0, 1e-9, draw.random() / 2])
    source = SourceConfig(path=text, image_column=text, image_root=text or None)
    columns = ColumnsConfig(id=text, group=text, split=None, keep=(f"{text}k:float", "é"))
    captions = (text.replace("{", "{{").replace("}", "}}") + "{c}",)
    model = ModelConfig(name=text, pretrained=text)
    stage = StageConfig(name="a", learns=("all",), epochs=1, learning_rate=rate, learning_rates={"projections": rate})
    return [
        PrepareConfig(source=source, output=text, captions=captions, columns=columns, split=SplitConfig(test=share)),
        TrainConfig(
            pairs=text,
            output=text,
            model=model,
            vocabulary=VocabularyConfig(terms=(text, "b")),
            stages=(stage, stage),
            gradient_clip=rate,
            validation=ValidationConfig(best="image_to_text/mrr@10"),
        ),
        TrainConfig(pairs=text, output=text, model=model),
        EmbedConfig(model=model, output=text, pairs=text, splits=(text, text), max_rejected_fraction=share),
        EmbedConfig(model=model, output=text, catalog=CatalogConfig(source=source, captions=captions)),
        EvaluateConfig(embeddings=text, output=text, split=text),
    ]


@pytest.mark.parametrize("text", AWKWARD)
def test_a_dump_reloads_to_the_same_config(tmp_path: Path, text: str) -> None:
    for config in some_configs(text, seed=len(text)):
        assert load(type(config), written(tmp_path, dump(config))).config == config


def test_plain_yaml_would_not_reload(tmp_path: Path) -> None:
    config = EvaluateConfig(embeddings="1e-4", output="o")
    plain = yaml.safe_dump(config.model_dump(mode="json"))
    assert "expected a valid string" in problems(tmp_path, plain, kind=EvaluateConfig)[0]


@pytest.mark.parametrize("number", range(6))
def test_explain_shows_every_value_with_its_meaning(tmp_path: Path, number: int) -> None:
    config = some_configs("text", seed=1)[number]
    lines = explain(load(type(config), written(tmp_path, dump(config))), [("steps", "7")]).splitlines()
    heads = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    rows = list(flatten(config))
    assert heads[: len(rows)] == [key for key, _, _ in rows]
    assert all(meaning for _, _, meaning in rows), "every value needs a docstring"
    assert "  steps  7" in lines
    told: set[str] = set()

    def collect(value: Any, prefix: str) -> None:
        for name, item in value.items():
            key = f"{prefix}{name}"
            sections = [(f"{key}.{i}", x) for i, x in enumerate(item)] if isinstance(item, list) else [(key, item)]
            for inner, x in sections:
                if isinstance(x, dict) and not key.endswith("learning_rates"):
                    collect(x, f"{inner}.")
                else:
                    told.add(key)

    collect(config.model_dump(mode="json"), "")
    assert told <= set(heads)


def test_a_user_error_survives_the_way_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UserError("one", "two")))
    assert error.problems == ("one", "two")
    assert str(error) == "one\ntwo"


def test_differences_are_named_by_their_leaf() -> None:
    ours = {"a": {"b": 1, "c": [1, 2]}, "d": 0.1 + 0.2, "e": None}
    theirs = {"a": {"b": 2, "c": [1, 2]}, "d": 0.3, "f": "x"}
    assert differences(ours, theirs) == [("a.b", 1, 2), ("f", None, "x")]
