"""Turns labels into a COCO data set, or checks a COCO file.

    python jobs/coco.py LABELS --out COCO
    python jobs/coco.py check ANN.json

The first writes COCO/annotations/{train,val}.json and COCO/images. A folder of images goes to one side as a whole; if
there is only one, its images are split one by one. People below coco.min_score become ignored regions, unreadable
images are left out. COCO is replaced in one step, and only if this job wrote all that is in it.
The second prints every fault, one a line, and exits with 1 if training on the file would go wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

import lcrnet
from lcrnet import coco, labels
from lcrnet.config import Config, UserError, parse, parser, run
from lcrnet.skeleton import SKELETONS


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser(__doc__ or "")
    cli.add_argument("labels", metavar="LABELS", help="folder of labels that jobs/annotate.py wrote, or `check`")
    cli.add_argument("file", metavar="ANN.json", nargs="?", help="after `check`: the file to check")
    cli.add_argument("--out", metavar="COCO", help="folder of the data set")
    args, config = parse(cli, argv)
    if args.file is not None:
        if args.labels != "check":
            cli.error(f"unknown {args.file!r}: give one folder of labels, or `check ANN.json`")
        return check(args.file)
    if args.out is None:
        cli.error("--out COCO is missing: the folder to write")
    try:
        convert(Path(args.labels), Path(args.out).resolve(), config)
    except OSError as error:
        raise UserError(f"{error.filename or args.out}: {error.strerror or error}") from None
    return 0


def check(file: str) -> int:
    """Prints every fault of a COCO file; 1 if one is fatal."""
    faults = coco.check(file)
    for fault in faults:
        print(f"{'fatal' if fault.fatal else 'warning'}: {fault}")
    fatal = sum(fault.fatal for fault in faults)
    if fatal:
        print(f"{file}: {fatal} fatal, {len(faults) - fatal} warnings")
        return 1
    people = [image.people for image in coco.read(file).images]
    ignored, with3d = (sum(int(getattr(p, name).sum()) for p in people) for name in ("crowd", "has3d"))
    print(
        f"{file}: no fatal fault, {len(faults)} warnings; {len(people)} images, {sum(map(len, people)) - ignored} "
        f"people ({with3d} with a 3D pose), {ignored} ignored regions"
    )
    return 0


def convert(folder: Path, out: Path, config: Config) -> None:
    """Writes the label table of `folder` as the COCO folder `out` and prints what became of it."""
    coco.refuse_others(out)
    table = labels.read(folder)
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    unreadable = len(table) - len(rows)
    if not rows:
        raise UserError(f"{folder}: none of its {unreadable} images could be read")
    if unknown := {row["skeleton"] for row in rows} - set(SKELETONS):
        raise UserError(f"{folder}: skeleton {unknown.pop()!r} is none of {', '.join(SKELETONS)}")
    skeleton = SKELETONS[rows[0]["skeleton"]]
    if other := {row["skeleton"] for row in rows} - {skeleton.name}:
        raise UserError(f"{folder}: labels of skeleton {skeleton.name} and of {other.pop()}; convert them one by one")

    names = coco.file_names([row["uri"] for row in rows])
    images = coco.from_labels(rows, names, config.coco, skeleton)
    sides = labels.sides(rows, config.coco.val_share)
    parts = {
        side: [image for image, its in zip(images, sides, strict=True) if its == side] for side in ("train", "val")
    }
    counts: dict[str, int] = {}
    for side, part in parts.items():
        ignored = sum(int(image.people.crowd.sum()) for image in part)
        people = sum(len(image.people) for image in part) - ignored
        counts |= {f"{side}_images": len(part), f"{side}_people": people, f"{side}_ignored": ignored}
    counts["unreadable"] = unreadable
    counts["outside"] = sum(len(row["people"] or []) for row in rows) - sum(len(image.people) for image in images)
    info = {
        "description": "people labelled by lcrnet",
        "version": lcrnet.__version__,
        "labels": str(folder.resolve()),
        "model": ", ".join(sorted({row["model"] or "unknown" for row in rows})),
        "coordinates": "pixels of the upright image (EXIF orientation applied); read the files so",
    }
    texts = {
        "config.yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        "counts.json": json.dumps(counts, indent=1) + "\n",
    }
    sources = {name: uri for uri, name in names.items()}
    coco.write_folder(out, parts, sources, skeleton, info, texts, copy=config.coco.images == "copy")
    for side in parts:
        number, people, ignored = (counts[f"{side}_{what}"] for what in ("images", "people", "ignored"))
        print(f"{side}: {number} images, {people} people, {ignored} ignored regions")
    print(f"left out: {unreadable} unreadable images, {counts['outside']} people outside their image")
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
