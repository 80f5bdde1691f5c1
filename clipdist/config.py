"""How a config is read, merged, checked and explained. The sections themselves stand beside their owners.

A job's config is one frozen, typed object. Values come from its YAML file, then from `key=value` overrides
(`stages.0.epochs=3`), then from the defaults. Every problem is reported at once, with its place.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

Key = tuple[str | int, ...]


class UserError(Exception):
    """A person's mistake: shown without a traceback, exit code 2. Holds all problems that were found."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, ...]]:
        return (type(self), self.problems)


class Fault(UserError):
    """What is no person's mistake, and has a message for one all the same: exit code 1."""


def together(*checks: Callable[[], Any]) -> list[Any]:
    """What each check returns. UserError with the problems of all that fail, instead of the first one's."""
    results: list[Any] = []
    problems: list[str] = []
    for check in checks:
        try:
            results.append(check())
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return results


def about(name: str, check: Callable[[], Any]) -> Any:
    """What the check returns; its problems are told as those of the setting `name`."""
    try:
        return check()
    except UserError as error:
        raise UserError(*(f"{name}: {problem}" for problem in error.problems)) from None


class Section(BaseModel):
    """A frozen part of a config. Attribute docstrings are the meanings that `--explain` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Section)


@dataclass(frozen=True)
class Loaded(Generic[ConfigT]):
    """A config and where each of its values came from (dotted key -> "FILE:LINE" or "command line")."""

    config: ConfigT
    origins: dict[str, str]


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as the number that people mean (YAML 1.1: a string), and `2024-01-31` as text (YAML 1.1: a date)."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that _Loader would read as numbers."""


_TAG = "tag:yaml.org,2002:"
for _kind in (_Loader, _Dumper):
    _number = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    _kind.add_implicit_resolver(f"{_TAG}float", _number, list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    start: [(tag, form) for tag, form in forms if tag != f"{_TAG}timestamp"]
    for start, forms in _Loader.yaml_implicit_resolvers.items()
}


def load(kind: type[ConfigT], path: str | None, overrides: Sequence[str] = ()) -> Loaded[ConfigT]:
    """Reads `path` (YAML), applies `key=value` overrides and checks the whole. Raises UserError with every problem."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    places: dict[Key, str] = {}
    if path is not None:
        values = _read_yaml(Path(path), places, problems)
    for override in overrides:
        _apply_override(kind, values, override, places, problems)
    try:
        # Strict JSON mode: lists become tuples, but "5" is no number and true is no number either.
        config = kind.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        problems += [_describe(kind, detail, places, path) for detail in _causes(error.errors())]
        raise UserError(*problems) from None
    if problems:
        raise UserError(*problems)
    return Loaded(config, {_dotted(key): place for key, place in places.items()})


def dump(config: Section) -> str:
    """The resolved config as YAML; it reruns the job that it was saved by."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def flatten(config: Section, prefix: str = "") -> Iterator[tuple[str, object, str]]:
    """Every value as (dotted key, value, meaning), in the order of the classes."""
    for name, field in type(config).model_fields.items():
        value, meaning = getattr(config, name), " ".join((field.description or "").split())
        sections = value if isinstance(value, tuple) else (value,)
        if sections and all(isinstance(section, Section) for section in sections):
            for index, section in enumerate(sections):
                inner = f"{prefix}{name}." + (f"{index}." if isinstance(value, tuple) else "")
                yield from flatten(section, inner)
        else:
            yield f"{prefix}{name}", value, meaning


def explain(loaded: Loaded[ConfigT], derived: Sequence[tuple[str, str]] = (), width: int = 150) -> str:
    """Each value with its origin and meaning, then the numbers that follow from them."""
    rows = []
    for key, value, meaning in flatten(loaded.config):
        shown = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
        rows.append((key, shown, _origin(loaded.origins, key), meaning))
    sizes = [min(max((len(row[i]) for row in rows), default=0), limit) for i, limit in ((0, 40), (1, 44), (2, 34))]
    lines = []
    for key, shown, origin, meaning in rows:
        head = f"{key:<{sizes[0]}}  {shown:<{sizes[1]}}  {origin:<{sizes[2]}}  "
        room = max(width - sum(sizes) - 6, 36)
        first, *rest = textwrap.wrap(meaning, room) or [""]
        lines.append((head + first).rstrip())
        lines += [" " * (sum(sizes) + 6) + line for line in rest]
    if derived:
        longest = max(len(name) for name, _ in derived)
        lines += ["", "follows from these:"] + [f"  {name:<{longest}}  {value}" for name, value in derived]
    return "\n".join(lines)


def _origin(origins: dict[str, str], key: str) -> str:
    """A value comes from the command line too when that set the section around it, or a part of it."""
    given = [name for name, place in origins.items() if place == "command line"]
    if any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in given):
        return "command line"
    return origins.get(key, "default")


