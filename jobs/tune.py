"""Sweeps hyperparameters: each trial is a training of its own; or, with --ppi, settings of PPI without training.

    python jobs/tune.py --config configs/sweep.yaml --out SWEEP [--data ANN.json --images DIR --val ANN.json]
    python jobs/tune.py --config configs/sweep_ppi.yaml --ppi RUN/model --data ANN.json --images DIR --out SWEEP

`tune.space` of the configuration names the fields and their values. Weak trials are stopped early (tune.scheduler:
asha), or go on from the checkpoints of strong ones with settings changed a little (pbt). Without --data the trainings
are on drawn people. SWEEP/best is the best trial's model folder, SWEEP/report.json the table, SWEEP/report.png the
metric over each field.

--ppi takes the pose proposals of all images once, SWEEP/proposals, and judges thousands of settings of ppi.* and
head.score_floor on them. SWEEP/best.yaml is for --config of annotate.py and evaluate.py. Choose on other images than
you report on.

The same command goes on after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import PlacementGroupID, tune
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.util.placement_group import PlacementGroup, remove_placement_group
from rich.progress import Progress, TextColumn

from jobs import session, train
from lcrnet import config, optim, sweep, synthetic, weights
from lcrnet.config import Config, UserError
from lcrnet.dataset import Source

DRIVER = {"memory": 2.0**20}
"""What Tune counts of a trial: its driver, which only waits. CPUs would be missing where the workers take them all."""

ROOM = "room.txt"

BLOCK = 8
"""Trials of a task of the cheap sweep: a fraction of a second on a small set."""

EVERY = 10
"""Seconds between two lines of progress where there is no terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = config.parser(__doc__ or "", config_required=True)
    parser.add_argument("--ppi", type=Path, metavar="MODEL", help="sweep ppi.* and head.score_floor of this model")
    parser.add_argument("--data", type=Path, metavar="ANN.json", help="COCO file to train on; drawn people without it")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of its images")
    parser.add_argument("--val", type=Path, metavar="ANN.json", help="COCO file that decides (with --ppi --data does)")
    parser.add_argument("--val-images", type=Path, metavar="DIR", help="folder of its images; --images without it")
    parser.add_argument("--out", type=Path, required=True, metavar="SWEEP", help="folder of the sweep")
    args, settings = config.parse(parser, argv)
    rows = cheap(args, settings) if args.ppi else trainings(args, settings)
    metric, best = settings.tune.metric, rows[0]
    print(table(rows[:20], metric))
    if best["metric"] is None:
        print(f"error: no trial came to a figure for {metric}: {best['error'] or 'nobody was found'}")
        return 1
    print(f"best of {len(rows)}: {best['trial']}, {metric} {best['metric']:.4g}; "
          f"{args.out / ('best.yaml' if args.ppi else 'best')}, {args.out / 'report.png'}")  # fmt: skip
    return 0


def trainings(args: Namespace, settings: Config) -> list[dict[str, Any]]:
    """The sweep over trainings that a command line asks for; its rows, best first."""
    if args.data and not (args.images and args.val):
        raise UserError("--data also needs --images and --val: a sweep is decided on images that it does not train on")
    search_space(settings)
    if args.data:
        data = Source(args.data.resolve(), args.images.resolve())
        val = Source(args.val.resolve(), (args.val_images or args.images).resolve())
    else:
        data, val = drawn(settings, session.writable(args.out).resolve() / "drawn")
    return run(settings, data, val, args.out)


def search_space(settings: Config) -> dict[str, Any]:
    """Ray Tune's space of `tune.space`; UserError names the field whose values cannot be."""
    kinds = {"loguniform": tune.loguniform, "uniform": tune.uniform, "choice": lambda *values: tune.choice(values)}
    return {name: kinds[how.kind](*how.values) for name, how in sweep.space_of(settings).items()}


def drawn(settings: Config, folder: Path) -> tuple[Source, Source]:
    """Training and validation drawings, made once."""
    size = settings.draw
    for part, count in (("train", size.train), ("val", size.val)):
        if not (folder / part / "annotations.json").is_file():
            print(f"drawing {count} images: {folder / part}")
            synthetic.write(folder / part, count, 1 + (part == "val"), size.size, size.heading)
    train_part, val_part = (Source(folder / p / "annotations.json", folder / p / "images") for p in ("train", "val"))
    return train_part, val_part


