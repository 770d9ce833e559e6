"""From a request to a list of items: retrieve, drop what is not eligible, pre-rank, rank if the teacher is there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from joint.data.eligibility import open_items, taken_items
from joint.data.requests import Requests
from joint.serving.diversity import Diversity, diversified
from joint.serving.errors import ExportError, RequestError
from joint.serving.index import Index
from joint.serving.inputs import Arrays, candidate_inputs, item_inputs, request_inputs
from joint.serving.items import Items
from joint.serving.manifest import Manifest, inside, version_folder
from joint.serving.requests import MOST_ITEMS, Request, RequestReader
from joint.serving.words import integer


@dataclass(frozen=True)
class Recommendation:
    """The answer to one request: items as logs write them, best first."""

    ids: list[object]
    scores: list[float]  # of the last stage
    stages: dict[str, int]  # stage -> the items it left
    milliseconds: dict[str, float] = field(compare=False)  # step -> how long it took; `total` is all
    version: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain lists and mappings."""
        return dict(self.__dict__)


class Recommender:
    """A version of an export, loaded. One recommender serves one request at a time; give each worker its own.

    Args:
        folder: a version, or a folder of versions, of which the newest is taken.
        pool: which index; by default that of the run's config.
        quotas: stage -> how many items it keeps (at least k); by default those of the run's config.
        threads: of every graph.
        verify: compare the SHA-256 of every file first. Integrity, not authenticity: sign the manifest elsewhere.

    Raises:
        ExportError: the folder is incomplete, changed or of mixed versions.
        RequestError: a quota is of no stage of this export, or not 1 to 100,000.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pool: str | None = None,
        quotas: Mapping[str, int] | None = None,
        threads: int = 1,
        verify: bool = True,
    ) -> None:
        self.manifest = Manifest(version_folder(Path(folder)))
        if verify:
            self.manifest.check_files()
        said = self.manifest.json
        self.version = f"{said['model']['name']}/{said['model']['version']}"
        self.tasks: list[str] = said["tasks"]
        self.items = Items(self.manifest)
        self.read = RequestReader(self.manifest, self.items)
        self.reads = {name: self.manifest.reads(name) for name in self.manifest.stages if name != "prerank_head"}
        self.graphs = {name: _session(self.manifest, name, threads) for name in self.manifest.stages}
        self.pool = said["eligibility"]["pool"] if pool is None else pool
        self.retrieves = "v" in self.items.vectors
        self.index = Index(self.manifest, self.items, self.pool) if self.retrieves else None
        self.quotas = _quotas(said["quotas"], quotas or {})

    def recommend(
        self,
        request: Request,
        k: int = 10,
        *,
        candidates: Sequence[object] | None = None,
        diversity: Diversity | None = None,
    ) -> Recommendation:
        """The best k items for a request; fewer where fewer are eligible.

        Args:
            candidates: rank these items instead of those that retrieval finds (other channels'); not eligible and
                unknown ones are left out.
            diversity: spread the list, by what items' vectors have in common.

        Raises:
            RequestError: a field is missing, unknown or of another kind, or there is nothing to retrieve from.
        """
        clock = _Clock()
        if not 0 < integer(k, "k") <= MOST_ITEMS:
            raise RequestError(f"k: expected 1 to {MOST_ITEMS}, found {k}")
        if candidates is None and self.index is None:
            raise RequestError("candidates: missing; this export has no retrieval head to find some")
        requests = self.read([request])
        given = None if candidates is None else self._given(candidates, requests)
        clock.lap("read")
        user = self.run("user_tower", request_inputs(self.reads["user_tower"], self.items.catalogue, requests))
        clock.lap("user_tower")
        rows, scores = self.retrieve(user, requests, self._quota("retrieval", k)) if given is None else (given, None)
        left = {"retrieval": len(rows)}
        clock.lap("retrieval")
        for stage, graph in (("pre_ranking", "prerank_head"), ("ranking", "ranking")):
            if graph not in self.graphs:
                continue
            scores = self.score(stage, user, requests, rows)
            last = stage == "ranking" or "ranking" not in self.graphs
            chosen = self._cut(scores, rows, k if last else self._quota(stage, k), stage, diversity)
            rows, scores = rows[chosen], scores[chosen]
            left[stage] = len(rows)
            if not last:  # as retrieval hands them on: in the order of the catalogue, which decides ties
                order = np.argsort(rows)
                rows, scores = rows[order], scores[order]
            clock.lap(stage)
        if scores is None:
            raise RequestError("candidates: this export has no stage after retrieval that could order them")
        if len(left) == 1:
            chosen = self._cut(scores, rows, k, "retrieval", diversity)
            rows, scores = rows[chosen], scores[chosen]
        return Recommendation(self.items.names(rows), scores.tolist(), left, clock.laps(), self.version)

    def retrieve(self, user: Arrays, requests: Requests, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best eligible rows of one request, ascending, and their scores."""
        assert self.index is not None
        weights = self.weights("retrieval", int(requests.scalars("group")[0]))
        query = weights @ user["u"][0]
        taken, day = self._taken(requests), int(requests.scalars("day")[0])
        later = len(self.index.joins) - int(np.searchsorted(self.index.joins, day, side="right"))
        rows, scores = self.index.search(query, count + len(taken) + later)  # as many more as may have to be dropped
        free = self._eligible(rows, taken, day)
        rows, scores = rows[free][:count], scores[free][:count]
        order = np.argsort(rows)
        return rows[order], scores[order]

    def score(self, stage: str, user: Arrays, requests: Requests, rows: np.ndarray) -> np.ndarray:
        """The fused scores `[N]` of the pre-ranking or the ranking head for candidates of one request."""
        if not len(rows):  # not every graph takes none
            return np.zeros(0, np.float32)
        if stage == "pre_ranking":
            logits = self.run("prerank_head", {"pu": user["pu"], "pi": self._pi(rows)})["logits"]
        else:
            inputs = candidate_inputs(self.reads["ranking"], self.items.catalogue, requests, rows)
            logits = self.run("ranking", inputs)["logits"]
        return self.fuse(stage, logits, int(requests.scalars("group")[0]))

    def fuse(self, stage: str, logits: np.ndarray, group: int) -> np.ndarray:
        """Σ_t w_t f_t(logit_t), `[N]` of `[N, T]`."""
        of = self.manifest.json["fusion"][stage]["of"]
        parts = [_transformed(logits[:, place], of[task]) for place, task in enumerate(self.tasks)]
        return np.stack(parts, axis=1) @ self.weights(stage, group)

    def weights(self, stage: str, group: int) -> np.ndarray:
        """The weight of each task in a stage's score, for this user group; float32 `[T]`."""
        fusion = self.manifest.json["fusion"][stage]
        weights = fusion["by_group"].get(str(group), fusion["default"])
        return np.array([weights[task] for task in self.tasks], np.float32)

    def run(self, graph: str, inputs: Arrays) -> Arrays:
        """A graph's outputs by name.

        Raises:
            RequestError: an input is missing or one too many, or of another type or shape, or so large that an output
                is not finite.
        """
        said = self.manifest.stages[graph]
        if inputs.keys() != set(said["inputs"]):
            wrong = sorted(inputs.keys() ^ set(said["inputs"]))
            raise RequestError(f"{graph}: inputs missing or unknown: {', '.join(wrong)}")
        for name, dtype in said["types"].items():
            if inputs[name].dtype != dtype:
                raise RequestError(f"{graph}: input {name} is {inputs[name].dtype}; expected {dtype}")
        try:
            found = self.graphs[graph].run(said["outputs"], inputs)
        except Exception as error:  # onnxruntime's own kinds
            raise RequestError(f"{graph}: {str(error).splitlines()[0]}") from error
        if not all(np.isfinite(output).all() for output in found):
            raise RequestError(f"{graph}: its answer is not finite; expected numbers like those of the log")
        return dict(zip(said["outputs"], found, strict=True))

    def item_vectors(self, rows: np.ndarray) -> Arrays:
        """`v` and `pi` of rows of the catalogue, made anew by the item tower."""
        return self.run("item_tower", item_inputs(self.reads["item_tower"], self.items.catalogue, rows))

    def _pi(self, rows: np.ndarray) -> np.ndarray:
        shape = self.manifest.json["dims"]["pi"]
        return np.take(self.items.vectors["pi"], rows, axis=0).reshape(len(rows), *shape)

    def _quota(self, stage: str, k: int) -> int:
        return max(int(self.quotas[stage]), k)

    def _taken(self, requests: Requests) -> np.ndarray:
        return np.unique(taken_items(requests, self.manifest.json["eligibility"]["not_eligible"]).values)

    def _eligible(self, rows: np.ndarray, taken: np.ndarray, day: int) -> np.ndarray:
        return open_items(self.items.first_day[self.pool], rows, day) & ~np.isin(rows, taken)

    def _given(self, candidates: Sequence[object], requests: Requests) -> np.ndarray:
        rows = np.unique(self.read.candidates(candidates))
        return rows[self._eligible(rows, self._taken(requests), int(requests.scalars("day")[0]))]

    def _cut(
        self, scores: np.ndarray, rows: np.ndarray, count: int, stage: str, diversity: Diversity | None
    ) -> np.ndarray:
        """The places of those that a stage keeps, best first."""
        if diversity is None:
            return np.argsort(-scores, kind="stable")[:count]
        keep = 0 if stage == "ranking" else diversity.keep
        vectors = self.items.vectors["v" if self.retrieves else "pi"][rows]
        return diversified(scores, vectors, count, weight=diversity.weight, keep=keep)


def _quotas(known: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    for stage, quota in given.items():
        if stage not in known:
            raise RequestError(f"quotas: no stage {stage!r}; expected {', '.join(known)}")
        if not 0 < integer(quota, f"quotas.{stage}") <= MOST_ITEMS:
            raise RequestError(f"quotas.{stage}: expected 1 to {MOST_ITEMS}, found {quota}")
    return {**known, **given}


def _transformed(logits: np.ndarray, of: str) -> np.ndarray:
    match of:
        case "sigmoid":
            return 1 / (1 + np.exp(-logits))
        case "exp":
            return np.exp(logits)
        case _:
            return logits


def _session(manifest: Manifest, graph: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = inside(manifest.folder, manifest.stages[graph]["file"])
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise ExportError(f"{path}: cannot be loaded ({str(error).splitlines()[0]})") from error


class _Clock:
    def __init__(self) -> None:
        self.began = self.before = time.perf_counter()
        self.found: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.found[name] = 1e3 * (now - self.before)
        self.before = now

    def laps(self) -> dict[str, float]:
        return self.found | {"total": 1e3 * (time.perf_counter() - self.began)}
