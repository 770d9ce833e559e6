"""Config machinery: merging, places, decoding, every error at once, and the way back."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from joint.configuring.settings import Tree, decode, differences, dump, merge, place, read
from joint.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Mmoe:
    experts: int
    kind: Literal["mmoe"] = "mmoe"
    hidden: tuple[int, ...] = (64,)


@dataclass(frozen=True, kw_only=True)
class Snr:
    kind: Literal["snr"] = "snr"
    beta: float = 2 / 3
    mode: Literal["trans", "aver"] = "trans"

    def __post_init__(self) -> None:
        wrong = ["beta must be positive, found " + str(self.beta)] if self.beta <= 0 else []
        wrong += ["mode: aver needs beta below 1"] if self.mode == "aver" and self.beta >= 1 else []
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass(frozen=True, kw_only=True)
class Head:
    trunk: Mmoe | Snr
    similarity: Literal["dot", "cosine"] = "dot"
    features: Literal["all"] | tuple[str, ...] = "all"


@dataclass(frozen=True, kw_only=True)
class Adam:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    warmup: int | Literal["auto"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    seed: int = 0
    debug: bool = False
    heads: dict[str, Head] = field(default_factory=dict)
    ranking: Head | None = None
    adam: Adam = Adam()
    notes: dict[str, int | float | bool | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    baseline: str
    variants: dict[str, Tree]


def of(hint: Any) -> type[Any]:
    """A dataclass with the one field `x: hint`."""
    return dataclass(frozen=True)(type("One", (), {"__annotations__": {"x": hint}}))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tree_of(text: str, *overrides: str, name: str = "c.yaml") -> Tree:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return read(name, overrides)


def value_of(hint: Any, text: str) -> Any:
    return decode(tree_of(f"x: {text}"), of(hint)).x


def errors_of(text: str, *overrides: str, cls: Any = Config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        decode(tree_of(text, *overrides), cls)
    return str(caught.value).splitlines()


# Scalars and unions


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "1_000_000", 1_000_000),
        (int, "'3'", 3),
        (float, "1e-3", 0.001),
        (float, "-2.5E+3", -2500.0),
        (float, "3", 3.0),
        (float, ".inf", math.inf),
        (float, "inf", math.inf),
        (bool, "yes", True),
        (bool, "false", False),
        (str, "no", "no"),  # not False: the text as written
        (str, "007", "007"),
        (str, "1e3", "1e3"),
        (str, "2026-13-99", "2026-13-99"),
        (str, "''", ""),
        (str, "'null'", "null"),
        (Literal["on", "off"], "on", "on"),  # YAML 1.1 reads on as true
        (Literal[1, 2], "2", 2),
        (int | Literal["all"], "all", "all"),
        (Literal["auto"] | int, "7", 7),
        (int | float, "3", 3),
        (float | int, "3", 3),
        (int | float, "1e-3", 0.001),
        (int | str, "'5'", "5"),
        (bool | str, "yes", True),
        (int | None, "null", None),
        (tuple[int | None, ...], "[1, null]", (1, None)),
        (tuple[int, str], "[1, 2]", (1, "2")),
        (tuple[tuple[int, ...], ...], "[[1], []]", ((1,), ())),
        (Literal["all"] | tuple[str, ...], "[a]", ("a",)),
        (Literal["all"] | tuple[str, ...], "all", "all"),
        (dict[str, tuple[int, ...]], "{5: [1]}", {"5": (1,)}),
    ],
)
def test_scalars_lists_and_unions(hint: Any, text: str, value: Any) -> None:
    found = value_of(hint, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("hint", "text", "message"),
    [
        (int, "abc", "expected an integer, found 'abc'"),
        (int, "1.5", "expected an integer, found 1.5"),
        (int, "1e6", "expected an integer, found 1e6"),
        (int, "true", "expected an integer, found true"),
        (float, "true", "expected a number, found true"),
        (float, "[1]", "expected a number, found a list"),
        (bool, "1", "expected true or false, found 1"),
        (bool, "maybe", "expected true or false, found 'maybe'"),
        (str, "{a: 1}", "expected a string, found a mapping"),
        (Literal["adam", "adamw"], "adan", "'adan' is not one of adam, adamw; did you mean adam?"),
        (Literal["adam"], "5", "5 is not adam"),
        (Literal[1, 2], "true", "true is not one of 1, 2"),
        (Literal["adam"] | None, "adm", "'adm' is not adam; did you mean adam?"),
        (int | Literal["all"], "al", "expected an integer or all, found 'al'; did you mean all?"),
        (Literal["all"] | tuple[str, ...], "x", "expected a list or all, found 'x'"),
        (Literal["all"] | tuple[str, ...], "{}", "expected a list or all, found a mapping"),
        (tuple[str, ...], "a", "expected a list, found 'a'"),
        (tuple[float, float], "[0.9]", "expected 2 items, found 1"),
        (dict[str, int], "3", "expected a mapping, found 3"),
        (Head, "[]", "expected a mapping, found a list"),
    ],
)
def test_what_was_expected_and_what_was_found(hint: Any, text: str, message: str) -> None:
    assert errors_of(f"x: {text}", cls=of(hint)) == [f"c.yaml:1: x: {message}"]


def test_items_of_a_list_are_named_by_their_index_and_line() -> None:
    assert errors_of("x:\n- 1\n- [a]\n- b", cls=of(tuple[int, ...])) == [
        "c.yaml:3: x.1: expected an integer, found a list",
        "c.yaml:4: x.2: expected an integer, found 'b'",
    ]


def test_null_in_a_list_is_nothing_to_remove() -> None:
    assert errors_of("x: [1, null]", cls=of(tuple[int, ...])) == ["c.yaml:1: x.1: expected an integer, found null"]


# Dataclasses and tagged unions


def test_defaults_and_nesting() -> None:
    config = decode(tree_of("name: a\nheads:\n  ranking: {trunk: {kind: mmoe, experts: 4}}\nadam: {lr: 1e-4}"), Config)
    assert config == Config(name="a", heads={"ranking": Head(trunk=Mmoe(experts=4))}, adam=Adam(lr=1e-4))


@pytest.mark.parametrize(
    ("trunk", "message"),
    [
        ("{experts: 4}", "trunk.kind: missing; expected one of mmoe, snr"),
        ("{kind: null}", "trunk.kind: missing; expected one of mmoe, snr"),
        ("{kind: mmo}", "trunk.kind: 'mmo' is not one of mmoe, snr; did you mean mmoe?"),
        ("{kind: [a]}", "trunk.kind: a list is not one of mmoe, snr"),
        ("mmoe", "trunk: expected a mapping, found 'mmoe'"),
        ("{kind: mmoe}", "trunk.experts: missing; expected an integer"),
        ("{kind: snr, experts: 3}", "trunk.experts: unknown key; known: kind, beta, mode"),
    ],
)
def test_the_tag_chooses_the_dataclass(trunk: str, message: str) -> None:
    assert errors_of(f"name: a\nranking:\n  trunk: {trunk}") == [f"c.yaml:3: ranking.{message}"]


def test_dataclasses_without_a_telling_field_are_a_bug() -> None:
    with pytest.raises(TypeError, match="no Literal field tells Adam, Config apart"):
        value_of(Adam | Config, "{}")


def test_every_error_at_once_in_file_order() -> None:
    text = """\
