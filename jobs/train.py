"""Trains LCR-Net on COCO data sets of poses, on the local machine or on the cluster that Ray is connected to.

    python jobs/train.py --config configs/tiny.yaml --data ANN.json --images DIR --out RUN [--val ANN.json]
    python jobs/train.py ... --data A.json --images A --weight 3 --data B.json --images B --weight 1 ...

RUN/model is the final model folder, RUN/tensorboard the curves (jobs/plot.py draws them), RUN/ray the checkpoints. The
same command goes on with a run that was interrupted; a finished one is left as it is. SIGTERM (`ray job stop`) and
Ctrl-C save a checkpoint first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from filelock import FileLock, Timeout
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from jobs import desk, driver, session, worker
from jobs.store import Store
from lcrnet import anchors, config, dataset, optim, weights
from lcrnet.config import Config, UserError
from lcrnet.dataset import Source
from lcrnet.pose import People

WHERE = (
    "workers", "gpu", "threads", "max_failures", "keep", "log_every", "picture_every", "validation",
)  # fmt: skip
"""Fields of `train` that say where a run runs and what it shows, not what it computes: they may change on the way."""

PATIENCE = 5
"""Seconds that a run waits for another in its folder to end: one that was killed just now."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, action="append", metavar="ANN.json",
                        help="COCO file to train on; several are mixed")  # fmt: skip
    parser.add_argument("--images", type=Path, required=True, action="append", metavar="DIR",
                        help="folder of its images; one for all, or one for each")  # fmt: skip
    parser.add_argument("--weight", type=float, action="append", metavar="W", help="share of each --data in the mix")
    parser.add_argument("--val", type=Path, metavar="ANN.json", help="COCO file to evaluate on at every checkpoint")
    parser.add_argument("--val-images", type=Path, metavar="DIR", help="folder of its images; --images without it")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--steps", dest="train.steps", default=argparse.SUPPRESS, help="short for --train.steps")
    parser.add_argument("--workers", dest="train.workers", default=argparse.SUPPRESS, help="short for --train.workers")
    args, settings = config.parse(parser, argv)
    val = Source(args.val, args.val_images or args.images[0]) if args.val else None
    metrics = run(settings, _sources(args), args.out, val)
    print(f"model: {args.out / 'model'}   curves: python jobs/plot.py {args.out}")
    return 0 if metrics is not None else 1


