"""Turns labels into a COCO data set, or checks a COCO file.

    python jobs/coco.py LABELS --out COCO
    python jobs/coco.py check ANN.json

The first writes COCO/annotations/{train,val}.json and COCO/images. Folders are split as one; the images of a single
folder one by one. People below coco.min_score become ignored regions; unreadable images are left out. COCO is replaced
as a whole, and only if this job wrote all that is in it.
The second prints every fault, one a line, and exits with 1 if training on the file would go wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

import lcrnet
from lcrnet import coco, labels
from lcrnet.config import Config, UserError, parse, parser, run, save
from lcrnet.skeleton import SKELETONS

SUMMARY = "summary.json"


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser(__doc__ or "")
    cli.add_argument("labels", metavar="LABELS", help="folder of labels that jobs/annotate.py wrote, or `check`")
    cli.add_argument("file", metavar="ANN.json", nargs="?", help="after `check`: the file to check")
    cli.add_argument("--out", metavar="COCO", help="folder of the data set")
    args, config = parse(cli, argv)
    if args.file is not None and args.labels != "check":
        cli.error(f"unknown {args.file!r}: one folder of labels, or `check ANN.json`")
    if args.file is not None:
        return check(args.file)
    if args.out is None:
        cli.error("--out COCO is missing: the folder to write")
    out = Path(args.out).resolve()
    try:
        convert(Path(args.labels), out, config)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None
    return 0


def check(file: str) -> int:
    """Prints every fault of a COCO file; 1 if one is fatal."""
    faults = coco.check(file)
    for fault in faults:
        print(f"{'fatal' if fault.fatal else 'warning'}: {fault}")
    fatal = sum(fault.fatal for fault in faults)
    if fatal:
        print(f"{file}: {fatal} fatal faults, {len(faults) - fatal} warnings")
        return 1
    people = [image.people for image in coco.read(file).images]
    print(
        f"{file}: {len(people)} images, {sum(map(len, people))} people, "
        f"{sum(int(p.has3d.sum()) for p in people)} of them with a 3D pose, "
        f"{sum(int(p.crowd.sum()) for p in people)} ignored regions, {len(faults)} warnings"
    )
    return 0


def convert(folder: Path, out: Path, config: Config) -> None:
    """The label table of `folder` as the COCO data set `out`."""
    table = labels.read(folder)
    owned(out)
    rows = table.to_pylist()
    kept = [row["status"] == "ok" for row in rows]
    rows, unreadable = [row for row, ok in zip(rows, kept, strict=True) if ok], kept.count(False)
    if not rows:
        raise UserError(f"{folder}: none of its {unreadable} images is readable")
    sides = labels.sides(table.filter(kept), config.coco.val_share)
    if len({row["skeleton"] for row in rows}) > 1 or rows[0]["skeleton"] not in SKELETONS:
        raise UserError(f"{folder}: skeleton {', '.join({str(row['skeleton']) for row in rows})}: one of ours, please")
    skeleton = SKELETONS[rows[0]["skeleton"]]
    names = file_names([row["uri"] for row in rows])
    images = coco.from_labels(rows, names, config.coco, skeleton)
    info = {
        "description": f"people labelled by lcrnet {lcrnet.__version__}",
        "labels": str(folder.resolve()),
        "model": sorted({str(row["model"]) for row in rows}),
        "min_score": config.coco.min_score,
        "coordinates": "pixels of the upright image: EXIF orientation applied, as lcrnet and OpenCV read a file; "
        "Pillow does with ImageOps.exif_transpose",
    }

    half = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        (half / "annotations").mkdir(parents=True)
        fill(half / "images", names, config.coco.images == "copy")
        counts: dict[str, Any] = {}
        hashes = {}
        for side in ("train", "val"):
            part = [image for image, its in zip(images, sides, strict=True) if its == side]
            file = half / "annotations" / f"{side}.json"
            coco.write(file, part, skeleton, info)
            verify(file, part)
            hashes[side] = hashlib.sha256(file.read_bytes()).hexdigest()
            ignored = sum(int(image.people.crowd.sum()) for image in part)
            people = sum(len(image.people) for image in part)
            counts[side] = {"images": len(part), "people": people - ignored, "ignored": ignored}
        counts["unreadable"] = unreadable
        counts["outside"] = sum(len(row["people"]) for row in rows) - sum(len(image.people) for image in images)
        save(config, half / "config.yaml")
        (half / SUMMARY).write_text(json.dumps({"job": "jobs/coco.py", "counts": counts, "sha256": hashes}, indent=1))
        replace(half, out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    for side in ("train", "val"):
        c = counts[side]
        print(f"{side}: {c['images']} images, {c['people']} people, {c['ignored']} ignored regions")
    print(f"left out: {unreadable} unreadable images, {counts['outside']} people outside their image\nwrote {out}")


if __name__ == "__main__":
    run(main)
