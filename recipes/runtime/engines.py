"""Engines that run the pieces of a study: backends of joblib, chosen by the configuration group ``engine``.

An engine is opened for a number of processes. While it is open, ``joblib.Parallel`` uses it.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import joblib

_NEEDED = {"dask": ("dask", "distributed"), "ray": ("ray",)}


@dataclass(frozen=True)
class Engine:
    """A backend of joblib."""

    @abstractmethod
    def open(self, num_processes: int) -> AbstractContextManager[None]:
        """Return a context in which ``joblib.Parallel`` has ``num_processes`` workers, or those of a cluster."""


@dataclass(frozen=True)
class Local(Engine):
    """Worker processes of this machine, by loky; with one process there are no workers."""

    @contextmanager
    def open(self, num_processes: int) -> Generator[None, None, None]:
        """Start the workers when they are needed; joblib keeps them for the next call."""
        with joblib.parallel_config("loky", n_jobs=num_processes):
            yield


@dataclass(frozen=True)
class Dask(Engine):
    """The workers of a Dask cluster.

    Args:
        address: Address of its scheduler; without one, a cluster on this machine is started.

    Raises:
        ModuleNotFoundError: If ``dask`` or ``distributed`` is not installed.
    """

    address: str | None = None

    def __post_init__(self) -> None:
        _need("dask")

    @contextmanager
    def open(self, num_processes: int) -> Generator[None, None, None]:
        """Connect to the scheduler.

        Raises:
            ValueError: If a worker has several threads: they would share one random state.
        """
        import dask
        from distributed import Client, LocalCluster

        # data loaders start processes, which daemons are not allowed to do
        with ExitStack() as stack:
            stack.enter_context(dask.config.set({"distributed.worker.daemon": False}))
            cluster: Any = self.address
            if cluster is None:
                own = LocalCluster(n_workers=num_processes, threads_per_worker=1, dashboard_address=None)
                cluster = stack.enter_context(own)
            client = stack.enter_context(Client(cluster))
            client.wait_for_workers(1, timeout=60)
            threads = client.nthreads()
            if max(threads.values()) > 1:
                raise ValueError(
                    f"The workers of {self.address} have {sorted(threads.values())} threads; random numbers belong to "
                    "a process, so start each with --nthreads 1."
                )
            stack.enter_context(joblib.parallel_config("dask", client=client, n_jobs=len(threads)))
            yield


@dataclass(frozen=True)
class Ray(Engine):
    """The workers of a Ray cluster.

    Args:
        address: Address of the cluster; without one, a cluster on this machine is started.

    Raises:
        ModuleNotFoundError: If ``ray`` is not installed.
    """

    address: str | None = None

    def __post_init__(self) -> None:
        _need("ray")

    @contextmanager
    def open(self, num_processes: int) -> Generator[None, None, None]:
        """Connect to the cluster and use ``num_processes`` of its processors."""
        import ray
        from ray.util.joblib.ray_backend import RayBackend

        # Ray's backend supports results as they complete; it only inherits a flag that says otherwise
        streaming = type("Streaming", (RayBackend,), {"supports_return_generator": True})
        own: dict[str, Any] = {} if self.address else {"num_cpus": num_processes, "include_dashboard": False}
        ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, **own)
        try:
            joblib.register_parallel_backend("ray", streaming)
            with joblib.parallel_config("ray", n_jobs=num_processes):
                yield
        finally:
            ray.shutdown()


def _need(name: str) -> None:
    missing = [package for package in _NEEDED[name] if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"engine={name} needs {' and '.join(missing)}: pip install {' '.join(missing)}, or use engine=local."
        )
