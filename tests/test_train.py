"""The training loop with a run in this process: it learns, it repeats itself, it goes on where it was stopped."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcrnet import coco, config, train, weights
from lcrnet.anchors import AnchorPoses
from lcrnet.coco import CocoImage
from lcrnet.config import Config, UserError
from lcrnet.dataset import Source
from lcrnet.pose import People


@dataclass
class LocalRun:
    """One process; checkpoints are copied to folder/step_N. Killed after reporting the step `dies_at`."""

    folder: Path
    checkpoint: Path | None = None
    dies_at: int | None = None
    rank: int = 0
    world_size: int = 1
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reported: list[dict[str, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def resume(self) -> AbstractContextManager[Path | None]:
        return nullcontext(self.checkpoint)

    def say(self, text: str) -> None:
        self.said.append(text)

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        self.reported.append(metrics)
        if folder:
            self.checkpoint = Path(shutil.copytree(folder, self.folder / f"step_{int(metrics['step'])}"))
        if metrics["step"] == self.dies_at:
            raise KeyboardInterrupt


@pytest.fixture
def data(drawn: Path) -> Source:
    return Source(drawn / "annotations.json", drawn / "images")


def changed(settings: Config, **fields: Any) -> Config:
    """A configuration with other fields of `train`, or `section__field=value`."""
    values = settings.model_dump()
    for name, value in fields.items():
        section, _, rest = name.rpartition("__")
        values[section or "train"][rest] = value
    return config.from_dict(values)


def losses(run: LocalRun) -> list[dict[str, float]]:
    """The losses that were said, step by step."""
    lines = [line for line in run.said if line.startswith("step ")]
    return [{k: float(v) for k, v in re.findall(r"(\w+) (\d+\.\d+|nan|inf)  ", line)} for line in lines]


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step_{step}" / "training.safetensors")


def bitwise(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_it_learns(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    """Two images by heart, and everything that a run leaves behind."""
    chosen = [i for i in coco.read(data.annotations).images if len(i.people)][:2]
    coco.write(tmp_path / "two.json", chosen)
    few = Source(tmp_path / "two.json", data.images)
    asked = changed(tiny, steps=80, schedule="steps", decay_at=[], clip=0, data__flip=0)
    run = LocalRun(tmp_path)
    metrics = train.fit(asked, run, few, poses, val=few)
    said = losses(run)
    assert len(said) == 80 and sorted(said[0]) == ["class", "pose2d", "pose3d", "rpn_box", "rpn_class"]
    first, last = ({k: sum(p[k] for p in some) / 5 for k in said[0]} for some in (said[:5], said[-5:]))
    for name, part in {"class": 0.7, "pose2d": 0.5, "pose3d": 0.1, "rpn_class": 0.2, "rpn_box": 0.5}.items():
        assert last[name] < part * first[name], name
    assert run.reported == [metrics] and metrics is not None and metrics["step"] == 80
    assert metrics["people"] == sum(len(i.people) for i in chosen)
    assert metrics["found"] > 0 and metrics["mpjpe_mm"] < 50
    assert next(tmp_path.glob("events.out.tfevents*")).stat().st_size > 1000
    model = weights.load(tmp_path / "step_80/model")
    assert model.config == asked
    about = weights.read_about(tmp_path / "step_80/model")
    assert about["step"] == 80 and about["metrics"] == metrics
    # what is published are the averaged weights, what goes on are the others
    state = tensors(tmp_path, 80)
    names = [name for name, _ in model.named_parameters()]
    for i in (0, len(names) - 1):
        assert torch.equal(model.state_dict()[names[i]], state[f"average.{i}"])
    assert not torch.equal(state["model.body.top.weight"], model.body.top.weight)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_interrupted_and_resumed_is_uninterrupted(
    optimizer: str, tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path
) -> None:
    """Bit by bit: weights, moments of the optimiser, average. And so are two runs of the same seed up to there."""
    asked = changed(tiny, optimizer=optimizer, save_every=2, steps=4, data__colour=0.2, data__scale=[0.8, 1.25])
    whole, killed = LocalRun(tmp_path / "whole"), LocalRun(tmp_path / "killed", dies_at=2)
    train.fit(asked, whole, data, poses)
    with pytest.raises(KeyboardInterrupt):
        train.fit(asked, killed, data, poses)
    assert bitwise(tensors(whole.folder, 2), tensors(killed.folder, 2)), "same seed, same weights"
    torch.manual_seed(123)  # whatever the new process did before
    resumed = LocalRun(tmp_path / "resumed", killed.checkpoint)
    train.fit(asked, resumed, data, poses)
    end = tensors(whole.folder, 4)
    assert bitwise(tensors(resumed.folder, 4), end)
    assert not bitwise(tensors(whole.folder, 2), end)
    kinds = {"exp_avg", "exp_avg_sq", "step"} if optimizer == "adamw" else {"momentum_buffer"}
    assert {name.split(".")[-1] for name in end if name.startswith("optimizer.")} == kinds
    assert any(name.startswith("average.") for name in end)
    ids = {weights.model_id(run.folder / "step_4/model") for run in (whole, resumed)}
    assert len(ids) == 1
    state = json.loads((resumed.folder / "step_4/state.json").read_text())
    assert state["step"] == 4 and config.from_dict(state["config"]) == asked


def test_another_seed_is_another_run(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    ends = []
    for seed in (0, 1):
        train.fit(changed(tiny, seed=seed, steps=1), LocalRun(tmp_path / str(seed)), data, poses)
        ends.append(tensors(tmp_path / str(seed), 1))
    assert not bitwise(*ends)


def test_a_finished_run_does_nothing(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    asked = changed(tiny, steps=1)
    first = LocalRun(tmp_path / "first")
    metrics = train.fit(asked, first, data, poses)
    again = LocalRun(tmp_path / "again", first.checkpoint)
    assert train.fit(asked, again, data, poses) == metrics
    assert again.reported == [] and not again.folder.exists()
    assert again.said == ["resumed at step 1"]
    other = LocalRun(tmp_path / "other", first.checkpoint)
    with pytest.raises(UserError, match="a checkpoint of another network or optimiser"):
        train.fit(changed(tiny, steps=2, optimizer="sgd"), other, data, poses)


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path
) -> None:
    run = LocalRun(tmp_path / "run")
    says = r"step \d+: the loss is not finite: \{'rpn_class': .*'pose3d'.*images \["
    with pytest.raises(train.NonFinite, match=says):
        train.fit(changed(tiny, lr=1e18, clip=0, warmup=0, steps=20), run, data, poses)
    assert run.reported == [], "nothing of it is kept"


def test_weights_that_are_not_finite_stop_the_run(
    tiny: Config, data: Source, poses: AnchorPoses, model_folder: Path, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(model_folder, tmp_path / "model"))
    held = load_file(spoilt / "model.safetensors")
    save_file({k: torch.full_like(v, torch.nan) for k, v in held.items()}, spoilt / "model.safetensors")
    with pytest.raises(train.NonFinite, match=r"^step 0: .*nan"):
        train.fit(changed(tiny, init=str(spoilt)), LocalRun(tmp_path / "run"), data, poses)


def test_init(
    tiny: Config, data: Source, poses: AnchorPoses, model_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Starts from a model; what does not fit is said, tensor by tensor, and nothing else."""
    asked = changed(tiny, init=str(model_folder), steps=1, lr=1e-12, ema=0)
    start = load_file(model_folder / "model.safetensors")
    few = AnchorPoses(poses.pose2d[:2], poses.pose3d[:2], poses.upper_only[:2], poses.skeleton)
    for anchors, misfits in ((poses, 0), (few, 4)):
        run = LocalRun(tmp_path / str(misfits))
        train.fit(asked, run, data, anchors)
        lines = [line for line in run.said if line.startswith("train.init: ")]
        assert len(lines) == misfits
        end = tensors(run.folder, 1)
        kept = [name for name in start if not (misfits and name.startswith("predictor."))]
        assert all(torch.allclose(end[f"model.{name}"], start[name], atol=1e-9) for name in kept)
    assert "train.init: predictor.classes.weight: (7, 320) in the file, (3, 320) in the network" in lines
    with pytest.raises(UserError, match="nothing: No such file or directory"):
        train.fit(changed(tiny, init=str(tmp_path / "nothing")), LocalRun(tmp_path / "x"), data, poses)


