"""Anchor poses: clustered from people or motion capture, or taken out of a released model; how well they cover data.

    python jobs/anchors.py --data ANN.json --out ANCHORS.json --anchors.k 16      cluster the people of a COCO file
    python jobs/anchors.py --data POSES.npz --out ANCHORS.json --anchors.k auto   motion capture; choose how many
    python jobs/anchors.py --from BUNDLE.pkl --out ANCHORS.json                   convert
    python jobs/anchors.py --from ANCHORS.json --data ANN.json                    how well they cover other data

Beside ANCHORS.json are ANCHORS.sheet.png, which shows each of them, and with k auto ANCHORS.curve.png, which shows why
so many. Train with them by `--anchors.file ANCHORS.json`. Needs no cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lcrnet import anchors, coco, config, draw, mocap
from lcrnet.anchors import AnchorPoses
from lcrnet.pose import People, centre
from lcrnet.skeleton import LCR13, Skeleton

SHEET_WIDTH = 1600
"""Pixels of an anchor sheet, about."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "")
    parser.add_argument("--data", metavar="FILE", help="COCO file whose people have 3D poses, or motion-capture .npz")
    parser.add_argument("--from", dest="source", metavar="FILE", help="anchor poses: a released .pkl or our JSON")
    parser.add_argument("--out", metavar="ANCHORS.json", help="file to write")
    args, settings = config.parse(parser, argv)
    section = settings.anchors
    if not (args.source or args.data) or not (args.out or args.source):
        parser.error("give --data FILE or --from FILE, and --out ANCHORS.json")
    console = Console(highlight=False, soft_wrap=True)
    poses = anchors.load(args.source) if args.source else None
    people, group = read(args.data, poses.skeleton if poses else LCR13, section.views) if args.data else (None, [])
    rows: list[dict[str, float]] = []
    k = 0
    if poses is None:
        assert people is not None
        with console.status("measuring anchor poses of many numbers" if section.k == "auto" else "clustering"):
            poses, rows, k = anchors.fit(people, group, section, LCR13, settings.train.seed)
    if rows:
        console.print(curve_table(rows, k, section.headings))
        console.print(f"chosen: k = {k}, the smallest after which no doubling lowers p95 by {section.gain:.0%}")
    console.print(
        f"{len(poses)} anchor poses: {len(poses.pose3d_distinct)} 3D poses, {poses.upper_only.sum()} of the upper body"
    )
    found: dict[str, Any] = {}
    if people is not None:
        known = people[people.has3d & ~people.crowd]
        found = anchors.coverage(centre(known.pose3d, poses.skeleton), poses, section.twin)
        console.print(*report(found), sep="\n")
    for warning in warnings(found or {"twins": anchors.twins(poses, section.twin)}, section.twin):
        console.print(f"warning: {warning}", markup=False)
    if args.out:
        anchors.save(poses, args.out)
        stem = args.out.removesuffix(".json")
        pictures = {f"{stem}.sheet.png": sheet(poses, found)}
        if rows:
            pictures[f"{stem}.curve.png"] = draw.coverage(rows, k)
        for file, picture in pictures.items():
            draw.save(picture, file)
        console.print(f"written: {', '.join([args.out, *pictures])}", markup=False)
    return 0


def read(file: str, skeleton: Skeleton, views: int) -> tuple[People, Sequence[Any]]:
    """The people of a COCO file or, as a camera sees them, of a motion-capture file; the image or clip of each."""
    if mocap.is_mocap(file):
        motion = mocap.read(file, skeleton)
        return mocap.views(motion, views), [clip for clip in motion.clip.tolist() for _ in range(views)]
    images = coco.read(file, skeleton).images
    people = People.join([People.empty(0, len(skeleton)), *(image.people for image in images)])
    return people, [image.file_name for image in images for _ in range(len(image.people))]


def curve_table(rows: Sequence[Mapping[str, float]], k: int, headings: int) -> Table:
    """The coverage curve, the chosen k marked."""
    each = f", each in {headings} headings" if headings else ""
    table = Table(title=f"mean joint distance to the nearest anchor pose, mm, of people left out{each}")
    for name in ("k", "mean", "p95", "worst", "p95 at 2 k"):
        table.add_column(name, justify="right")
    p95 = {row["k"]: row["p95"] for row in rows}
    for row in rows:
        cells = [f"{1000 * row[name]:.0f}" for name in ("mean", "p95", "worst")]
        doubled = p95.get(2 * row["k"])
        change = f"{doubled / row['p95'] - 1:+.1%}" if doubled is not None and row["p95"] else ""
        table.add_row(f"{row['k']:.0f}", *cells, change, style="bold reverse" if row["k"] == k else None)
    return table


def report(coverage: Mapping[str, Any]) -> list[str]:
    """Lines on how far people are from their nearest anchor pose."""
    lines = ["mean joint distance to the nearest anchor pose, mm"]
    lines += [f"  {name:<6} {1000 * coverage[name]:6.0f}" for name in ("mean", "p95", "worst")]
    lines.append(f"people of each anchor pose ({coverage['people']} in all)")
    for i, count in enumerate(coverage["count"]):
        lines.append(f"  {i:>6} {count:6d}  {'#' * round(50 * count / max(coverage['count']))}")
    return lines


def warnings(coverage: Mapping[str, Any], twin: float) -> list[str]:
    """Lines on anchor poses that a network learns nothing from, or could not tell apart."""
    lines = [f"3D pose {i} is empty: nobody in the data is nearest to it" for i in coverage.get("empty", [])]
    for i, j, distance in coverage["twins"]:
        if i == j:
            lines.append(f"3D pose {i} is there twice for boxes of one kind: take one out")
        else:
            lines.append(
                f"3D poses {i} and {j} are near-twins: {1000 * distance:.0f} mm apart (anchors.twin {twin:g} m)"
            )
    return lines


def sheet(poses: AnchorPoses, coverage: Mapping[str, Any]) -> Any:
    """A picture of each 3D pose with the anchors that have it: their 2D in the box, and the share of people."""
    tiles = []
    for group, pose3d in enumerate(poses.pose3d_distinct):
        members = [i for i, g in enumerate(poses.group.tolist()) if g == group]
        titles = [f"#{i} {'upper body' if poses.upper_only[i] else 'whole'}" for i in members]
        caption = f"3D pose {group}"
        if coverage:
            caption += f": {coverage['count'][group] / coverage['people']:.1%} of {coverage['people']} people"
            caption += " (empty)" * (group in coverage["empty"])
        twins = [j if i == group else i for i, j, _ in coverage.get("twins", []) if group in (i, j)]
        caption += f", twin of {', '.join(map(str, twins))}" if twins else ""
        tiles.append(draw.anchor(poses.pose2d[members], pose3d, titles, poses.skeleton, caption))
    return draw.sheet(tiles, columns=max(1, round(SHEET_WIDTH / tiles[0].shape[1])), gap=20)


if __name__ == "__main__":
    config.run(main)
