"""Sweeps hyperparameters: every trial is a training of its own, weak ones are stopped early (ASHA).

    python jobs/tune.py --config configs/sweep.yaml --out SWEEP [--data ANN.json --images DIR --val ANN.json]

`tune.space` of the configuration names the fields and their values. Without --data the sweep runs on drawn people.
SWEEP/best is the best trial's model folder, SWEEP/report.json the table. The same command goes on after an
interruption.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from jobs import session, train
from lcrnet import config, synthetic
from lcrnet.config import Config, UserError
from lcrnet.dataset import Source

DRIVER_CPU = 0.1
"""What the driver of a trial takes, which only waits for its workers."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "", config_required=True)
    parser.add_argument("--data", type=Path, metavar="ANN.json", help="COCO file to train on; drawn people without it")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of its images")
    parser.add_argument("--val", type=Path, metavar="ANN.json", help="COCO file that decides")
    parser.add_argument("--val-images", type=Path, metavar="DIR", help="folder of its images; --images without it")
    parser.add_argument("--out", type=Path, required=True, metavar="SWEEP", help="folder of the sweep")
    args, settings = config.parse(parser, argv)
    if args.data and not (args.images and args.val):
        raise UserError("--data also needs --images and --val: a sweep is decided on images that it does not train on")
    space = search_space(settings)
    out = session.writable(args.out).resolve()
    config.save(settings, out / "config.yaml")
    if args.data:
        data = Source(args.data.resolve(), args.images.resolve())
        val = Source(args.val.resolve(), (args.val_images or args.images).resolve())
    else:
        data, val = drawn(settings, out / "drawn")
    rows = sweep(settings, space, data, val, out)
    best = rows[0]
    print(table(rows, settings.tune.metric))
    if best["metric"] is None:
        print("error: no trial came to an evaluation; their errors are in the lines above")
        return 1
    print(f"best: {best['trial']}, {settings.tune.metric} {best['metric']:.4g}; model: {out / 'best'}")
    return 0


def search_space(settings: Config) -> dict[str, Any]:
    """Ray Tune's space of `tune.space`; UserError names the field whose values cannot be."""
    kinds = {"loguniform": tune.loguniform, "uniform": tune.uniform, "choice": lambda *values: tune.choice(values)}
    space = {}
    if not settings.tune.space:
        raise UserError(
            "tune.space is empty: nothing to sweep; e.g. tune: {space: {train.lr: {loguniform: [1e-4, 1e-2]}}}"
        )
    for name, how in settings.tune.space.items():
        kind, values = next(iter(how.items())) if len(how) == 1 else ("", [])
        if kind not in kinds or not isinstance(values, list) or (kind != "choice" and len(values) != 2) or not values:
            raise UserError(
                f"tune.space: {name}: {how} is not one of loguniform: [a, b], uniform: [a, b], choice: [...]"
            )
        for value in values:
            with_override(settings, {name: value})
        space[name] = kinds[kind](*values)
    return space


def with_override(settings: Config, values: dict[str, Any]) -> Config:
    """The configuration with some dotted fields replaced; ConfigError if one cannot be."""
    nested = settings.model_dump()
    for name, value in values.items():
        section, field = name.split(".")
        nested[section][field] = value
    return config.from_dict(nested, "tune.space")


def drawn(settings: Config, folder: Path) -> tuple[Source, Source]:
    """Training and validation drawings, made once."""
    size = settings.draw
    for part, count in (("train", size.train), ("val", size.val)):
        if not (folder / part / "annotations.json").is_file():
            print(f"drawing {count} images: {folder / part}")
            synthetic.write(folder / part, count, 1 + (part == "val"), size.size, size.heading)
    train_part, val_part = (Source(folder / p / "annotations.json", folder / p / "images") for p in ("train", "val"))
    return train_part, val_part


def sweep(settings: Config, space: dict[str, Any], data: Source, val: Source, out: Path) -> list[dict[str, Any]]:
    """Runs the trials; their rows, best first. The best trial's model becomes out/best."""
    # An early checkpoint may find nobody: then there is no MPJPE yet, which is no error.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    workers, threads = settings.train.workers, settings.train.threads or 1
    settings = with_override(settings, {"train.threads": threads})
    session.connect(workers, settings.train.gpu, cpus=threads)
    kind, each = ("GPU", workers) if settings.train.gpu else ("CPU", workers * threads + DRIVER_CPU)
    # Tune counts only the drivers: more trials than fit would wait for each other's workers for ever.
    fit = max(1, int(ray.cluster_resources().get(kind, 0) // each))
    scheduler = ASHAScheduler(time_attr="step", grace_period=min(settings.train.save_every, settings.train.steps),
                              max_t=settings.train.steps, reduction_factor=3)  # fmt: skip
    trainable = tune.with_resources(_Trial(settings, data, val, out / "trials"), {"CPU": DRIVER_CPU})
    if tune.Tuner.can_restore(str(out / "tune")):
        tuner = tune.Tuner.restore(str(out / "tune"), trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=settings.tune.metric, mode=settings.tune.mode, num_samples=settings.tune.trials,
                max_concurrent_trials=min(settings.tune.concurrent or fit, fit), scheduler=scheduler,
            ),
            run_config=tune.RunConfig(name="tune", storage_path=str(out), verbose=1),
        )  # fmt: skip
    sign = -1 if settings.tune.mode == "max" else 1
    rows = [
        {"trial": r.metrics.get("trial_id"), "metric": r.metrics.get(settings.tune.metric),
         "step": r.metrics.get("step"),
         **{name: r.config[name] for name in space}, "error": str(r.error or "")}
        for r in tuner.fit()
    ]  # fmt: skip
    rows.sort(key=lambda row: (row["metric"] is None, sign * (row["metric"] or 0)))
    (out / "report.json").write_text(json.dumps(rows, indent=1))
    models = sorted((out / "trials" / str(rows[0]["trial"])).glob("ray/checkpoint_*/model"))
    if models:
        shutil.copytree(models[-1], out / "best", dirs_exist_ok=True)
    return rows


class _Trial:
    """One trial: a training of its own, in a folder named by the trial so that it goes on after a restart."""

    def __init__(self, settings: Config, data: Source, val: Source, out: Path):
        self.settings, self.data, self.val, self.out = settings, data, val, out
        self.__name__ = "lcrnet"

    def __call__(self, values: dict[str, Any]) -> None:
        folder = self.out / tune.get_context().get_trial_id()
        settings = with_override(self.settings, values)
        if train.run(settings, self.data, folder, self.val, callbacks=[TuneReportCallback()]) is None:
            raise RuntimeError(f"the trial failed; its lines above say why ({folder})")


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """The trials as text, best first."""
    names = [name for name in rows[0] if name not in ("metric", "error")]
    lines = [[metric, *names]] + [[row["metric"], *(row[name] for name in names)] for row in rows]
    texts = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(t.rjust(w) for t, w in zip(line, widths, strict=True)) for line in texts)


if __name__ == "__main__":
    config.run(main)
