"""jobs/lift.py: a COCO file with 2D joints becomes one with 3D poses; the user's mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.lift import main
from lcrnet import body, coco
from lcrnet.annotations import CocoImage
from lcrnet.config import UserError
from lcrnet.pose import People, box_of, centre
from lcrnet.skeleton import LCR13

FEW = ["--lift.headings", "8", "--lift.elevations", "[0]", "--lift.neighbours", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """poses.npz; ann.json, one person an image: the first with 3D, the last with too few joints; images/."""
    out = tmp_path_factory.mktemp("lift")
    rng = np.random.default_rng(0)
    pose3d = centre(np.stack([body.sample(rng, 180).joints for _ in range(40)]), LCR13)
    np.savez(out / "poses.npz", poses=pose3d * [-1, -1, 1], joints=np.array(LCR13.joints))
    (out / "images").mkdir()
    images = []
    for n in range(6):
        people = People.empty(1, 13)
        people.pose3d[0], people.has3d[0] = pose3d[3 * n], n == 0
        people.pose2d[0], people.seen[:] = 60 * pose3d[3 * n, :, :2] + 90, 2
        people.seen[0, : 7 * (n == 5)] = 0
        people.box, people.area[:] = box_of(people.pose2d), 9000
        extra = {"trust_in_2d": n, "pose_3d_source": "teacher"} if n == 0 else {"trust_in_2d": n}
        images.append(CocoImage(n + 1, f"{n}.png", 180, 180, f"clip{n}", people, [n + 11], {"license": 3}, [extra]))
        Image.new("RGB", (180, 180), (90, 99, 90)).save(out / "images" / f"{n}.png")
    coco.write(out / "ann.json", images, LCR13, {"description": "made"}, [{"id": 3}])
    return out


def run(folder: Path, *arguments: str, data: str = "ann.json") -> int:
    return main(["--data", str(folder / data), "--mocap", str(folder / "poses.npz"), *FEW, *arguments])


def rows(file: Path) -> list[dict[str, Any]]:
    return list(json.loads(file.read_text())["annotations"])


def test_writes_what_it_found(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out.json"
    assert run(folder, "--out", str(out), "--images", str(folder / "images")) == 0
    told = capsys.readouterr().out
    assert "4 people got a 3D pose" in told and "1 are without" in told
    assert "5.png, annotation 16: 6 joints labelled, lift.min_joints is 8" in told
    before, after = rows(folder / "ann.json"), rows(out)
    assert after[0] == before[0]  # it has a 3D pose
    for old, new in zip(before[1:5], after[1:5], strict=True):
        assert {k: v for k, v in new.items() if k in old} == old  # ids, boxes, 2D joints, fields of others
        assert set(new) - set(old) == {"pose", "pose3d", "trust", "lift_error", "pose_3d_source"}
        assert new["pose_3d_source"] == "lift" and 0 < new["trust"] < 1
    assert after[5] == before[5]
    made = json.loads(out.read_text())
    assert made["info"] == {"description": "made"} and made["licenses"] == [{"id": 3}]
    assert made["images"] == json.loads((folder / "ann.json").read_text())["images"]
    assert not coco.check(out)
    assert sum(image.people.has3d.sum() for image in coco.read(out).images) == 5
    assert np.asarray(Image.open(tmp_path / "new" / "out.json.sheet.png")).std() > 10

    assert run(folder, "--out", str(tmp_path / "again.json")) == 0
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_replaces_when_told(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--out", str(tmp_path / "out.json"), "--replace") == 0
    first = rows(tmp_path / "out.json")[0]
    assert first["pose_3d_source"] == "lift" and first["pose3d"] != rows(folder / "ann.json")[0]["pose3d"]


def test_checks_against_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--check") == 0
    told = capsys.readouterr().out
    assert "1 people" in told and "PA-MPJPE" in told and "nearest" in told and "random pose" in told


def test_other_joints(folder: Path, shared: Path, tmp_path: Path) -> None:
    """People labelled in COCO's joints come out in ours, those of other images and regions too."""
    data = shared / "coco-mini" / "annotations" / "person_keypoints.json"
    out = tmp_path / "out.json"
    assert main(["--data", str(data), "--mocap", str(folder / "poses.npz"), "--out", str(out), *FEW]) == 0
    before, after = coco.read(data), coco.read(out)
    assert [image.file_name for image in after.images] == [image.file_name for image in before.images]
    people = People.join(image.people for image in after.images)
    assert people.has3d.sum() > 10 and len(people) == sum(len(image.people) for image in before.images)
    assert not [fault for fault in coco.check(out) if fault.fatal]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--out OUT.json"),
        (["--check", "--images", "x"], "give --out"),
        (["--out", "{}/ann.json"], "would replace"),
        (["--out", "{}/poses.npz"], "would replace"),
        (["--out", "{}/o.json", "--lift.elevations", "[100]"], "lift.elevations"),
        (["--out", "{}/o.json", "--lift.elevations", "[]"], "lift.elevations"),
        (["--out", "{}/o.json", "--lift.min_joints", "2"], "lift.min_joints"),
        (["--out", "{}/o.json", "--lift.neighbors", "2"], "lift.neighbours"),
    ],
)
def test_mistakes_on_the_command_line(
    folder: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(folder, *(argument.format(folder) for argument in arguments))
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_mistakes_in_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"poses\.npz: .*not JSON"):
        run(folder, "--out", str(tmp_path / "o.json"), data="poses.npz")
    with pytest.raises(UserError, match=r"ann\.json: not an \.npz"):
        main(["--data", str(folder / "ann.json"), "--mocap", str(folder / "ann.json"), "--check"])
    with pytest.raises(UserError, match=r"nowhere\.json"):
        run(folder, "--check", data="nowhere.json")
    with pytest.raises(UserError, match=r"/nobody/1\.png|/nobody/[0-4]\.png"):
        run(folder, "--out", str(tmp_path / "o.json"), "--images", "/nobody")
    with pytest.raises(UserError, match=r"poses\.npz: "):
        run(folder, "--out", str(folder / "poses.npz" / "o.json"))
