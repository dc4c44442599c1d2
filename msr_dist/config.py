"""Typed configuration: what a file or a command line says is checked whole before anything runs.

Every component derives its own settings from `Config`: frozen, unknown keys forbidden, types strict. `load` reads a
TOML file and dotted overrides; `component` makes a field whose class is chosen by its `kind`:

    [model]
    kind = "star"          # msr_dist/models/star.py, class Config
    widths = [128, 64]
"""

import difflib
import importlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, Self, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, PlainValidator, SerializeAsAny, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError


class Config(BaseModel):
    """Base of every configuration: frozen, strict, and without room for a misspelt key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


class Readable(Protocol):
    """A file or folder, a `Path` or in an object store, as far as configurations are read from it."""

    def __truediv__(self, name: str, /) -> Self: ...

    def is_file(self) -> bool:
        """Whether it is there."""
        ...

    def read_bytes(self) -> bytes:
        """All that is in it."""
        ...


def load(cls: type[C], path: Readable, overrides: Sequence[str] = ()) -> C:
    """Read `path` (TOML) and apply `overrides` such as `model.widths=[64,32]`.

    Raises ValueError, one line per fault, naming the file and the dotted path of the key.
    """
    try:
        raw = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the path of a TOML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    return parse(cls, merge(raw, overrides), where=str(path))


def merge(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with dotted `key=value` overrides; a value that is not TOML is taken as a string."""
    merged: dict[str, Any] = json.loads(json.dumps(raw, default=str))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"override {override!r}: expected KEY=VALUE, such as seed=3 or model.widths=[64,32]")
        *parents, leaf = key.strip().split(".")
        node: Any = merged
        for depth, parent in enumerate(parents):
            node = _below(node, parent)
            if not isinstance(node, dict | list):
                raise ValueError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        if isinstance(node, list):
            raise ValueError(f"override {override!r}: give the place's keys, such as {key.strip()}.KEY=VALUE")
        node[leaf] = _value(text.strip())
    return merged


def _below(node: Any, key: str) -> Any:
    """What stands under `key`; in a list of sections, a key is a place from 0 on, and the next free place a new one."""
    if isinstance(node, dict):
        return node.setdefault(key, {})
    if isinstance(node, list) and key.isdigit() and int(key) <= len(node):
        if int(key) == len(node):
            node.append({})
        return node[int(key)]
    return None


def parse(cls: type[C], raw: Mapping[str, Any], where: str) -> C:
    """Validate `raw` as `cls`; `where` opens each line of the ValueError."""
    try:
        return _validate(cls, raw)
    except ValidationError as error:
        raise ValueError("\n".join(f"{where}: {fault}" for fault in _faults(error))) from None


def dump(config: Config) -> str:
    """The configuration as TOML, defaults included; `parse` of it gives an equal configuration."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


class Kinded(Config):
    """Base of a configuration whose class is chosen by `kind`."""

    kind: str
    """The file in the component's package that holds it, or a dotted module from outside."""


def component(package: str) -> Any:
    """The type of a field whose class is `Config` in the module that `kind` names, within `package`."""

    def validate(value: Any) -> Kinded:
        if isinstance(value, Kinded):
            return value
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise ValueError(f"needs a kind: one of {', '.join(_kinds(package))}, or a dotted module of your own")
        return _validate(kind_config(package, value["kind"]), value)

    return Annotated[SerializeAsAny[Kinded], PlainValidator(validate)]


def kind_config(package: str, kind: str) -> type[Kinded]:
    """The class `Config` of `package`.`kind`; a dotted `kind` names a module outside of the package."""
    if not all(part.isidentifier() for part in kind.split(".")):
        raise ValueError(f"unknown kind {kind!r}{_near(kind, _kinds(package))}")
    name = kind if "." in kind else f"{package}.{kind}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"unknown kind {kind!r}{_near(kind, _kinds(package))}") from None
    cls = getattr(module, "Config", None)
    if not (isinstance(cls, type) and issubclass(cls, Kinded) and "kind" in cls.__annotations__):
        raise ValueError(f"kind {kind!r}: {name} is no component{_near(kind, _kinds(package))}")
    return cls


def _kinds(package: str) -> list[str]:
    """The files of `package` that define a component, found in their text so that none is imported."""
    folder = Path(importlib.import_module(package).__path__[0])
    return sorted(file.stem for file in folder.glob("*.py") if "\nclass Config(" in file.read_text())


def _value(text: str) -> Any:
    try:
        return json.loads(json.dumps(tomllib.loads(f"value = {text}")["value"], default=str))
    except tomllib.TOMLDecodeError:
        return text


def _near(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _validate(cls: type[C], raw: Mapping[str, Any]) -> C:
    try:
        # JSON mode is the strict one that still takes lists for tuples and strings for paths.
        return cls.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        details = [_detail(fault, cls) for fault in error.errors()]
        raise ValidationError.from_exception_data(error.title, details) from None


def _detail(fault: ErrorDetails, cls: type[BaseModel]) -> InitErrorDetails:
    """One fault in our words: an unknown key gets its near miss, everything else the value that was found."""
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key{_near(str(fault['loc'][-1]), sorted(_section(cls, fault['loc'][:-1]).model_fields))}"
    elif fault["type"] not in ("missing", "value_error", "explained"):
        message = f"{message} (got {fault['input']!r})"
    kind = PydanticCustomError("explained", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=fault["loc"], input=fault["input"])


def _section(cls: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The configuration class at `location` within `cls`; keys of dicts and places in lists do not change it."""
    for key in location:
        field = cls.model_fields.get(str(key))
        if field is not None:
            cls = next(iter(_config_classes(field.annotation)), cls)
    return cls


def _config_classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _config_classes(argument)]


def _faults(error: ValidationError) -> list[str]:
    faults = error.errors(include_url=False)
    # A section that lost a faulty part is called too short as well: that follows from the part's own fault.
    inner = {fault["loc"][:depth] for fault in faults for depth in range(1, len(fault["loc"]))}
    shown = [fault for fault in faults if fault["loc"] not in inner]
    return [": ".join(filter(None, [".".join(map(str, fault["loc"])), fault["msg"]])) for fault in shown]
