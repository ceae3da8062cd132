"""Options of a verb: defaults < preset < TOML file < command line, resolved in one place for all verbs."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from difflib import get_close_matches
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, get_type_hints

import tyro

from starlm.errors import InputError
from starlm.settings import from_dict, read_toml, to_dict, to_toml

if TYPE_CHECKING:
    from starlm.cli.console import Console

# Further lines of a field's docstring come from docstring_parser with their indentation, at which tyro breaks
# the help in mid-sentence. Where a later version has nothing of this name, help is as it makes it.
with suppress(ImportError, AttributeError):
    from docstring_parser import attrdoc

    _raw = attrdoc.ast_get_constant_value

    def _clean(node: Any) -> Any:
        value = _raw(node)
        return cleandoc(value) if isinstance(value, str) else value

    attrdoc.ast_get_constant_value = _clean

# Help is about no run and no model, and must not look for any.
_HELP = {"-h", "--help"}
O = TypeVar("O")  # noqa: E741
Layer = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Verb(Generic[O]):
    """One verb of the command line."""

    options: type[O]
    """Frozen dataclass; the docstring under each field is its help."""
    run: Callable[[O, "Console"], dict[str, Any]]
    """Does the work; what it returns is the object of --json."""
    base: Layer = field(default_factory=dict)
    """Where the verb's defaults differ from those of `options`."""
    presets: Mapping[str, Layer] = field(default_factory=dict)
    """Named settings, in the form of the TOML file."""
    one_of: frozenset[str] = frozenset()
    """Options that exclude each other: one of them in a layer puts those of the layers below out of force."""
    follow: Callable[[O], Layer] | None = None
    """Defaults that follow from other options, such as a model's vocabulary from its data; above a preset."""
    follows: tuple[str, ...] = ()
    """The options that they follow from: paths."""
    resumes: tuple[str, str] | None = None
    """An option that names a folder, and a TOML file there: it stands for --config, where neither that nor
    --preset is given."""
    read_config: Callable[[Path], Layer] = read_toml
    """Reads the files of `resumes` and --config."""
    plan: Callable[[O], dict[str, Any]] | None = None
    """What --dry-run adds to the resolved configuration."""
    rerun: str = "Nothing was kept; run the same command again to start over."
    """What happens when the command is given again after Ctrl+C."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Options of every verb."""

    dry_run: bool
    json: bool


def resolve(prog: str, summary: str, verb: Verb[O], argv: list[str]) -> tuple[O, Shared]:
    """The verb's options and the shared ones from the command line and the files that it names.

    Raises:
        InputError: unknown preset, unusable TOML file, impossible value.
        SystemExit: help was asked for (0) or the command line is wrong (2); tyro has printed why.
    """
    options = _layers(verb, argv, {})
    if verb.follow and not _HELP & set(argv):
        # What it follows from are paths, which may stand on the command line as well.
        given = {name: value for name in verb.follows if (value := _value_of(f"--{name}", argv)) is not None}
        known = _overlay(verb, options, given, "the command line")
        options = _layers(verb, argv, verb.follow(known))
    config = _value_of("--config", argv)
    names = _names(argv)
    if config is not None and names <= {"config", "preset", "dry_run", "json", "debug"}:
        # Nothing can come to mend what the file says, so the error may name it.
        from_dict(verb.options, to_dict(options), where=config)
    options = _overlay(verb, options, {}, "the command line", given=names)
    shared = _shared(verb)
    parser: Any = make_dataclass(
        "Parser", [("options", _unprefixed(verb.options)), ("shared", _unprefixed(shared))], kw_only=True
    )
    # The first letter as a sentence has it.
    about = f"{summary[0].upper()}{summary[1:]}."

    def parse(options: O) -> tuple[O, Shared]:
        default = parser(options=options, shared=shared())
        result = tyro.cli(parser, prog=prog, description=about, args=argv, default=default)
        return result.options, Shared(dry_run=result.shared.dry_run, json=result.shared.json)

    if verb.one_of & _marked(verb.options, tyro.conf.Positional):
        # What stands without a name is not among `names`; tyro finds it, where nothing below excludes it.
        found = parse(_overlay(verb, options, {}, "the command line", given=verb.one_of))
        if any(getattr(found[0], name) is not None for name in verb.one_of):
            return found
    return parse(options)


