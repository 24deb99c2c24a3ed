"""What the jobs share before they start: a connection to Ray that has room for them, a folder they can write to."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError
from ray.train import ScalingConfig, ValidationConfig

from lcrnet.config import Config, UserError

_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do by default, and warns of until then
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it a worker's lines come twice
    # Ray Train's loop is not the main thread: glibc would give every large tensor back to the system and fetch it anew,
    # 8 % of a step on CPU.
    "MALLOC_ARENA_MAX": "1",
}


def connect(workers: int, gpu: bool = False, *, field: str = "train", cpus: int = 1, log: bool = True) -> None:
    """Joins the cluster of RAY_ADDRESS (set by `ray job submit`), else starts a Ray on this machine; a Ray that this
    process already has is used as it is.

    workers, gpu, cpus   processes wanted, each with a GPU or not and with so many CPUs
    field                section of the configuration they come from, for the message
    log                  whether the workers' prints come through
    UserError: no cluster answers, or it has no room for them (Ray itself would wait for ever).
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if address:
            _probe(address)
        else:
            # Ray protects a local cluster with a token: one of our own, as its file in the home folder may be another
            # cluster's, or not writable. RAY_AUTH_MODE stays Ray's to set: it is read once, when ray is imported.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        local: dict[str, Any] = {} if address else {"address": "local", "include_dashboard": False}
        try:
            # ERROR while it starts (a notice about the token), WARNING from then on.
            ray.init(**local, logging_level=logging.ERROR, log_to_driver=log)
        except (ConnectionError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(f"Ray {f'at RAY_ADDRESS={address}' if address else 'did not start'}: {why}") from None
        logging.getLogger("ray").setLevel(logging.WARNING)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(n.get("CPU", 0) // cpus, n.get("GPU", 0) if gpu else workers)) for n in nodes)
    if room < workers:
        has = ", ".join(f"{sum(n.get(kind, 0) for n in nodes):g} {kind}s" for kind in ("GPU", "CPU"))
        each = f"{cpus} CPU{'s' * (cpus > 1)}{' + 1 GPU' * gpu}"
        fix = f"lower --{field}.workers to {room}" if room else f"--{field}.gpu false" if gpu else "add nodes"
        raise UserError(f"asked for {workers} workers x {each}; the cluster has {has}, room for {room}: {fix}")


def quiet() -> None:
    """Ray Data without its own bars and notices: jobs say how far they are."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would tell that there are no bars


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A UserError that a worker of Ray Data raises arrives as text in one of Ray's own: raise it again."""
    try:
        yield
    except RayError as error:
        if said := re.search(r"UserError: (.+)", str(error)):
            raise UserError(said[1]) from None
        raise


def scaling(config: Config, beside: bool = False) -> ScalingConfig:
    """The workers of a training: `threads` CPUs each, or an equal share of all that the cluster has.

    With `store.min_workers` Ray may start again with fewer, and with more once there are (`elastic`).
    beside   a validation (`validation`) needs such a share too, outside of what the workers hold
    """
    train = config.train
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    shares = (c for c in range(max(nodes), 0, -1) if sum(n // c for n in nodes) >= train.workers + beside)
    cpus = train.threads or next(shares, 1)
    resources = {"CPU": cpus, "GPU": 1} if train.gpu else {"CPU": cpus}
    workers = (config.store.min_workers, train.workers) if elastic(config) else train.workers
    return ScalingConfig(num_workers=workers, use_gpu=train.gpu, resources_per_worker=resources)


def validation(function: Callable[..., dict[str, float]], config: Config) -> ValidationConfig:
    """Ray Train's validation in a task of its own (alpha in Ray 2.60), on a GPU if one is left over."""
    resources = scaling(config, beside=True).resources_per_worker or {}
    spare = ray.cluster_resources().get("GPU", 0) > config.train.workers
    options = {"num_cpus": resources["CPU"], "num_gpus": int(config.train.gpu and spare)}
    return ValidationConfig(fn=function, ray_remote_kwargs=options)


def elastic(config: Config) -> bool:
    """Whether the number of workers may change; UserError where a step's images cannot be shared among some number.

    The images of a step, and so the learning rate, stay what they are: each worker takes more of them.
    """
    train, least = config.train, config.store.min_workers
    if not least or least == train.workers:
        return False
    if least > train.workers:
        raise UserError(f"store.min_workers {least} is above train.workers {train.workers}: lower it")
    counts = range(least, train.workers + 1)
    if uneven := [n for n in counts if train.batch % (n * train.accumulate)]:
        each = math.lcm(*counts) * train.accumulate
        raise UserError(
            f"store.min_workers: train.batch {train.batch} cannot be shared among {uneven[0]} workers, and "
            f"{least} to {train.workers} it may have to be: make train.batch a multiple of {each}"
        )
    return True


def _probe(address: str) -> None:
    """UserError if nothing listens at host:port; Ray would try for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(f"RAY_ADDRESS={address}: no cluster there ({error}); unset it for a local Ray") from None


def writable(folder: str | os.PathLike[str], option: str = "--out") -> Path:
    """The folder, made if need be, after a trial file in it; UserError if it cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another {option}") from None
    return Path(folder)
