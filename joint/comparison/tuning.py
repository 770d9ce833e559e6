"""The same search for every variant: so many draws of the same numbers, judged on the validation part."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from joint.configuring import settings
from joint.errors import ConfigError
from joint.experiment import Config

TRIAL_SEED = 1000  # of the training of all trials; far from those of the runs that count


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Trial 0 is the variant as written; each of the `trials` after it draws every number log-uniformly."""

    trials: int
    over: dict[str, tuple[float, float]]  # dotted key -> its lowest and highest value

    def __post_init__(self) -> None:
        wrong = [f"trials must be at least 1, found {self.trials}"] if self.trials < 1 else []
        for key, (low, high) in self.over.items():
            if not 0 < low < high < math.inf:
                wrong.append(f"over: {key} must be a range above 0, low before high, found {low:g} to {high:g}")
        if wrong:
            raise ValueError("\n".join(wrong))

    def draw(self, trial: int) -> dict[str, float]:
        """The values of a trial: a function of its number and each key alone, so the same for every variant."""
        if trial == 0:
            return {}
        found = {}
        for key, (low, high) in self.over.items():
            share = np.random.default_rng([zlib.crc32(key.encode()), trial]).random()
            found[key] = float(f"{low * (high / low) ** share:.4g}")
        return found

    def values(self, config: Config, trial: int) -> dict[str, float]:
        """Those of a trial's values that a variant has a place for."""
        return {key: value for key, value in self.draw(trial).items() if key in reach(config, self)}

    def configs(self, config: Config) -> dict[str, Config]:
        """`trial-K` -> the experiment to judge: without the validation part in training, measured on it.

        A variant that has none of the keys has one trial only: there is nothing to choose.
        """
        valid = config.evaluation.valid
        train = tuple(part for part in config.data.train if part != valid)
        if not train:
            raise ConfigError(f"tune: data.train holds only {valid}, which trials are judged on")
        judged = replace(
            config, data=replace(config.data, train=train), evaluation=replace(config.evaluation, test=valid)
        )
        trials = self.trials if reach(config, self) else 0
        return {f"trial-{t}": applied(judged, self.values(config, t)) for t in range(trials + 1)}


def reach(config: Config, tune: Tune) -> list[str]:
    """The keys to be tuned that this experiment has, as numbers with a fraction."""

    def child(node: Any, key: str) -> Any:
        return node.get(key) if isinstance(node, dict) else None

    plain = settings.plain(config)
    return [key for key in tune.over if isinstance(reduce(child, key.split("."), plain), float)]


def applied(config: Config, values: Mapping[str, float]) -> Config:
    """The experiment with values at dotted keys.

    Raises:
        ConfigError: a value is not allowed there.
    """
    for key, value in values.items():
        try:
            config = _with(config, key, value)
        except ValueError as error:
            raise ConfigError(f"tune.over.{key}: {value:g} is drawn, but {error}") from error
    return config


def _with(node: Any, path: str, value: float) -> Any:
    key, _, rest = path.partition(".")
    child = node[key] if isinstance(node, dict) else getattr(node, key)
    changed = {key: _with(child, rest, value) if rest else value}
    return replace(node, **changed) if is_dataclass(node) and not isinstance(node, type) else node | changed
