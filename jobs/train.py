"""Trains LCR-Net on a COCO data set of poses, on the local machine or on the cluster that Ray is connected to.

    python jobs/train.py --config configs/tiny.yaml --data ANN.json --images DIR --out RUN [--val ANN.json]

RUN/model is the final model folder, RUN/tensorboard the curves, RUN/ray the checkpoints. The same command goes on with
a run that was interrupted; a finished one is left as it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from jobs import session
from lcrnet import anchors, config, dataset, train, weights
from lcrnet.config import Config, UserError
from lcrnet.dataset import Source
from lcrnet.pose import People

LOG = "train.log"
"""What rank 0 says, in the run's folder; the driver prints it as it comes."""

WHERE = ("workers", "gpu", "threads", "max_failures", "keep", "log_every")
"""Fields of `train` that say where a run runs, not what it computes: they may change when it goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, metavar="ANN.json", help="COCO file to train on")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of its images")
    parser.add_argument("--val", type=Path, metavar="ANN.json", help="COCO file to evaluate on at every checkpoint")
    parser.add_argument("--val-images", type=Path, metavar="DIR", help="folder of its images; --images without it")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--steps", dest="train.steps", default=argparse.SUPPRESS, help="short for --train.steps")
    parser.add_argument("--workers", dest="train.workers", default=argparse.SUPPRESS, help="short for --train.workers")
    args, settings = config.parse(parser, argv)
    val = Source(args.val, args.val_images or args.images) if args.val else None
    metrics = run(settings, Source(args.data, args.images), args.out, val)
    print(f"model: {args.out / 'model'}   curves: tensorboard --logdir {args.out / 'tensorboard'}")
    return 0 if metrics is not None else 1


def run(
    settings: Config, data: Source, out: Path, val: Source | None = None, callbacks: Sequence[UserCallback] = ()
) -> dict[str, Any] | None:
    """Trains into the folder `out` and returns the final metrics, None if it failed (and says why).

    UserError for what the user can mend.
    """
    out = session.writable(out).resolve()
    data, val = _absolute(data), _absolute(val) if val else None
    settings = _unchanged(settings, out / "config.yaml")
    if (out / "model").is_dir():
        print(f"{out} is finished (step {weights.read_about(out / 'model')['step']}); another --out starts anew")
        return dict(weights.read_about(out / "model")["metrics"])
    poses = _anchors(settings, data, out / "anchors.json")
    if val:
        dataset.read(val, poses.skeleton)
    session.connect(settings.train.workers, settings.train.gpu, cpus=settings.train.threads or 1, log=False)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": settings, "data": data, "val": val, "anchors": poses, "out": out},
        torch_config=TorchConfig(backend="nccl" if settings.train.gpu else "gloo"),
        scaling_config=session.scaling(settings.train),
        run_config=RunConfig(
            name="ray",
            storage_path=str(out),
            failure_config=FailureConfig(max_failures=settings.train.max_failures, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=settings.train.keep),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        with _following(out / LOG):
            result = trainer.fit()
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
    with result.checkpoint.as_directory() as folder:
        _publish(Path(folder) / "model", out / "model")
    return dict(said["metrics"])


def _worker(args: dict[str, Any]) -> dict[str, Any]:
    """One process of the training; what it returns on rank 0 reaches the driver."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    try:
        metrics = train.fit(args["config"], RayRun(args["out"]), args["data"], args["anchors"], args["val"])
    except (train.NonFinite, UserError) as error:  # starting again would only repeat it
        return {"error": str(error)}
    return {"metrics": metrics}


class RayRun:
    """`lcrnet.train.Run` over Ray Train."""

    def __init__(self, out: Path):
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.threads = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        self.folder = out / "tensorboard"

    @contextmanager
    def resume(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint()
        with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
            yield Path(folder) if folder else None

    def say(self, text: str) -> None:
        if self.rank == 0:
            with open(self.folder.parent / LOG, "a", encoding="utf-8") as log:
                log.write(text + "\n")

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        checkpoint = Checkpoint.from_directory(str(folder)) if folder else None
        ray.train.report(metrics, checkpoint=checkpoint)
        # A report is only safe once the controller has taken it (RAY.md 2.2).
        ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)


@contextmanager
def _following(log: Path) -> Iterator[None]:
    """Prints what is added to a log while the context lasts."""
    log.touch()
    end = threading.Event()

    def follow() -> None:
        with log.open(encoding="utf-8") as lines:
            lines.seek(0, 2)
            while True:
                last = end.wait(0.5)
                print(lines.read(), end="", flush=True)
                if last:
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _anchors(settings: Config, data: Source, file: Path) -> anchors.AnchorPoses:
    """The run's anchor poses: those it has, those of `anchors.file`, or clustered from the data; kept in `file`."""
    poses = None
    if file.is_file():
        poses = anchors.load(file)
    elif settings.train.init:
        poses = weights.anchors_of(settings.train.init)
    if poses is None and settings.anchors.file:
        poses = anchors.load(settings.anchors.file)
    images = dataset.read(data, poses.skeleton if poses else anchors.LCR13, settings.data.min_joints)
    people = People.join(image.people for image in images)
    print(f"{len(images)} images, {int((~people.crowd).sum())} people, {int(people.has3d.sum())} with a 3D pose")
    if not (~people.crowd).any():
        raise UserError(f"{data.annotations}: nobody in it has a pose to learn from")
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


def _publish(model: Path, target: Path) -> None:
    """Copies a model folder into place, whole or not at all."""
    scratch = Path(tempfile.mkdtemp(prefix=".model-", dir=target.parent))
    shutil.copytree(model, scratch, dirs_exist_ok=True)
    scratch.chmod(0o755)
    scratch.rename(target)
    (target.parent / "metrics.json").write_text(json.dumps(weights.read_about(target)["metrics"], indent=1))


def _absolute(source: Source) -> Source:
    return Source(source.annotations.resolve(), source.images.resolve())


if __name__ == "__main__":
    config.run(main)
