"""Saves and restores Orbax checkpoints: items `state`, `params`, `data`, `meta`, and `adapters`
under LoRA."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from mm_jax import __version__
from mm_jax.config.errors import UserError
from mm_jax.config.files import read_json, write_whole
from mm_jax.models.abstract import AbstractModel
from mm_jax.models.lora import is_adapter
from mm_jax.run.build import Run
from mm_jax.training.state import TrainState

policies = ocp.training.preservation_policies
LATE_FILE = "late_scores.json"


class CheckpointError(UserError, ValueError):
    """Says that a checkpoint is missing, does not fit the run, or could not be written."""


def pure(tree: Any) -> Any:
    """Turns nnx states inside a tree into nested dicts of arrays (integer keys become strings)."""
    # String keys sort "10" before "2". Restoring relies on the order of leaves, so a list of more
    # than ten modules must not be checkpointed; models stack their layers instead.
    return jax.tree.map(
        lambda s: _stringed(nnx.to_pure_dict(s)) if isinstance(s, nnx.State) else s,
        tree,
        is_leaf=lambda s: isinstance(s, nnx.State),
    )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _stringed(tree: Any) -> Any:
    return {str(k): _stringed(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


# Replicas share the writing of an array only where each writes at least this many bytes. Orbax
# slices a shared array, and every slice is a program of its own for each shape and device:
# compiling them for small arrays takes longer than writing the arrays.
SHARED_BYTES = 16 << 20


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SHARED_BYTES
    return context


class _KeepBest:
    """Keeps the best checkpoint of `Checkpoints`, late scores included."""

    # Orbax's own policy knows only the metrics that were saved with a checkpoint.

    def __init__(self, owner: Checkpoints):
        self.owner = owner

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        scores = [self.owner.score(c) for c in checkpoints]
        best = max(((s, c.step) for s, c in zip(scores, checkpoints, strict=True)
                    if s is not None), default=None)  # fmt: skip
        return [best is not None and c.step == best[1] for c in checkpoints]


class Checkpoints:
    """Keeps the newest checkpoints of one stage and the best by `score` (larger is better).

    The score of a step that was evaluated after it had been saved is in `late_scores.json`: a
    written checkpoint is never changed.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        late = folder / LATE_FILE
        self.late: dict[str, float] = read_json(late) if late.is_file() else {}
        self.checkpointer = ocp.training.Checkpointer(
            folder.resolve(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(max(1, keep)), _KeepBest(self)]
            ),
            cleanup_tmp_directories=True,
            context=_context(),
        )

    def save(
        self,
        state: TrainState,
        params: nnx.State,
        data: dict,
        meta: dict,
        metrics: dict | None,
    ) -> None:
        """Saves asynchronously; `params` is the inference view, `data` the data's resume point.

        `metrics`: those of an evaluation, with "score", or None. A checkpoint without a score is
        never the best, unless `score_late` gives it one. Raises CheckpointError where this or the
        previous save could not be written.
        """
        step = int(state.step)
        flat = nnx.to_flat_state(state.trainable)
        adapters = nnx.from_flat_state([(p, v) for p, v in flat if is_adapter(p)])
        # Returns once the arrays are on the host, so the next step may donate their buffers; an
        # error of the writing itself surfaces at the next save or in `wait`.
        with self._writing():
            self.checkpointer.save_checkpointables_async(
                step,
                dict(
                    state=pure((state.trainable, state.opt_state)),
                    params=pure(params),
                    data=data,
                    meta={**meta, "version": __version__, "step": step},
                    **({"adapters": pure(adapters)} if adapters else {}),
                ),
                metrics=metrics and {k: float(v) for k, v in metrics.items()},
            )

    def save_params(self, params: nnx.State, meta: dict) -> None:
        """Saves parameters that were not trained here, as step 0 and as the best."""
        items = dict(params=pure(params), meta={**meta, "version": __version__, "step": 0})
        with self._writing():
            self.checkpointer.save_checkpointables(0, items, metrics={"score": 0.0})

    def wait(self) -> None:
        """Waits until everything is written. Raises CheckpointError where it could not be."""
        with self._writing():
            self.checkpointer.wait()

    def close(self) -> None:
        with self._writing():
            self.checkpointer.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:
            # Unfinished saves have names with a suffix; a number alone is a complete checkpoint.
            whole = sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())
            kept = f"step {whole[-1]}" if whole else "none"
            raise CheckpointError(
                f"checkpoint in {self.folder} could not be written (disk full?): "
                f"{type(error).__name__}: {str(error)[:300]}; last complete checkpoint: {kept}; "
                "free some space, then continue with --resume"
            ) from error

    def steps(self) -> list[int]:
        return sorted(m.step for m in self.checkpointer.checkpoints)

    def score_late(self, step: int, score: float) -> None:
        """Gives a saved step the score of a later evaluation."""
        self.late[str(step)] = score
        if jax.process_index() == 0:
            write_whole(self.folder / LATE_FILE, json.dumps(self.late))

    def score(self, checkpoint) -> float | None:
        metrics = checkpoint.metrics
        return self.late.get(str(checkpoint.step)) if metrics is None else metrics["score"]

    def evaluated(self, step: int) -> bool:
        found = {m.step: m for m in self.checkpointer.checkpoints}
        return step in found and self.score(found[step]) is not None

    def best_step(self) -> int:
        """Returns the step with the largest score. Raises CheckpointError where there is none."""
        found = [m for m in self.checkpointer.checkpoints if self.score(m) is not None]
        if not found:
            raise CheckpointError(f"no evaluated checkpoint in {self.folder}")
        return max(found, key=lambda m: (self.score(m), m.step)).step  # ties: the later step

    def restore_state(
        self, step: int, state: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict, dict]:
        """Restores (state, data, meta) of a step, into the shapes and dtypes of `state` and onto
        `shardings`; the mesh may differ from the one it was saved on."""
        wanted = pure((state.trainable, state.opt_state))
        places = pure((shardings.trainable, shardings.opt_state))
        wanted = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), wanted, places
        )
        loaded = self._load(step, dict(state=wanted, data=None, meta=None))
        trainable, opt_state = loaded["state"]
        leaves = jax.tree.leaves((trainable, opt_state))
        tree = jax.tree.structure((state.trainable, state.opt_state))
        trainable, opt_state = jax.tree.unflatten(tree, leaves)
        number = jax.device_put(jax.numpy.int32(step), shardings.step)
        # Frozen weights are in no checkpoint's state: they never change during a stage.
        return (
            TrainState(trainable, opt_state, number, state.frozen),
            loaded["data"],
            loaded["meta"],
        )

    def restore_params(
        self, step: int, params: nnx.State, shardings: nnx.State, as_stored: bool = False
    ) -> nnx.State:
        """Restores all parameters of a step, into the shapes and dtypes of the abstract `params`;
        `as_stored`: in the dtypes they were saved in."""
        plain = pure(params)
        dtypes = [a.dtype for a in jax.tree.leaves(plain)]
        if as_stored:
            stored = self._stored(step)["params"]
            dtypes = [a.dtype for a in jax.tree.leaves(stored, is_leaf=_is_array)]
        wanted = jax.tree.map(
            lambda a, s, dtype: jax.ShapeDtypeStruct(a.shape, dtype, sharding=s),
            plain,
            pure(shardings),
            jax.tree.unflatten(jax.tree.structure(plain), dtypes),
        )
        loaded = self._load(step, dict(params=wanted))["params"]
        return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(loaded))

    def restore_adapters(self, step: int) -> nnx.State:
        """Restores a step's LoRA adapters, on one device. Raises CheckpointError without any."""
        stored = self._stored(step)
        if "adapters" not in stored:
            raise CheckpointError(f"{self.folder}/{step} has no adapters: not a stage with LoRA")
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
            stored["adapters"],
            is_leaf=_is_array,
        )
        loaded = self._load(step, dict(adapters=wanted))["adapters"]
        flat = jax.tree_util.tree_flatten_with_path(loaded)[0]
        return nnx.from_flat_state(
            [(tuple(k.key for k in path), nnx.Param(value)) for path, value in flat]
        )

    def _stored(self, step: int) -> dict:
        """Reads the shapes and dtypes of a step: item -> tree."""
        try:
            return ocp.checkpointables_metadata(self.folder.resolve() / str(step)).metadata
        except Exception as error:
            raise CheckpointError(
                f"no checkpoint {self.folder}/{step}: {type(error).__name__}"
            ) from error

    def _load(self, step: int, wanted: dict) -> dict:
        if step not in self.steps():
            raise CheckpointError(
                f"--step: no checkpoint of step {step} in {self.folder}; there are "
                f"{self.steps() or 'none'}"
            )
        try:
            return self.checkpointer.load_checkpointables(step, wanted)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.folder}/{step} does not fit this run (another model size, "
                f"trained parts or optimiser?): {type(error).__name__}: {str(error)[:500]}"
            ) from error


def load_stage(
    run: Run,
    name: str,
    step: int | None = None,
    abstract: AbstractModel | None = None,
    as_stored: bool = False,
) -> tuple[nnx.State, int]:
    """Reads a stage's checkpoint (the best by default); returns its parameters and its step.

    `abstract`: the model they belong to (default: the run's); `as_stored`: keep the saved dtypes.
    """
    abstract = abstract or run.abstract
    with contextlib.closing(Checkpoints(run.workdir / "checkpoints" / name)) as checkpoints:
        step = checkpoints.best_step() if step is None else step
        params = checkpoints.restore_params(step, abstract.params, abstract.shardings, as_stored)
    return params, step
