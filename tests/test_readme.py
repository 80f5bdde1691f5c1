"""README tells the truth: its commands parse, its settings exist, its tree is the package, its code compiles."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from clipdist.cli import JOBS, _parser, load_job
from clipdist.config import UserError
from tests.test_layers import ORDER

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line for kind, block in BLOCKS if not kind for line in block.splitlines() if re.match(r"clipdist \w+ ", line)
]


def check(command: str) -> None:
    """Parses a command; for a job with a YAML also loads the config with the overrides."""
    options = _parser().parse_args(shlex.split(command)[1:])
    if options.command in JOBS and (options.config or "").endswith(".yaml"):
        load_job(options.command, str(ROOT / options.config), options.overrides)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses_and_its_settings_exist(command: str) -> None:
    check(command)


def test_a_wrong_command_is_seen() -> None:
    with pytest.raises(UserError):
        check("clipdist train jobs/train.yaml no.such=1")
    with pytest.raises(SystemExit):
        check("clipdist trian jobs/train.yaml")


def test_the_two_commands_are_what_the_project_defines() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "pip install uv && uv run --extra demo clipdist demo" in README
    assert "demo" in project["project"]["optional-dependencies"]
    assert project["project"]["scripts"]["clipdist"] == "clipdist.cli:main"
    assert "pip install uv && uv run pytest" in README
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text()


def test_the_tree_lists_every_module_in_order() -> None:
    assert re.findall(r"^  (\w+)\.py ", README, re.MULTILINE) == ORDER


def test_python_examples_compile_and_import_what_exists() -> None:
    for kind, block in BLOCKS:
        if kind == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = __import__(str(node.module), fromlist=["_"])
                    assert all(hasattr(module, alias.name) for alias in node.names)


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