def run(settings: Config, data: Source, val: Source, out: Path) -> list[dict[str, Any]]:
    """Trains the trials into the folder `out`; their rows, best first. The best trial's model becomes out/best."""
    out = session.writable(out).resolve()
    own = settings.model_dump(mode="json")
    for name in train.WHERE:
        own["train"].pop(name)
    own["tune"].pop("concurrent")
    sections = ("image", "anchors", "model", "rpn", "head", "ppi", "data", "train", "evaluate", "tune")
    sources = [str(file) for source in (data, val) for file in (source.annotations, source.images)]
    _unchanged(out, {"sources": sources, **{name: own[name] for name in sections}})
    config.save(settings, out / "config.yaml")
    if (out / "report.json").is_file() and (out / "best").is_dir():
        rows: list[dict[str, Any]] = json.loads((out / "report.json").read_text())
        if not any(row["error"] for row in rows):
            print(f"{out} is finished; another --out starts anew")
            return rows
    if settings.store.checkpoints:
        raise UserError("store.checkpoints: trials keep theirs in SWEEP/trials, not all in one place; leave it out")
    if settings.train.validation != "inline":
        raise UserError("a sweep is decided by what its trials report at their checkpoints: --train.validation inline")
    # An early checkpoint may find nobody: then there is no MPJPE yet, which is no error.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    settings = sweep.with_override(settings, {"train.threads": settings.train.threads or 1})
    session.connect(settings.train.workers, settings.train.gpu, cpus=settings.train.threads)
    evolves = settings.tune.scheduler == "pbt"
    rows = (_population if evolves else _independent)(settings, data, val, out)
    best = rows[0]
    if best["metric"] is not None:
        _keep(_model_at(Path(best["folder"]), best["step"]), out / "best")
    _report(rows, settings, out)
    return rows


