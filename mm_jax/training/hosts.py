"""Joins many hosts into jax's multi-controller runtime, and runs work that one process does."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from mm_jax.config.errors import ConfigError, require

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "many processes",
        "SLURM (srun), Open MPI (mpirun) and Kubernetes indexed jobs are recognised; anywhere else "
        "start the same command once per process with these three",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num_processes", type=int, help="how many there are")
    group.add_argument("--process_id", type=int, help="which one this is, from 0")


def launcher(env=os.environ) -> str | None:
    """Tells from the environment which launcher started several processes of this program."""
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    return None


def initialize(args: argparse.Namespace) -> None:
    """Joins the other processes, before the first use of a device. Raises ConfigError."""
    if jax.distributed.is_initialized():  # by an earlier training of the same command (`dfew`)
        return
    given = [args.coordinator, args.num_processes, args.process_id]
    if any(value is not None for value in given):
        require(
            all(value is not None for value in given),
            "--coordinator, --num_processes and --process_id go together",
        )
        require(
            0 <= args.process_id < args.num_processes,
            f"--process_id: expected 0 to {args.num_processes - 1}, got {args.process_id}",
        )
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    elif launcher() is not None:
        jax.distributed.initialize()
    else:
        return
    log.info(
        "process %d of %d (%s), %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        launcher() or "explicit",
        jax.local_device_count(),
        jax.device_count(),
    )
    if jax.process_index() > 0:
        logging.getLogger().setLevel(logging.WARNING)


def on_first(work: Callable[[], None]) -> None:
    """Runs `work` on process 0 while the others wait; its failure ends all of them."""
    # A process that raised alone would leave the others waiting for it for ever.
    error = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as caught:
            error = caught
    failed = bool(np.any(from_all(np.array(error is not None))))
    if error is not None:
        raise error
    if failed:
        raise ConfigError("process 0 failed; see its error message")


def from_all(value: np.ndarray) -> np.ndarray:
    """Gathers the values of all processes, stacked."""
    if jax.process_count() == 1:
        return value[None]
    return multihost_utils.process_allgather(value)


def gather_objects(value) -> list:
    """Gathers the JSON values of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = from_all(np.array(len(own)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    rows = from_all(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
