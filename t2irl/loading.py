"""From YAML files and `--dotted.key value` overrides to a checked config, a `Run` above all, and back to YAML.

Layers merge left to right: mappings merge key by key, everything else is replaced. A mapping whose `type` changes is
replaced too, since its other keys belong to the old type, and one without `type` keeps the type it had (at first the
default). `null` removes a reward or regulariser that an earlier layer named. Paths in a config (`model.path`, `data.*`,
`run_dir`) are taken as typed, relative to the current directory, not to the file.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from t2irl import registry
from t2irl.config import Run
from t2irl.errors import ConfigError

Root = TypeVar("Root", bound=BaseModel)
Place = tuple[Any, ...]
"""Keys from the top of a config tree to a value."""

FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
MERGE = "tag:yaml.org,2002:merge"
NAMED = frozenset(name for name, field in Run.model_fields.items() if get_origin(field.annotation) is dict)
"""Mappings by a name of the user's choice."""


class _Reader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-4` is a number, `on`, `no` and `12:30` are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"<<$"), "<"),
):
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))


class _Writer(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read as text."""


_Writer.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Layer:
    """A config tree, where each of its keys was set, and the class that reads it."""

    values: dict[str, Any]
    origins: dict[Place, str]
    root: type[BaseModel] = Run


def load_run(files: Sequence[Path | Layer], overrides: Sequence[str] = ()) -> Run:
    """The run that config files (or layers of them) and overrides (`--a.b c` or `--a.b=c`) describe, see `load`."""
    return load(Run, files, overrides, "t2irl train configs/tiny/demo.yaml")


def load(root: type[Root], files: Sequence[Path | Layer], overrides: Sequence[str], example: str) -> Root:
    """What files and overrides describe, as any config class; `example` is a command that would be right. Raises ConfigError
    with every problem at once: the key, where it was set, the value, and what would be right.
    """
    if not files:
        raise ConfigError(f"no config file given; for example: {example}")
    layer = Layer(registry.default_types(root), {}, root)
    for file in files:
        layer = merge(layer, file if isinstance(file, Layer) else read_file(Path(file)))
    layer = merge(layer, _override_layer(overrides, layer))
    try:
        return root.model_validate(layer.values)
    except ValidationError as error:
        raise ConfigError(_report(error, layer, [str(f) for f in files if not isinstance(f, Layer)])) from error


def describe_fields() -> str:
    """Every field of a run's config, with what it takes, its default and its meaning."""
    return registry.describe(Run)


def dump_run(run: Run) -> str:
    """The whole run as YAML, defaults included; `load_run` of it gives an equal run."""
    return yaml.dump(run.model_dump(mode="json"), Dumper=_Writer, sort_keys=False, allow_unicode=True, width=110)


def read_file(path: Path) -> Layer:
    """One YAML file. Raises ConfigError for anything but a UTF-8 file that holds a mapping with distinct text keys."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        there = {p.stem: p for p in path.parent.glob("*.y*ml")}
        near = difflib.get_close_matches(path.stem, list(there), n=1)
        hint = f". Did you mean {there[near[0]]}?" if near else f" (relative to {Path.cwd()})"
        raise ConfigError(f"config file {path}: no such file{hint}") from error
    except UnicodeDecodeError as error:
        line = bytes(error.object)[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"config file {path}: cannot be read: {error.strerror or error}") from error
    values, origins = _parse(text, str(path))
    if values is None:
        raise ConfigError(f"config file {path}: is empty; expected lines such as `seed: 0`")
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: holds {_shown(values)}; expected lines such as `seed: 0`")
    return Layer(values, origins)


def _parse(text: str, source: str, numbered: bool = True) -> tuple[Any, dict[Place, str]]:
    """What YAML text holds, and where each key stands. `source` names it in messages, with lines if `numbered`."""
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        origins: dict[Place, str] = {}
        return (None if node is None else _Plain(reader, source, origins).value(node, ())), origins
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark and numbered else source
        raise ConfigError(f"{at}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        at = f"{source}:{text[: error.position].count(chr(10)) + 1}" if numbered else source
        raise ConfigError(f"{at}: not valid YAML: the character {text[error.position]!r} is not allowed") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error


class _Plain:
    """YAML nodes as plain values. Notes in `origins` where each key stands."""

    def __init__(self, reader: _Reader, source: str, origins: dict[Place, str]):
        self.reader, self.source, self.origins = reader, source, origins
        self.around: list[yaml.Node] = []

    def value(self, node: yaml.Node, place: Place) -> Any:
        """The node's value, which belongs at `place`."""
        if node in self.around:
            raise ConfigError(f"{self._at(node)}: an alias that contains itself")
        self.around.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(n, (*place, i)) for i, n in enumerate(node.value)]
            return (
                self._mapping(node, place) if isinstance(node, yaml.MappingNode) else self.reader.construct_object(node)
            )
        except ValueError as error:  # an explicit tag such as `!!int x`
            raise ConfigError(f"{self._at(node)}: {error}") from error
        finally:
            self.around.pop()

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        # Keys of the mapping itself win over merged ones, wherever they stand.
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != MERGE):
            if key.tag == MERGE:
                result |= self._merged(value, place)
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{self._at(key)}: a key must be text; put it in quotes if it is meant as text")
            here = (*place, key.value)
            if key.value in lines:
                first = f"first in line {lines[key.value]}"
                raise ConfigError(f"{self._at(key)}: the key {_dotted(here)} is set twice ({first}); keep one of them")
            lines[key.value] = key.start_mark.line + 1
            _drop(self.origins, here)
            self.origins[here] = self._at(key)
            result[key.value] = self.value(value, here)
        return result

    def _merged(self, node: yaml.Node, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for source in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            if not isinstance(source, yaml.MappingNode):
                raise ConfigError(f"{self._at(node)}: `<<` takes a mapping, as in `<<: *name`")
            result |= self.value(source, place)
        return result

    def _at(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}"


def _drop(origins: dict[Place, str], place: Place) -> None:
    for key in [k for k in origins if k[: len(place)] == place]:
        del origins[key]


def merge(below: Layer, above: Layer) -> Layer:
    """One layer on top of another."""
    values = _merged(below.values, above.values, (), origins := dict(below.origins))
    return Layer(values, origins | above.origins, below.root)


def _merged(below: dict[str, Any], above: dict[str, Any], place: Place, origins: dict[Place, str]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old, here = below.get(key), (*place, key)
        if value is None and key in below and len(here) == 2 and here[0] in NAMED:
            del result[key]
        elif (
            isinstance(old, dict)
            and isinstance(value, dict)
            and value.get("type") in (None, old.get("type", value.get("type")))
        ):
            result[key] = _merged(old, value, here, origins)
        else:
            _drop(origins, here)
            result[key] = value
    return result


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[Place, str]]:
    """Overrides as (place, text)."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}: config files come first, then overrides such as --seed 1")
        if not all(key.split(".")):
            raise ConfigError(f"override {word}: expected --key value with a dotted key such as rollout.prompts")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"override {word}: the value is missing; write {word} VALUE or {word}=VALUE")
            text = rest.pop(0)
        yield tuple(key.split(".")), text


def _override_layer(arguments: Sequence[str], below: Layer) -> Layer:
    """Overrides as one more layer. Text and path fields take their value as typed, all others as YAML."""
    layer = Layer({}, {})
    pairs = list(_pairs(arguments))
    for place, text in pairs:
        _set(layer.values, place, text)
        layer.origins.update({place[:n]: f"--{_dotted(place)}" for n in range(1, len(place) + 1)})
    # Which field a key stands for depends on the types of plugins, so on files and overrides together.
    whole = merge(below, layer).values
    for place, text in pairs:
        if registry.unpack(registry.annotation_at(below.root, place, whole))[0] not in (str, Path):
            _set(layer.values, place, _parse(text, f"--{_dotted(place)} {text}", numbered=False)[0])
    return layer


def _set(tree: dict[str, Any], place: Place, value: Any) -> None:
    for key in place[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[place[-1]] = value


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _report(error: ValidationError, layer: Layer, files: Sequence[str]) -> str:
    """All problems, one a line. Alternatives of a union that fail on the same value make one problem."""
    problems: dict[str, list[str]] = {}
    for entry in error.errors(include_url=False):
        place = _place(entry, layer.values)
        text = _text(entry, place, layer)
        texts = problems.setdefault(_head(entry, place, layer, files), [])
        if text not in texts:
            texts.append(text)
    lines = [f"{head}: {', or '.join(texts)}" if head else "; ".join(texts) for head, texts in problems.items()]
    return lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems in the config", *lines])


def _absent(entry: Any) -> bool:
    # A list that is too short is reported as missing its last item.
    return entry["type"] == "missing" and isinstance(entry["loc"][-1], str)


def _place(entry: Any, tree: Any) -> Place:
    """The key that a problem belongs to: pydantic's location without the names of union members and list items."""
    place: list[Any] = []
    for depth, key in enumerate(entry["loc"], 1):
        if isinstance(tree, dict) and key in tree:
            tree = tree[key]
            place.append(key)
        elif depth == len(entry["loc"]) and _absent(entry):
            place.append(key)
    return (*place, "type") if entry["type"] == "union_tag_invalid" else tuple(place)


def _head(entry: Any, place: Place, layer: Layer, files: Sequence[str]) -> str:
    if not place:
        return ""
    if _absent(entry):
        return f"{_dotted(place)} is missing in {', '.join(files)}"
    origin = next((layer.origins[place[:n]] for n in range(len(place), 0, -1) if place[:n] in layer.origins), "default")
    return f"{_dotted(place)} = {_shown(reduce(getitem, place, layer.values))} ({origin})"


def _text(entry: Any, place: Place, layer: Layer) -> str:
    """What is wrong and what would be right."""
    kind, context = entry["type"], entry.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(place, layer)
    if kind in ("literal_error", "union_tag_invalid"):
        expected = str(context.get("expected") or context.get("expected_tags"))
        given = context.get("tag") or entry["input"]
        hint = registry.did_you_mean(str(given), re.findall(r"'([^']*)'", expected))
        return f"must be one of {expected}{'.' if hint else ''}{hint}"
    if kind.endswith(("_type", "_parsing")) or kind in ("missing", "int_from_float", "too_short", "too_long"):
        annotation = registry.annotation_at(layer.root, place, layer.values)
        return f"expected {registry.type_text(annotation)}{', not empty' if kind == 'too_short' else ''}"
    text = str(entry["msg"]).replace("Input should be", "must be")
    if kind == "plugin" and len(place) == 2 and place[0] in NAMED:
        others = [name for name in layer.values[place[0]] if name != place[1]]
        text += f".{registry.did_you_mean(place[1], others)} Other entries of {place[0]}: {', '.join(others) or 'none'}"
    return text


def _unknown_key(place: Place, layer: Layer) -> str:
    above, key = place[:-1], str(place[-1])
    annotation = registry.annotation_at(layer.root, above, layer.values)
    owner = registry.class_of(annotation, reduce(getitem, above, layer.values))
    known = list(owner.model_fields) if owner else []
    namesakes: dict[str, str] = {}
    for path, _, choice in registry.fields_of(layer.root):
        if path == _dotted(place):
            return f"unknown key here; it belongs to type: {choice}. Known: {', '.join(known)}"
        if path.split(".")[-1] == key:
            namesakes[path] = choice
    close = [k for k in known if k.endswith(f"_{key}")] or difflib.get_close_matches(key, known, n=1)
    if near := [_dotted((*above, k)) for k in close] or list(namesakes):
        return f"unknown key. Did you mean {' or '.join(near)}?"
    return f"unknown key. Known {f'keys of {_dotted(above)}' if above else 'keys'}: {', '.join(known)}"
