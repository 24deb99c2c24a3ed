"""Shared fixtures: the folder of real data beside the checkout, and one local Ray for all tests that need it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
    """One local Ray."""
    import ray

    ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()
