"""Shared fixtures: the folder of real data beside the checkout, and one local Ray for all tests that need it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lcrnet.anchors import AnchorPoses
    from lcrnet.config import Config

# Before anything imports Ray (RAY.md 1, 2.2, 2.8): no token, quick polls, prints once.
os.environ.update(
    RAY_AUTH_MODE="disabled", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5", RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)  # fmt: skip
os.environ.pop("RAY_ADDRESS", None)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; it lies beside the project's own checkout only."""
    folder = Path(os.environ.get("LCRNET_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (LCRNET_SHARED_DATA names another folder)")
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """One local Ray. Its CPUs are a number: more than there are, so that no test waits for another's to be released."""
    import ray

    ray.init(num_cpus=8, num_gpus=0, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with annotations.json and images/ of twelve drawings; nobody may write into it."""
    from lcrnet import synthetic

    folder = tmp_path_factory.mktemp("drawn")
    synthetic.write(folder, 12, seed=0, size=128, heading=75, processes=1)
    return folder


@pytest.fixture(scope="session")
def tiny() -> Config:
    """A configuration whose steps take a tenth of a second on one core."""
    from lcrnet import config

    return config.from_dict({
        "image": {"short_side": 64, "max_side": 64},
        "anchors": {"k": 3},
        "model": {"backbone": "tiny", "norm": "gn", "freeze": 0},
        "rpn": {"sizes": [16, 32, 56], "ratios": [1, 2], "train_post_nms": 60, "post_nms": 30, "samples": 64},
        "head": {"samples": 24, "jitter": 4, "positive_share": 0.5},
        "data": {"loaders": 0, "scale": [1, 1]},
        "train": {"batch": 2, "steps": 4, "optimizer": "adamw", "lr": 1e-3, "warmup": 1, "schedule": "cosine",
                  "ema": 0.9, "clip": 5, "threads": 1, "log_every": 1},
    })  # fmt: skip


@pytest.fixture(scope="session")
def poses(drawn: Path, tiny: Config) -> AnchorPoses:
    """Six anchor poses of the drawings: three 3D poses, for the whole and for the upper body."""
    from lcrnet import anchors, coco
    from lcrnet.pose import People

    people = People.join(image.people for image in coco.read(drawn / "annotations.json").images)
    return anchors.cluster(people, tiny.anchors.k)


@pytest.fixture(scope="session")
def model_folder(tiny: Config, poses: AnchorPoses, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights; nobody may write into it."""
    import torch

    from lcrnet import model, weights

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained") / "model"
    weights.save(model.build(tiny, poses), folder)
    return folder
