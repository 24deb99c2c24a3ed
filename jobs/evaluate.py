"""Evaluates a model on a COCO data set: people found, missed and false, errors of their 2D and 3D poses.

    python jobs/evaluate.py --model RUN/model --data ANN.json --images DIR --out REPORT
    python jobs/evaluate.py --model RUN/model --data MultiPersonTestSet --images MultiPersonTestSet --out REPORT
        --protocol mupots
    python jobs/evaluate.py --model RUN/model --data HUMAN.json --images DIR --out REPORT --calibrate oks50

REPORT/report.html is a page to look at, REPORT/metrics.json holds the figures and what they were made of. The model
detects with its own settings; `evaluate` and `annotate` fields given here, and what decides detection (ppi.*,
head.score_floor, ...; of --config FILE only those), go on top. --annotate.workers 4 detects on four workers of the
cluster, --annotate.gpu true on GPUs: the figures are the same. --calibrate makes the scores of RUN/model probabilities.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from rich.progress import track

from jobs import session
from lcrnet import calibration, config, dataset, evaluate, image, labels, protocols, report, weights
from lcrnet.annotate import DETECTION, Annotator, Detector, detector_id, settings
from lcrnet.config import Config, ConfigError, UserError
from lcrnet.dataset import Source

EXAMPLES = 6


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="model folder, say RUN/model")
    parser.add_argument("--data", type=Path, required=True, metavar="ANN.json", help="COCO file with the truth")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of its images")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT", help="folder of the report")
    parser.add_argument("--protocol", choices=protocols.KINDS, help="--data is that data set; its own figures too")
    parser.add_argument("--calibrate", choices=list(calibration.EVENTS), help="the scores become its probability")
    args, asked = config.parse(parser, argv)
    for name in vars(args):
        section, _, field = name.partition(".")
        if field and section not in ("evaluate", "annotate") and field not in DETECTION.get(section, ()):
            raise ConfigError(f"--{name} is fixed by the model; evaluate.*, annotate.* and detection can be set here")
    try:
        metrics = run(args.model, Source(args.data, args.images), args.out, asked, args.protocol, args.calibrate)
    except OSError as error:
        raise UserError(f"{error.filename or args.out}: {error.strerror or error}") from None
    print(evaluate.table(metrics))
    print(f"\n{args.out / 'report.html'}, {args.out / 'metrics.json'}")
    return 0


def run(
    model: Path, source: Source, out: Path, asked: Config, protocol: protocols.Kind | None = None,
    calibrate: calibration.Event | None = None, annotator: Callable[..., Any] = Annotator,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates the model of a folder into the folder `out`; returns what metrics.json says.

    asked      evaluate.*, annotate.* and settings of detection that take the place of the model's, where they are set
    annotator  makes the callable that detects, from Annotator's arguments
    """
    data, images = source.annotations, source.images
    out = session.writable(out)
    skeleton, own = weights.skeleton(model), settings(config.load(model / "config.yaml"), asked)
    told = {name: getattr(asked.evaluate, name) for name in asked.evaluate.model_fields_set}
    own = config.from_dict(own.model_dump() | {"evaluate": own.evaluate.model_dump() | told,
                                               "annotate": asked.annotate.model_dump()})  # fmt: skip
    if protocol:
        benchmark = protocols.read(protocol, data, images, skeleton)
        entries = benchmark.images
    else:
        entries = dataset.read(source, skeleton)
    files = [str((images / entry.file_name).absolute()) for entry in entries]
    groups = [str(entry.group) if protocol else labels.group_of(entry.file_name) for entry in entries]
    raw = calibrate or not own.annotate.calibrated
    start = time.monotonic()
    found_rows = detect(files, str(model.absolute()), own, asked, not raw, annotator)
    speed, dropped = len(files) / (time.monotonic() - start), sum(row["dropped"] for row in found_rows)
    truth = [entry.people for entry in entries]
    found = [[labels.person_of(person) for person in row["people"]] for row in found_rows]
    unreadable = {row["uri"]: row["error"] for row in found_rows if row["error"] is not None}

    judged = evaluate.judge(truth, found, skeleton)
    scores = calibration.tables(judged, calibrate)
    if calibrate:
        about = {"data": str(data.absolute()), "images": len(files), "poses": len(judged.score),
                 "detector": detector_id(own), "error": scores["error"],
                 "calibrated": scores["calibrated"]["error"]}  # fmt: skip
        made = calibration.fit(judged, calibrate, about)
        found = [made.apply(people) for people in found]
        weights.calibrate(model, made)
    outcomes = evaluate.outcomes(truth, found, skeleton, own.evaluate)
    metrics = {
        **evaluate.evaluate(truth, found, skeleton, own.evaluate, groups if len(set(groups)) > 1 else None, outcomes),
        **({"protocol": {"kind": protocol, **protocols.figures(benchmark, found)}} if protocol else {}),
        "calibration": scores,
        "unreadable": len(unreadable),
        "unreadable_files": unreadable,
        "dropped_proposals": dropped,
        "images_per_second": round(speed, 2),
        "model": str(model.absolute()),
        "model_id": weights.model_id(model),
        "data": str(data.absolute()),
        "images_folder": str(images.absolute()),
        "command": shlex.join(sys.argv),
        "config": own.model_dump(mode="json"),
    }
    pictures = []
    for kind, i in [(kind, i) for kind, some in evaluate.examples(outcomes, EXAMPLES).items() for i in some]:
        if files[i] not in unreadable:
            rows = [n for n, person in enumerate(found[i]) if person.score >= own.evaluate.min_score]
            pairs = [(int(t), rows.index(n)) for t, n in outcomes[i].pairs]
            shot, shown = image.read(files[i], own.annotate.max_pixels), [found[i][n] for n in rows]
            pictures.append(report.Example(kind, entries[i].file_name, str(outcomes[i]), shot, truth[i], shown, pairs))
    report.write(out / "report.html", metrics, pictures, skeleton, f"{model} on {data}")
    part = out / ".metrics.json.part"
    part.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(out / "metrics.json")
    return metrics


