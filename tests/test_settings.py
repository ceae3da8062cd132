"""Settings from and to TOML: what goes in comes out, and what does not fit is named."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlm.errors import InputError
from starlm.settings import from_dict, read_toml, to_dict, to_toml
from starlm.train.config import OptimConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: int = 0
    share: float = 0.0
    limit: int | None = None

    def __post_init__(self):
        if self.number == 13:
            raise InputError("number must not be 13.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    text: str = ""
    flag: bool = False
    path: Path = Path("a")
    names: tuple[str, ...] = ()
    paths: tuple[Path, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    kind: Literal["x", "y"] = "x"
    inner: Inner = field(default_factory=Inner)
    choice: float | None = None


paths = st.text(min_size=1).filter(lambda text: "\0" not in text).map(Path)
inners = st.builds(
    Inner,
    number=st.integers(-(2**63), 2**63 - 1).filter(lambda n: n != 13),
    share=st.floats(allow_nan=False),
    limit=st.none() | st.integers(0, 9),
)
outers = st.builds(
    Outer,
    text=st.text(),
    flag=st.booleans(),
    path=paths,
    names=st.lists(st.text(), max_size=3).map(tuple),
    paths=st.lists(paths, max_size=3).map(tuple),
    pair=st.tuples(st.integers(-9, 9), st.floats(allow_nan=False)),
    kind=st.sampled_from(["x", "y"]),
    inner=inners,
    choice=st.none() | st.floats(allow_nan=False),
)


@given(config=outers)
def test_toml_round_trip(config):
    assert from_dict(Outer, tomllib.loads(to_toml(config)), where="x") == config


@given(config=outers)
def test_dict_round_trip(config):
    assert from_dict(Outer, to_dict(config), where="x") == config


@given(config=outers, base=outers)
def test_a_whole_layer_hides_its_base(config, base):
    assert from_dict(Outer, to_dict(config), where="x", base=base) == config


@given(base=outers)
def test_an_empty_layer_changes_nothing(base):
    assert from_dict(Outer, {}, where="x", base=base) == base
    assert from_dict(Outer, {}, where="x", base=base, check=False) == base


def test_a_layer_changes_what_it_names():
    base = Outer(text="a", inner=Inner(number=1, share=0.5))
    layered = from_dict(Outer, {"inner": {"number": 2}}, where="x", base=base)
    assert layered == Outer(text="a", inner=Inner(number=2, share=0.5))


def test_unchecked_layers_skip_only_the_class_s_own_checks():
    assert (
        from_dict(Outer, {"inner": {"number": 13}}, where="x", base=Outer(), check=False).inner.number == 13
    )
    with pytest.raises(InputError, match="must be of type int"):
        from_dict(Outer, {"inner": {"number": "1"}}, where="x", base=Outer(), check=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"txt": "a"}, "Unknown key 'txt' in x.toml. Did you mean 'text'?"),
        ({"zzzzzz": 1}, "Unknown key 'zzzzzz' in x.toml. Known keys: text, flag, path,"),
        ({"inner": {"numbr": 1}}, "Unknown key 'inner.numbr' in x.toml. Did you mean 'number'?"),
        ({"inner": 3}, "inner in x.toml must be of type Inner; got 3."),
        ({"inner": {"number": 1.5}}, "inner.number in x.toml must be of type int; got 1.5."),
        ({"inner": {"number": True}}, "inner.number in x.toml must be of type int; got True."),
        ({"inner": {"share": True}}, "inner.share in x.toml must be of type float; got True."),
        ({"inner": {"limit": "a"}}, "inner.limit in x.toml must be of type int; got 'a'."),
        ({"inner": {"number": 13}}, "number must not be 13. (in x.toml)"),
        ({"flag": 1}, "flag in x.toml must be of type bool; got 1."),
        ({"text": None}, "text in x.toml must be of type str; got None."),
        ({"path": 1}, "path in x.toml must be of type Path; got 1."),
        ({"names": "abc"}, "names in x.toml must be of type tuple; got 'abc'."),
        ({"names": ["a", 1]}, "names in x.toml must be of type str; got 1."),
        ({"pair": [1]}, "pair in x.toml must be of type tuple; got [1]."),
        ({"kind": "z"}, "kind in x.toml must be one of x, y; got 'z'."),
        ({"choice": "1"}, "choice in x.toml must be of type float; got '1'."),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(InputError) as caught:
        from_dict(Outer, values, where="x.toml")
    assert message in str(caught.value)


def test_whole_numbers_are_fractions_too():
    value = from_dict(Inner, {"share": 2}, where="x").share
    assert (value, type(value)) == (2.0, float)


def test_train_config_round_trip():
    config = TrainConfig(out=Path("runs/x"), steps=3, sample_prompts=('a\n"b"\\', ""))
    assert from_dict(TrainConfig, tomllib.loads(to_toml(config)), where="x") == config


def test_read_toml(tmp_path):
    path = tmp_path / "a.toml"
    with pytest.raises(InputError, match=r"Cannot read the config file .*a\.toml: No such file"):
        read_toml(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not valid TOML"):
        read_toml(path)
    path.write_text("a = " + "[" * 100_000)
    with pytest.raises(InputError, match="is not valid TOML"):
        read_toml(path)
    path.write_text("a = 1\n[b]\nc = 'd'\n")
    assert read_toml(path) == {"a": 1, "b": {"c": "d"}}


def test_what_is_made_in_python_has_the_types_that_are_declared():
    made = TrainConfig(steps=np.int64(3), optim=OptimConfig(clip=2), sample_prompts=["a"], data="there")
    assert (type(made.steps), type(made.optim.clip), made.sample_prompts) == (int, float, ("a",))
    assert made.data == Path("there")
    with pytest.raises(InputError, match=r"steps in TrainConfig must be of type int; got 2\.5"):
        TrainConfig(steps=2.5)
    with pytest.raises(InputError, match=r"optim\.clip in OptimConfig must be of type float; got 'x'"):
        OptimConfig(clip="x")

    @dataclass(frozen=True, kw_only=True)
    class More(OptimConfig):
        NAME: ClassVar[str] = "x"
        number: int = 1

    assert More(number=3).number == 3
    with pytest.raises(InputError, match="model must be a StarLMConfig; got 3"):
        TrainConfig(model=3)
