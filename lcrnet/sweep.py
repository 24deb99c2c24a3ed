"""Search spaces, and the cheap sweep: settings of PPI and the score floor, on proposals that the network gave once.

    plan = Plan("RUN/model", Source(...), settings, "SWEEP/proposals")
    for chunk in plan.missing():
        plan.propose(chunk)                      # the only use of the network
    rows = plan.trials(range(0, 1000))           # a dict of settings and figures each

Trial 0 is the model's own settings. Trial i > 0 takes point i of a scrambled Halton sequence (Owen, "A randomized
Halton algorithm in R", 2017), which fills the space more evenly than chance does; it depends on the seed and i alone,
so that a sweep is the same on any number of processes, goes on after a kill, and can be prolonged.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from scipy.stats import qmc

from lcrnet import annotate, config, dataset, evaluate, image, ppi, weights
from lcrnet.config import Config, ConfigError, UserError
from lcrnet.dataset import Source
from lcrnet.model import LCRNet
from lcrnet.pose import People, Person, PoseProposals
from lcrnet.skeleton import Skeleton

KINDS = ("loguniform", "uniform", "choice")

CHEAP = frozenset({*(f"ppi.{name}" for name in config.Ppi.model_fields if name != "released"), "head.score_floor"})
"""Fields that act after the network, which the cheap sweep can vary."""

CHUNK = 32
"""Images of one file of proposals, which is what a kill can cost."""

ROOM = 1 << 15
"""Proposals, padding among them, that PPI gets at a time: tens of MB."""

_FIELDS = ("box", "score", "anchor", "pose2d", "pose3d")


@dataclass(frozen=True)
class Range:
    """The values of a field: kind and its arguments, as `tune.space` has them."""

    kind: str
    values: tuple[Any, ...]

    def at(self, u: float) -> Any:
        """The value at a point 0 <= u < 1 of the range."""
        if self.kind == "choice":
            return self.values[int(u * len(self.values))]
        low, high = map(float, self.values)
        if self.kind == "loguniform":
            return min(max(low * (high / low) ** u, low), high)
        return low + u * (high - low)

    def near(self, value: Any, rng: np.random.Generator) -> Any:
        """A value beside this one: 0.8 or 1.2 times it, within the range, or the next of the choices; one time in four
        any."""
        if rng.random() < 0.25:
            return self.at(float(rng.random()))
        up = rng.random() < 0.5
        if self.kind == "choice":
            return self.values[min(max(self.values.index(value) + (1 if up else -1), 0), len(self.values) - 1)]
        return min(max(value * (1.2 if up else 0.8), float(self.values[0])), float(self.values[1]))


def space_of(settings: Config) -> dict[str, Range]:
    """`tune.space`, checked; UserError names the field whose values cannot be."""
    if not settings.tune.space:
        raise UserError(
            "tune.space is empty: nothing to sweep; e.g. tune: {space: {train.lr: {loguniform: [1e-4, 1e-2]}}}"
        )
    space = {}
    for name, how in settings.tune.space.items():
        kind, values = next(iter(how.items())) if len(how) == 1 else ("", [])
        if kind not in KINDS or not isinstance(values, list) or (kind != "choice" and len(values) != 2) or not values:
            raise UserError(
                f"tune.space: {name}: {how} is not one of loguniform: [a, b], uniform: [a, b], choice: [...]"
            )
        least = 0 if kind == "loguniform" else -math.inf
        number = all(isinstance(v, int | float) and v > least for v in values)
        if kind != "choice" and not (number and values[0] < values[1]):
            raise UserError(f"tune.space: {name}: {kind} needs {'0 < ' * (least == 0)}a < b, not {values}")
        space[name] = Range(kind, tuple(values))
        if kind == "choice":
            for value in values:
                with_override(settings, {name: value})
            continue
        try:
            for u in (0.0, 0.37, 1.0):
                with_override(settings, {name: space[name].at(u)})
        except ConfigError as error:
            raise UserError(f"{error}; where only some values can be, take choice: [...]") from None
    return space


def with_override(settings: Config, values: dict[str, Any]) -> Config:
    """The configuration with some dotted fields replaced; ConfigError if one cannot be."""
    nested = settings.model_dump()
    for name, value in values.items():
        section, field = name.split(".")
        nested[section][field] = value
    return config.from_dict(nested, "tune.space")


def draw(space: dict[str, Range], seed: int, index: int) -> dict[str, Any]:
    """The settings of a trial: {field: value}; nothing for trial 0."""
    if index == 0:
        return {}
    point = qmc.Halton(len(space), scramble=True, seed=np.random.default_rng(seed)).fast_forward(index).random(1)[0]
    return {name: values.at(float(u)) for (name, values), u in zip(space.items(), point, strict=True)}


@dataclass(frozen=True)
class Plan:
    """A cheap sweep.

    model     model folder
    data      truth and images
    settings  of the model, with what is asked for on top (`plan` makes them)
    folder    of the cached proposals
    """

    model: str
    data: Source
    settings: Config
    folder: str

    @property
    def floor(self) -> float:
        """The lowest score floor of the space, at which proposals are cached."""
        swept = space_of(self.settings).get("head.score_floor")
        return min([self.settings.head.score_floor, *(swept.values if swept else ())])

    @property
    def about(self) -> dict[str, Any]:
        """All that decides the rows, for JSON: a sweep goes on only with the same."""
        own = self.settings
        return {
            "model": weights.model_id(self.model),
            "data": hashlib.sha256(self.data.annotations.read_bytes()).hexdigest()[:16],
            "images": str(self.data.images),
            "detection": annotate.config_id(own, own.annotate.max_pixels, False),
            "evaluate": own.evaluate.model_dump(mode="json"),
            "space": own.tune.space,
            "metric": own.tune.metric,
            "seed": own.train.seed,
        }

    def images(self) -> int:
        return len(_entries(self.data, self.model))

    def missing(self) -> list[int]:
        """Chunks of images whose proposals are not there yet."""
        return [c for c in range(-(-self.images() // CHUNK)) if not self._file(c).is_file()]

    def propose(self, chunk: int, device: str = "cpu", threads: int = 1) -> int:
        """Caches the proposals of a chunk of images; -> how many of its files are unreadable: nobody is found there.

        The proposals of an image are kept by falling score (of equals in the network's order): a higher floor is a
        prefix of them.
        """
        torch.set_num_threads(threads)
        model = _network(self.model, device)
        model.config = with_override(self.settings, {"head.score_floor": self.floor})
        model.rpn.config = model.config.rpn
        parts: list[PoseProposals] = []
        sizes: list[tuple[int, int]] = []
        unreadable = 0
        entries = _entries(self.data, self.model)[chunk * CHUNK : (chunk + 1) * CHUNK]
        for start in range(0, len(entries), self.settings.annotate.batch):
            group = entries[start : start + self.settings.annotate.batch]
            shots = {}
            for i, entry in enumerate(group):
                try:
                    shots[i] = image.read(self.data.images / entry.file_name, self.settings.annotate.max_pixels)
                except image.Unreadable:
                    unreadable += 1
            found = dict(zip(shots, model.propose(list(shots.values())), strict=True))
            joints = len(model.skeleton)
            for i, entry in enumerate(group):
                parts.append(found.get(i) or _none(joints))
                sizes.append(shots[i].shape[:2] if i in shots else (entry.height, entry.width))
        order = [np.argsort(-p.score, kind="stable") for p in parts]
        tensors = {
            name: torch.from_numpy(np.concatenate([getattr(p, name)[o] for p, o in zip(parts, order, strict=True)]))
            for name in _FIELDS
        }
        tensors |= {"count": torch.tensor([len(p) for p in parts]), "size": torch.tensor(sizes)}
        unfinished = self._file(chunk).with_suffix(f".{os.getpid()}.part")
        save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished)
        os.replace(unfinished, self._file(chunk))
        return unreadable

    def trials(self, indices: Iterable[int], threads: int = 1) -> list[dict[str, Any]]:
        """The rows of trials: {"trial", "metric", each field of the space, "error"}; metric None where it has none."""
        torch.set_num_threads(threads)
        cached = _cached(self.folder, -(-self.images() // CHUNK))
        truth = [entry.people for entry in _entries(self.data, self.model)]
        skeleton, upper = _anchors(self.model)
        space, rows = space_of(self.settings), []
        for index in indices:
            values = draw(space, self.settings.train.seed, index)
            row: dict[str, Any] = {"trial": index, "metric": None}
            try:
                settings = with_override(self.settings, values)
                found = integrate(cached, settings, skeleton, upper)
                row["metric"] = figure(truth, found, skeleton, settings)
                error = ""
            except ConfigError as impossible:  # of two fields of the space, say; the others are worth knowing
                error = str(impossible)
            rows.append(row | {name: values.get(name, _own(self.settings, name)) for name in space} | {"error": error})
        return rows

    def best(self, row: dict[str, Any]) -> dict[str, Any]:
        """The settings of a row as a configuration for `--config` of annotate and evaluate: those of detection only."""
        settings = with_override(self.settings, {name: row[name] for name in space_of(self.settings)})
        nested = settings.model_dump(mode="json")
        out = {section: {name: nested[section][name] for name in fields}
               for section, fields in annotate.DETECTION.items()}  # fmt: skip
        out["ppi"].pop("released")  # it fills what is not given; all is
        return out

    def _file(self, chunk: int) -> Path:
        return Path(self.folder) / f"{chunk:05d}.safetensors"


def plan(model: Path, data: Source, asked: Config, folder: Path) -> Plan:
    """The sweep of what `asked` says, explicitly, on top of the model's own settings. UserError as it must be."""
    own = annotate.settings(config.load(model / "config.yaml"), asked)
    told = {name: getattr(asked.evaluate, name) for name in asked.evaluate.model_fields_set}
    nested = own.model_dump() | {part: getattr(asked, part).model_dump() for part in ("annotate", "tune")}
    nested["evaluate"] |= told
    nested["train"]["seed"] = asked.train.seed
    settings = config.from_dict(nested)
    space = space_of(settings)
    if other := sorted(set(space) - CHEAP):
        raise UserError(f"tune.space: {', '.join(other)}: not with --ppi, which varies {', '.join(sorted(CHEAP))}")
    if "head.score_floor" in space and settings.head.at_least and settings.head.passes > 1:
        raise UserError("tune.space: head.score_floor cannot vary with head.at_least and two passes of the head: "
                        "what is kept of a pass is not known afterwards; add --head.at_least 0")  # fmt: skip
    if settings.tune.mode == "max" and settings.tune.metric.endswith("_mm"):
        raise UserError(f"tune.metric {settings.tune.metric} is an error: set tune.mode: min")
    skeleton = weights.skeleton(model)
    figure([People.empty(0, len(skeleton))], [[]], skeleton, settings)  # refuses a metric that there is not
    return Plan(str(model.resolve()), Source(data.annotations.resolve(), data.images.resolve()), settings, str(folder))


@dataclass(frozen=True)
class Cached:
    """The proposals of all images (tensors, by falling score), and (height, width) of each."""

    proposals: Sequence[PoseProposals]
    sizes: Sequence[tuple[int, int]]


def integrate(cached: Cached, settings: Config, skeleton: Skeleton, upper: np.ndarray) -> list[list[Person]]:
    """The people of each image with these settings, as the model's `detect_batch` would find them, uncalibrated."""
    kept = [_above(p, settings.head.score_floor, settings.head.at_least) for p in cached.proposals]
    found: list[list[Person]] = [[] for _ in kept]
    order = sorted(range(len(kept)), key=lambda i: len(kept[i]))  # those of like counts together: less padding
    batch: list[int] = []
    for i in [*order, None]:
        if batch and (i is None or len(kept[i]) * (len(batch) + 1) > ROOM):
            sizes = [cached.sizes[b] for b in batch]
            people, _ = ppi.integrate_batch([kept[b] for b in batch], sizes, settings.ppi, skeleton, upper)
            for b, own in zip(batch, people, strict=True):
                found[b] = own
            batch = []
        if i is not None:
            batch.append(i)
    return found


def figure(
    truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton, settings: Config
) -> float | None:
    """The figure that `tune.metric` names; None where nobody gives it a value. UserError: no such figure."""
    name = settings.tune.metric
    figures = (
        evaluate.oks_ap(truth, found, skeleton) if name.startswith("oks_ap")
        else evaluate.evaluate(truth, found, skeleton, settings.evaluate)
    )  # fmt: skip
    if name not in figures or isinstance(figures[name], dict):
        flat = [known for known, value in figures.items() if not isinstance(value, dict)]
        raise UserError(f"tune.metric: no figure is called {name!r}; there are {', '.join(flat)}")
    value = figures[name]
    return None if value is None else float(value)


FIXED = frozenset({*(f"train.{name}" for name in ("steps", "batch", "optimizer", "ema", "seed", "save_every"))})
"""Fields that a training cannot change on its way, besides those of the sections model and anchors."""


@dataclass(frozen=True)
class Member:
    """One training of a population: whose checkpoint it goes on from (None: from the start), and its settings."""

    parent: int | None
    values: dict[str, Any]


def founders(space: dict[str, Range], seed: int, count: int) -> list[Member]:
    """The first round of a population. UserError: a field of the space cannot change on the way."""
    if fixed := sorted(n for n in space if n in FIXED or n.split(".")[0] in ("model", "anchors")):
        raise UserError(
            f"tune.space: {', '.join(fixed)} cannot change while a network trains: take tune.scheduler: asha"
        )
    if count < 2:
        raise UserError(f"tune.trials {count}: a population (tune.scheduler: pbt) needs two or more")
    return [Member(None, draw(space, seed, 1 + i)) for i in range(count)]


def successors(
    space: dict[str, Range], seed: int, turn: int, members: Sequence[Member], metrics: Sequence[float | None], mode: str
) -> list[Member]:
    """The next round of a population, a function of its arguments alone.

    Jaderberg et al., "Population based training of neural networks", 2017, section 4.1.1: the weakest fifth goes on
    from a random one of the strongest fifth (truncation selection), its settings each drawn anew with probability 0.25
    or changed by a factor of 0.8 or 1.2 (`explore`); the others go on as they are.
    """
    rows = [{"trial": i, "metric": metric} for i, metric in enumerate(metrics)]
    order = [row["trial"] for row in ranked(rows, mode)]
    part = max(1, len(members) // 5)
    able = [i for i in order[:part] if metrics[i] is not None]
    out = [Member(i, member.values) for i, member in enumerate(members)]
    for i in order[-part:]:
        rng = np.random.default_rng([seed, turn, i])
        if able and i not in able:
            parent = able[int(rng.integers(len(able)))]
            out[i] = Member(parent, {n: space[n].near(v, rng) for n, v in members[parent].values.items()})
    return out


def picture(rows: Sequence[dict[str, Any]], names: Sequence[str], settings: Config, file: Path) -> None:
    """A PNG: the metric of the trials against each field of the space; the best trial is marked."""
    space = space_of(settings)
    judged = [row for row in rows if row["metric"] is not None]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with matplotlib.rc_context({"font.size": 8}):
        shape = Figure(figsize=(3.2 * columns, 2.6 * lines), dpi=120, layout="constrained")
        for n, name in enumerate(names):
            axes = shape.add_subplot(lines, columns, n + 1)
            kind, options = space[name].kind, [str(v) for v in space[name].values]
            x = [row[name] for row in judged]
            if kind == "choice":
                rng = np.random.default_rng(0)  # spread, so that equal ones are seen beside each other
                known = [*options, *sorted({str(v) for v in x} - set(options))]
                x = [known.index(str(v)) + rng.uniform(-0.2, 0.2) for v in x]
                axes.set_xticks(range(len(known)), known, rotation=30 if max(map(len, known)) > 6 else 0)
            elif kind == "loguniform":
                axes.set_xscale("log")
                at = [space[name].at(u / 3) for u in range(4)]
                axes.set_xticks(at, [f"{v:.2g}" for v in at])
                axes.set_xticks([], minor=True)
            y = [row["metric"] for row in judged]
            axes.plot(x, y, ".", ms=4 if len(y) < 500 else 2, alpha=0.6)
            axes.plot(x[:1], y[:1], "o", mfc="none", mec="C3", ms=8)
            axes.set_xlabel(name)
            axes.set_ylabel(settings.tune.metric if n % columns == 0 else "")
            axes.grid(alpha=0.3)
        shape.savefig(file)


def ranked(rows: Iterable[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Best first, then those without a figure; of equals the earlier trial."""
    sign = -1 if mode == "max" else 1
    return sorted(rows, key=lambda row: (row["metric"] is None, sign * (row["metric"] or 0), row["trial"]))


def _above(proposals: PoseProposals, floor: float, at_least: int) -> PoseProposals:
    """Those, sorted by falling score, that `PosePredictor.decode` gives with a floor: score > floor, and the best
    `at_least` with all that score as much as the last of them."""
    score = proposals.score
    count = int((score > floor).sum())
    if at_least > count and len(score):
        count = int((score >= score[min(at_least, len(score)) - 1]).sum())
    return PoseProposals(*(getattr(proposals, name)[:count] for name in _FIELDS))


def _none(joints: int) -> PoseProposals:
    box, pose2d, pose3d = (np.zeros((0, *shape), np.float32) for shape in ((4,), (joints, 2), (joints, 3)))
    return PoseProposals(box, np.zeros(0, np.float32), np.zeros(0, np.int64), pose2d, pose3d)


def _own(settings: Config, name: str) -> Any:
    section, _, field = name.partition(".")
    return settings.model_dump(mode="json")[section][field]


# A process keeps what it has read: it gets many trials of one sweep, and then perhaps another's.


@lru_cache(maxsize=1)
def _network(folder: str, device: str) -> LCRNet:
    return weights.load(folder, device)


@lru_cache(maxsize=1)
def _entries(data: Source, model: str) -> list[Any]:
    return dataset.read(data, _anchors(model)[0])


@lru_cache(maxsize=1)
def _anchors(model: str) -> tuple[Skeleton, np.ndarray]:
    poses = weights.anchors_of(model)
    assert poses is not None  # a model folder has them
    return poses.skeleton, poses.upper_only


@lru_cache(maxsize=1)
def _cached(folder: str, chunks: int) -> Cached:
    proposals: list[PoseProposals] = []
    sizes: list[tuple[int, int]] = []
    for chunk in range(chunks):
        held = load_file(Path(folder) / f"{chunk:05d}.safetensors")
        counts = held["count"].tolist()
        parts = zip(*(held[name].split(counts) for name in _FIELDS), strict=True)
        proposals += [PoseProposals(*part) for part in parts]
        sizes += [(int(h), int(w)) for h, w in held["size"].tolist()]
    return Cached(proposals, sizes)
