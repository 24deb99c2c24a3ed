"""Trainings that are stopped, killed, lose nodes: they go on from the last checkpoint and end where others end.

The slow ones start clusters of their own: pytest -m slow tests/test_jobs_faults.py
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import driver, plot, train
from lcrnet import anchors, coco, config, weights
from lcrnet import train as loop
from lcrnet.config import Config
from lcrnet.dataset import Source


@dataclass
class Plain:
    """A run in this process, without Ray: what those on Ray must equal."""

    folder: Path
    rank: int = 0
    world_size: int = 1
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    losses: dict[int, dict[str, float]] = field(default_factory=dict)

    def resume(self) -> AbstractContextManager[Path | None]:
        return nullcontext(None)

    def say(self, text: str) -> None: ...

    def progress(
        self, step: int, last: int, losses: dict[str, float], images_per_s: float, seconds_left: float
    ) -> None:
        self.losses[step] = losses

    def stopping(self) -> bool:
        return False

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        if folder:
            shutil.copytree(folder, self.folder / f"step_{int(metrics['step'])}")
            shutil.rmtree(folder)


def changed(settings: Config, **fields: Any) -> Config:
    """A configuration with other fields of `train`, or `section__field=value`."""
    values = settings.model_dump()
    for name, value in fields.items():
        section, _, rest = name.rpartition("__")
        values[section or "train"][rest] = value
    return config.from_dict(values)


@pytest.fixture(scope="module")
def source(drawn: Path) -> Source:
    return Source(drawn / "annotations.json", drawn / "images")


def said(run: Path) -> str:
    file = run / driver.LOG
    return file.read_text() if file.exists() else ""


def losses(run: Path) -> dict[int, dict[str, float]]:
    """The losses of a run by step, as its log has them."""
    return {int(m[1]): {k: float(v) for k, v in re.findall(r"(\w+) (\d+\.\d+)  ", m[0])}
            for m in re.finditer(r"^step (\d+)/\d+  .*$", said(run), re.MULTILINE)}  # fmt: skip


def when(condition: Callable[[], Any], act: Callable[[], Any], seconds: float = 240) -> threading.Thread:
    """Acts, in a thread, once a condition holds."""

    def wait() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                act()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def workers_of(process: int) -> list[int]:
    """The Ray Train workers among the descendants of a process, and of nobody else."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue

    def below(pid: int) -> bool:
        while pid in parents:
            if (pid := parents[pid]) == process:
                return True
        return False

    return [pid for pid, title in titles.items() if title.startswith("ray::RayTrainWorker") and below(pid)]