seed: abc
heads:
  ranking:
    trunk:
      kind: snr
      bta: 1
    similarity: dott
  retrieval: {}
adam:
  lr: fast
  wamup: 3
"""
    assert errors_of(text, "debug=perhaps", "adam.clip=x") == [
        "c.yaml:1: name: missing; expected a string",
        "c.yaml:1: seed: expected an integer, found 'abc'",
        "c.yaml:6: heads.ranking.trunk.bta: unknown key; did you mean beta?",
        "c.yaml:7: heads.ranking.similarity: 'dott' is not one of dot, cosine; did you mean dot?",
        "c.yaml:8: heads.retrieval.trunk: missing; expected a mapping",
        "c.yaml:10: adam.lr: expected a number, found 'fast'",
        "c.yaml:11: adam.wamup: unknown key; did you mean warmup?",
        "debug=perhaps (command line): debug: expected true or false, found 'perhaps'",
        "adam.clip=x (command line): adam.clip: expected a number, found 'x'",
    ]


def test_errors_of_post_init_are_placed_at_the_field_they_open_with() -> None:
    assert errors_of("name: a\nranking:\n  trunk:\n    kind: snr\n    beta: -1") == [
        "c.yaml:5: ranking.trunk.beta: must be positive, found -1.0"
    ]
    text = "name: a\nranking:\n  trunk:\n    kind: snr\n    beta: 1"
    assert errors_of(text, "ranking.trunk.mode=aver") == [
        "ranking.trunk.mode=aver (command line): ranking.trunk.mode: aver needs beta below 1"
    ]


def test_errors_of_post_init_without_a_field_are_placed_at_the_mapping() -> None:
    @dataclass(frozen=True)
    class Pair:
        low: int = 0
        high: int = 0

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("an empty range" if self.high else "")

    assert errors_of("x:\n  low: 2\n  high: 1", cls=of(Pair)) == ["c.yaml:1: x: an empty range"]
    assert errors_of("low: 1", cls=Pair) == ["c.yaml:1: not valid"]


# Null and overlays


def test_null_is_none_or_the_default_or_the_entry_gone() -> None:
    text = "name: a\nseed: 5\nadam: {clip: 2.0}\nranking: {trunk: {kind: snr}}\nnotes: {a: 1}\n"
    text += "heads: {a: {}, b: {trunk: {kind: snr}}}"
    overrides = ("seed=null", "adam.clip=null", "ranking=null", "heads.a=null", "notes.a=null")
    config = decode(tree_of(text, *overrides), Config)
    assert config.seed == 0
    assert config.adam.clip is None
    assert config.ranking is None
    assert list(config.heads) == ["b"]
    assert config.notes == {"a": None}  # the entry's own type has None


def test_null_for_a_required_field_leaves_it_missing() -> None:
    assert errors_of("name: a", "name=null") == ["name=null (command line): name: missing; expected a string"]


def test_null_that_removes_nothing_is_an_error() -> None:
    text = "name: a\nheads: {ranking: {trunk: {kind: snr}}}"
    assert errors_of(text, "heads.rankin=null", "sed=null") == [
        "heads.rankin=null (command line): heads.rankin: nothing to remove; did you mean ranking?",
        "sed=null (command line): sed: unknown key; did you mean seed?",
    ]


def test_an_overlay_changes_the_kind_and_drops_the_old_keys() -> None:
    text = "name: a\nranking: {trunk: {kind: mmoe, experts: 4}}"
    assert errors_of(text, "ranking.trunk.kind=snr") == [
        "c.yaml:2: ranking.trunk.experts: unknown key; known: kind, beta, mode"
    ]
    tree = tree_of(text, "ranking.trunk={kind: snr, experts: null}")
    assert decode(tree, Config).ranking == Head(trunk=Snr())


def test_overlays_are_kept_as_trees_and_merged_later() -> None:
    sweep = decode(tree_of("baseline: a\nvariants:\n  b: {seed: 3, ranking: null}"), Sweep)
    base = tree_of("name: a\nseed: 1\nranking: {trunk: {kind: snr}}")
    merged = merge(base, sweep.variants["b"])
    assert decode(merged, Config) == Config(name="a", seed=3)
    assert place(merged, "seed") == "c.yaml:3"
    assert decode(base, Config).seed == 1


# The way back


ROUND_TRIPS = [
    Config(name="a"),
    Config(
        name="1e-3",
        seed=-1,
        debug=True,
        heads={
            "b": Head(trunk=Mmoe(experts=2, hidden=())),
            "a": Head(trunk=Snr(mode="aver"), features=("x", "no")),
        },
        ranking=Head(trunk=Snr(beta=1e-30)),
        adam=Adam(lr=math.inf, betas=(1e-3, 1e22), clip=None, warmup=3),
        notes={
            "a": "1e-3",
            "b": "5",
            "c": 5,
            "d": 1e-3,
            "e": None,
            "f": "null",
            "g": True,
            "h": "yes",
            "i": "2026-01-02",
        },
    ),
    Config(
        name="ünï: # 'x'\n y",
        notes={"": "", "0": "~", "<<": "=", "on": 1e16, "x": 5.0, "y": "1_0", "z": "0x1f"},
    ),
]


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_dump_and_read_give_the_same_config(config: Config) -> None:
    again = decode(tree_of(dump(config)), Config)
    assert again == config
    assert repr(again) == repr(config)  # 5 and 5.0 are equal


def test_dump_writes_defaults_in_field_order() -> None:
    assert (
        dump(Config(name="a", ranking=Head(trunk=Mmoe(experts=4))))
        == """\
name: a
seed: 0
debug: false
heads: {}
ranking:
  trunk:
    experts: 4
    kind: mmoe
    hidden: [64]
  similarity: dot
  features: all
adam:
  lr: 0.001
  betas: [0.9, 0.999]
  clip: 1.0
  warmup: auto
notes: {}
"""
    )


def test_differences_name_the_key_and_both_values() -> None:
    a = Config(name="a", heads={"x": Head(trunk=Snr()), "y": Head(trunk=Snr())}, adam=Adam(lr=0.1, betas=(0.5, 0.5)))
    b = replace(a, name="b", adam=replace(a.adam, betas=(0.5, 0.9)), heads={"x": a.heads["x"]}, seed=3)
    lines = differences(a, b)
    assert lines[:2] == ["name: 'a' != 'b'", "seed: 0 != 3"]
    assert lines[2].startswith("heads.y: {'trunk': ")
    assert lines[2].endswith(" != (absent)")
    assert lines[3:] == ["adam.betas: [0.5, 0.5] != [0.5, 0.9]"]
    assert differences(a, a) == []
    assert differences(a, tree_of(dump(a))) == []
    assert differences({"x": 1}, {"x": {"y": 1}}) == ["x: 1 != {'y': 1}"]