def run(
    settings: Config, data: Source | Sequence[Source], out: Path, val: Source | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> dict[str, Any] | None:  # fmt: skip
    """Trains into the folder `out` and returns the final metrics, None if it failed (and says why).

    UserError for what the user can mend. SystemExit, 128 + the signal, for a run that was stopped, after a checkpoint.
    """
    out = session.writable(out).resolve()
    try:
        with FileLock(out / ".lock", timeout=PATIENCE):
            return _run(settings, data, out, val, callbacks)
    except Timeout:
        raise UserError(f"{out}: another process trains there; take another --out") from None


def _run(
    settings: Config, data: Source | Sequence[Source], out: Path, val: Source | None, callbacks: Sequence[UserCallback]
) -> dict[str, Any] | None:
    sources = [_absolute(source) for source in ([data] if isinstance(data, Source) else data)]
    val = _absolute(val) if val else None
    least = settings.store.min_workers if session.elastic(settings) else settings.train.workers
    if settings.store.keep_best and not (val and settings.train.validation != "none"):
        raise UserError("store.keep_best: checkpoints have figures to choose by only with --val ANN.json")
    store = Store(settings.store, out)
    store.fetch()
    settings = _unchanged(settings, out / "config.yaml")
    if (out / "model").is_dir():
        print(f"{out} is finished (step {weights.read_about(out / 'model')['step']}); another --out starts anew")
        return dict(weights.read_about(out / "model")["metrics"])
    poses = _anchors(settings, sources, out / "anchors.json")
    store.put()
    if val:
        dataset.read(val, poses.skeleton)
    beside = val if settings.train.validation == "beside" else None
    session.connect(least + bool(beside), settings.train.gpu, cpus=settings.train.threads or 1, log=False)
    table, kept, mended = desk.opened(), settings.store, store.mend()
    trainer = TorchTrainer(
        worker.work,
        train_loop_config={"config": settings, "data": sources if len(sources) > 1 else sources[0], "val": val,
                           "anchors": poses, "out": out, "desk": table, "mended": mended},
        torch_config=TorchConfig(backend="nccl" if settings.train.gpu else "gloo"),
        scaling_config=session.scaling(settings, bool(beside)),
        run_config=RunConfig(
            name="ray",
            storage_path=store.uri,
            failure_config=FailureConfig(max_failures=settings.train.max_failures, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=settings.train.keep, checkpoint_score_order=kept.best_mode,
                                               checkpoint_score_attribute=kept.keep_best or None),
            callbacks=[*callbacks, desk.Witness(table)],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
        validation_config=session.validation(partial(worker.validate, val=beside, desk=table), settings)
        if beside else None,
    )  # fmt: skip
    try:
        result, signal = driver.attend(trainer.fit, table, out)
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {}) or {0: error}
        for rank, failure in sorted(failures.items())[:1]:
            print(f"error: training failed, first on worker {rank}:\n{str(failure).strip()[-2000:]}")
        return None
    said = result.return_value or {}
    if "error" in said:
        print(f"error: {said['error']}")
        return None
    if result.checkpoint is None:
        raise UserError(f"{out}: no checkpoint there although the run ended; is it storage that all nodes share?")
    last = optim.scaled(settings.train).steps
    if said["metrics"]["step"] < last:
        print(f"{last - said['metrics']['step']} steps are left; the same command goes on")
        raise SystemExit(128 + signal if signal else 1)
    return _finish(result, said["metrics"], kept, out)


def _finish(result: ray.train.Result, metrics: dict[str, Any], kept: config.Store, out: Path) -> dict[str, Any]:
    """RUN/best where one is kept, RUN/model, which marks the run as finished, and metrics.json."""
    metrics |= {k: v for k, v in (result.metrics or {}).items() if isinstance(v, int | float)}
    best = result.get_best_checkpoint(kept.keep_best, kept.best_mode) if kept.keep_best else None
    if best:
        found = next((dict(m) for c, m in result.best_checkpoints or [] if c == best), {})
        shutil.rmtree(out / "best", ignore_errors=True)
        _publish(best, out / "best", found)
        print(f"best: {kept.keep_best} {found.get(kept.keep_best)} at step {found.get('step')}; model: {out / 'best'}")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    _publish(result.checkpoint, out / "model", metrics)
    return metrics


def _sources(args: argparse.Namespace) -> list[Source]:
    """The data sets of the command line; UserError where their options do not pair."""
    count = len(args.data)
    images = args.images * count if len(args.images) == 1 else args.images
    shares = args.weight or [1.0] * count
    for option, given in (("--images", images), ("--weight", shares)):
        if len(given) != count:
            raise UserError(f"{count} --data, but {len(given)} {option}: give one for each")
    if any(share <= 0 for share in shares):
        raise UserError(f"--weight {min(shares):g}: must be above 0; leave the data set out instead")
    sources = [Source(a, i) for a, i in zip(args.data, images, strict=True)]
    return [replace(s, weight=w) for s, w in zip(sources, shares, strict=True)] if args.weight else sources


def _anchors(settings: Config, sources: Sequence[Source], file: Path) -> anchors.AnchorPoses:
    """The run's anchor poses: those it has, those of `anchors.file`, or clustered from the data; kept in `file`."""
    poses = None
    if file.is_file():
        poses = anchors.load(file)
    elif settings.train.init:
        poses = weights.anchors_of(settings.train.init)
    if poses is None and settings.anchors.file:
        poses = anchors.load(settings.anchors.file)
    skeleton = poses.skeleton if poses else anchors.LCR13
    images = [i for source in sources for i in dataset.read(source, skeleton, settings.data.min_joints)]
    people = People.join(image.people for image in images)
    print(f"{len(images)} images, {int((~people.crowd).sum())} people, {int(people.has3d.sum())} with a 3D pose")
    if not (~people.crowd).any():
        names = ", ".join(str(source.annotations) for source in sources)
        raise UserError(f"{names}: nobody in it has a pose to learn from")
    if poses is None:
        owner = [image.file_name for image in images for _ in range(len(image.people))]
        poses, _, k = anchors.fit(people, owner, settings.anchors, seed=settings.train.seed)
        if settings.anchors.k == "auto":
            print(f"anchors.k auto: {k} 3D poses; `python jobs/anchors.py` with this data and configuration shows why")
    if not file.is_file():
        anchors.save(poses, file)
    if people.has3d.any():
        reach = anchors.coverage(people.pose3d[people.has3d], poses)
        print(f"{len(poses)} anchor poses; distance to the nearest: mean {1000 * reach['mean']:.0f} mm, "
              f"worst {1000 * reach['worst']:.0f} mm")  # fmt: skip
    return poses


def _unchanged(settings: Config, file: Path) -> Config:
    """Records the configuration of a new run, compares that of one that goes on. UserError where it differs."""
    if file.is_file():
        before, now = (c.model_dump() for c in (config.load(file), settings))
        differ = [
            f"{section}.{field} was {before[section][field]}"
            for section in ("image", "anchors", "model", "rpn", "head", "data", "train")
            for field in now[section]
            if now[section][field] != before[section][field] and not (section == "train" and field in WHERE)
        ]
        if differ:
            raise UserError(f"{file.parent} holds another run: {', '.join(differ)}; take another --out")
    config.save(settings, file)
    return settings


def _publish(checkpoint: Checkpoint, target: Path, metrics: dict[str, Any]) -> None:
    """Copies the model of a checkpoint into place, whole or not at all, with its figures, some of which came later."""
    scratch = Path(tempfile.mkdtemp(prefix=".model-", dir=target.parent))
    with checkpoint.as_directory() as folder:
        shutil.copytree(Path(folder) / "model", scratch, dirs_exist_ok=True)
    about = {**weights.read_about(scratch), "metrics": metrics}
    (scratch / "model.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    scratch.chmod(0o755)
    scratch.rename(target)


def _absolute(source: Source) -> Source:
    return replace(source, annotations=source.annotations.resolve(), images=source.images.resolve())


if __name__ == "__main__":
    config.run(main)