def model(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def whole_run(settings: Config, source: Source, run: Path, folder: Path) -> Plain:
    """The training of a run from its start to its end, without Ray."""
    plain = Plain(folder)
    loop.fit(settings, plain, source, anchors.load(run / "anchors.json"))
    return plain


def test_stopped_and_killed_is_uninterrupted(cluster: Any, tiny: Config, source: Source, tmp_path: Path) -> None:
    """SIGTERM saves and ends with 143; the same command goes on, loses its worker, and ends with the same weights."""
    settings, run = changed(tiny, steps=60, save_every=20, picture_every=0), tmp_path / "run"
    when(lambda: "step 5/" in said(run), lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        train.run(settings, source, run)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert not (run / "model").exists()
    stopped = re.search(r"stopped at step (\d+)", said(run))
    assert stopped and 5 <= int(stopped[1]) < 60 and int(stopped[1]) % 20, "not one of the checkpoints it has anyway"

    def kill() -> None:
        for pid in workers_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)

    thread = when(lambda: f"step {max(int(stopped[1]) + 8, 42)}/" in said(run), kill)
    metrics = train.run(settings, source, run)
    thread.join()
    assert metrics is not None and metrics["step"] == 60
    starts = [int(n) for n in re.findall(r"resumed at step (\d+)", said(run))]
    assert len(starts) == 2 and starts[0] == int(stopped[1]) < starts[1], (
        "from the stop, and from a checkpoint after it"
    )
    assert re.search(r"worker 0 of 1 failed: .*", said(run))
    whole_run(settings, source, run, tmp_path / "whole")
    assert model(run) == model(tmp_path / "whole/step_60")
    assert sorted(plot.read(run)["loss/total"]) == list(range(1, 61)), "each step once"


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_more_workers_have_the_losses_of_one(
    workers: int, cluster: Any, tiny: Config, source: Source, tmp_path: Path
) -> None:
    """At the same batch, within 1e-3 of each loss and 1e-4 of the weights after 5 steps of SGD.

    Every image is the same one and no region is left out at random: else workers draw other regions, and a mean of
    means over their regions is not the mean over all.
    """
    one = [i for i in coco.read(source.annotations).images if len(i.people) > 1][:1]
    coco.write(tmp_path / "one.json", one)
    few = Source(tmp_path / "one.json", source.images)
    settings = changed(
        tiny, steps=5, batch=4, optimizer="sgd", lr=0.01, ema=0, data__flip=0, rpn__samples=100000, head__samples=1000,
        head__jitter=0, head__positive_share=1, anchors__k=2, rpn__positive_share=1,
    )  # fmt: skip
    run = tmp_path / "run"
    assert train.run(changed(settings, workers=workers), few, run) is not None
    alone = whole_run(settings, few, run, tmp_path / "alone")
    theirs = losses(run)
    assert sorted(theirs) == sorted(alone.losses) == [1, 2, 3, 4, 5]
    for step, values in alone.losses.items():
        assert theirs[step] == {k: pytest.approx(v, rel=1e-3, abs=1e-3) for k, v in values.items()}, step
    ours = weights.load(run / "model").state_dict()
    for name, value in weights.load(tmp_path / "alone/step_5/model").state_dict().items():
        assert torch.allclose(ours[name], value, atol=1e-4), name


@pytest.mark.slow
def test_checkpoints_elsewhere_validated_beside_and_the_best_kept(
    cluster: Any, tiny: Config, source: Source, tmp_path: Path
) -> None:
    far = tmp_path / "far"
    settings = changed(
        tiny, steps=8, save_every=2, keep=1, validation="beside", picture_every=0,
        store__checkpoints=f"file://{far}", store__keep_best="step", store__best_mode="min",
    )  # fmt: skip
    run = tmp_path / "run"
    metrics = train.run(settings, source, run, val=source)
    assert metrics is not None and metrics["step"] == 8 and metrics["people"] > 0, "figures came back from beside"
    assert weights.read_about(run / "model")["metrics"] == metrics
    assert weights.read_about(run / "best")["step"] == 2 and weights.read_about(run / "model")["step"] == 8
    assert len(list(far.glob("ray/checkpoint_2*"))) == 2, "the best and the last"
    assert not (run / "ray").exists() and (far / "config.yaml").is_file()
    curves = plot.read(run)
    assert sorted(curves["val/people"]) == [2, 4, 6, 8] and len(curves["loss/class"]) == 8
    assert said(run).count(" validated: ") == 4

    # RUN was on a machine that is gone: the checkpoints and records are enough to end the run elsewhere.
    again = tmp_path / "again"
    assert train.run(settings, source, again, val=source) is not None
    assert model(again) == model(run) and "resumed at step 8" in said(again)


def job(home: Path, source: Source, settings: Config, run: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A training as a user starts it."""
    config.save(settings, home / "config.yaml")
    command = [sys.executable, str(Path(train.__file__)), "--config", str(home / "config.yaml"), "--out", str(run)]
    command += ["--data", str(source.annotations), "--images", str(source.images)]
    return subprocess.Popen(command, env=os.environ | environment)


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_driver(tiny: Config, source: Source, tmp_path: Path) -> None:
    """SIGKILL of the job, again and again wherever it is; the same command in the end has the weights of one life."""
    settings, run = changed(tiny, steps=200, save_every=10, threads=1, picture_every=0), tmp_path / "run"
    for step in (15, 60, 120):
        process = job(tmp_path, source, settings, run)
        until(lambda step=step: max(losses(run), default=0) >= step)
        process.kill()
        process.wait()
    assert job(tmp_path, source, settings, run).wait(timeout=240) == 0
    starts = [int(n) for n in re.findall(r"resumed at step (\d+)", said(run))]
    assert len(starts) == 3 and starts == sorted(starts) and starts[0] >= 10
    whole_run(settings, source, run, tmp_path / "whole")
    assert model(run) == model(tmp_path / "whole/step_200")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_job(number: int, tiny: Config, source: Source, tmp_path: Path) -> None:
    settings, run = changed(tiny, steps=2000, save_every=1000, picture_every=0), tmp_path / "run"
    process = job(tmp_path, source, settings, run)
    until(lambda: max(losses(run), default=0) >= 5)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert "stopped at step" in said(run)
    assert len(list(run.glob("ray/checkpoint_*/training.safetensors"))) == 1


@pytest.mark.slow
def test_a_lost_node(tiny: Config, source: Source, tmp_path: Path) -> None:
    """Of two nodes with a worker each one is lost for good: the other goes on with the whole batch."""
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    settings = changed(
        tiny, steps=150, save_every=10, batch=4, workers=2, threads=1, picture_every=0, store__min_workers=1
    )  # fmt: skip
    config.save(settings, tmp_path / "config.yaml")
    names = [str(p) for p in (tmp_path / "config.yaml", source.annotations, source.images, tmp_path / "run")]
    quick = os.environ | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
    done = subprocess.run([sys.executable, str(script), *names], env=quick, timeout=400)
    assert done.returncode == 0
    assert weights.read_about(tmp_path / "run/model")["step"] == 150
    assert re.search(r"resumed at step \d+0", said(tmp_path / "run"))


LOST = """
import sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from jobs import train
from lcrnet import config
from lcrnet.dataset import Source

settings, data, images, run = config.load(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
small = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
found = {}
thread = threading.Thread(target=lambda: found.update(m=train.run(settings, Source(data, images), run)), daemon=True)
thread.start()
while "step 25/" not in ((run / "train.log").read_text() if (run / "train.log").exists() else ""):
    assert thread.is_alive()
    time.sleep(0.1)
cluster.remove_node(nodes[1], allow_graceful=False)
thread.join(300)
assert found["m"]["step"] == settings.train.steps, found
ray.shutdown()
cluster.shutdown()
"""
