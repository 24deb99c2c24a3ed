"""3D poses for people with 2D labels: the motion-capture poses that look most alike, under a fitted camera.

    python jobs/lift.py --data ANN.json --mocap POSES.npz --out OUT.json
    python jobs/lift.py --data ANN.json --mocap POSES.npz --check            how good they are, where ANN.json has 3D

OUT.json is ANN.json, in the joints of LCR13, with a 3D pose and a trust below 1 for those who have enough 2D joints
(lift.min_joints) and look like a pose of POSES.npz (lift.max_error); 3D poses that are there are kept unless --replace
is given. Such a 3D pose is plausible, not measured: the 2D is right, the depth and the size of the body are those of
motion capture. With --images DIR, OUT.json.sheet.png shows some of them, the most trusted first. Needs no cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lcrnet import coco, config, draw, image, lift, mocap
from lcrnet.annotations import CocoImage
from lcrnet.config import UserError
from lcrnet.skeleton import Skeleton

SHOWN, NAMED = 12, 10  # people on the sheet, people without a 3D pose in the terminal


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, metavar="ANN.json", help="COCO file with 2D joints")
    parser.add_argument("--mocap", type=Path, required=True, metavar="POSES.npz", help="motion-capture poses")
    parser.add_argument("--out", type=Path, metavar="OUT.json", help="COCO file to write")
    parser.add_argument("--replace", action="store_true", help="people who have a 3D pose get another")
    parser.add_argument("--check", action="store_true", help="compare with the 3D poses of ANN.json")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, for the sheet")
    args, settings = config.parse(parser, argv)
    if not args.out and not args.check:
        parser.error("give --out OUT.json to write, or --check to compare")
    if args.images and not args.out:
        parser.error("--images is for the sheet of what --out writes: give --out OUT.json too")
    if args.out and args.out.resolve() in (args.data.resolve(), args.mocap.resolve()):
        parser.error(f"--out {args.out} would replace what was given; choose another file")
    try:
        run(args, settings)
    except OSError as error:
        raise UserError(f"{error.filename or args.out}: {error.strerror or error}") from None
    return 0


def run(args: Any, settings: config.Config) -> None:
    """What the command line asks for."""
    data = coco.read(args.data)
    bank = lift.Bank.of(mocap.read(args.mocap, data.skeleton), settings.lift, settings.train.seed)
    people = sum(len(one.people) for one in data.images)
    print(f"{people} people, {len(bank.pose3d)} poses (mirror images included) in {len(bank.view)} views")
    if args.check:
        with progress(people) as advance:
            everybody = lift.everybody(data.images, data.skeleton)
            found = lift.check(everybody, bank, settings.lift, settings.train.seed, advance)
        report(found)
    if not args.out:
        return
    start = time.perf_counter()
    with progress(people) as advance:
        images, done, left = lift.lift_images(data.images, bank, settings.lift, args.replace, advance)
    print(f"{done} people got a 3D pose in {time.perf_counter() - start:.0f} s, {len(left)} are without")
    for one in left[:NAMED]:
        print(f"  {one.file_name}, annotation {one.id}: {one.reason}")
    if len(left) > NAMED:
        print(f"  and {len(left) - NAMED} more")
    coco.write(args.out, images, data.skeleton, data.info, data.licenses)
    print(f"written: {args.out}")
    if args.images:
        sheet(images, args.images, data.skeleton, args.out.with_name(f"{args.out.name}.sheet.png"))


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, and what moves it by a number of people."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("people", total=total)
        yield lambda count: bar.advance(task, count)


def report(found: dict[str, Any]) -> None:
    """Prints what `lift.check` found."""
    print(f"{found['people']} people whose 2D labels were lifted, against the 3D poses in the file")
    methods = Table("", "MPJPE mm", "PA-MPJPE mm")
    for name, errors in found["methods"].items():
        methods.add_row(name, *(f"{e:.1f}" for e in errors))
    trust = Table("trust", "people", "MPJPE mm", "PA-MPJPE mm")
    for low, high, count, *errors in found["trust"]:
        trust.add_row(f"{low:.2f} to {high:.2f}", str(count), *(f"{e:.1f}" for e in errors))
    for table in (methods, trust):
        Console().print(table)


def sheet(images: Sequence[CocoImage], folder: Path, skeleton: Skeleton, file: Path) -> None:
    """A contact sheet of people from the most to the least trusted, evenly spaced."""
    lifted = [
        (float(one.people.trust[p]), n, p)
        for n, one in enumerate(images)
        for p, extra in enumerate(one.extras)
        if extra.get("pose_3d_source") == "lift"
    ]
    lifted.sort(key=lambda row: (-row[0], *row[1:]))
    step = max(1, (len(lifted) - 1) // (SHOWN - 1))
    tiles = []
    for trust, n, p in lifted[::step][:SHOWN]:
        one = images[n]
        try:
            pixels = image.read(folder / one.file_name)
        except image.Unreadable as error:
            raise UserError(f"{folder / one.file_name}: {error}") from None
        caption = f"{one.file_name}, trust {trust:.2f}, error {one.extras[p]['lift_error']:.2f}"
        tiles.append(draw.tile(pixels, {"lifted": one.people[p : p + 1]}, skeleton, caption))
    draw.save(draw.sheet(tiles, columns=3), file)
    print(f"written: {file}")


if __name__ == "__main__":
    config.run(main)
