"""Compares released or exported weights, as this library runs them, with transformers' models.

torch is imported in here and nowhere else in the library but to read torch files: checks do not
belong to training.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.models.mamba import Mamba
from mm_jax.models.qwen2 import Qwen2
from mm_jax.models.siglip import Siglip
from mm_jax.weights import keymap
from mm_jax.weights.load import load_state
from mm_jax.weights.sources import MAMBA, VISION, Source
from mm_jax.weights.tensors import WeightsError

ERROR = 1e-3  # allowed difference, relative to the largest value (float32 at 7B: about 1e-5)
DIVERGENCE = 1e-4  # allowed KL of the next token, nats


@dataclasses.dataclass(frozen=True)
class Check:
    """Largest difference, largest value, and of logits error and KL at every position."""

    part: str
    error: float
    scale: float
    positions: list[tuple[float, float]]

    @property
    def passed(self) -> bool:
        close = self.error <= ERROR * max(1.0, self.scale)
        return close and all(kl <= DIVERGENCE for _, kl in self.positions)


def read_vectors(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids int[B, T], logits [B, T, V]) of an npz file. Raises WeightsError."""
    try:
        with np.load(path) as stored:
            ids, logits = stored["input_ids"], stored["logits"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(
            f"weights: {path}: expected an npz file with input_ids and logits ({error})"
        ) from error
    whole = ids.ndim == 2 and logits.shape[:2] == ids.shape and ids.size and ids.min() >= 0
    if not whole or ids.max() >= logits.shape[-1]:
        raise WeightsError(
            f"weights: {path}: expected input_ids [B, T] below V and logits [B, T, V], got shapes "
            f"{ids.shape} and {logits.shape}"
        )
    return ids, logits


def check_source(
    source: Source, vectors: tuple[np.ndarray, np.ndarray] | None = None
) -> Iterator[Check]:
    """Every part that transformers has a model of (language model, SigLIP, Mamba), in float32 on
    random input; or, with `vectors` (see `read_vectors`), the language model against stored logits.
    One model is in memory at a time. Raises WeightsError where there is nothing to compare."""
    if vectors is not None:
        ids, want = vectors
        yield compare_logits(run_language_model(source, ids), want)
        return
    if not {"llm", "vision", "compressor"} & set(source.configs):
        raise WeightsError(
            f"weights: {source.name}: transformers has no model of {sorted(source.configs)} to "
            "compare with; tools/check_parity.py has golden values"
        )
    rng = np.random.default_rng(0)
    if "llm" in source.configs:
        ids = rng.integers(0, vocabulary(source), (2, 16))
        ours = run_language_model(source, ids)
        yield compare_logits(ours, language_model(source, ids))
    if "vision" in source.configs:
        c = source.configs["vision"]
        pixels = rng.uniform(-1, 1, (1, c.image_size, c.image_size, c.num_channels))
        pixels = pixels.astype(np.float32)
        ours = run(source, Siglip, c, keymap.SIGLIP, VISION, normed_and_pooled, pixels)
        yield compare_states("vision_tower", ours, vision_tower(source, pixels))
    if "compressor" in source.configs:
        c = source.configs["compressor"]
        ids = rng.integers(0, c.vocab_size, (2, 16))
        ours = run(source, Mamba, c, keymap.MAMBA, MAMBA, lambda m, x: m(x), ids)
        yield compare_states("mamba_compressor", ours, compressor(source, ids))


def run(source: Source, cls, config, table: dict, prefix: str, call: Callable, x) -> np.ndarray:
    """`call(our module with the source's weights, x)`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    state = load_state(state, table, stripped(source, prefix), name=source.name)
    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda s, x: call(nnx.merge(graph, s), x))(state, jnp.asarray(x))
    return np.asarray(out)


def normed_and_pooled(tower: Siglip, pixels: jax.Array) -> jax.Array:
    """[B, P + 1, D]: the tower's normed states and its pooler's output."""
    hidden = tower(pixels)
    return jnp.concatenate([tower.post_layernorm(hidden), tower.pooled(hidden)[:, None]], axis=1)


def run_language_model(source: Source, ids: np.ndarray) -> np.ndarray:
    only = source.only("language_model")
    if ids.max() >= vocabulary(source):
        raise WeightsError(
            f"weights: {source.name}: input_ids go up to {ids.max()}, the vocabulary has "
            f"{vocabulary(source)} rows"
        )

    def call(m, ids):
        return m.logits(m(m.embed(ids), jnp.ones(ids.shape, bool)))

    return run(only, Qwen2, source.configs["llm"], keymap.QWEN2, "", call, ids)


def vocabulary(source: Source) -> int:
    return source.configs["llm"].vocab_size


def stripped(source: Source, prefix: str) -> dict:
    return {k.removeprefix(prefix): t for k, t in source.tensors.items() if k.startswith(prefix)}


def filled(model, tensors: dict, tied: bool = False):
    """A transformers model with these weights: all of its own, and no others."""
    import torch

    own = model.state_dict()
    if set(own) - ({"lm_head.weight"} if tied else set()) != set(tensors):
        differing = sorted(set(own) ^ set(tensors))[:5]
        raise WeightsError(f"weights: transformers' model has other tensors, such as {differing}")
    with torch.no_grad():
        for key, tensor in tensors.items():
            for start, stop in tensor.blocks():
                rows = np.ascontiguousarray(tensor.rows(start, stop).astype(np.float32))
                own[key][start:stop] = torch.from_numpy(rows)
    return model.eval()


def language_model(source: Source, ids: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    c = source.configs["llm"].to_hf_config()
    config = transformers.Qwen2Config(**c, attn_implementation="eager")
    only = source.only("language_model")
    model = filled(transformers.Qwen2ForCausalLM(config), only.tensors, config.tie_word_embeddings)
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)).logits.numpy()


def vision_tower(source: Source, pixels: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    c = source.configs["vision"].to_hf_config()
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**c, attn_implementation="eager")
    )
    tensors = stripped(source, VISION)
    if not any(k.startswith("vision_model.") for k in model.state_dict()):  # newer transformers
        tensors = {k.removeprefix("vision_model."): t for k, t in tensors.items()}
    model = filled(model, tensors)
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        out = model(x)
        return torch.cat([out.last_hidden_state, out.pooler_output[:, None]], dim=1).numpy()


def compressor(source: Source, ids: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    config = transformers.MambaConfig(**source.configs["compressor"].to_hf_config())
    model = filled(transformers.MambaModel(config), stripped(source, MAMBA))
    with torch.no_grad():
        return model(torch.as_tensor(ids)).last_hidden_state.numpy()


def compare_states(part: str, got: np.ndarray, want: np.ndarray) -> Check:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return Check(part, float(np.abs(got - want).max()), float(np.abs(want).max()), [])


def compare_logits(got: np.ndarray, want: np.ndarray) -> Check:
    if got.shape != want.shape:
        raise WeightsError(f"weights: logits: expected shape {want.shape}, got {got.shape}")
    states = compare_states("language_model", got, want)

    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(want), log_softmax(got)
    kl = (np.exp(p) * (p - q)).sum(axis=-1).max(axis=0)
    error = np.abs(got.astype(np.float64) - want).max(axis=(0, 2))
    return dataclasses.replace(
        states, positions=list(zip(error.tolist(), kl.tolist(), strict=True))
    )


def report(checks: Iterator[Check]) -> None:
    """Prints every check as it is made. Raises WeightsError at the end where one failed."""
    failed = []
    for check in checks:
        print(
            f"{check.part}: largest difference {check.error:.2e}, of values up to {check.scale:.3g}"
        )
        if check.positions:
            print("  position  max error        KL (nats)")
            for i, (error, kl) in enumerate(check.positions):
                print(f"  {i:>8}  {error:9.2e}  {kl:15.2e}")
        if not check.passed:
            failed.append(check.part)
    if failed:
        raise WeightsError(
            f"weights: {failed} differ by more than {ERROR:g} of the largest value, or a KL above "
            f"{DIVERGENCE:g}"
        )
