"""Compares this library's outputs on released or exported weights with those of transformers.

torch is imported only here and to read torch files; training does not need it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.models.decoder import Decoder
from mm_jax.models.mamba import Mamba, MambaConfig
from mm_jax.models.siglip import Siglip, SiglipConfig
from mm_jax.weights import keymap
from mm_jax.weights.load import load_state
from mm_jax.weights.sources import MAMBA, VISION, Source
from mm_jax.weights.tensors import Tensor, WeightsError

ERROR = 1e-3  # allowed difference, relative to the largest value (float32 at 7B: about 1e-5)
DIVERGENCE = 1e-4  # allowed KL of the next token, nats
TABLES = {Decoder: keymap.DECODER, Siglip: keymap.SIGLIP, Mamba: keymap.MAMBA}


@dataclasses.dataclass(frozen=True)
class Check:
    """Holds a part's largest difference and largest value; for logits also the largest difference
    and KL at every position."""

    part: str
    error: float
    scale: float
    positions: list[tuple[float, float]]

    @property
    def passed(self) -> bool:
        close = self.error <= ERROR * max(1.0, self.scale)
        return close and all(kl <= DIVERGENCE for _, kl in self.positions)


def read_vectors(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads (input_ids int[B, T], logits [B, T, V]) from an npz file. Raises WeightsError."""
    try:
        with np.load(path) as stored:
            ids, logits = stored["input_ids"], stored["logits"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(
            f"weights: {path}: expected an npz file with input_ids and logits ({error})"
        ) from error
    fits = ids.ndim == 2 and logits.shape[:2] == ids.shape and ids.size and ids.min() >= 0
    if not fits or ids.max() >= logits.shape[-1]:
        raise WeightsError(
            f"weights: {path}: expected input_ids [B, T] below V and logits [B, T, V], got shapes "
            f"{ids.shape} and {logits.shape}"
        )
    return ids, logits


def check_source(
    source: Source, vectors: tuple[np.ndarray, np.ndarray] | None = None
) -> Iterator[Check]:
    """Checks every part that transformers has a model for (language model, SigLIP, Mamba), in
    float32 on random input.

    With `vectors` (see `read_vectors`) it checks only the language model, against stored logits.
    One model is in memory at a time. Raises WeightsError if there is nothing to compare.
    """
    if vectors is not None:
        ids, want = vectors
        yield compare_logits(run_language_model(source, ids), want)
        return
    configs = source.configs
    if not {"llm", "vision", "compressor"} & set(configs):
        raise WeightsError(
            f"weights: {source.name}: transformers has no model of {sorted(configs)} to "
            "compare with; tools/check_parity.py has golden values"
        )
    rng = np.random.default_rng(0)
    if "llm" in configs:
        ids = rng.integers(0, configs["llm"].vocab_size, (2, 16))
        yield compare_logits(run_language_model(source, ids), torch_language_model(source, ids))
    if "vision" in configs:
        c = configs["vision"]
        x = rng.uniform(-1, 1, (1, c.image_size, c.image_size, c.num_channels)).astype(np.float32)
        tensors = stripped(source, VISION)
        ours = run(source.name, Siglip, c, tensors, normed_and_pooled, x)
        yield compare("vision_tower", ours, torch_vision_tower(c, tensors, x))
    if "compressor" in configs:
        c = configs["compressor"]
        ids = rng.integers(0, c.vocab_size, (2, 16))
        tensors = stripped(source, MAMBA)
        ours = run(source.name, Mamba, c, tensors, lambda m, x: m(x), ids)
        yield compare("mamba_compressor", ours, torch_compressor(c, tensors, ids))


def run(name: str, cls, config, tensors: dict, call: Callable, x: np.ndarray) -> np.ndarray:
    """Computes `call(our module with these weights, x)`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    state = load_state(state, TABLES[cls], tensors, name=name)
    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda s, x: call(nnx.merge(graph, s), x))(state, jnp.asarray(x))
    return np.asarray(out)


def run_language_model(source: Source, ids: np.ndarray) -> np.ndarray:
    """Computes our logits. Raises WeightsError if the vocabulary lacks an id."""
    tensors = source.only("language_model").tensors
    config = source.configs["llm"]
    if ids.max() >= config.vocab_size:
        raise WeightsError(
            f"weights: {source.name}: input_ids go up to {ids.max()}, the vocabulary has "
            f"{config.vocab_size} rows"
        )

    def call(m: Decoder, ids: jax.Array) -> jax.Array:
        return m.logits(m(m.embed(ids), jnp.ones(ids.shape, bool)))

    return run(source.name, Decoder, config, tensors, call, ids)


def normed_and_pooled(tower: Siglip, pixels: jax.Array) -> jax.Array:
    """Returns [B, P + 1, D]: the tower's normed states and its pooler's output."""
    hidden = tower(pixels)
    return jnp.concatenate([tower.post_layernorm(hidden), tower.pooled(hidden)[:, None]], axis=1)


def stripped(source: Source, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in source.tensors.items() if k.startswith(prefix)}


def filled(model, tensors: dict[str, Tensor], tied: bool = False):
    """Copies the weights into a transformers model, which must need all of them and no others."""
    import torch

    state = model.state_dict()
    if set(state) - ({"lm_head.weight"} if tied else set()) != set(tensors):
        differing = sorted(set(state) ^ set(tensors))[:5]
        raise WeightsError(f"weights: transformers' model has other tensors, such as {differing}")
    with torch.no_grad():
        for key, tensor in tensors.items():
            for start, stop in tensor.blocks():
                rows = np.ascontiguousarray(tensor.rows(start, stop).astype(np.float32))
                state[key][start:stop] = torch.from_numpy(rows)
    return model.eval()


def torch_language_model(source: Source, ids: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    file = source.folder
    if file.suffix == ".gguf" and not source.merged:  # with their own reader of it
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    else:
        c = source.configs["llm"].to_hf_config()
        config = transformers.AutoConfig.for_model(**c, attn_implementation="eager")
        tensors = source.only("language_model").tensors
        model = transformers.AutoModelForCausalLM.from_config(config)
        model = filled(model, tensors, config.tie_word_embeddings)
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)).logits.numpy()


def torch_vision_tower(config: SiglipConfig, tensors: dict, pixels: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    c = transformers.SiglipVisionConfig(**config.to_hf_config(), attn_implementation="eager")
    model = transformers.SiglipVisionModel(c)
    if not any(k.startswith("vision_model.") for k in model.state_dict()):  # newer transformers
        tensors = {k.removeprefix("vision_model."): t for k, t in tensors.items()}
    model = filled(model, tensors)
    with torch.no_grad():
        out = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        return torch.cat([out.last_hidden_state, out.pooler_output[:, None]], dim=1).numpy()


def torch_compressor(config: MambaConfig, tensors: dict, ids: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    model = transformers.MambaModel(transformers.MambaConfig(**config.to_hf_config()))
    with torch.no_grad():
        return filled(model, tensors)(torch.as_tensor(ids)).last_hidden_state.numpy()


def compare(part: str, got: np.ndarray, want: np.ndarray) -> Check:
    error = np.abs(got.astype(np.float64) - want).max()
    return Check(part, float(error), float(np.abs(want).max()), [])


def compare_logits(got: np.ndarray, want: np.ndarray) -> Check:
    if got.shape != want.shape:
        raise WeightsError(f"weights: logits: expected shape {want.shape}, got {got.shape}")
    got, want = got.astype(np.float64), want.astype(np.float64)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(want), log_softmax(got)
    kl = (np.exp(p) * (p - q)).sum(axis=-1).max(axis=0)
    error = np.abs(got - want).max(axis=(0, 2))
    positions = list(zip(error.tolist(), kl.tolist(), strict=True))
    return dataclasses.replace(compare("language_model", got, want), positions=positions)


def report(checks: Iterator[Check]) -> None:
    """Prints every check as it is made. Raises WeightsError at the end if one failed."""
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