def fit_at_a_time(settings: Config) -> int:
    """Trials that have room for all their workers at the same time: more would wait for each other's for ever."""
    own = settings.train
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = [int(min(n.get("CPU", 0) // max(own.threads, 1), n.get("GPU", 0) if own.gpu else 1e9)) for n in nodes]
    room = max(1, sum(slots) // own.workers)
    return min(settings.tune.concurrent or room, room)


def _independent(settings: Config, data: Source, val: Source, out: Path) -> list[dict[str, Any]]:
    """Trials that know nothing of each other; ASHA stops the weak ones."""
    own, names = settings.tune, list(settings.tune.space)
    grace = min(own.grace or settings.train.save_every, optim.scaled(settings.train).steps)
    # A training ends by itself: at max_t it would be stopped before RUN/model is there.
    asha = ASHAScheduler(time_attr="step", max_t=10**9, reduction_factor=own.reduction, grace_period=grace)
    scheduler = FIFOScheduler() if own.scheduler == "none" else asha
    grid = _tuned(
        _Trial(settings, data, val, out / "trials"), out / "tune", search_space(settings), own.trials, scheduler,
        settings,
    )  # fmt: skip
    rows = [
        {"trial": r.metrics.get("trial_id"), "metric": r.metrics.get(own.metric), "step": r.metrics.get("step"),
         **{name: r.config[name] for name in names}, "folder": str(out / "trials" / str(r.metrics.get("trial_id"))),
         "error": str(r.error or "").strip()[-300:]}
        for r in grid
    ]  # fmt: skip
    return sweep.ranked(rows, own.mode)


def _population(settings: Config, data: Source, val: Source, out: Path) -> list[dict[str, Any]]:
    """Population-based training in rounds: all members train to the same step, then the weak go on from the strong.

    Ray Tune's own scheduler of this name needs checkpoints that Tune has; those of Ray Train it does not get (2.60),
    and where it stops a trial depends on the clock. Here Tune runs the rounds, a round is a function of the one before
    it, and SWEEP/population.json says what they were.
    """
    own, space, every = settings.tune, sweep.space_of(settings), settings.train.save_every
    length = own.perturb_every or every
    if length % every:
        raise UserError(f"tune.perturb_every {length} is not a multiple of train.save_every {every}: a round ends at a "
                        "checkpoint")  # fmt: skip
    seed, file = settings.train.seed, out / "population.json"
    members = sweep.founders(space, seed, own.trials)
    # A run may be a checkpoint ahead when Tune stops it: the one before must still be there.
    settings = sweep.with_override(settings, {"train.keep": max(settings.train.keep, 4), "store.keep_best": ""})
    last = optim.scaled(settings.train).steps
    rounds: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    ends = [*range(length, last, length), last]
    for turn, step in enumerate(ends):
        homes = [out / "trials" / f"round_{turn:03d}" / str(i) for i in range(len(members))]
        if turn == len(rounds):
            if turn:
                for i, member in enumerate(members):
                    _fork(homes[i].parents[1] / f"round_{turn - 1:03d}" / str(member.parent), homes[i], ends[turn - 1])
            print(f"round {turn + 1} of {len(ends)}: {len(members)} trainings to step {step}", flush=True)
            job = _Member(settings, data, val, members, homes)
            stop = {"step": step} if step < last else None
            found = {r.config["member"]: r for r in _tuned(
                job, out / f"tune_{turn:03d}", {"member": tune.grid_search(list(range(len(members))))}, 1,
                FIFOScheduler(), settings, stop)}  # fmt: skip
            if failed := [i for i, r in found.items() if r.error]:
                raise UserError(f"{out}: member {failed[0]} failed in round {turn + 1}; its lines above say why; the "
                                "same command tries again")  # fmt: skip
            rounds.append({
                "step": step,
                "members": [
                    {**dataclasses.asdict(member), "metric": _metric_at(home, step, own.metric)}
                    for member, home in zip(members, homes, strict=True)
                ],
            })  # fmt: skip
            _write(file, json.dumps(rounds, indent=1))
            for old in (out / "trials").glob(f"round_{turn - 1:03d}/*/ray"):
                shutil.rmtree(old)  # the curves stay
        now = rounds[turn]["members"]
        metrics = [member["metric"] for member in now]
        members = [sweep.Member(member["parent"], member["values"]) for member in now]
        if turn + 1 < len(ends):
            members = sweep.successors(space, seed, turn, members, metrics, own.mode)
    rows = [
        {"trial": i, "metric": metric, "step": ends[-1], **member.values, "folder": str(home), "error": ""}
        for i, (metric, member, home) in enumerate(zip(metrics, members, homes, strict=True))
    ]
    return sweep.ranked(rows, own.mode)


def _tuned(
    job: Any, folder: Path, space: dict[str, Any], trials: int, scheduler: Any, settings: Config,
    stop: dict[str, int] | None = None,
) -> Any:  # fmt: skip
    """The results of Tune's trials in a folder, whose unfinished ones go on."""
    trainable = tune.with_resources(job, tune.PlacementGroupFactory([DRIVER]))
    if tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(str(folder), trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=settings.tune.metric, mode=settings.tune.mode, num_samples=trials, scheduler=scheduler,
                max_concurrent_trials=fit_at_a_time(settings),
            ),
            run_config=tune.RunConfig(
                name=folder.name, storage_path=str(folder.parent), verbose=1, stop=stop, callbacks=[_Freed(job.home)],
            ),
        )  # fmt: skip
    return tuner.fit()


class _Room(WorkerGroupCallback):
    """Notes what a training reserves, in its folder: the ids of its placement groups.

    A trial that Tune stops leaves its workers' placement group behind, since Ray Train's controller is killed with its
    driver, and later trials would wait for that room for ever. Train has an actor that would remove it, but that asks
    the dashboard, which a local Ray of ours has not (and is at a loss where a machine has two).
    """

    def __init__(self, file: Path):
        self.file = file

    def after_worker_group_start(self, worker_group: Any) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(group.id.hex() + "\n")


class _Freed(tune.Callback):
    """Gives back what a trial that has ended, or was stopped, had reserved."""

    def __init__(self, home: Any):
        self.home = home

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        file = self.home(trial.config, trial.trial_id) / ROOM
        for line in file.read_text().split() if file.is_file() else ():
            with contextlib.suppress(ValueError, RuntimeError, RayError):
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(line))))
        file.unlink(missing_ok=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)


