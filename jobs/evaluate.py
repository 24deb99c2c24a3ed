"""Evaluates a model on a COCO data set: people found, missed and false, errors of their 2D and 3D poses.

    python jobs/evaluate.py --model RUN/model --data ANN.json --images DIR --out REPORT

REPORT/metrics.json holds the figures and what they were made of, REPORT/sheet.png the worst, the best and some other
images, truth beside prediction. The configuration is the model's own; `evaluate`, `ppi` and `annotate` fields given
here (of --config FILE only those sections) go on top. `--annotate.gpu true` runs it on a GPU.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import session
from lcrnet import config, dataset, draw, evaluate, image, weights
from lcrnet.annotations import CocoImage
from lcrnet.config import Config, ConfigError, UserError
from lcrnet.dataset import Source
from lcrnet.model import LCRNet
from lcrnet.pose import People, Person

SECTIONS = ("evaluate", "ppi", "annotate")
EXAMPLES = 6


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="model folder, say RUN/model")
    parser.add_argument("--data", type=Path, required=True, metavar="ANN.json", help="COCO file with the truth")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of its images")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT", help="folder of the report")
    args, given = config.parse(parser, argv)
    for name in vars(args):
        if "." in name and not name.startswith(tuple(f"{section}." for section in SECTIONS)):
            raise ConfigError(f"--{name} is fixed by the model; to be set here: fields of {', '.join(SECTIONS)}")
    try:
        metrics = run(args.model, Source(args.data, args.images), args.out, given)
    except OSError as error:
        raise UserError(f"{error.filename or args.out}: {error.strerror or error}") from None
    print(evaluate.table(metrics))
    print(f"\n{args.out / 'metrics.json'}, {args.out / 'sheet.png'}")
    return 0


def run(folder: Path, source: Source, out: Path, given: Config | None = None) -> dict[str, Any]:
    """Evaluates the model of a folder into the folder `out`; returns what metrics.json says.

    given   a configuration whose explicitly set fields of SECTIONS replace the model's
    """
    out = session.writable(out)
    try:
        model = weights.load(folder, "cuda" if given and given.annotate.gpu else "cpu")
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises where there is no GPU
        raise UserError(f"--annotate.gpu: {str(error).splitlines()[0]}") from None
    model.config = settings = merged(model.config, given)
    entries = dataset.read(source, model.skeleton)
    truth, files = [e.people for e in entries], [source.images / e.file_name for e in entries]
    limits, start = settings.annotate, time.monotonic()
    found, unreadable = evaluate.detect(model.detect_batch, files, limits.batch, limits.max_pixels, _progress)
    speed = len(files) / (time.monotonic() - start)
    metrics = {
        **evaluate.evaluate(truth, found, model.skeleton, settings.evaluate),
        "unreadable": len(unreadable),
        "unreadable_files": unreadable,
        "images_per_second": round(speed, 2),
        "model": str(folder.resolve()),
        "model_id": weights.model_id(folder),
        "data": str(source.annotations.resolve()),
        "images_folder": str(source.images.resolve()),
        "command": shlex.join(sys.argv),
        "config": settings.model_dump(mode="json"),
    }
    _sheet(out / "sheet.png", entries, files, found, model)
    part = out / ".metrics.json.part"
    part.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(out / "metrics.json")
    return metrics


def merged(base: Config, given: Config | None) -> Config:
    """`base` with those fields of SECTIONS that were explicitly set in `given` (by a file or on the command line)."""
    values = base.model_dump()
    for section in SECTIONS if given else ():
        part = getattr(given, section)
        values[section] |= {name: getattr(part, name) for name in part.model_fields_set}
    return config.from_dict(values)


def _sheet(out: Path, entries: list[CocoImage], files: list[Path], found: list[list[Person]], model: LCRNet) -> None:
    """Draws truth beside prediction of the images worth looking at."""
    skeleton, limits = model.skeleton, model.config.evaluate
    outcomes = [evaluate.compare(e.people, f, skeleton, limits) for e, f in zip(entries, found, strict=True)]
    tiles = []
    for kind, rows in evaluate.examples(outcomes, EXAMPLES).items():
        for i in rows:
            try:
                pixels = image.read(files[i], model.config.annotate.max_pixels)
            except image.Unreadable:
                continue
            shown = [person for person in found[i] if person.score >= limits.min_score]
            layers: dict[str, People | list[Person]] = {"truth": entries[i].people, "found": shown}
            caption = f"{kind}: {entries[i].file_name}, {outcomes[i]}"
            tiles.append(draw.tile(pixels, layers, skeleton, caption))
    draw.save(draw.sheet(tiles), out)


def _progress(done: int, total: int) -> None:
    print(f"{done} of {total} images", end="\r" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    config.run(main)
