"""The same models by our trainer, as it is, its loader and reports included."""

from __future__ import annotations

from pathlib import Path

from benchmarks.recflow_way.log import Files
from benchmarks.recflow_way.theirs import WIDTH
from benchmarks.step import WARM_UP, trainer
from joint.config import load_config
from joint.data.dataset import Dataset
from joint.experiment import Config

CONFIGS = Path("configs/papers")
FEATURES = (
    *("weekday", "hour", "minute", "user_id", "device_id", "age", "gender", "province", "viewed"),
    *("video_id", "author_id", "category_level_two", "category_level_one", "upload_type"),
    *("upload_weekday", "upload_hour", "upload_minute"),
)
# the variant fs_ltr of configs/ablations/recflow_table5.yaml
FS_LTR = (
    "data.candidates={exposed: all, coarse_neg: 10, rank_neg: 10, rank_pos: 10, rerank_neg: 10, rerank_pos: 10}",
    "objectives.exposures=null",
    "objectives.order={head: pre_ranking, loss: pairwise, "
    "space: [positive, exposed_neg, rerank_pos, rank_pos, rerank_neg, rank_neg, coarse_neg]}",
)
MODELS = {  # name -> its file, its head, what else
    "DSSM": ("recflow_pre_ranking.yaml", "pre_ranking", ()),
    "FS-LTR": ("recflow_pre_ranking.yaml", "pre_ranking", FS_LTR),
    "DIN": ("recflow_ranking.yaml", "ranking", ()),
}


def our_config(model: str, dataset: Path, out: Path, *more: str, requests: int) -> Config:
    """A model of `MODELS` on the made-up log, with the features of time that the release's code has."""
    name, head, variant = MODELS[model]
    overrides = [f"tables.{table}.dim={WIDTH}" for table in ("weekday", "hour", "minute")]
    overrides += [f"data.path={dataset}", "data.not_eligible=[]", f"data.requests_per_batch={requests}"]
    overrides += [f"heads.{head}.features=[{','.join(FEATURES)}]", "data.epochs=9", f"run.dir={out}", "run.name=way"]
    return load_config(CONFIGS / name, [*overrides, *variant, *more])[0]


def epoch_seconds(config: Config, dataset: Dataset, files: Files) -> float:
    """Processor seconds of as many steps as an epoch has, after the first ones: reading its files is among them."""
    steps = -(-len(files.requests) // config.data.requests_per_batch)
    assert steps >= WARM_UP
    between, _, _ = trainer(config, dataset, steps)
    return float(between[:, 1].sum())
