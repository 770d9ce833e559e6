"""YAML files and `key=value` overrides, merged into one tree that remembers where everything was written.

Sources merge from low to high: the `base:` chain, the file, the overrides as given. Mappings merge, lists and
scalars replace, and `null` removes: it stays in the tree as a mark, which `settings.decode` acts upon.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import yaml

import joint
from joint.errors import ConfigError

MOST_KNOWN = 16  # names that a message lists


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written. Places sort by source, from the lowest to the highest, then by line."""

    layer: int  # 0 is the file that was read, its bases are below, 1 is the command line
    line: int
    text: str  # 'configs/sdcl.yaml:34' or 'run.seed=abc (command line)'


@dataclass(frozen=True)
class Tree:
    """A mapping of trees, a list of trees or a scalar, and where it was written."""

    value: Any
    place: Place
    text: str = field(default="", compare=False)  # a scalar as written: a `str` field takes it (no, 1e3, 007)
    removes: bool = field(default=False, compare=False)  # a null that stands over something


Problems = list[tuple[Place, str]]


class _Loader(yaml.SafeLoader):
    """Builds trees, and reports keys that a mapping holds twice."""

    def __init__(self, text: str, place_of: Callable[[int], Place], problems: Problems) -> None:
        super().__init__(text)
        self.place_of, self.problems = place_of, problems

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Tree:
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        return Tree(super().construct_object(node, deep=True), self.place_of(node.start_mark.line + 1), text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Tree]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a scalar", key.start_mark)
            if key.value in seen:
                self.problems.append((self.place_of(key.start_mark.line + 1), f"{key.value}: given twice"))
            seen.add(key.value)
        self.flatten_mapping(node)  # YAML's own merge key, '<<'
        # A value is placed at its key: a nested mapping itself only starts on the next line.
        return {
            key.value: replace(self.construct_object(value), place=self.place_of(key.start_mark.line + 1))
            for key, value in node.value
        }


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):  # PyYAML reads YAML 1.1, where 1e-3 is a string
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def read(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Tree:
    """Read `path`, its `base:` chain (each relative to the file that names it) and `a.b.c=value` overrides.

    An override's value is YAML (`[1, 2]`, `{kind: snr}`, nothing at all for null) after the first `=`.

    Raises:
        ConfigError: unreadable files, YAML mistakes, keys given twice, circular bases, malformed overrides.
    """
    problems: Problems = []
    layers = [*_chain(_shipped(os.fspath(path)), problems)][::-1]
    layers += [_override(text, number, problems) for number, text in enumerate(overrides)]
    raise_all(problems)
    return reduce(merge, layers)


def merge(lower: Tree, upper: Tree) -> Tree:
    """Lay `upper` over `lower`: mappings merge, lists and scalars replace, null removes."""
    if not (isinstance(lower.value, dict) and isinstance(upper.value, dict)):
        return replace(upper, removes=upper.value is None)
    children = dict(lower.value)
    for key, child in upper.value.items():
        children[key] = merge(children[key], child) if key in children else child
    # An override of a key deep inside is not where the mappings around it were written.
    return Tree(children, upper.place if upper.place.layer <= 0 else lower.place)


def _shipped(path: str) -> str:
    """The path itself, or where there is no such file the config of that name (`configs/…`) that was installed."""
    if os.path.exists(path) or not path.startswith("configs/"):
        return path
    package = os.path.dirname(os.path.abspath(joint.__file__))
    homes = package, os.path.dirname(package)  # of a wheel, of a checkout
    return next((own for home in homes if os.path.isfile(own := os.path.join(home, path))), path)


def _chain(path: str, problems: Problems) -> Iterator[Tree]:
    """The tree of `path`, then that of its base, and so on."""
    seen: list[str] = []
    while True:
        seen.append(os.path.realpath(path))
        tree = _file(path, 1 - len(seen), problems)
        base = tree.value.pop("base", Tree(None, tree.place))
        yield tree
        if base.value is None:
            return
        path = _shipped(os.path.normpath(os.path.join(os.path.dirname(path), base.text)))
        known = os.path.realpath(path) in seen
        if known or not os.path.isfile(path):
            problems.append((base.place, f"base: {path} is {'its own base' if known else 'not a file'}"))
            return


def _file(path: str, layer: int, problems: Problems) -> Tree:
    """The mapping in one file; an empty one where the file cannot be read."""
    tree = empty = Tree({}, Place(layer, 1, f"{path}:1"))
    try:
        with open(path, encoding="utf-8") as stream:
            tree = _parse(stream.read(), lambda line: Place(layer, line, f"{path}:{line}"), problems)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.append((Place(layer, 0, path), f"cannot be read: {reason}"))
    if tree.value is not None and not isinstance(tree.value, dict):
        problems.append((tree.place, f"expected a mapping, found {found(tree)}"))
    return tree if isinstance(tree.value, dict) else empty


def _override(text: str, number: int, problems: Problems) -> Tree:
    """The tree that `a.b.c=value` stands for."""
    place = Place(1, number, f"{text} (command line)")
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        problems.append((place, "expected key=value, with dots between nested keys"))
    tree = _parse(value, lambda line: place, problems)
    return reduce(lambda child, key: Tree({key: child}, place), reversed(path.split(".")), tree)


def _parse(text: str, place_of: Callable[[int], Place], problems: Problems) -> Tree:
    """The tree of one YAML document; null where it is empty or wrong."""
    try:
        return _Loader(text, place_of, problems).get_single_data() or Tree(None, place_of(1))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: PyYAML takes 0x_ for a number and fails
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        problems.append((place_of(mark.line + 1 if mark else 1), "not YAML: " + " ".join(what.split())))
        return Tree(None, place_of(1))


def write(value: Any) -> str:
    """YAML of plain dicts, lists and scalars, in the order given; short innermost collections on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def place(tree: Tree, path: str) -> str:
    """'file:line', or the override, of the deepest node that exists on the dotted `path`."""
    return find(tree, path).place.text


def find(tree: Tree, path: str) -> Tree:
    """The deepest node that exists on the dotted `path`; items of a list go by their index."""
    for key in path.split("."):
        children = tree.value
        if isinstance(children, list):
            children = {str(index): child for index, child in enumerate(children)}
        if not isinstance(children, dict) or key not in children:
            break
        tree = children[key]
    return tree


def at(tree: Tree, problems: Iterable[tuple[str, str]]) -> Problems:
    """(dotted path, message) pairs, each at its place in `tree`."""
    return [(find(tree, path).place, f"{path}: {text}" if path else text) for path, text in problems]


def raise_at(tree: Tree, problems: Iterable[tuple[str, str]]) -> None:
    """Raise one ConfigError for (dotted path, message) pairs, each at its place in `tree`, if any."""
    raise_all(at(tree, problems))


def raise_all(problems: Problems, *, most: int | None = None) -> None:
    """Raise one ConfigError for all problems, if any, in the order of their places.

    Of more than `most` the last line has the places of those that are left.
    """
    if problems:
        ordered = sorted(problems, key=lambda problem: problem[0])
        lines = [f"{place.text}: {message}" for place, message in ordered]
        if most and len(lines) > most:
            more = ordered[most - 1 :]
            places = ", ".join(dict.fromkeys(place.text for place, _ in more))
            lines[most - 1 :] = [f"… and {len(more)} more, at {places}"]
        raise ConfigError("\n".join(lines))


def near_miss(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the one of `known` that is close to `word`, or else '; known: A, B, C'."""
    known = list(known)
    said = [*known[:MOST_KNOWN], *(["…"] if len(known) > MOST_KNOWN else [])]
    return suggest(word, known) or ("; known: " + ", ".join(said) if said else "")


def suggest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the one of `known` that is close to `word`, or else ''."""
    close = nearest(word, known)
    return f"; did you mean {close}?" if close else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The one of `known` that is closest to `word`, or '' where none is close."""
    return "".join(difflib.get_close_matches(word, list(known), n=1))


def found(tree: Tree) -> str:
    """How a message names what was found: 'abc', 3, null, a list."""
    names = {dict: "a mapping", list: "a list", type(None): "null", str: repr(tree.text)}
    return names.get(type(tree.value), tree.text)
