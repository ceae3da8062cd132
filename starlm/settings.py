"""Frozen dataclasses from and to plain values and TOML: one checker for every configuration.

config = from_dict(TrainConfig, tomllib.loads(text), where="run.toml")
text = to_toml(config)
"""

import tomllib
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from starlm.errors import InputError

T = TypeVar("T")


def from_dict(
    cls: type[T], values: dict[str, Any], *, where: str, base: T | None = None, check: bool = True
) -> T:
    """The dataclass `cls` filled from `values`; fields not given come from `base`, else the defaults.

    Args:
        values: plain values as TOML and JSON have them; nested tables for nested dataclasses.
        where: what the values came from, for error messages.
        check: False leaves out the class's own checks (`__post_init__`), for one of several layers that only
            make sense together; needs `base`.

    Raises:
        InputError: unknown key (the nearest known one is named), wrong type, impossible value.
    """
    return _build(cls, values, where, base, check, prefix="")


def _build(cls: type[T], values: dict[str, Any], where: str, base: T | None, check: bool, prefix: str) -> T:
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    filled: dict[str, Any] = {name: getattr(base, name) for name in known} if base else {}
    for key, value in values.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
            raise InputError(f"Unknown key {prefix + key!r} in {where}. {hint}")
        if is_dataclass(hints[key]) and isinstance(value, dict):
            nested = filled.get(key)
            filled[key] = _build(hints[key], value, where, nested, check, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            filled[key] = _convert(value, hints[key], f"{prefix}{key}", where)
    if not check:
        bare = object.__new__(cls)
        for name in known:
            object.__setattr__(bare, name, filled[name])
        return bare
    try:
        return cls(**filled)
    except InputError as error:
        raise InputError(f"{error} (in {where})") from None


def _convert(value: Any, hint: Any, name: str, where: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in options:
            return None
        (hint,) = [option for option in options if option is not NoneType]
        return _convert(value, hint, name, where)
    if origin is Literal:
        if value in options:
            return value
        raise InputError(f"{name} in {where} must be one of {', '.join(map(str, options))}; got {value!r}.")
    if origin is tuple and isinstance(value, list | tuple):
        kinds = options[:1] * len(value) if Ellipsis in options else options
        if len(kinds) == len(value):
            return tuple(_convert(v, k, name, where) for v, k in zip(value, kinds, strict=True))
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif hint is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    wanted = _name_of(hint)
    raise InputError(f"{name} in {where} must be of type {wanted}; got {value!r}.")


def _name_of(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))


def settle_types(config: Any, prefix: str = "") -> None:
    """Make each field of a frozen dataclass what it is declared as: in `__post_init__`, before other checks.

    Args:
        prefix: what messages put before the names of fields.

    Raises:
        InputError: names the field, its type, and what it got instead.
    """
    hints = get_type_hints(type(config))
    for name in (field.name for field in fields(config)):
        hint, value = hints[name], getattr(config, name)
        if not is_dataclass(hint):
            object.__setattr__(config, name, _convert(value, hint, prefix + name, type(config).__name__))
        elif not isinstance(value, hint):  # type: ignore[arg-type]
            raise InputError(f"{prefix}{name} must be a {_name_of(hint)}; got {value!r}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, nested; paths as text."""
    result: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = [str(item) if isinstance(item, Path) else item for item in value]
        result[field.name] = value
    return result


def to_toml(config: Any) -> str:
    """TOML text that `from_dict(cls, tomllib.loads(text))` turns back into `config`; None is left out."""
    lines: list[str] = []
    _write_table(to_dict(config), "", lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(values: dict[str, Any], path: str, lines: list[str]) -> None:
    plain = {k: v for k, v in values.items() if v is not None and not isinstance(v, dict)}
    if path and plain:
        lines.append(f"\n[{path}]")
    lines += [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in values.items():
        if isinstance(value, dict):
            _write_table(value, f"{path}.{key}" if path else key, lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escapes = {"\\": "\\\\", '"': '\\"'}
        return (
            '"'
            + "".join(
                escapes.get(c, c if ord(c) >= 32 and ord(c) != 127 else f"\\u{ord(c):04x}") for c in value
            )
            + '"'
        )
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in the file at `path`.

    Raises:
        InputError: missing, unreadable or malformed file.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read the config file {path}: {error.strerror}. Check the path.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"The config file {path} is not valid TOML: {error}.") from None