def _layers(verb: Verb[O], argv: list[str], follow: Layer) -> O:
    """Everything below the command line, with a layer right above the preset; not checked as a whole."""
    options = from_dict(verb.options, dict(verb.base), where="the defaults")
    preset, config = _value_of("--preset", argv), _value_of("--config", argv)
    if preset is not None:
        options = _overlay(verb, options, _preset(verb, preset), f"preset {preset}")
    options = _overlay(verb, options, follow, "the defaults")
    if verb.resumes and preset is None and config is None and not _HELP & set(argv):
        option, name = verb.resumes
        file = Path(_value_of(f"--{option}", argv) or getattr(options, option)) / name
        if file.is_file():
            # Where it was looked for, also if it has moved there from elsewhere.
            layer = {**verb.read_config(file), option: str(file.parent)}
            options = _overlay(verb, options, layer, str(file))
    if config is not None:
        options = _overlay(verb, options, verb.read_config(Path(config)), config)
    return options


def _unprefixed(cls: type) -> Any:
    return Annotated[cls, tyro.conf.arg(name="")]


def _shared(verb: Verb) -> Any:
    """The options of every verb as tyro reads them; --preset only where there are presets."""
    preset: Any = tyro.conf.Suppress[str | None]
    if verb.presets:
        names = "{" + ",".join(verb.presets) + "}"
        preset = Annotated[str | None, tyro.conf.arg(metavar=names, help=_PRESET)]
    shared = [
        ("preset", preset, None),
        ("config", Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml", help=_CONFIG)], None),
        ("dry_run", _flag("Print the resolved configuration and run nothing."), False),
        ("json", _flag("Put one JSON object on the last line of stdout; other text goes to stderr."), False),
        ("debug", _flag("Print the traceback of an error."), False),
    ]
    return make_dataclass("Shared", shared, kw_only=True)


_PRESET = "Named settings; a TOML file and the command line take precedence."
_CONFIG = "TOML file of options by the same names; the command line takes precedence."


def _flag(text: str) -> Any:
    return Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=text)]


def _preset(verb: Verb, name: str) -> Layer:
    if name in verb.presets:
        return verb.presets[name]
    near = get_close_matches(name, verb.presets, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(verb.presets) or 'none here'}."
    raise InputError(f"Unknown preset {name!r}. {hint}")


def _overlay(verb: Verb[O], options: O, layer: Layer, where: str, given: frozenset[str] = frozenset()) -> O:
    """`options` with a layer on top; whether it makes sense as a whole is checked when all layers are there.

    Args:
        given: further names that the layer sets, for `one_of`, and for what may be given again: tyro appends
            that to what it finds there.
    """
    cleared: dict[str, Any] = dict.fromkeys(given & _marked(verb.options, tyro.conf.UseAppendAction), ())
    if verb.one_of & (layer.keys() | given):
        cleared |= dict.fromkeys(verb.one_of)
    return from_dict(verb.options, {**cleared, **layer}, where=where, base=options, check=False)


def _marked(options: type, marker: Any) -> frozenset[str]:
    """The options that have this marker of tyro's."""
    hints = get_type_hints(options, include_extras=True)
    return frozenset(name for name, hint in hints.items() if marker in getattr(hint, "__metadata__", ()))


def _value_of(flag: str, argv: list[str]) -> str | None:
    """The last value of a flag, as `--flag value` or `--flag=value`; `_` in it may be written as `-`."""
    found = None
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == flag.replace("-", "_"):
            found = value if equals else next(iter(argv[index + 1 :]), None)
    return found


def _names(argv: list[str]) -> frozenset[str]:
    return frozenset(word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--"))


def dry_run(verb: Verb[O], options: O, console: "Console") -> dict[str, Any]:
    """Print the configuration as TOML, and the verb's plan as its comments; both as a result."""
    plan = verb.plan(options) if verb.plan else {}
    console.say(to_toml(options).rstrip())
    if plan:
        console.say()
        console.table([(f"# {name}", text) for name, text in _flat(plan)])
    return {"config": to_dict(options), **({"plan": plan} if plan else {})}


def _flat(plan: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in plan.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}: ")
        else:
            rows.append((f"{prefix}{name}", f"{value:,}" if isinstance(value, int) else f"{value:.3g}"))
    return [(name.replace("_", " "), text) for name, text in rows]