def detect(
    files: list[str], model: str, own: Config, asked: Config, calibrated: bool, annotator: Callable[..., Any]
) -> list[dict[str, Any]]:
    """The row of the label table of each file, in their order. The files go to the model in the same chunks whatever
    the number of workers, so that they all find the same."""
    limits = own.annotate
    arguments = {"model": model, "device": "cuda" if limits.gpu else "cpu", "max_pixels": limits.max_pixels,
                 "batch": limits.batch, "asked": asked, "calibrated": calibrated}  # fmt: skip
    size = 4 * limits.batch
    chunks = [files[i : i + size] for i in range(0, len(files), size)]
    where = _on_cluster if limits.workers > 1 else _here
    tables = where(chunks, limits, arguments, annotator)
    shown = track(tables, "detecting", len(chunks), disable=not sys.stderr.isatty())
    rows = {row["uri"]: row for table in shown for row in table.to_pylist()}
    return [rows[file] for file in files]


def _here(
    chunks: list[list[str]], limits: config.Annotate, arguments: dict[str, Any], annotator: Callable[..., Any]
) -> Iterator[pa.Table]:
    try:
        detector = Detector(arguments, annotator=annotator)
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises where there is no GPU
        raise UserError(f"--annotate.gpu: {str(error).splitlines()[0]}") from None
    for chunk in chunks:
        yield detector({"uris": [chunk]})


def _on_cluster(
    chunks: list[list[str]], limits: config.Annotate, arguments: dict[str, Any], annotator: Callable[..., Any]
) -> Iterator[pa.Table]:
    session.connect(limits.workers, limits.gpu, field="annotate")
    session.quiet()
    workers = min(limits.workers, len(chunks))
    threads = max(1, int(ray.available_resources().get("CPU", 1) // workers))
    found = ray.data.from_items([{"uris": chunk} for chunk in chunks], override_num_blocks=len(chunks)).map_batches(
        Detector, fn_constructor_args=(arguments, threads, annotator), batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=1, num_gpus=1 if limits.gpu else 0,
    )  # fmt: skip
    with session.told():
        yield from found.iter_batches(batch_size=None, batch_format="pyarrow")


if __name__ == "__main__":
    config.run(main)
