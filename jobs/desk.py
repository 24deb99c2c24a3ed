"""The desk: an actor beside the driver of a training, where its workers say things and are asked to stop."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Desk:
    """An actor beside the driver, for what workers and driver have to tell each other; it needs no shared storage."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.fault = ""
        self.stop = asyncio.Event()

    async def tell(self, kind: str, what: Any) -> None:
        """From a worker: "begun", "say" a line that stays, "progress" (step, last, line), "figures" (step, figures)."""
        self.told.append((kind, what))

    async def take(self) -> list[tuple[str, Any]]:
        """For the driver: what was told since the last call."""
        told, self.told = self.told, []
        return told

    async def ask_to_stop(self) -> None:
        self.stop.set()

    async def stopped(self) -> bool:
        """For the workers: answers once they are to stop."""
        return await self.stop.wait()

    async def give_up(self, fault: str) -> None:
        """From a worker: why starting again would be in vain."""
        self.fault = self.fault or fault

    async def given_up(self) -> str:
        return self.fault


def opened() -> Any:
    """A desk on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Desk).remote()


class Witness(UserCallback):
    """Tells the desk why workers are started again."""

    def __init__(self, desk: Any):
        self.desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in sorted(worker_exceptions.items())[:1]:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.desk.tell.remote("say", f"worker {rank} of {len(worker_exceptions)} failed: {lines[-1].strip()[:300]}")
