"""What a run says in words: its opening, a line an epoch, and the table at its end."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence

from torchrec.distributed import DistributedModelParallel

from joint.checkpoint import Progress
from joint.cost import Cost, funnel_costs
from joint.data.dataset import Dataset
from joint.data.loader import Loader
from joint.data.planted.truth import LIST
from joint.distributed import world_size
from joint.evaluating.alignment import STUDENTS
from joint.experiment import Config, heads_of
from joint.features import Plan
from joint.sizes import size_text

WIDTH = 120  # columns of a terminal
THIN = 0.75  # of the requests asked for: batches that hold fewer are worth a warning
NO_BREAK = "\u00a0"


def opening(
    plan: Plan,
    dataset: Dataset,
    loader: Loader,
    model: DistributedModelParallel,
    costs: Mapping[str, Cost],
    progress: Progress,
    total: int,
) -> str:
    """What is about to be trained, on what, from where, and what each head costs."""
    config = plan.config
    rows = sum(table.rows for table in plan.tables)
    table_bytes = sum(table.rows * table.dim * 4 for table in plan.tables)
    trained = {objective.head for objective in config.objectives.values()}
    dense = sum(p.numel() for name, p in model.named_parameters() if "embeddings." not in name)
    begin = f"resuming after step {progress.step}" if progress.step else "starting"
    begin = begin if progress.step < total else "trained to its end before, and measured again"
    batches = f"{config.data.requests_per_batch} ({loader.mean_requests:.1f} on average)"
    return "\n".join(
        [
            f"{config.run.name}: {dataset.directory}, {dataset.schema.items:,} items; {loader.requests:,} requests x "
            f"{config.data.epochs} epochs, {total} steps of {batches} on {world_size()} rank(s)",
            f"heads {', '.join(heads_of(config))}; {len(plan.tables)} tables of {rows:,} rows "
            f"({size_text(table_bytes)}), {dense:,} dense parameters; {begin}",
            *collision_lines(plan),
            *aligned(cost_cells(costs)),
            *(f"warning: {line}" for line in thin_batches(loader)),
            *(f"no objective trains the {head} head" for head in heads_of(config) if head not in trained),
        ]
    )


def thin_batches(loader: Loader) -> list[str]:
    """A line where batches hold far fewer requests than asked for: the reason that costs most, and what to do."""
    asked, real = loader.data.requests_per_batch, loader.mean_requests
    if real >= THIN * asked:
        return []
    days = [sum(part.rows for part in parts) for parts in loader.days.values()]
    even = sum(days) / sum(math.ceil(rows / asked) for rows in days)  # were all shards of a day equally long
    if even / asked < real / even:
        why = f"a day of {sum(days) / len(days):,.0f} ends with what is left; lower data.requests_per_batch"
    else:
        why = f"a day's row groups go to {loader.data.shards} shards, some run out early; lower data.shards"
    return [f"{real:.1f} requests a batch on average, not {asked}: {why}"]


def collision_lines(plan: Plan) -> list[str]:
    """A line for every hashed table: how many of its ids are not alone in their row."""
    return [
        f"table {space} is hashed: {rate:.1%} of {plan.id_spaces[space] - 1:,} ids share one of "
        f"{plan.config.tables[space].rows:,} rows with another"
        for space, rate in plan.collisions.items()
    ]


def cost_cells(costs: Mapping[str, Cost]) -> list[list[str]]:
    """The table of what heads cost, its heading first."""
    heading = ["multiply-adds", "a request", "an item", "a candidate", "parameters"]
    return [heading] + [
        [head, f"{c.request:,}", f"{c.item:,}" if c.item else "-", f"{c.candidate:,}", f"{c.parameters:,}"]
        for head, c in costs.items()
    ]


def highlights(config: Config, found: Mapping[str, float]) -> list[str]:
    """A few figures of a model: recall of each head, AUC of the teacher, what the funnel lets through."""
    task = config.evaluation.task
    first = min(config.evaluation.k)
    names = [f"{head}/recall@{first}" for head in heads_of(config)]
    names += [f"{head}/auc/{task}" for head in heads_of(config)]
    names += ["alignment/reverse_rate/fused", *(name for name in found if re.match("funnel/(?!lost/)", name))]
    return [f"{name} {found[name]:.4f}" for name in names if name in found]


def tables(config: Config, found: Mapping[str, float]) -> str:
    """What was measured of a model: its heads, funnel and baselines; below, how near students are to their teacher."""
    return "\n\n".join(filter(None, (table(config, found), alignment_table(config, found))))


def table(config: Config, found: Mapping[str, float]) -> str:
    """Heads, funnel and baselines by recall, AUC and reverse rate; then the funnel, stage by stage."""
    baselines = dict.fromkeys("/".join(name.split("/")[:2]) for name in found if name.startswith("baselines/"))
    columns = (
        [f"true_reward@{LIST}"]
        + [f"recall@{k}" for k in config.evaluation.k]
        + [f"auc/{task}" for task in config.tasks]
        + ["reverse_rate/fused"]
    )
    aliases = {
        "retrieval/reverse_rate/fused": "alignment/retrieval_reverse_rate/fused",
        "pre_ranking/reverse_rate/fused": "alignment/reverse_rate/fused",
    }
    if config.evaluation.quotas:
        last, quota = list(config.evaluation.quotas.items())[-1]
        aliases[f"funnel/recall@{quota}"] = f"funnel/{last}/recall@{quota}"
    cells = {
        row: [found.get(aliases.get(f"{row}/{column}", f"{row}/{column}"), math.nan) for column in columns]
        for row in [*heads_of(config), "funnel", *baselines]
    }
    known = [i for i in range(len(columns)) if any(not math.isnan(values[i]) for values in cells.values())]
    lines = [["", *(columns[i] for i in known)]]
    lines += [[row.removeprefix("baselines/"), *(_cell(values[i]) for i in known)] for row, values in cells.items()]
    return "\n".join([*folded(lines), *_funnel_lines(config, found)])


def alignment_table(config: Config, found: Mapping[str, float]) -> str:
    """How near each student is to the own teacher: what is known of reverse rates, overlap, calibration and fusion.

    '' where there is nothing: no student, or no teacher.
    """
    first, tasks = min(config.evaluation.k), list(config.tasks)
    columns = {f"reverse/{task}": f"{{rate}}/{task}" for task in ("fused", *tasks)}
    columns["inconsistency"] = "alignment/fusion_inconsistency/{student}/ranking"
    if "retrieval" in config.evaluation.quotas:
        quota = config.evaluation.quotas["retrieval"]
        columns[f"nktd@{quota}"] = f"alignment/nktd@{quota}/{{student}}"
    for part in ("", "/exposed", "/unexposed"):
        columns[f"overlap@{first}{part}"] = f"alignment/teacher/overlap@{first}/{{student}}{part}"
    columns |= {f"calibration/{task}": f"{{student}}/calibration/{task}" for task in tasks}
    cells = {
        student: [found.get(name.format(rate=rate, student=student), math.nan) for name in columns.values()]
        for student, rate in STUDENTS.items()
        if f"{rate}/fused" in found
    }
    known = [i for i in range(len(columns)) if any(not math.isnan(values[i]) for values in cells.values())]
    lines = [["to the teacher", *([*columns][i] for i in known)]]
    lines += [[student, *(_cell(values[i]) for i in known)] for student, values in cells.items()]
    return "\n".join(folded(lines)) if known else ""


def funnel_table(config: Config, found: Mapping[str, float], costs: Mapping[str, Cost], *, corpus: int) -> str:
    """Stage by stage: what it scores and keeps, whose favourites are left, the worth of its own ten, what it costs.

    `corpus`: what the first stage scores, the pool or without a retrieval head the logged candidates of a request.
    Multiply-adds of a request: the user side, and for every candidate what is left to do when items are cached.
    """
    columns = ["positives", "teacher_favourites", "true_favourites", f"true_reward@{LIST}"]
    lines = [["", "scores", "keeps", "multiply-adds", *columns]]
    scored, prices = corpus, funnel_costs(costs, config.evaluation.quotas, corpus)
    for head, quota in config.evaluation.quotas.items():
        names = [f"funnel/{head}/recall@{quota}", *(f"funnel/{head}/{name}" for name in columns[1:3])]
        cells = [_cell(found.get(name, math.nan)) for name in [*names, f"{head}/{columns[3]}"]]
        lines.append([head, f"{scored:,}", f"{quota:,}", f"{prices[head]:,}", *cells])
        scored = quota
    blank = ["", "", "", "-", "-", "-"]
    whose = ["funnel", *(name for name in found if name.startswith("baselines/") and name.endswith(columns[3]))]
    for name in whose:
        value = found.get(f"funnel/{columns[3]}" if name == "funnel" else name, math.nan)
        lines.append([name.removeprefix("baselines/").partition("/")[0], *blank, _cell(value)])
    known = [i for i in range(len(lines[0])) if i < 4 or any(line[i] != "-" for line in lines[1:])]
    return "\n".join(aligned([[line[i] for i in known] for line in lines]))


def _funnel_lines(config: Config, found: Mapping[str, float]) -> list[str]:
    stages = [
        (head, quota, found.get(f"funnel/{head}/recall@{quota}")) for head, quota in config.evaluation.quotas.items()
    ]
    known = [f"{head} keeps {quota}: {value:.4f}" for head, quota, value in stages if value is not None]
    return ["", f"share of the {config.evaluation.task} positives left: " + " -> ".join(known)] if known else []


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def wrapped(words: Sequence[str], *, first: str, between: str) -> str:
    """Words behind `first`, in lines of at most WIDTH, broken between words alone; further lines begin below them."""
    text, below = between.join(word.replace(" ", NO_BREAK) for word in words), " " * len(first)
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=below, break_on_hyphens=False)
    return "\n".join(lines).replace(NO_BREAK, " ")


def folded(rows: list[list[str]]) -> list[str]:
    """A table as lines of at most WIDTH: one that is wider goes on below, without the rows that have nothing there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if blocks[-1] and widths[0] + sum(2 + widths[i] for i in (*blocks[-1], column)) > WIDTH:
            blocks.append([])
        blocks[-1].append(column)
    lines: list[str] = []
    for block in blocks:
        own = [[row[0], *(row[i] for i in block)] for row in rows]
        some = [row for row in own[1:] if {*row[1:]} != {"-"}] if lines else own[1:]
        lines += [*([""] if lines else []), *aligned([own[0], *some])]
    return lines


def aligned(rows: list[list[str]]) -> list[str]:
    """The lines of a table, its heading underlined: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
