"""Draws the curves of a training: losses, learning rate, speed, figures of the validation.

    python jobs/plot.py RUN [RUN ...] [--out curves.png] [--smooth 0.9]

Reads RUN/tensorboard, also while the run goes on, and writes RUN/curves.png, several runs into one picture. A point
that a run wrote again after it was interrupted counts once, as the last of its lives has it.
"""

from __future__ import annotations

import argparse
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.message import DecodeError
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event

from lcrnet import config
from lcrnet.config import UserError

Curves = dict[str, dict[int, float]]
"""{tag: {step: value}}, tags such as loss/class, steps rising"""

COLUMNS = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that jobs/train.py wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write; curves.png in the first RUN")
    parser.add_argument("--smooth", type=float, default=0.9, metavar="S", help="of the thick lines; 0 = none")
    args = parser.parse_args(argv)
    if not 0 <= args.smooth < 1:
        raise UserError(f"--smooth {args.smooth:g}: 0 (none) or more, below 1")
    out = args.out or args.runs[0] / "curves.png"
    found = {str(run): read(run) for run in args.runs}
    figure = draw(found, args.smooth)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written ({error}); --out names another file") from None
    steps = max(max(curve) for curves in found.values() for curve in curves.values())
    print(f"{out}: {len({tag for curves in found.values() for tag in curves})} curves to step {steps}")
    return 0


def read(run: Path) -> Curves:
    """The curves of a run folder, all its lives in one. UserError: there are none."""
    points: dict[str, dict[int, tuple[float, float]]] = {}
    purged: dict[Path, list[tuple[float, int]]] = {}
    files = sorted((run / "tensorboard").rglob("events.out.tfevents.*"))
    for file in files:
        for event in events(file):
            if event.HasField("session_log"):  # the run goes on from here: what was written of later steps is void
                purged.setdefault(file.parent, []).append((event.wall_time, event.step))
    for file in files:
        for event in events(file):
            void = any(event.wall_time < time and event.step >= step for time, step in purged.get(file.parent, []))
            for value in event.summary.value:
                if value.HasField("simple_value") and not void:
                    at = points.setdefault(value.tag, {})
                    at[event.step] = max(at.get(event.step, (-math.inf, 0.0)), (event.wall_time, value.simple_value))
    if not points:
        raise UserError(f"{run}: no curves in {run / 'tensorboard'}; a run writes them every --train.log_every steps")
    return {tag: {step: at[step][1] for step in sorted(at)} for tag, at in sorted(points.items())}


def events(file: Path) -> Iterator[Event]:
    """TensorBoard's events in a file: records of length (8 bytes), CRC (4), event, CRC (4).

    One that is still being written, or was cut off, ends them.
    """
    with file.open("rb") as records:
        while len(head := records.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            body = records.read(length + 4)
            if len(body) < length + 4:
                return
            try:
                yield Event.FromString(body[:length])
            except DecodeError:
                return


def draw(runs: dict[str, Curves], smooth: float) -> Figure:
    """A panel for each tag, a colour for each run: its values, and thick their moving average."""
    tags = sorted({tag for curves in runs.values() for tag in curves}, key=_place)
    rows = math.ceil(len(tags) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3 * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for panel, tag in zip(panels, tags, strict=False):
        for number, (run, curves) in enumerate(runs.items()):
            if tag in curves:
                _line(panel, curves[tag], f"C{number}", smooth if tag.startswith(("loss/", "train/")) else 0, run)
        panel.set_title(tag, fontsize=10)
        panel.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        panel.grid(alpha=0.3)
    for panel in list(panels)[len(tags) :]:
        panel.set_axis_off()
    if len(runs) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center")
    return figure


def averaged(values: Sequence[float], smooth: float) -> list[float]:
    """The exponential moving average of values, without a bias to zero; what is not finite is left out."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = smooth * total + (1 - smooth) * value, smooth * weight + (1 - smooth)
        out.append(total / weight if weight else math.nan)
    return out


def _line(panel: Axes, curve: dict[int, float], colour: str, smooth: float, label: str) -> None:
    steps, values = list(curve), list(curve.values())
    thin = bool(smooth) and len(values) > 1
    mark = "." if len(values) < 30 and not thin else ""
    panel.plot(steps, averaged(values, smooth), color=colour, marker=mark, label=label)
    if thin:
        panel.plot(steps, values, color=colour, alpha=0.3, linewidth=0.7)


def _place(tag: str) -> tuple[int, str]:
    """Losses first, their sum before all, then the training's, then the validation's."""
    order = ["loss/total", "loss/", "train/", "val/"]
    return next((n for n, start in enumerate(order) if tag.startswith(start)), len(order)), tag


if __name__ == "__main__":
    config.run(main)
