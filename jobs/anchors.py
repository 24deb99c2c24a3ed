"""Anchor poses: clustered from the people of a COCO file, or taken out of a released LCR-Net model.

    python jobs/anchors.py --data ANN.json --out ANCHORS.json --anchors.k 16    cluster; how well they cover the data
    python jobs/anchors.py --from BUNDLE.pkl --out ANCHORS.json                 convert
    python jobs/anchors.py --from ANCHORS.json --data ANN.json                  how well they cover other data

Train with them by `--anchors.file ANCHORS.json`. Needs no cluster.
"""

from __future__ import annotations

from typing import Any

from lcrnet import anchors, coco, config
from lcrnet.pose import People, centre
from lcrnet.skeleton import LCR13


def main() -> None:
    parser = config.parser(__doc__ or "")
    parser.add_argument("--data", metavar="ANN.json", help="COCO file whose people have 3D poses")
    parser.add_argument("--from", dest="source", metavar="FILE", help="anchor poses: a released .pkl or our JSON")
    parser.add_argument("--out", metavar="ANCHORS.json", help="file to write")
    args, settings = config.parse(parser)
    if not (args.source or args.data) or not (args.out or args.source):
        parser.error("give --data ANN.json or --from FILE, and --out ANCHORS.json")
    poses = anchors.load(args.source) if args.source else None
    people = None
    if args.data:
        data = coco.read(args.data, poses.skeleton if poses else LCR13)
        people = People.join([People.empty(0, len(data.skeleton)), *(image.people for image in data.images)])
        if poses is None:
            section = settings.anchors
            poses = anchors.cluster(people, section.k, data.skeleton, section.upper, settings.train.seed)
    assert poses is not None
    print(
        f"{len(poses)} anchor poses: {len(poses.pose3d_distinct)} 3D poses, {poses.upper_only.sum()} of the upper body"
    )
    if people is not None:
        known = people[people.has3d & ~people.crowd]
        report(anchors.coverage(centre(known.pose3d, poses.skeleton), poses))
    if args.out:
        anchors.save(poses, args.out)
        print(f"written: {args.out}")


def report(coverage: dict[str, Any]) -> None:
    """Prints how far people are from their nearest anchor pose."""
    print("mean joint distance to the nearest anchor pose, mm")
    for name in ("mean", "p95", "worst"):
        print(f"  {name:<6} {1000 * coverage[name]:6.0f}")
    print(f"people of each anchor pose ({coverage['people']} in all)")
    for i, count in enumerate(coverage["count"]):
        print(f"  {i:>6} {count:6d}  {'#' * round(50 * count / max(coverage['count']))}")


if __name__ == "__main__":
    config.run(main)
