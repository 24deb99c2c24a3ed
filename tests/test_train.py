"""The training loop with a run in this process: it learns, it repeats itself, it goes on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from local_run import LocalRun, bitwise, changed, tensors
from safetensors.torch import load_file

from lcrnet import board, coco, config, train, weights
from lcrnet.anchors import AnchorPoses
from lcrnet.coco import CocoImage
from lcrnet.config import Config, UserError
from lcrnet.dataset import Source
from lcrnet.heads import PosePredictor, Regions
from lcrnet.model import LCRNet
from lcrnet.pose import People


@pytest.fixture
def data(drawn: Path) -> Source:
    return Source(drawn / "annotations.json", drawn / "images")


def test_it_learns(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    """Two images by heart, and everything that a run leaves behind."""
    chosen = [i for i in coco.read(data.annotations).images if len(i.people)][:2]
    coco.write(tmp_path / "two.json", chosen)
    few = Source(tmp_path / "two.json", data.images)
    asked = changed(tiny, steps=80, schedule="steps", decay_at=[], clip=0, data__flip=0)
    run = LocalRun(tmp_path)
    metrics = train.fit(asked, run, few, poses, val=few)
    said = run.lines
    assert len(said) == 80 and sorted(said[0]) == ["class", "pose2d", "pose3d", "rpn_box", "rpn_class"]
    first, last = ({k: sum(p[k] for p in some) / 5 for k in said[0]} for some in (said[:5], said[-5:]))
    for name, part in {"class": 0.7, "pose2d": 0.5, "pose3d": 0.1, "rpn_class": 0.2, "rpn_box": 0.5}.items():
        assert last[name] < part * first[name], name
    assert run.reported == [metrics] and metrics is not None and metrics["step"] == 80
    assert metrics["people"] == sum(len(i.people) for i in chosen)
    assert metrics["found"] > 0 and metrics["mpjpe_mm"] < 50
    assert next((tmp_path / "tensorboard").glob("events.out.tfevents*")).stat().st_size > 1000
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


@pytest.mark.parametrize(("stop", "ask"), [(1, 1), (2, 2), (4, 5)])
def test_asked_to_stop_and_resumed_is_uninterrupted(
    stop: int, ask: int, tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path
) -> None:
    """Between two checkpoints, at one, and at the end, whose evaluations are made when the run goes on."""
    asked = changed(tiny, save_every=2, steps=4, evaluate__min_score=0.1)
    whole = LocalRun(tmp_path / "whole")
    metrics = train.fit(asked, whole, data, poses, data)
    stopped = LocalRun(tmp_path / "stopped", stops_at=ask)  # an evaluation asks, too
    got = train.fit(asked, stopped, data, poses, data)
    assert got == {"step": stop} and stopped.reported[-1] == got, "no evaluation"
    assert stopped.said[-1] == f"stopped at step {stop}"
    resumed = LocalRun(tmp_path / "resumed", stopped.checkpoint)
    assert train.fit(asked, resumed, data, poses, data) == metrics
    assert bitwise(tensors(whole.folder, 4), tensors(resumed.folder, 4))
    evaluated = [m for m in (*stopped.reported, *resumed.reported) if len(m) > 1]
    assert evaluated == whole.reported, "every checkpoint has its figures, once"
    again = LocalRun(tmp_path / "again", resumed.checkpoint)
    assert train.fit(asked, again, data, poses, data) == metrics and not again.reported


def test_asked_to_stop_in_the_evaluation(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    """It is broken off: what was trained is saved at once."""
    run = LocalRun(tmp_path, stops_at=3)  # two steps ask, the third who asks is the evaluation
    metrics = train.fit(changed(tiny, save_every=2), run, data, poses, data)
    assert run.reported == [{"step": 2}, {"step": 3}] and metrics == {"step": 3}


def test_fp16(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    """A step whose gradient overflows is left out and the scale halved; the scale is part of a checkpoint."""
    asked = changed(tiny, precision="fp16", optimizer="sgd", ema=0, save_every=1, steps=2)
    whole, killed = LocalRun(tmp_path / "whole"), LocalRun(tmp_path / "killed", dies_at=1)
    train.fit(asked, whole, data, poses)
    with pytest.raises(KeyboardInterrupt):
        train.fit(asked, killed, data, poses)
    state = json.loads((tmp_path / "killed/step_1/state.json").read_text())
    assert state["scaler"]["scale"] > 0 and state["scaler"]["_growth_tracker"] <= 1
    state["scaler"]["scale"] = 2.0**40
    (tmp_path / "killed/step_1/state.json").write_text(json.dumps(state))
    before = tensors(killed.folder, 1)
    huge = LocalRun(tmp_path / "huge", killed.checkpoint)
    train.fit(asked, huge, data, poses)
    after = json.loads((tmp_path / "huge/step_2/state.json").read_text())
    assert after["scaler"]["scale"] == 2.0**39 and bitwise(tensors(huge.folder, 2), before), "the step was left out"
    state["scaler"]["scale"] = json.loads((tmp_path / "whole/step_1/state.json").read_text())["scaler"]["scale"]
    (tmp_path / "killed/step_1/state.json").write_text(json.dumps(state))
    resumed = LocalRun(tmp_path / "resumed", killed.checkpoint)
    train.fit(asked, resumed, data, poses)
    assert bitwise(tensors(resumed.folder, 2), tensors(whole.folder, 2))


def even(tiny: Config, **fields: Any) -> Config:
    """One step of four images where every image counts the same in the losses, if there is one person in each: as many
    regions and joints of each, all of them used."""
    return changed(
        tiny, steps=1, batch=4, optimizer="sgd", lr=0.1, warmup=0, clip=0, momentum=0, ema=0, data__flip=0,
        head__samples=200, head__jitter=0, head__positive_share=1, head__positive_iou=1,
        rpn__samples=500, rpn__positive_share=1, rpn__positive_iou=0.3, rpn__negative_iou=0.3,
        rpn__nms_iou=1, rpn__min_size=0, rpn__train_post_nms=96, **fields,
    )  # fmt: skip


@pytest.fixture
def four(data: Source, tmp_path: Path) -> Source:
    """Four images of one person."""
    images = [i for i in coco.read(data.annotations).images if len(i.people) == 1 and not i.people.crowd.any()][:4]
    assert len(images) == 4
    coco.write(tmp_path / "four.json", images)
    return Source(tmp_path / "four.json", data.images)


def alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.startswith("model."):
            torch.testing.assert_close(value, b[name], rtol=1e-5, atol=1e-7)


def test_accumulated_is_the_large_batch(tiny: Config, four: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    whole, *others = (LocalRun(tmp_path / str(parts)) for parts in (1, 2, 4))
    train.fit(even(tiny), whole, four, poses)
    for run, parts in zip(others, (2, 4), strict=True):
        train.fit(even(tiny, accumulate=parts), run, four, poses)
        assert run.lines[0] == pytest.approx(whole.lines[0], rel=1e-5)
        alike(tensors(run.folder, 1), tensors(whole.folder, 1))
    assert not bitwise(tensors(run.folder, 1), tensors(whole.folder, 1)), "it went another way"


def test_two_workers(tiny: Config, four: Source, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    """They do the steps of one, in parts or not, all stop when one of them is asked to, and name the one to blame."""
    one = LocalRun(tmp_path / "one")
    train.fit(even(tiny), one, four, poses)
    mp.start_processes(_work, (tmp_path, tiny, four, data, poses), nprocs=2, start_method="spawn")
    for parts in (1, 2):
        alike(tensors(one.folder, 1), tensors(tmp_path / f"parts{parts}", 1))
    assert bitwise(tensors(tmp_path / "whole", 3), tensors(tmp_path / "resumed", 3))
    whole, shares = _head_loss(tiny, poses, slice(None)), [torch.load(tmp_path / f"share{rank}") for rank in (0, 1)]
    for name, value in whole.items():
        torch.testing.assert_close((shares[0][name] + shares[1][name]) / 2, value, rtol=1e-6, atol=0)
    errors = [(tmp_path / f"error{rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    (guilty,) = (tmp_path / "nan/nonfinite").iterdir()
    about = json.loads((guilty / "snapshot.json").read_text())
    assert guilty.name == "step_0-rank_1" and f"images {about['ids']};" in errors[0] and str(guilty) in errors[0]


def _head_loss(tiny: Config, poses: AnchorPoses, rows: slice) -> dict[str, torch.Tensor]:
    """The head's losses of some of twenty regions, of which the first five have one person's, the others nine's."""
    draw = torch.Generator().manual_seed(0)
    predictor = PosePredictor(8, poses, shared=False)
    joints, classes = len(poses.skeleton), len(poses)
    label = torch.zeros(20, dtype=torch.int64)
    label[4:14] = 1 + torch.arange(10) % classes
    roi = torch.cat([torch.zeros(20, 1), torch.rand(20, 2, generator=draw), 5 + torch.rand(20, 2, generator=draw)], 1)
    pose, seen = torch.rand(20, joints, 5, generator=draw), torch.rand(20, 2, joints, generator=draw) < 0.7
    logits = torch.rand(20, classes + 1, generator=draw)
    refined = torch.rand(20, classes, joints, 5, generator=draw)
    regions = Regions(roi, label, torch.ones(20), pose[..., :2], pose[..., 2:], *seen.unbind(1))
    some = Regions(*(getattr(regions, f.name)[rows] for f in fields(Regions)))
    return predictor.loss(logits[rows], refined[rows], some, tiny.head)