class _Trial:
    """One trial: a training of its own, in a folder named by the trial so that it goes on after a restart."""

    def __init__(self, settings: Config, data: Source, val: Source, out: Path):
        self.settings, self.data, self.val, self.out = settings, data, val, out
        self.__name__ = "lcrnet"

    def home(self, values: dict[str, Any], trial: str) -> Path:
        return self.out / trial

    def __call__(self, values: dict[str, Any]) -> None:
        self.train(values, self.home(values, tune.get_context().get_trial_id()))

    def train(self, values: dict[str, Any], folder: Path) -> None:
        settings = sweep.with_override(self.settings, values)
        callbacks: list[Any] = [TuneReportCallback(), _Room(session.writable(folder) / ROOM)]
        if train.run(settings, self.data, folder, self.val, callbacks=callbacks) is None:
            raise RuntimeError(f"the trial failed; its lines above say why ({folder})")


class _Member(_Trial):
    """The trainings of one round of a population, by number."""

    def __init__(
        self, settings: Config, data: Source, val: Source, members: Sequence[sweep.Member], homes: Sequence[Path]
    ):
        super().__init__(settings, data, val, homes[0].parent)
        self.members, self.homes = members, homes

    def home(self, values: dict[str, Any], trial: str) -> Path:
        return self.homes[values["member"]]

    def __call__(self, values: dict[str, Any]) -> None:
        self.train(self.members[values["member"]].values, self.home(values, ""))