def _read_yaml(path: Path, places: dict[Key, str], problems: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this config file ({error.__class__.__name__}: {error})") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
        if node is not None:
            _collect_places(node, (), str(path), places, problems)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise UserError(f"{path}: an alias (*name) stands inside its own anchor (&name)") from None
    if node is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: expected `key: value` lines, got a {type(values).__name__}")
    return values


def _collect_places(node: yaml.Node, key: Key, path: str, places: dict[Key, str], problems: list[str]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for name_node, value_node in node.value:
            if name_node.tag == f"{_TAG}merge":  # << : what the mapping itself says goes before what is merged
                merged: dict[Key, str] = {}
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    _collect_places(source, key, path, merged, [])
                places.update({name: place for name, place in merged.items() if name not in places})
                continue
            place, inner = f"{path}:{name_node.start_mark.line + 1}", (*key, str(name_node.value))
            if inner in seen:
                problems.append(f"{place}: {_dotted(inner)}: this key stands twice; keep one")
            seen.add(inner)
            places[inner] = place
            _collect_places(value_node, inner, path, places, problems)
    elif isinstance(node, yaml.SequenceNode):
        for index, value_node in enumerate(node.value):
            inner = (*key, index)
            places[inner] = f"{path}:{value_node.start_mark.line + 1}"
            _collect_places(value_node, inner, path, places, problems)


def _apply_override(
    kind: type[Section], values: dict[str, Any], override: str, places: dict[Key, str], problems: list[str]
) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        problems.append(f'command line: "{override}": expected key=value, such as seed=1 or stages.0.epochs=3')
        return
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        value = text
    target: Any = values
    *parents, last = [int(part) if part.isdecimal() else part for part in name.split(".")]
    for depth, part in enumerate(parents):
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = _default_list(kind, tuple(parents[: depth + 1]))
        try:
            target = target[part]
        except (KeyError, IndexError, TypeError):
            where = _dotted(tuple(parents[: depth + 1]))
            problems.append(f"command line: {name}: there is no {where} to set a value in")
            return
    if isinstance(target, list) and isinstance(last, int) and last < len(target):
        target[last] = value
    elif isinstance(target, dict):
        target[str(last)] = value
    else:
        problems.append(f"command line: {name}: cannot set {last!r} there")
        return
    key: Key = (*parents, last)
    for old in [place for place in places if place[: len(key)] == key]:
        del places[old]
    places[key] = "command line"


def _default_list(kind: type[Section], key: Key) -> Any:
    """What `stages.0.epochs=3` changes when the file has no stages: their default. A section starts empty."""
    section = _section_at(kind, key)
    field = section.model_fields.get(str(key[-1])) if section else None
    default = field.get_default(call_default_factory=True, validated_data={}) if field else None
    return to_jsonable_python(default) if isinstance(default, tuple) else {}


def _causes(details: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Without the "too few items" that follows from bad items."""
    inner = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
    return (detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in inner)


def _describe(kind: type[Section], detail: ErrorDetails, places: dict[Key, str], path: str | None) -> str:
    key = tuple(detail["loc"])
    known = key
    while known and known not in places:
        known = known[:-1]
    place = places.get(known) or path or "config"
    name = _dotted(key) or "config"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if detail["type"] == "extra_forbidden":
        message = _unknown_key(kind, key)
    elif detail["type"] == "missing":
        meaning = _field_meaning(kind, key)
        message = "required, but not given" + (f": {meaning}" if meaning else "")
    elif detail["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]}, got {_shown(detail['input'])}"
    return f"{place}: {name}: {message}"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _section_at(kind: type[Section], key: Key) -> type[Section] | None:
    """The class of the section that holds `key`."""
    section: type[Section] | None = kind
    for part in key[:-1]:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(str(part)) if section else None
        section = next(_sections_in(field.annotation), None) if field else None
    return section


def _sections_in(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _unknown_key(kind: type[Section], key: Key) -> str:
    section = _section_at(kind, key)
    names = list(section.model_fields) if section else []
    close = difflib.get_close_matches(str(key[-1]), names, n=1, cutoff=0.6)
    return f'unknown key; did you mean "{close[0]}"?' if close else f"unknown key (known here: {', '.join(names)})"


def _field_meaning(kind: type[Section], key: Key) -> str:
    section = _section_at(kind, key)
    field = section.model_fields.get(str(key[-1])) if section else None
    return " ".join((field.description or "").split()) if field else ""


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def differences(ours: object, theirs: object, key: str = "") -> list[tuple[str, object, object]]:
    """The leaves in which two JSON-like values differ, as (dotted key, ours, theirs)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = []
        for name in sorted({*ours, *theirs}):
            found += differences(ours.get(name), theirs.get(name), f"{key}.{name}" if key else str(name))
        return found
    same = ours == theirs or (isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs))
    return [] if same else [(key, ours, theirs)]