def _work(rank: int, folder: Path, tiny: Config, four: Source, data: Source, poses: AnchorPoses) -> None:
    """One of two workers, a process."""
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)

    def run(name: str, **fields: Any) -> LocalRun:
        return LocalRun(folder / name, rank=rank, world_size=2, **fields)

    for parts in (1, 2):
        train.fit(even(tiny, accumulate=parts), run(f"parts{parts}"), four, poses)
    share = _head_loss(tiny, poses, slice(0, 5) if rank == 0 else slice(5, None))
    torch.save(share, folder / f"share{rank}")
    asked = changed(tiny, batch=4, accumulate=2, steps=3)
    train.fit(asked, run("whole"), data, poses)
    stopped = run("stopped", stops_at=2 if rank == 1 else None)
    assert train.fit(asked, stopped, data, poses) == {"step": 2} and stopped.reported == [{"step": 2}]
    train.fit(asked, run("resumed", checkpoint=folder / "stopped/step_2"), data, poses)
    if rank == 1:
        LCRNet.forward = _nan(LCRNet.forward)  # type: ignore[method-assign]
    with pytest.raises(train.NonFinite) as caught:
        train.fit(asked, run("nan"), data, poses)
    (folder / f"error{rank}").write_text(str(caught.value))
    torch.distributed.destroy_process_group()


