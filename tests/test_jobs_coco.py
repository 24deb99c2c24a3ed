"""jobs/coco.py: labels to a COCO folder, and its checker."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools.coco import COCO

from jobs.coco import main
from lcrnet import coco, labels
from lcrnet.config import UserError
from lcrnet.pose import Person, centre
from lcrnet.skeleton import LCR13


def person(seed: int, score: float) -> Person:
    r = np.random.default_rng(seed)
    pose2d = r.uniform(5, 40, (13, 2)).astype(np.float32)
    pose3d = centre(r.normal(size=(13, 3)), LCR13).astype(np.float32)
    return Person(np.array([2, 2, 45, 45], np.float32), pose2d, pose3d, score, r.random(13), 1, 2, r.random(13))


NAMES = [*(f"clip{c}/{n}.jpg" for c in range(4) for n in range(3)), "odd name é.JPG", "negative.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tmp_path with images/ and labels/: four clips with the same names, two images beside them, one that is broken."""
    rows = []
    for number, name in enumerate(NAMES):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (number, 0, 0)).save(file, "PNG")
        people = [person(number, 0.9), person(number + 100, 0.2)] if number < 13 else []
        rows.append(
            labels.row(
                str(file), sha256=hashlib.sha256(file.read_bytes()).hexdigest(), width=64, height=48, people=people,
                group=labels.group_of(str(file), str(tmp_path / "images")), model="m1", config="c1",
            )
        )  # fmt: skip
    rows.append(labels.row(str(tmp_path / "images/broken.jpg"), error="no picture"))
    save(tmp_path, rows)
    return tmp_path


def save(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "labels").mkdir(exist_ok=True)
    pq.write_table(labels.table(rows), folder / "labels/0.parquet")


def convert(folder: Path, *more: str) -> Path:
    assert main([str(folder / "labels"), "--out", str(folder / "coco"), *more]) == 0
    return folder / "coco"


def content(folder: Path) -> dict[str, str]:
    """Everything in a folder: the target of a link, or the bytes' hash."""
    return {
        str(f.relative_to(folder)): os.readlink(f) if f.is_symlink() else hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*")
        if f.is_symlink() or f.is_file()
    }


