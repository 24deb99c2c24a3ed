"""Labels folders of images: one row per image in LABELS/*.parquet, whatever becomes of it.

    python jobs/annotate.py IMAGES --model MODEL --out LABELS [--config C]

IMAGES: folders (with all below them), files, or glob patterns in quotes. Run it again after a kill, or with more
images: what LABELS has is not done again. The model detects with its own settings; what --config or the command line
says of image.*, rpn.nms_iou, head.score_floor, ppi.* and the like takes their place.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

import lcrnet
from jobs.session import connect, quiet, told, writable
from lcrnet import config, image, weights
from lcrnet.annotate import Annotator, Labeller, config_id, settings
from lcrnet.config import Config, UserError

EVERY = 10
"""Seconds between two lines of progress."""

_SCORES = "people.list.element.score"  # a person's smallest column, to count people by


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="folder, file or glob pattern")
    parser.add_argument("--model", required=True, help="model folder, as jobs/train.py writes it")
    parser.add_argument("--out", required=True, metavar="LABELS", help="folder of the label table")
    args, asked = config.parse(parser, argv)
    annotate(args.images, args.model, args.out, asked)
    return 0


def annotate(
    images: Sequence[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    asked: Config,
    annotator: Callable[..., Any] = Annotator,
) -> dict[str, Any]:
    """Labels what LABELS lacks; returns what is in LABELS/run.json. UserError for what the user can mend.

    asked       `annotate`, and detection settings that take the place of the model's (lcrnet.annotate.settings)
    annotator   makes each worker's callable, from Annotator's arguments
    """
    started = time.time()
    model = os.path.abspath(model)
    ids = {"model": weights.model_id(model)}
    resolved = settings(config.load(Path(model) / "config.yaml"), asked).model_copy(update={"annotate": asked.annotate})
    ids["config"] = config_id(resolved, asked.annotate.max_pixels, asked.annotate.calibrated)
    found, others = image.find(images)
    folder = writable(os.path.abspath(out))
    before = _committed(folder, ids)
    for unfinished in folder.glob(".*.part"):  # of a run that was killed
        unfinished.unlink(missing_ok=True)
    todo = {uri: error for uri, error in found.items() if uri not in before}
    print(
        f"{len(found)} images, {others.total()} other files ignored; {len(found) - len(todo)} labelled before",
        flush=True,
    )
    about: dict[str, Any] = {
        "finished": False, "inputs": [os.path.abspath(i) for i in images], "model": model, "ids": ids,
        "lcrnet": lcrnet.__version__, "ignored": dict(others.most_common()), "config": resolved.model_dump(mode="json"),
    }  # fmt: skip
    _write_json(folder / "run.json", about)

    run = {"images": 0, "images_per_s": 0.0, "dropped": 0}
    if todo:
        run = _run(todo, folder, model, _root(images), asked, annotator)

    rows = pa.concat_tables(pq.ParquetFile(f).read(["uri", "error", _SCORES]) for f in _files(folder))
    rows = rows.filter(pc.is_in(rows["uri"], pa.array(found, pa.string())))
    faults = rows.filter(pc.is_valid(rows["error"])).sort_by("uri")
    for fault in faults.slice(0, 10).to_pylist():
        print(f"unreadable: {fault['uri']}: {fault['error']}")
    if missing := len(found) - pc.count_distinct(rows["uri"]).as_py():
        raise RuntimeError(f"{missing} of {len(found)} images have no row in {folder}; run the same command again")
    counts = {"images": len(found), "people": pc.sum(pc.list_value_length(rows["people"])).as_py(),
              "unreadable": len(faults), "labelled_before": len(found) - len(todo)}  # fmt: skip
    about |= {"finished": True, **counts, "run": run | {"seconds": round(time.time() - started, 1)}}
    _write_json(folder / "run.json", about)
    if run["dropped"]:
        print(f"{run['dropped']} pose proposals were left out: the network gave them numbers that are not finite")
    print(f"done: {folder} has a row of each of {counts['images']} images: {counts['people']} people, "
          f"{counts['unreadable']} unreadable; {run['images']} images now, at {run['images_per_s']:.1f} images/s",
          flush=True)  # fmt: skip
    return about


def _run(
    todo: Mapping[str, str], out: Path, model: str, root: str, asked: Config, annotator: Callable[..., Any]
) -> dict[str, Any]:
    """Labels on the cluster; what was done, as it is printed on the way."""
    own = asked.annotate
    # Small jobs get smaller blocks, so that each worker has work and there is progress to see.
    size = min(own.block, max(own.batch, -(-len(todo) // (4 * own.workers))))
    blocks = -(-len(todo) // size)
    connect(own.workers, own.gpu, field="annotate")
    workers = min(own.workers, blocks)
    quiet()
    arguments = {"model": model, "device": "cuda" if own.gpu else "cpu", "max_pixels": own.max_pixels,
                 "batch": own.batch, "asked": asked, "root": root, "calibrated": own.calibrated}  # fmt: skip
    threads = max(1, int(ray.available_resources().get("CPU", 1) // workers))  # Ray itself would allow one
    # A block is a task is a file: batch_size=None hands each over whole.
    rows = [{"uri": uri, "error": error} for uri, error in todo.items()]
    commits = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Labeller, fn_constructor_args=(out, arguments, threads, annotator), batch_size=None, batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=1, num_gpus=1 if own.gpu else 0,
    )  # fmt: skip
    done = {"images": 0, "people": 0, "unreadable": 0, "dropped": 0}
    started, over = time.time(), threading.Event()

    def speed() -> float:
        return done["images"] / max(time.time() - started, 1e-3)

    def report() -> None:
        while not over.wait(EVERY):
            print(f"{done['images']} / {len(todo)} images, {speed():.1f} images/s, {done['people']} people, "
                  f"{done['unreadable']} unreadable", flush=True)  # fmt: skip

    threading.Thread(target=report, daemon=True).start()
    try:
        with told():
            for commit in commits.iter_batches(batch_size=None, batch_format="pyarrow"):
                for name in done:
                    done[name] += pc.sum(commit[name]).as_py()
    finally:
        over.set()
    return done | {"images_per_s": round(speed(), 2)}


def _root(images: Sequence[str]) -> str:
    """The folder that all the images are in, for their groups."""
    paths = [os.path.abspath(path if os.path.lexists(path) else re.split(r"[*?\[]", path)[0] + "_") for path in images]
    return os.path.commonpath([path if os.path.isdir(path) else os.path.dirname(path) for path in paths])


def _files(folder: Path) -> list[Path]:
    """The Parquet files of a label table; one that is being written has a name that begins with a dot."""
    return sorted(f for f in folder.glob("*.parquet") if not f.name.startswith("."))


def _committed(folder: Path, ids: Mapping[str, str]) -> set[str]:
    """The uris that have a row. UserError if a file is no label table, or one of another model or configuration."""
    done: set[str] = set()
    for file in _files(folder):
        try:
            table = pq.read_table(file, columns=["uri", *ids])
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: not a label table ({' '.join(str(error).split())}); remove it") from None
        for kind, mine in ids.items():
            for other in set(table[kind].to_pylist()) - {mine}:
                raise UserError(f"{folder}: has labels of another {kind} ({other}, not {mine}): choose another --out")
        done.update(table["uri"].to_pylist())
    return done


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, file)


if __name__ == "__main__":
    config.run(main)