def test_plain_coco_keypoints(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    """2D only, most joints unlabelled, some people without any: finite losses, nothing of 3D; also in bfloat16."""
    document = json.loads(data.annotations.read_text())
    for i, annotation in enumerate(document["annotations"]):
        for name in ("pose", "pose3d"):
            annotation.pop(name, None)
        keypoints = annotation["keypoints"]
        for j in range(len(keypoints) // 3):
            if i % 4 == 0 or (i + j) % 3 == 0:
                keypoints[3 * j : 3 * j + 3] = 0, 0, 0
        annotation["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(document))
    people = People.join(i.people for i in coco.read(file, min_joints=4).images)
    assert not people.has3d.any() and people.crowd.any() and (people.seen[~people.crowd] == 0).any()
    for precision in ("fp32", "bf16"):
        asked = changed(tiny, steps=3, precision=precision, head__soft=0.05)
        run = LocalRun(tmp_path / precision)
        train.fit(asked, run, Source(file, data.images), poses)
        said = losses(run)
        assert len(said) == 3 and all(line["pose3d"] == 0 for line in said)
        assert sum(line["pose2d"] for line in said) > 0


def test_images_without_people(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    nobody = [CocoImage(0, i.file_name, i.width, i.height, None, People.empty(0, 13))
              for i in coco.read(data.annotations).images]  # fmt: skip
    coco.write(tmp_path / "nobody.json", nobody)
    run = LocalRun(tmp_path)
    train.fit(changed(tiny, steps=2), run, Source(tmp_path / "nobody.json", data.images), poses)
    assert len(losses(run)) == 2
    for line in losses(run):
        assert line["pose2d"] == line["pose3d"] == line["rpn_box"] == 0 < line["rpn_class"]


def test_faults_of_the_data_come_before_any_step(tiny: Config, poses: AnchorPoses, tmp_path: Path) -> None:
    run = LocalRun(tmp_path / "run")
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        train.fit(tiny, run, Source(tmp_path / "none.json", tmp_path), poses)
    assert not run.folder.exists()