def _fork(parent: Path, child: Path, step: int) -> None:
    """Makes a run that goes on from a checkpoint of another: same anchor poses, weights, moments and step.

    A run's folder is what Ray Train resumes from (RAY.md 2.4): checkpoints, and a list of them, which the new one has
    of that checkpoint alone. No torn folder stays after a kill.
    """
    if child.is_dir():
        return
    listed = json.loads((parent / "ray" / "checkpoint_manager_snapshot.json").read_text())
    at = [n for n, result in enumerate(listed["checkpoint_results"]) if result["metrics"]["step"] == step]
    if not at:
        raise UserError(f"{parent}: no checkpoint of step {step} any more; raise --train.keep")
    result = listed["checkpoint_results"][at[0]]
    listed |= {
        "checkpoint_results": [result], "checkpoint_report_indices": [0], "latest_checkpoint_result": result,
        "current_report_index": 1, "pending_training_results": [], "pending_validation_specs": [],
    }  # fmt: skip
    part = child.with_name(f".{child.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    name = result["checkpoint_dir_name"]
    shutil.copytree(parent / "ray" / name, part / "ray" / name)
    (part / "ray" / "checkpoint_manager_snapshot.json").write_text(json.dumps(listed))
    shutil.copy(parent / "anchors.json", part / "anchors.json")
    part.rename(child)


def _checkpoints(run: Path) -> dict[int, Path]:
    """The model folders of a run by their step."""
    found = [*run.glob("ray/checkpoint_*/model"), *run.glob("model")]
    return {int(weights.read_about(model)["step"]): model for model in found}


def _model_at(run: Path, step: int) -> Path:
    """The model folder of a step; the latest if it is gone."""
    found = _checkpoints(run)
    if not found:
        raise UserError(f"{run}: no checkpoint there; is --out storage that all nodes share?")
    return found.get(step, found[max(found)])


def _metric_at(run: Path, step: int, metric: str) -> float | None:
    model = _checkpoints(run).get(step)
    value = weights.read_about(model)["metrics"].get(metric) if model else None
    return None if value is None else float(value)


def _keep(model: Path, target: Path) -> None:
    """Copies a model folder into place, whole."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(model, part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def cheap(args: Namespace, asked: Config) -> list[dict[str, Any]]:
    """The sweep on cached proposals that a command line asks for; its rows, best first."""
    if not (args.data and args.images):
        raise UserError("--ppi also needs --data and --images: the truth that decides, and its images")
    out = session.writable(args.out).resolve()
    plan = sweep.plan(args.ppi, Source(args.data, args.images), asked, session.writable(out / "proposals"))
    _unchanged(out, plan.about)
    own, log = plan.settings, out / "trials.jsonl"
    rows, chunks = _rows(log), plan.missing()
    todo = [i for i in range(own.tune.trials) if i not in rows]
    if chunks or todo:
        gpu = own.annotate.gpu
        session.connect(own.annotate.workers if gpu else 1, gpu, field="annotate")
        total = ray.cluster_resources()
        # Every process has one thread: images and trials go side by side.
        slots = max(1, min(own.tune.concurrent or 1 << 20, int(total["CPU"])))
    if chunks:
        print(f"proposals of {plan.images()} images at a score floor of {plan.floor:g}", flush=True)
        propose = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0, max_retries=3)(sweep.Plan.propose)
        calls = [(propose, (plan, chunk, "cuda" if gpu else "cpu")) for chunk in chunks]
        takers = min(slots, int(total["GPU"])) if gpu else slots
        if unreadable := sum(_several(calls, takers, "chunks of images")):
            print(f"{unreadable} images could not be read: nobody is found in them")
    if todo:
        blocks = [todo[i : i + BLOCK] for i in range(0, len(todo), BLOCK)]
        trials, start = ray.remote(num_cpus=1, max_retries=3)(sweep.Plan.trials), time.monotonic()
        with log.open("a", encoding="utf-8") as lines:
            for done in _several([(trials, (plan, block)) for block in blocks], slots, f"blocks of {BLOCK} trials"):
                rows |= {row["trial"]: row for row in done}
                lines.write("".join(json.dumps(row) + "\n" for row in done))
                lines.flush()
        passed = time.monotonic() - start
        print(f"{len(todo)} trials in {passed:.1f} s, {len(todo) / passed:.1f} trials/s on {slots} processes")
    found = sweep.ranked([row for i, row in rows.items() if i < own.tune.trials], own.tune.mode)
    _report(found, own, out)
    if found[0]["metric"] is not None:
        if rows[0]["metric"] is not None:
            print(f"the model's own settings: {own.tune.metric} {rows[0]['metric']:.4g}")
        head = f"# {own.tune.metric} {found[0]['metric']:.4g} on {plan.data.annotations}, trial {found[0]['trial']}\n"
        _write(out / "best.yaml", head + yaml.safe_dump(plan.best(found[0]), sort_keys=False))
    return found


def _several(calls: Sequence[tuple[Any, tuple[Any, ...]]], slots: int, what: str) -> Iterator[Any]:
    """The results of remote functions as they end; twice `slots` are under way, so that no process waits."""
    todo = list(calls)[::-1]
    under: list[Any] = []
    bar = Progress(*Progress.get_default_columns(), TextColumn(what), disable=not sys.stdout.isatty())
    said = time.monotonic()
    with session.told(), bar:
        task, done = bar.add_task("", total=len(calls)), 0
        while todo or under:
            while todo and len(under) < 2 * slots:
                function, arguments = todo.pop()
                under.append(function.remote(*arguments))
            ready, under = ray.wait(under, num_returns=1)
            yield ray.get(ready[0])
            done += 1
            bar.update(task, completed=done)
            if bar.disable and time.monotonic() - said > EVERY:
                said = time.monotonic()
                print(f"{done} of {len(calls)} {what}", flush=True)


def _rows(log: Path) -> dict[int, dict[str, Any]]:
    """The trials of a log; a line that a kill tore is dropped, from the file too."""
    rows: dict[int, dict[str, Any]] = {}
    whole = 0
    text = log.read_bytes() if log.is_file() else b""
    for line in text.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            os.truncate(log, whole)
            break
        row = json.loads(line)
        rows[row["trial"]] = row
        whole += len(line)
    return rows


def _unchanged(out: Path, about: dict[str, Any]) -> None:
    """Records what decides a sweep, compares that of one that goes on. UserError where it differs."""
    file = out / "sweep.json"
    about = json.loads(json.dumps(about))
    if file.is_file():
        before = json.loads(file.read_text())
        differ = [name for name in {**before, **about} if before.get(name) != about.get(name)]
        if differ:
            raise UserError(f"{out} holds another sweep (of other {', '.join(differ)}); take another --out")
    else:
        _write(file, json.dumps(about, indent=1))


def _report(rows: list[dict[str, Any]], settings: Config, out: Path) -> None:
    _write(out / "report.json", json.dumps(rows, indent=1))
    sweep.picture(rows, list(settings.tune.space), settings, out / "report.png")


def _write(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """The trials as text, best first."""
    names = [name for name in rows[0] if name not in ("metric", "error", "folder")]
    lines = [[metric, *names]] + [[row["metric"], *(row[name] for name in names)] for row in rows]
    texts = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(t.rjust(w) for t, w in zip(line, widths, strict=True)) for line in texts)


if __name__ == "__main__":
    config.run(main)