def test_labels_become_a_data_set_that_both_readers_take(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(folder, "--coco.val_share", "0.4")
    printed = capsys.readouterr().out
    found = {side: coco.read(out / f"annotations/{side}.json") for side in ("train", "val")}
    names = {side: [i.file_name for i in part.images] for side, part in found.items()}
    assert sorted(names["train"] + names["val"]) == sorted(NAMES)  # the negative too
    assert not {n.split("/")[0] for n in names["train"] if "/" in n} & {
        n.split("/")[0] for n in names["val"] if "/" in n
    }
    ids = [i.id for part in found.values() for i in part.images]
    assert sorted(ids) == list(range(1, len(NAMES) + 1))
    for side, part in found.items():
        assert coco.check(out / f"annotations/{side}.json") == []
        with contextlib.redirect_stdout(io.StringIO()):
            document = COCO(str(out / f"annotations/{side}.json"))
        assert len(document.imgs) == len(part.images) > 0
        crowds = sum(int(i.people.crowd.sum()) for i in part.images)
        people = sum(len(i.people) for i in part.images) - crowds
        assert f"{side}: {len(part.images)} images, {people} people, {crowds} ignored regions" in printed
        for i in part.images:
            assert (out / "images" / i.file_name).read_bytes() == (folder / "images" / i.file_name).read_bytes()
    assert "1 unreadable images" in printed
    assert "EXIF" in found["val"].info["coordinates"] and found["val"].info["model"] == "m1"
    assert json.loads((out / "counts.json").read_text())["unreadable"] == 1
    assert "val_share: 0.4" in (out / "config.yaml").read_text()
    assert (out / "images/clip0/0.jpg").is_symlink()


def test_again_gives_the_same_and_a_copy_has_no_links(folder: Path) -> None:
    first = content(convert(folder))
    assert content(convert(folder)) == first
    copied = convert(folder, "--coco.images", "copy", "--coco.min_score", "0.1")
    assert not any(f.is_symlink() for f in copied.rglob("*"))
    assert set(content(copied)) == set(first)
    images = coco.read(copied / "annotations/train.json").images
    assert not any(i.people.crowd.any() for i in images)
    assert [f.name for f in folder.iterdir() if f.name.startswith(".")] == []


def test_images_turned_by_exif_keep_their_upright_size(folder: Path) -> None:
    """The stored picture is 64 x 48; upright, as labelled and as our reader shows it, it is 48 x 64."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = folder / "images/turned.jpg"
    Image.new("RGB", (64, 48)).save(turned, "JPEG", exif=exif)
    save(folder, [labels.row(str(turned), width=48, height=64, people=[person(0, 0.9)])])
    image = coco.read(convert(folder, "--coco.val_share", "0") / "annotations/train.json").images[0]
    assert (image.width, image.height) == (48, 64)


def test_nothing_of_others_is_replaced(folder: Path) -> None:
    out = convert(folder)
    before = content(out)
    (out / "annotations/mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds annotations/mine\.json, which jobs/coco\.py did not write"):
        convert(folder)
    (out / "annotations/mine.json").unlink()
    corrected = (out / "annotations/train.json").read_text()
    (out / "annotations/train.json").write_text(corrected + " ")
    with pytest.raises(UserError, match=r"train\.json: was changed since"):
        convert(folder)
    (out / "annotations/train.json").write_text(corrected)
    assert content(out) == before
    foreign = folder / "foreign"
    (foreign / "annotations").mkdir(parents=True)
    (foreign / "annotations/train.json").write_text("genuine")
    with pytest.raises(UserError, match=r"was not written by jobs/coco\.py; choose another --out"):
        main([str(folder / "labels"), "--out", str(foreign)])
    assert (foreign / "annotations/train.json").read_text() == "genuine"
    (folder / "empty").mkdir()
    assert main([str(folder / "labels"), "--out", str(folder / "empty")]) == 0


def test_a_failure_leaves_the_old_data_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(convert(folder))
    (folder / "images/clip1/1.jpg").unlink()
    (folder / "images/clip2/1.jpg").unlink()
    with pytest.raises(UserError, match=r"2 labelled images are not on this machine: .*clip1/1\.jpg, .*clip2/1\.jpg"):
        convert(folder)
    (folder / "images/clip1/1.jpg").touch()
    (folder / "images/clip2/1.jpg").touch()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "images/x.jpg")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UserError, match="No space left on device"):
        convert(folder, "--coco.images", "copy")
    assert content(folder / "coco") == before
    assert [f.name for f in folder.iterdir() if f.name.startswith(".")] == []


BAD: list[tuple[str, list[str], str]] = [
    ("no labels", ["{}/none", "--out", "{}/x"], "no such folder of labels"),
    ("no parquet", ["{}/images", "--out", "{}/x"], "no *.parquet in it"),
    ("out is a file", ["{}/labels", "--out", "{}/labels/0.parquet"], "was not written by jobs/coco.py"),
    ("out below a file", ["{}/labels", "--out", "{}/labels/0.parquet/x"], "Not a directory"),
    ("out is the labels", ["{}/labels", "--out", "{}/labels"], "was not written by jobs/coco.py"),
    ("no file", ["check", "{}/none.json"], "none.json: No such file"),
]


@pytest.mark.parametrize(("argv", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_mistakes_are_named(folder: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        main([a.format(folder) for a in argv])
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["labels"], "--out COCO is missing"),
        (["labels", "more", "--out", "x"], "unknown 'more'"),
        (["labels", "--out", "x", "--coco.val_shere", "1"], "did you mean '--coco.val_share'"),
        (["labels", "--out", "x", "--coco.images", "lnk"], "did you mean 'link'"),
    ],
)
def test_a_wrong_command_line_ends_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([labels.row("/x.jpg", error="empty")], "none of its 1 images could be read"),
        ([labels.row("/x.jpg", width=1, height=1, skeleton="lcr99")], "skeleton 'lcr99' is none of lcr13"),
        (
            [labels.row(f"/{s}.jpg", width=1, height=1, skeleton=s) for s in ("lcr13", "coco17")],
            "labels of skeleton coco17 and of lcr13",
        ),
        ([labels.row("s3://b/x.jpg", width=1, height=1)], "no absolute path"),
    ],
)
def test_tables_that_make_no_data_set(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    save(tmp_path, rows)
    with pytest.raises(UserError, match=message):
        convert(tmp_path)
    assert not (tmp_path / "coco").exists()


def test_check_prints_every_fault_and_ends_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = convert(folder) / "annotations/train.json"
    capsys.readouterr()
    assert main(["check", str(file)]) == 0
    assert "no fatal fault, 0 warnings" in capsys.readouterr().out
    document = json.loads(file.read_text())
    for annotation in document["annotations"][:7]:
        annotation["bbox"][2] = 0
    document["annotations"][0]["num_keypoints"] = 3
    (folder / "bad.json").write_text(json.dumps(document))
    assert main(["check", str(folder / "bad.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("fatal: annotation") for line in lines) == 7
    assert sum(line.startswith("warning: annotation") for line in lines) == 1
    assert lines[-1].endswith("7 fatal, 1 warnings")


def test_exit_codes_of_the_command(root: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    codes = [
        (["check", str(tmp_path / "bad.json")], 1, ""),
        (["check", "none.json"], 2, "error: none.json: No such file"),
    ]
    for argv, code, message in codes:
        done = subprocess.run(
            [sys.executable, root / "jobs/coco.py", *argv], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == code, done.stderr
        assert done.stderr.strip().startswith(message) and "Traceback" not in done.stderr
