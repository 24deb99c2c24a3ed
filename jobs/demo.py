"""The whole pipeline on drawn people: train, evaluate, annotate, convert to COCO, train on that. Minutes on two cores.

    python jobs/demo.py --config configs/demo.yaml --out DIR

DIR/drawn the drawings, DIR/run the training, DIR/report the evaluation, DIR/labels and DIR/coco what the model says of
images it has never seen, DIR/retrained the training on those labels, DIR/sheet.png what to look at first. The same
command goes on where an earlier one was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import annotate, coco, evaluate, session, train
from lcrnet import config, draw, image, labels, synthetic
from lcrnet.config import Config
from lcrnet.dataset import Source
from lcrnet.skeleton import LCR13

SHOWN = 12  # images on the sheet


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "", config_required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of everything the demo makes")
    args, settings = config.parse(parser, argv)
    out, start = session.writable(args.out).resolve(), time.monotonic()

    def stage(text: str) -> None:
        print(f"\n[{time.monotonic() - start:4.0f} s] {text}", flush=True)

    size = settings.draw
    stage(f"draws people: {size.train} images to train on, {size.val} to evaluate on, {size.unlabelled} to annotate")
    learn, val, unlabelled = (drawn(out / "drawn", part, settings) for part in ("train", "val", "unlabelled"))
    session.connect(settings.train.workers, settings.train.gpu, cpus=settings.train.threads or 1, log=False)
    stage(f"trains {settings.train.steps} steps on a local Ray")
    if train.run(settings, learn, out / "run") is None:
        return 1
    stage("evaluates on drawings that it has not seen")
    figures = evaluate.run(out / "run/model", val, out / "report", settings)
    stage("annotates images without labels")
    annotate.annotate([str(unlabelled.images)], out / "run/model", out / "labels", settings)
    stage("turns the labels into a COCO data set")
    coco.convert(out / "labels", out / "coco", settings)
    stage(f"trains {size.finetune_steps} steps on that data set")
    again = Source(out / "coco/annotations/train.json", out / "coco/images")
    if train.run(retraining(settings, out / "run/model"), again, out / "retrained") is None:
        return 1
    after = evaluate.run(out / "retrained/model", val, out / "retrained/report", settings)
    stage("draws what it found")
    sheet(out / "labels", out / "sheet.png", settings)
    stage("done")
    print(table({"trained on drawings": figures, "retrained on its own labels": after}))
    print(f"\nlook at   {out / 'sheet.png'}   people found in images that were never labelled, 2D and 3D"
          f"\n          {out / 'report/report.html'}   figures, curves, truth beside prediction: for a browser"
          f"\n          {out / 'report/metrics.json'}   all figures"
          f"\ncurves    tensorboard --logdir {out / 'run/tensorboard'}"
          f"\nmodel     {out / 'run/model'}   labels {out / 'labels'}   COCO {out / 'coco'}")  # fmt: skip
    return 0


def drawn(folder: Path, part: str, settings: Config) -> Source:
    """One set of drawings, made unless it is there; each from seeds of its own."""
    size, home = settings.draw, folder / part
    count = {"train": size.train, "val": size.val, "unlabelled": size.unlabelled}[part]
    about = home / "drawn.yaml"
    wanted = f"{settings.draw.model_dump_json()} seed {settings.train.seed}"
    if not about.is_file() or about.read_text() != wanted:
        seed = 3 * settings.train.seed + ["train", "val", "unlabelled"].index(part)
        synthetic.write(home, count, seed, size.size, size.heading, labelled=part != "unlabelled")
        about.write_text(wanted)
    return Source(home / "annotations.json", home / "images")


def retraining(settings: Config, model: Path) -> Config:
    """The configuration of a few gentle steps from a trained model on."""
    values = settings.model_dump()
    values["train"] |= {"init": str(model), "steps": settings.draw.finetune_steps, "warmup": 5,
                        "lr": settings.train.lr / 10}  # fmt: skip
    return config.from_dict(values)


def sheet(folder: Path, out: Path, settings: Config) -> None:
    """Draws the first labelled images of a label table with somebody in them."""
    tiles = []
    rows = [row for row in labels.read(folder).to_pylist() if row["status"] == "ok"]
    for row in rows[:SHOWN]:
        people = [labels.person_of(p) for p in row["people"] if p["score"] >= settings.evaluate.min_score]
        scores = ", ".join(f"{p.score:.2f}" for p in people)
        tiles.append(draw.tile(image.read(row["uri"]), {"found": people}, LCR13, f"{Path(row['uri']).name}  {scores}"))
    draw.save(draw.sheet(tiles, columns=3), out)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The main figures, a line for each model."""
    columns = {
        "people": "people", "found": "found", "missed": "missed", "false": "false", "recall": "recall",
        "precision": "precision", "OKS-AP": "oks_ap", "2D error / height": "error2d_height_median",
        "MPJPE mm": "mpjpe_mm", "PA-MPJPE mm": "pa_mpjpe_mm",
    }  # fmt: skip
    head = f"{'':28}" + "  ".join(columns)
    lines = [
        f"{name:28}" + "  ".join(_text(figures[key]).rjust(len(title)) for title, key in columns.items())
        for name, figures in rows.items()
    ]
    return "\n".join([head, *lines])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}" if value < 10 else f"{value:.1f}"


if __name__ == "__main__":
    config.run(main)
