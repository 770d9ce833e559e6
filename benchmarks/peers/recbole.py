"""RecBole's DSSM (pointwise on the cosine) and, as it has no multi-task model, its DeepFM on clicks, by its trainer.

Its two-tower model reads the tables of users and items alone: what is of the request is lost, and a user has one
history. Its test rows are drawn from all rows.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from benchmarks.peers import common
from benchmarks.peers.common import CONTEXT, ITEM, USER, Rows

MODELS = {"dssm": "DSSM", "mmoe": "DeepFM"}
SETTINGS = {
    **{"dataset": "rows", "use_gpu": False, "show_progress": False, "state": "ERROR", "load_col": None},
    **{"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LABEL_FIELD": "click", "threshold": None},
    **{"alias_of_item_id": ["history"], "seq_separator": " ", "numerical_features": [], "normalize_all": False},
    **{"embedding_size": common.DIM, "mlp_hidden_size": common.TOWERS, "dropout_prob": 0.0, "epochs": 1},
    **{"learning_rate": common.LR, "train_neg_sample_args": None, "metrics": ["AUC", "LogLoss"], "valid_metric": "AUC"},
    "eval_args": {"split": {"RS": [10 / 11, 0.0, 1 / 11]}, "group_by": None, "order": "RO", "mode": "labeled"},
}


def main() -> None:
    """Train an epoch, then score the test rows."""
    run = common.asked(*MODELS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder) / "rows", common.rows(run.data, "train"), common.rows(run.data, "test"))
        os.chdir(folder)  # it writes its log to where it is
        own = {"data_path": folder, "checkpoint_dir": f"{folder}/saved", "seed": run.seed}
        sizes = {"train_batch_size": run.batch, "eval_batch_size": 2 * run.batch}
        config = Config(model=MODELS[run.model], dataset="rows", config_dict=SETTINGS | own | sizes)
        init_seed(run.seed, True)
        train, _, test = data_preparation(config, create_dataset(config))
        model = get_model(MODELS[run.model])(config, train.dataset)
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        with common.Timed() as timed:
            trainer._train_epoch(train, 0, show_progress=False)
        found = trainer.evaluate(test, load_best_model=False, show_progress=False)
    timed.done(len(train.dataset), float(found["auc"]))


def _write(folder: Path, train: Rows, test: Rows) -> None:
    """Its files of tab-separated values: interactions, and users and items once each."""
    folder.mkdir()
    rows = {name: np.concatenate([train[name], test[name]]) for name in train}
    _table(folder / "rows.inter", rows, ["user_id", "item_id", *CONTEXT, "click"])
    for name, key, fields in (("user", "user_id", [*USER, "history"]), ("item", "item_id", [*ITEM])):
        _, first = np.unique(rows[key], return_index=True)
        _table(folder / f"rows.{name}", {field: rows[field][first] for field in fields}, fields)


def _table(path: Path, rows: Rows, fields: list[str]) -> None:
    kinds = {"history": "token_seq", "click": "float"}
    columns = [
        (" ".join(map(str, row)) for row in rows[name]) if rows[name].ndim == 2 else map(str, rows[name])
        for name in fields
    ]
    lines = [
        "\t".join(f"{name}:{kinds.get(name, 'token')}" for name in fields),
        *map("\t".join, zip(*columns, strict=True)),
    ]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
