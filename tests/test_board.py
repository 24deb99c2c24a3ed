"""What a training leaves in TensorBoard's files, over two lives of it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from local_run import LocalRun, changed
from tensorboardX.proto import event_pb2

from lcrnet import train
from lcrnet.anchors import AnchorPoses
from lcrnet.config import Config
from lcrnet.dataset import Source


@pytest.fixture
def data(drawn: Path) -> Source:
    return Source(drawn / "annotations.json", drawn / "images")


def test_tensorboard(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    asked = changed(tiny, steps=4, save_every=2, log_every=2, picture_every=4, image__resize="detectron")
    run = LocalRun(tmp_path, dies_at=2)
    with pytest.raises(KeyboardInterrupt):
        train.fit(asked, run, data, poses, data)
    train.fit(asked, LocalRun(tmp_path, run.checkpoint), data, poses, data)
    files = sorted((tmp_path / "tensorboard").glob("events.out.tfevents*"))
    seen = [(e.step, v.tag) for file in files for e in events(file) for v in e.summary.value]
    names = {name for _, name in seen}
    assert {f"loss/{name}" for name in [*run.lines[0], "total"]} <= names
    assert {"train/lr", "train/gradient_norm", "train/images_per_second", "train/data_wait_percent"} <= names
    assert {"val/oks_ap", "val/pck", "val/step"} - names == {"val/step"}
    assert [s for s, name in seen if name == "loss/total"] == [2, 4]
    assert [s for s, name in seen if name == "val/oks_ap"] == [2, 4]
    assert [s for s, name in seen if name == "found"] == [4]
    assert any(name.startswith("config") for name in names)
    # a life after the first hides what came after its start, not the figures of the step it starts from
    starts = [e.step for file in files for e in events(file) if e.HasField("session_log")]
    assert starts == [1, 3]


def events(file: Path) -> list[Any]:
    """The events of a file of TensorBoard: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, out = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        out.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return out
