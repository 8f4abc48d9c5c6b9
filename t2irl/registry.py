"""From a name in a config to a class: the file name of a module, or `package.module:Class`.

Also answers what a place in a config holds, plugins included, for overrides, spelling help and the list of fields.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import pkgutil
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, SerializeAsAny, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

KINDS = {
    "models": "ModelFamily",
    "dynamics": "Dynamics",
    "engines": "RolloutEngine",
    "algorithms": "Algorithm",
    "rewards": "Reward",
    "regularizers": "Regularizer",
    "evaluation.suites": "Suite",
}
"""Package under `t2irl` -> base class in its `base` module."""

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class PluginKind:
    """Marks the annotation of a plugin's field with the package that its `type` is looked up in."""

    name: str


def names(kind: str) -> list[str]:
    """Every plugin of one kind, by file name."""
    package = importlib.import_module(f"t2irl.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("base", "combine"))


def find(kind: str, name: str) -> type:
    """The class that `name` stands for. Raises LookupError with the known names and the nearest one."""
    base = getattr(importlib.import_module(f"t2irl.{kind}.base"), KINDS[kind])
    if ":" in name:
        return _find_outside(kind, name, base)
    known = names(kind)
    if name not in known:
        choices = f"Known: {', '.join(known)}; or package.module:Class"
        raise LookupError(f"no {kind} of type {name!r}.{did_you_mean(name, known)} {choices}")
    try:
        module = importlib.import_module(f"t2irl.{kind}.{name}")
    except ImportError as error:
        raise LookupError(f"{kind} of type {name!r} cannot be imported: {error}") from error
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise LookupError(f"t2irl/{kind}/{name}.py must define exactly one {base.__name__}, found {len(classes)}")
    return classes[0]


def _find_outside(kind: str, name: str, base: type) -> type:
    if not IMPORT_PATH.fullmatch(name):
        raise LookupError(f"{name!r} is not of the form package.module:Class")
    module_name, class_name = name.split(":", 1)
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise LookupError(f"cannot import {name!r} ({error}); expected package.module:Class") from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise LookupError(f"{name!r} is not a subclass of t2irl.{kind}.base.{base.__name__}")
    return found


def build(kind: str, config: Any, *args: Any, **kwargs: Any) -> Any:
    """An instance of the class that a plugin's config names: `Class(config, *args, **kwargs)`."""
    return find(kind, config.type)(config, *args, **kwargs)


def Plugin(kind: str) -> Any:  # noqa: N802 - reads as a type in config classes
    """A config field whose class is chosen by its `type` key."""

    def validate(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("plugin", "Input should be a mapping with a `type`, one of {known}", known())
        if "type" not in value:
            raise PydanticCustomError("plugin", "`type` is missing: one of {known}", known())
        try:
            config_class = find(kind, str(value["type"])).Config
        except LookupError as error:
            problem = PydanticCustomError("plugin", "{message}", {"message": str(error.args[0])})
            raise ValidationError.from_exception_data(
                kind, [{"type": problem, "loc": ("type",), "input": value["type"]}]
            ) from error
        return config_class.model_validate(value)

    def known() -> dict[str, str]:
        return {"known": f"{', '.join(names(kind))}, or package.module:Class"}

    return Annotated[SerializeAsAny[Any], BeforeValidator(validate), PluginKind(kind)]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def mentions(annotation: Any, *wanted: type) -> bool:
    """Whether an annotation is, or has among its alternatives or members, one of `wanted`."""
    return annotation in wanted or any(mentions(part, *wanted) for part in get_args(annotation))


def unpack(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation without its metadata, and the metadata."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return inner, tuple(metadata)
    return annotation, ()


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of any other annotation itself alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def kind_of(metadata: Sequence[Any]) -> str | None:
    """The plugin kind that an annotation's metadata mark, if any."""
    return next((m.name for m in metadata if isinstance(m, PluginKind)), None)


def annotation_of(field: FieldInfo) -> Any:
    """A field's annotation with its metadata."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def class_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The config class that reads `value` where `annotation` stands; None for plain values and unknown types."""
    inner, metadata = unpack(annotation)
    kind, chosen = kind_of(metadata), value.get("type") if isinstance(value, Mapping) else None
    if kind is not None:
        try:
            return find(kind, str(chosen)).Config if chosen is not None else None
        except LookupError:
            return None
    members = [option for member in alternatives(inner) for option in alternatives(_bare(member))]
    classes = [c for c in map(_bare, members) if inspect.isclass(c) and issubclass(c, BaseModel)]
    if len(classes) > 1:
        classes = [c for c in classes if c.model_fields["type"].default == chosen]
    return classes[0] if classes else None


def _bare(annotation: Any) -> Any:
    return unpack(annotation)[0]


def annotation_at(root: type[BaseModel], path: Sequence[Any], tree: Any) -> Any:
    """The annotation at `path` of a config tree read by `root`; None where there is no such field.

    Types of plugins are taken from the tree.
    """
    annotation: Any = root
    for key in path:
        owner, inner = class_of(annotation, tree), _bare(annotation)
        if owner is not None:
            if key not in owner.model_fields:
                return None
            annotation = annotation_of(owner.model_fields[key])
        elif get_origin(inner) is dict:
            annotation = get_args(inner)[1]
        else:
            return None
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return annotation


def fields_of(root: type[BaseModel], prefix: str = "", choice: str = "") -> Iterator[tuple[str, FieldInfo, str]]:
    """Every field of a config class and of the classes within it: dotted path, field, and, where a
    mapping may be of several types, the `type` that it belongs to. Plugins' own fields are left out.
    """
    for name, field in root.model_fields.items():
        yield f"{prefix}{name}", field, choice
        named = get_origin(field.annotation) is dict
        inside = get_args(field.annotation)[1] if named else field.annotation
        parts = map(_bare, (option for member in alternatives(inside) for option in alternatives(_bare(member))))
        classes = [c for c in parts if inspect.isclass(c) and issubclass(c, BaseModel)]
        for inner in classes:
            below = inner.model_fields["type"].default if len(classes) > 1 else choice
            yield from fields_of(inner, f"{prefix}{name}.{'NAME.' if named else ''}", below)


def default_types(root: type[BaseModel]) -> dict[str, Any]:
    """The `type` of every field that has one by default, as a config tree: what a mapping without `type` means."""
    tree: dict[str, Any] = {}
    for name, field in root.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            below = default_types(field.annotation)
            if below:
                tree[name] = below
        elif isinstance(field.default, dict) and "type" in field.default:
            tree[name] = {"type": field.default["type"]}
        elif isinstance(field.default, BaseModel) and "type" in type(field.default).model_fields:
            tree[name] = {"type": field.default.model_dump()["type"]}
    return tree


WORDS = {int: "integer", float: "number", bool: "true | false", str: "text", type(None): "null"}
BOUNDS = {Gt: "> {0.gt}", Ge: ">= {0.ge}", Lt: "< {0.lt}", Le: "<= {0.le}"}


def type_text(annotation: Any) -> str:
    """What a field takes, in words: `integer > 0`, `group | global | none`."""
    inner, metadata = unpack(annotation)
    kind, origin, parts = kind_of(metadata), get_origin(inner), get_args(inner)
    if kind is not None:
        return f"mapping with type: {' | '.join(names(kind))} | package.module:Class"
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        texts = [type_text(part) for part in parts]
        return " | ".join(t.removeprefix("mapping with type: ") if i else t for i, t in enumerate(texts))
    if origin is tuple:
        return f"[{', '.join('...' if part is Ellipsis else type_text(part) for part in parts)}]"
    if origin is dict:
        return f"mapping of names, each a {type_text(parts[1])}"
    if issubclass(inner, BaseModel):
        return f"mapping with type: {inner.model_fields['type'].default}" if "type" in inner.model_fields else "mapping"
    # Within another annotation the bounds of `Field(...)` are one level deeper.
    flat = [m for outer in metadata for m in (outer.metadata if isinstance(outer, FieldInfo) else [outer])]
    limits = " and ".join(BOUNDS[type(m)].format(m) for m in flat if type(m) in BOUNDS)
    word = WORDS.get(inner, "path" if issubclass(inner, PurePath) else inner.__name__)
    return f"{word} {limits}" if limits else word


def describe(root: type[BaseModel]) -> str:
    """Every field of a config class, plugins' own fields included, as text."""
    lines: list[str] = []
    described: dict[str, str] = {}
    for path, field, choice in fields_of(root):
        if choice and path.endswith(".type"):
            continue
        lines += _described(path, field, choice)
        entries = path
        kind = kind_of(field.metadata)
        if get_origin(field.annotation) is dict:
            entries, kind = f"{path}.NAME", kind_of(unpack(get_args(field.annotation)[1])[1])
        if kind is not None and described.setdefault(kind, path) != path:
            lines.append(f"    Entries as in {described[kind]}.")
        elif kind is not None:
            for name in names(kind):
                for inner, sub, _ in fields_of(find(kind, name).Config, f"{entries}."):
                    if inner != f"{entries}.type":
                        lines += _described(inner, sub, name)
    return "\n".join(lines)


def _described(path: str, field: FieldInfo, choice: str) -> list[str]:
    default = field.default
    if field.is_required():
        value = "required"
    elif field.default_factory is not None:
        value = "optional"
    elif isinstance(default, BaseModel):
        value = f"default: type {default.model_dump()['type']}" if "type" in type(default).model_fields else "optional"
    else:
        value = f"default: {json.dumps(default, ensure_ascii=False, default=str)}"
    where = f"  [type {choice}]" if choice else ""
    doc = " ".join((field.description or "").split())
    return [
        f"{path}{where}  {type_text(annotation_of(field))}  ({value})",
        *textwrap.wrap(doc, 108, initial_indent="    ", subsequent_indent="    "),
    ]