def _nan(forward: Any) -> Any:
    return lambda *args: {k: v * float("nan") for k, v in forward(*args).items()}


def test_accumulation_must_divide(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"train\.batch 2 is not divisible by .*1 times train\.accumulate 3"):
        changed(tiny, accumulate=3)
    asked = changed(tiny, accumulate=2)  # of one worker; the run has two
    with pytest.raises(UserError, match=r"train\.batch 2 is not divisible by 2 workers x train\.accumulate 2"):
        train.fit(asked, LocalRun(tmp_path / "x", world_size=2), data, poses)


def test_lr_reference(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    run = LocalRun(tmp_path)
    metrics = train.fit(changed(tiny, steps=4, batch=4, lr_reference=2), run, data, poses)
    assert metrics == {"step": 2} and len(run.lines) == 2


def test_two_sources(tiny: Config, data: Source, four: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    mixed = [Source(data.annotations, data.images, 3), Source(four.annotations, four.images, 1)]
    run = LocalRun(tmp_path / "run")
    assert train.fit(changed(tiny, steps=2), run, mixed, poses) == {"step": 2}


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


def test_out_of_memory_names_the_fix(
    tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(LCRNet, "forward", full)
    says = r"^step 0: out of GPU memory with {} images of \(\d+, \d+\) pixels at a time on worker 0: {}"
    with pytest.raises(train.OutOfMemory, match=says.format(2, "--train.accumulate 2 ")):
        train.fit(tiny, LocalRun(tmp_path), data, poses)
    with pytest.raises(train.OutOfMemory, match=says.format(1, "a lower --image.short_side or a lower --train.batch")):
        train.fit(changed(tiny, accumulate=2), LocalRun(tmp_path), data, poses)


def test_compile_without_a_compiler(
    tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"train\.compile: torch\.compile needs a C\+\+ compiler"):
        train.fit(changed(tiny, compile=True), LocalRun(tmp_path), data, poses)


@pytest.mark.slow
def test_compiled(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    """The same losses but for rounding, the same names of weights, and a model that loads without a compiler."""
    runs = [LocalRun(tmp_path / str(c)) for c in (False, True)]
    for run in runs:
        asked = changed(tiny, compile=run is runs[1], steps=2, data__scale=[0.8, 1.25])
        train.fit(asked, run, data, poses, data)
    plain, compiled = runs
    for a, b in zip(plain.lines, compiled.lines, strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    a, b = tensors(plain.folder, 2), tensors(compiled.folder, 2)
    assert a.keys() == b.keys() and not bitwise(a, b)
    assert weights.load(compiled.folder / "step_2/model").detect(np.zeros((64, 64, 3), np.uint8)) is not None


@pytest.mark.parametrize("validation", ["beside", "none"])
def test_validation_is_left_to_others(
    validation: str, tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path
) -> None:
    run = LocalRun(tmp_path)
    assert train.fit(changed(tiny, steps=1, validation=validation), run, data, poses, data) == {"step": 1}
    inline = LocalRun(tmp_path / "inline")
    metrics = train.fit(changed(tiny, steps=1), inline, data, poses, data)
    assert metrics is not None and len(metrics) > 10
    figures = train.validate(weights.load(tmp_path / "step_1/model"), data)
    assert {"step": 1} | board.scalars(figures) == metrics, "what a task beside finds is what the run would have"


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
        said = run.lines
        assert len(said) == 3 and all(line["pose3d"] == 0 for line in said)
        assert sum(line["pose2d"] for line in said) > 0


def test_images_without_people(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    nobody = [CocoImage(0, i.file_name, i.width, i.height, None, People.empty(0, 13))
              for i in coco.read(data.annotations).images]  # fmt: skip
    coco.write(tmp_path / "nobody.json", nobody)
    run = LocalRun(tmp_path)
    train.fit(changed(tiny, steps=2), run, Source(tmp_path / "nobody.json", data.images), poses)
    assert len(run.lines) == 2
    for line in run.lines:
        assert line["pose2d"] == line["pose3d"] == line["rpn_box"] == 0 < line["rpn_class"]


def test_faults_of_the_data_come_before_any_step(tiny: Config, poses: AnchorPoses, tmp_path: Path) -> None:
    run = LocalRun(tmp_path / "run")
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        train.fit(tiny, run, Source(tmp_path / "none.json", tmp_path), poses)
    assert not run.folder.exists()
