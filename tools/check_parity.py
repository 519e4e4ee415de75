"""Compares every network component with golden values of the reference implementation.

    python tools/check_parity.py --golden DIR [--json OUT]

DIR holds one folder a component (config.json, weights*.safetensors, io.npz); sizes, shapes and
cases are read from them. Prints name, largest error, tolerance and result of every comparison;
exits with 1 where one fails or a component is missing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.data import fbank as fbank_lib
from mm_jax.data import media
from mm_jax.models.beats import (
    FBANK_MEAN,
    FBANK_STD,
    Beats,
    BeatsConfig,
    relative_buckets,
)
from mm_jax.models.compressor import Compressor
from mm_jax.models.mamba import Mamba, MambaConfig, MambaState
from mm_jax.models.multimood import MultiMood, MultiMoodConfig
from mm_jax.models.qwen2 import Qwen2, Qwen2Config, token_log_probs
from mm_jax.models.siglip import Siglip, SiglipConfig, normalise_pixels
from mm_jax.models.stc import PADDING, StcConfig, StcConnector
from mm_jax.weights import keymap
from mm_jax.weights.load import SafetensorsFolder, load_state, to_checkpoint

jax.config.update("jax_default_matmul_precision", "highest")


@dataclasses.dataclass(frozen=True)
class Bound:
    """|got - want| <= atol + rtol * |want|; `relative` scales atol by the largest |want|."""

    atol: float
    rtol: float = 0.0
    relative: bool = False

    def describe(self) -> str:
        scale = " * max" if self.relative else ""
        return f"atol {self.atol:g}{scale}, rtol {self.rtol:g}"


MODULE = Bound(5e-5, 1e-4)
LOGITS = Bound(3e-4, 1e-4)
LOSS = Bound(0.0, 2e-5)
GRADIENT = Bound(1e-4, 1e-3, relative=True)
EXACT = Bound(0.0)


@dataclasses.dataclass(frozen=True)
class Result:
    name: str
    error: float
    tolerance: str
    passed: bool


def compare(name: str, got, want, bound: Bound, where=None) -> Result:
    """One comparison; `where` is a boolean mask of the positions that count."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return Result(name, float("inf"), f"shape {want.shape}, got {got.shape}", False)
    got, want = got.astype(np.float64), want.astype(np.float64)
    if where is not None:
        got, want = got[where], want[where]
    if want.size == 0:
        return Result(name, 0.0, "empty", True)
    error = np.abs(got - want)
    atol = bound.atol * np.abs(want).max() if bound.relative else bound.atol
    passed = bool(np.all(error <= atol + bound.rtol * np.abs(want)))  # False for NaN
    return Result(name, float(error.max()), bound.describe(), passed)


class Component:
    """A golden folder: config, tensors, and models with its weights."""

    def __init__(self, folder: pathlib.Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.folder = folder
        with np.load(folder / "io.npz") as io:
            self.io = {name: io[name] for name in io.files}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.io[name]

    def cases(self, pattern: str) -> Iterator[re.Match]:
        for name in self.io:
            if match := re.fullmatch(pattern, name):
                yield match

    def model(self, create: Callable, table: dict, weights: str = "weights", ignore=()):
        """(graph, state) of the module `create(rngs)` with the folder's weights."""
        graph, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
        source = SafetensorsFolder(self.folder / f"{weights}.safetensors")
        return graph, load_state(state, table, source, source.keys(), ignore)


def run(model, fn, *args, **static):
    """`fn(module, *args, **static)` jitted."""
    graph, state = model
    return jax.jit(lambda s, *a: fn(nnx.merge(graph, s), *a, **static))(state, *args)


def gradients(model, table, loss: Callable, *args) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Loss and its gradients by checkpoint key.

    A parameter that the checkpoint stores once per layer gets the gradient of the sum.
    """
    graph, state = model
    value, grads = jax.jit(jax.value_and_grad(lambda s, *a: loss(nnx.merge(graph, s), *a)))(
        state, *args
    )
    return value, to_checkpoint(grads, table)


def gradient_results(prefix: str, c: Component, grads: dict) -> Iterator[Result]:
    for match in c.cases(re.escape(prefix) + r"grad/(.+)"):
        if match[1] in grads:
            yield compare(match[0], grads[match[1]], c[match[0]], GRADIENT)


# --- components ---------------------------------------------------------------------------------


def fbank_result(name: str, got: np.ndarray, want: np.ndarray) -> Result:
    """The fbank rule of the golden README: energies, and logs of bins near the loudest."""
    got, want = np.float64(got), np.float64(want)
    if got.shape != want.shape:
        return Result(name, float("inf"), f"shape {want.shape}, got {got.shape}", False)
    loudest = want.max(axis=1, keepdims=True)
    energy = np.abs(np.exp(got) - np.exp(want)) / np.exp(loudest)
    near = want >= loudest - 12
    logs = np.abs(got - want)[near]
    passed = bool((energy <= 1e-5).all() and (logs <= 5e-4).all())
    return Result(name, float(logs.max()), "energy 1e-5 of frame maximum, log 5e-4", passed)


def check_audio_frontend(c: Component) -> Iterator[Result]:
    scale = c.config.get("scale", 32768)
    yield compare("window_povey", fbank_lib.povey_window(), c["window_povey"], Bound(1e-6))
    yield compare("mel_banks", fbank_lib.mel_banks(), c["mel_banks"], Bound(5e-5))
    for match in c.cases(r"(short\d+)_pcm"):
        case = match[1]
        got = fbank_lib.fbank(c[match[0]] / scale)
        yield fbank_result(f"{case}_fbank", got, c[f"{case}_fbank"])
        double = c[f"{case}_fbank_double"]
        yield fbank_result(f"{case}_fbank_double", got, double)
        normal = (double - FBANK_MEAN) / (2 * FBANK_STD)
        want = c[f"{case}_normalised"]
        got = (got.astype(np.float64) - FBANK_MEAN) / (2 * FBANK_STD)
        near = normal >= normal.max(axis=1, keepdims=True) - 12 / (2 * FBANK_STD)
        yield compare(f"{case}_normalised", got, want, Bound(5e-5), near)
    seconds = c.config.get("seconds", 30)
    if "file_pcm" in c.io:
        wave = c["file_pcm"].astype(np.float64) / scale
        got = fbank_lib.fbank(fbank_lib.released_waveform(wave, of_video=False, seconds=seconds))
        yield compare("file_num_frames", len(got), c["file_num_frames"], EXACT)
        head = c["file_fbank_head"]
        yield fbank_result("file_fbank_head", got[: len(head)], head)
        silence = np.full_like(got[len(head) :], c["file_padding_value"])
        yield compare("file_padding", got[len(head) :], silence, Bound(1e-5))
    for match in c.cases(r"(video\d+)_pcm"):
        case = match[1]
        wave = c[match[0]].astype(np.float32) / scale
        ranges = fbank_lib.spread_clips(len(wave) / fbank_lib.SAMPLE_RATE)
        samples = np.round(ranges * fbank_lib.SAMPLE_RATE).astype(np.int64)
        yield compare(f"{case}_clip_sample_ranges", samples, c[f"{case}_clip_sample_ranges"], EXACT)
        got = fbank_lib.fbank(fbank_lib.released_waveform(wave, of_video=True, seconds=seconds))
        yield compare(f"{case}_num_frames", len(got), c[f"{case}_num_frames"], EXACT)
        rows = c[f"{case}_fbank_rows"]
        yield fbank_result(f"{case}_fbank", got[rows], c[f"{case}_fbank"])
    for match in c.cases(r"clips_seconds_(.+)_f64"):
        got = fbank_lib.spread_clips(float(match[1]))
        yield compare(match[0], got, c[match[0]], Bound(1e-9))


def mask_lengths(mask: np.ndarray) -> np.ndarray:
    """bool[B, A] or [B, A, 128], True = padding -> int32[B] real frames."""
    if mask.ndim == 3:
        mask = mask.all(axis=-1)
    return (~mask).sum(axis=1).astype(np.int32)


def check_beats(c: Component) -> Iterator[Result]:
    config = BeatsConfig.from_hf_config(
        {**c.config["model"], "layer_wise_gradient_decay_ratio": 1.0}
    )

    def create(config):
        return c.model(lambda r: Beats(config, rngs=r), keymap.BEATS)

    model = create(config)
    mels = 128 // config.input_patch_size
    for match in c.cases(r"(.+)_features"):
        case = match[1]
        bank = c[f"{case}_fbank"]
        mask = c.io.get(f"{case}_padding_mask")
        frames = None if mask is None else mask_lengths(mask)
        got, taps = run(model, lambda m, x, n: m.encode(x, n), bank, frames)
        real = np.asarray(taps["allowed"])
        yield compare(match[0], got, c[match[0]], MODULE, real)
        grid = (bank.shape[1] // config.input_patch_size, mels)
        yield compare(f"{case}_grid", np.array(grid), c[f"{case}_grid"], EXACT)
        for tap in c.cases(re.escape(case) + r"_tap_(.+)"):
            layer = re.fullmatch(r"layer_(\d+)", tap[1])
            value = taps["layers"][int(layer[1])] if layer else taps[tap[1]]
            yield compare(tap[0], value, c[tap[0]], MODULE, real)
    for match in c.cases(r"(.+)_predictor_probs"):
        frames = mask_lengths(c[f"{match[1]}_padding_mask"])
        got = run(model, lambda m, x, n: m.predict(x, n), c[f"{match[1]}_fbank"], frames)
        yield compare(match[0], got, c[match[0]], MODULE)
    if "preprocess_in" in c.io:
        got = (c["preprocess_in"] - FBANK_MEAN) / (2 * FBANK_STD)
        yield compare("preprocess_out", got, c["preprocess_out"], MODULE)
    for match in c.cases(r"bucket_(tiny|(\d+)_(\d+))"):
        want = c[match[0]]
        reach = len(want) // 2
        sizes = (config.num_buckets, config.max_distance)
        if match[2]:
            sizes = (int(match[2]), int(match[3]))
        got = relative_buckets(np.arange(-reach, reach + 1), *sizes)
        yield compare(match[0], got, want, EXACT)
    if "plain_grad_fbank" in c.io:
        for prefix, ratio in (
            ("grad_plain", 1.0),
            (
                "grad_with_layer_decay",
                c.config["model"]["layer_wise_gradient_decay_ratio"],
            ),
        ):
            decayed = dataclasses.replace(config, layer_wise_gradient_decay_ratio=ratio)
            loss, grads = gradients(
                create(decayed),
                keymap.BEATS,
                lambda m, x, g: jnp.sum(m(x) * g),
                c["plain_grad_fbank"],
                c["plain_grad_cotangent"],
            )
            if ratio == 1.0:
                yield compare("plain_grad_loss", loss, c["plain_grad_loss"], Bound(1e-4, 2e-5))
            for match in c.cases(re.escape(prefix) + r"/(.+)"):
                yield compare(match[0], grads[match[1]], c[match[0]], GRADIENT)


def check_siglip(c: Component) -> Iterator[Result]:
    config = SiglipConfig.from_hf_config(c.config["model"])
    model = c.model(lambda r: Siglip(config, rngs=r), keymap.SIGLIP)
    select = config.num_hidden_layers + 1 + c.config.get("select_layer", -2)

    def hidden(pixels, layers):
        return run(model, lambda m, x: m(x, layers=layers), channels_last(pixels))

    pixels = c["pixel_values"]
    yield compare("features", hidden(pixels, select), c["features"], MODULE)
    for match in c.cases(r"hidden_states_(\d+)"):
        yield compare(match[0], hidden(pixels, int(match[1])), c[match[0]], MODULE)
    last = hidden(pixels, None)
    if "last_hidden_state_post_layernorm" in c.io:
        got = run(model, lambda m, x: m.post_layernorm(x), last)
        yield compare(
            "last_hidden_state_post_layernorm", got, c["last_hidden_state_post_layernorm"], MODULE
        )
    if "pooler_output" in c.io:
        got = run(model, lambda m, x: m.pooled(x), last)
        yield compare("pooler_output", got, c["pooler_output"], MODULE)
    colour = c.config.get("processor", {}).get("pad_colour", media.PAD_COLOUR)
    for match in c.cases(r"(.+)_squared"):
        case, images = match[1], c[f"{match[1]}_image"] if f"{match[1]}_image" in c.io else None
        if images is None:
            continue
        squares = [media.pad_to_square(image, colour) for image in images]
        yield compare(match[0], np.stack(squares), c[match[0]], EXACT)
        resized = c[f"{case}_resized_u8"]
        got = np.stack([media.prepare_frame(image, resized.shape[-1]) for image in images])
        got = got.transpose(0, 3, 1, 2)
        yield compare(f"{case}_resized_u8", got, resized, EXACT)
        if f"{case}_pixel_values" in c.io:
            values = np.asarray(normalise_pixels(jnp.asarray(got)))
            yield compare(f"{case}_pixel_values", values, c[f"{case}_pixel_values"], Bound(1e-6))
    for match in c.cases(r"(.+\d)_features"):
        got = hidden(c[f"{match[1]}_pixel_values"], select)
        yield compare(match[0], got, c[match[0]], MODULE)
    for match in c.cases(r"frames_uniform_n(\d+)_d(\d+)"):
        got = media.uniform_frame_indices(int(match[1]), int(match[2]))
        yield compare(match[0], got, c[match[0]], EXACT)
    for match in c.cases(r"frames_fps(\d+)_d(\d+)"):
        got = media.fps_frame_indices(int(match[1]), int(match[2]))
        yield compare(match[0], got, c[match[0]], EXACT)


def channels_last(images: np.ndarray) -> np.ndarray:
    """[..., 3, S, S] -> [..., S, S, 3]."""
    return np.moveaxis(images, -3, -1)


def check_stc(c: Component) -> Iterator[Result]:
    values = c.config["model"]

    def create(kind):
        config = StcConfig(values["mm_hidden_size"], values["hidden_size"], kind, values["depth"])
        return c.model(lambda r: StcConnector(config, rngs=r), keymap.STC)

    own = values["mm_projector_type"]
    older = next(kind for kind in PADDING if kind != own)
    for match in c.cases(r"(b\d+_t\d+_n\d+)_input"):
        case = match[1]
        got = run(create(own), lambda m, x: m(x), c[match[0]])
        yield compare(f"{case}_output", got, c[f"{case}_output"], MODULE)
        if f"v1_{case}_output" in c.io:
            got = run(create(older), lambda m, x: m(x), c[match[0]])
            yield compare(f"v1_{case}_output", got, c[f"v1_{case}_output"], MODULE)
        if f"{case}_tap_s1" in c.io:
            got = run(create(own), stage_one, c[match[0]])
            yield compare(f"{case}_tap_s1", np.moveaxis(got, -1, 1), c[f"{case}_tap_s1"], MODULE)
    if "grad_input" in c.io:
        graph, state = create(own)
        loss, (grads, grad_input) = jax.jit(
            jax.value_and_grad(lambda s, x, g: jnp.sum(nnx.merge(graph, s)(x) * g), argnums=(0, 1))
        )(state, c["grad_input"], c["grad_cotangent"])
        yield compare("grad_loss", loss, c["grad_loss"], Bound(1e-4, 2e-5))
        yield compare("grad/input", grad_input, c["grad/input"], GRADIENT)
        yield from gradient_results("", c, to_checkpoint(grads, keymap.STC))


def stage_one(m: StcConnector, x: jax.Array) -> jax.Array:
    b, t, n, d = x.shape
    side = round(n**0.5)
    return m.s1(x.reshape(b * t, side, side, d))


def check_mamba(c: Component) -> Iterator[Result]:
    config = MambaConfig.from_hf_config(c.config["model"])
    model = c.model(lambda r: Mamba(config, rngs=r), keymap.MAMBA)
    for match in c.cases(r"(L\d+)_input_ids"):
        ids = c[match[0]]

        def layers(m, ids):
            return m.extend(ids, m.empty_state(ids.shape[0]), with_layers=True)

        hidden, _, outputs = run(model, layers, ids)
        name = f"{match[1]}_last_hidden_state"
        yield compare(name, hidden, c[name], MODULE)
        for tap in c.cases(match[1] + r"_hidden_states_(\d+)"):
            i = int(tap[1])
            got = hidden if i == config.num_hidden_layers else outputs[i]
            yield compare(tap[0], got, c[tap[0]], MODULE)
    if "grad_input_ids" in c.io:
        loss, grads = gradients(
            model,
            keymap.MAMBA,
            lambda m, x, g: jnp.sum(m(x) * g),
            c["grad_input_ids"],
            c["grad_cotangent"],
        )
        yield compare("grad_loss", loss, c["grad_loss"], Bound(1e-4, 2e-5))
        yield from gradient_results("", c, grads)
    if "step_input_ids" in c.io:
        yield from mamba_steps(c, model)


def mamba_steps(c: Component, model) -> Iterator[Result]:
    ids, prefix = c["step_input_ids"], c.config["prefix_length"]
    full = run(model, lambda m, x: m(x), ids)
    yield compare("step_full_last_hidden_state", full, c["step_full_last_hidden_state"], MODULE)

    def start(m, x):
        return m.extend(x, m.empty_state(x.shape[0]))

    def states(name: str, state: MambaState) -> Iterator[Result]:
        got = np.asarray(state.conv).transpose(0, 1, 3, 2)
        yield compare(f"step_{name}_conv_states", got, c[f"step_{name}_conv_states"], MODULE)
        yield compare(f"step_{name}_ssm_states", state.ssm, c[f"step_{name}_ssm_states"], MODULE)

    hidden, state = run(model, start, ids[:, :prefix])
    yield compare(
        "step_prefix_last_hidden_state", hidden, c["step_prefix_last_hidden_state"], MODULE
    )
    yield from states("prefix", state)
    steps = []
    for t in range(prefix, ids.shape[1]):
        hidden, state = run(model, lambda m, x, s: m.extend(x, s), ids[:, t : t + 1], state)
        steps.append(np.asarray(hidden))
    want = c["step_decode_last_hidden_state"]
    yield compare("step_decode_last_hidden_state", np.concatenate(steps, axis=1), want, MODULE)
    yield from states("final", state)


def memory_positions(ids: np.ndarray, memory_id: int) -> np.ndarray:
    """Positions of `<MEM>` in every row, padded with 0 to the largest count: int32[B, U]."""
    rows = [np.flatnonzero(row == memory_id) for row in ids]
    width = max((len(r) for r in rows), default=0)
    return np.stack([np.pad(r, (0, width - len(r))) for r in rows]).astype(np.int32)


def check_compressor(c: Component) -> Iterator[Result]:
    mamba = MambaConfig.from_hf_config(
        {**c.config["mamba"], "vocab_size": c.config["tokenizer_len"]}
    )
    width, memory_id = c.config["llm_input_size"], c.config["mem_token_id"]
    model = c.model(lambda r: Compressor(mamba, width, rngs=r), keymap.COMPRESSOR)
    ragged = []
    for match in c.cases(r"(.+)_memory"):
        if match[1] == "grad":
            continue
        ids = c[f"{match[1]}_input_ids"]
        got = run(model, lambda m, x, p: m(x, p), ids, memory_positions(ids, memory_id))
        yield compare(match[0], got, c[match[0]], MODULE)
        if match[1].startswith("ragged"):
            ragged.append((match[1], ids, c[match[0]]))
    if ragged:  # the same histories in one batch, padded on the right
        longest = max(ids.shape[1] for _, ids, _ in ragged)
        ids = np.concatenate([np.pad(i, ((0, 0), (0, longest - i.shape[1]))) for _, i, _ in ragged])
        got = run(model, lambda m, x, p: m(x, p), ids, memory_positions(ids, memory_id))
        for row, (case, _, want) in zip(np.asarray(got), ragged, strict=True):
            yield compare(f"{case}_batched", row[None, : want.shape[1]], want, MODULE)
    if "grad_input_ids" in c.io:
        ids = c["grad_input_ids"]
        loss, grads = gradients(
            model,
            keymap.COMPRESSOR,
            lambda m, x, p, g: jnp.sum(m(x, p) * g),
            ids,
            memory_positions(ids, memory_id),
            c["grad_cotangent"],
        )
        yield compare("grad_loss", loss, c["grad_loss"], Bound(1e-4, 2e-5))
        yield from gradient_results("", c, grads)


def next_token_loss(hidden, kernel, labels) -> jax.Array:
    """Mean cross-entropy of labels[t + 1] at position t over labels other than -100."""
    targets = labels[:, 1:]
    counted = targets != -100
    logps, _ = token_log_probs(hidden[:, :-1], kernel, jnp.where(counted, targets, 0), chunk=8)
    return -jnp.sum(jnp.where(counted, logps, 0)) / jnp.sum(counted)


def greedy(m: Qwen2, embeds, mask, steps: int):
    """Greedy continuation with the cache: tokens [B, steps] and logits [B, steps, V].

    Left padding: the next token's logits are those of the last position.
    """
    batch, length, _ = embeds.shape
    cache = m.empty_cache(batch, length + steps)
    hidden, cache = m.extend(embeds, mask, cache, 0)
    logits = m.logits(hidden[:, -1])

    def step(carry, t):
        logits, cache = carry
        token = jnp.argmax(logits, axis=-1)
        hidden, cache = m.extend(
            m.embed(token[:, None]), jnp.ones((batch, 1), bool), cache, length + t
        )
        return (m.logits(hidden[:, 0]), cache), (token, logits)

    _, (tokens, all_logits) = jax.lax.scan(step, (logits, cache), jnp.arange(steps))
    return tokens.T, all_logits.swapaxes(0, 1)


def check_qwen2(c: Component) -> Iterator[Result]:
    for tag, tied in (("untied", False), ("tied", True)):
        if f"{tag}_right_logits" not in c.io:
            continue
        config = Qwen2Config.from_hf_config({**c.config["model"], "tie_word_embeddings": tied})
        table = {k: v for k, v in keymap.QWEN2.items() if not (tied and k == "lm_head")}
        model = c.model(lambda r, cfg=config: Qwen2(cfg, rngs=r), table, f"weights_{tag}")

        for side in ("right", "left"):
            ids, mask = c[f"{side}_input_ids"], c[f"{side}_attention_mask"].astype(bool)

            def layers(m, ids, mask, right_padded):
                x = m.embed(ids)
                hidden, outputs = m(x, mask, right_padded=right_padded, with_layers=True)
                return m.logits(hidden), x, outputs, hidden

            logits, x, outputs, hidden = run(model, layers, ids, mask, right_padded=side == "right")
            name = f"{tag}_{side}_logits"
            yield compare(name, logits, c[name], LOGITS, mask)
            for tap in c.cases(f"{tag}_{side}_hidden_states_" + r"(\d+)"):
                i = int(tap[1])
                last = i == config.num_hidden_layers
                got = x if i == 0 else hidden if last else outputs[i - 1]
                yield compare(tap[0], got, c[tap[0]], MODULE, mask)
        if f"{tag}_generated" in c.io:
            steps = c[f"{tag}_generated"].shape[1]

            def generated(m, ids, mask, steps):
                return greedy(m, m.embed(ids), mask, steps)

            mask = c["left_attention_mask"].astype(bool)
            tokens, logits = run(model, generated, c["left_input_ids"], mask, steps=steps)
            yield compare(f"{tag}_generated", tokens, c[f"{tag}_generated"], EXACT)
            name = f"{tag}_generated_logits"
            yield compare(name, logits, c[name], LOGITS)
        if f"{tag}_loss" in c.io:

            def loss(m, ids, mask, labels):
                return next_token_loss(m(m.embed(ids), mask), m.head_kernel(), labels)

            mask = c["right_attention_mask"].astype(bool)
            value, grads = gradients(model, table, loss, c["right_input_ids"], mask, c["labels"])
            yield compare(f"{tag}_loss", value, c[f"{tag}_loss"], LOSS)
            yield from gradient_results(f"{tag}_", c, grads)


FakeBatch = collections.namedtuple(
    "FakeBatch",
    "tokens mask labels frames fbank fbank_frames history_tokens memory_index",
)


def check_multimood_full(c: Component) -> Iterator[Result]:
    m = c.config["multimodal"]
    llm = Qwen2Config.from_hf_config(c.config["qwen2"])
    vocab = llm.vocab_size
    config = MultiMoodConfig(
        llm=llm,
        vision=SiglipConfig.from_hf_config(c.config["siglip"]),
        audio=BeatsConfig.from_hf_config(
            {**c.config["beats"], "layer_wise_gradient_decay_ratio": 1.0}
        ),
        compressor=MambaConfig.from_hf_config(
            {**c.config["mamba"], "vocab_size": c.config["tokenizer_len"]}
        ),
        connector_type=m["mm_projector_type"],
        vision_select_layer=m["mm_vision_select_layer"],
        video_token_id=vocab,
        audio_token_id=vocab + 1,
        history_token_id=vocab + 2,
    )
    model = c.model(lambda r: MultiMood(config, rngs=r), keymap.MULTIMOOD)
    if c.config["beats"]["layer_wise_gradient_decay_ratio"] != 1.0:
        audio = dataclasses.replace(
            config.audio,
            layer_wise_gradient_decay_ratio=c.config["beats"]["layer_wise_gradient_decay_ratio"],
        )
        trained = dataclasses.replace(config, audio=audio)
        grad_model = c.model(lambda r: MultiMood(trained, rngs=r), keymap.MULTIMOOD)
    else:
        grad_model = model
    yield from multimood_parts(c, model)

    def forward(m, batch):
        x = m.embed(batch)
        hidden = m.language_model(x, batch.mask)
        loss = next_token_loss(hidden, m.language_model.head_kernel(), batch.labels)
        return x, m.language_model.logits(hidden), loss

    for case, about in c.config["cases"].items():
        batch, rows = expand(c, case, about, config)
        embeds, logits, loss = run(model, forward, batch)
        embeds, logits = np.asarray(embeds), np.asarray(logits)
        prefix = f"{case}/"
        intended = f"{prefix}intended_logits" in c.io
        name = f"{prefix}intended_logits" if intended else f"{prefix}logits"
        want = c[name]
        mask = scatter(batch.mask[..., None], rows, (*want.shape[:2], 1))[..., 0].astype(bool)
        if f"{prefix}inputs_embeds" in c.io:
            expected = c[f"{prefix}inputs_embeds"]
            got = scatter(embeds, rows, expected.shape)
            yield compare(f"{prefix}inputs_embeds", got, expected, MODULE, mask)
        yield compare(name, scatter(logits, rows, want.shape), want, LOGITS, mask)
        name = f"{prefix}intended_loss" if intended else f"{prefix}loss"
        yield compare(name, loss, c[name], LOSS)
        if any(c.cases(re.escape(prefix) + "grad/.+")):
            _, grads = gradients(grad_model, keymap.MULTIMOOD, lambda m, b: forward(m, b)[2], batch)
            yield from gradient_results(prefix, c, grads)
        for match in c.cases(re.escape(prefix) + r"generated_(\d+)"):
            steps = c[match[0]].shape[1]
            row = int(match[1])
            length = int(batch.mask[row].sum())

            def continuation(m, batch, steps, row, length):
                x = m.embed(batch)[row : row + 1, :length]
                return greedy(m.language_model, x, jnp.ones((1, length), bool), steps)[0]

            got = run(model, continuation, batch, steps=steps, row=row, length=length)
            yield compare(match[0], got, c[match[0]], EXACT)


def multimood_parts(c: Component, model) -> Iterator[Result]:
    video = channels_last(c["parts/video"])[None]
    for name, fn in (("frame_features", "frame_features"), ("video_tokens", "video_tokens")):
        got = run(model, lambda m, x, fn=fn: getattr(m, fn)(x), video)
        want = c[f"parts/{name}"]
        yield compare(f"parts/{name}", np.asarray(got).reshape(want.shape), want, MODULE)
    bank = c["parts/audio"]
    got = run(model, lambda m, x: m.audio_tower(x), bank)
    yield compare("parts/audio_features", got, c["parts/audio_features"], MODULE)
    frames = np.full(len(bank), bank.shape[1], np.int32)
    got = run(model, lambda m, x, n: m.audio_tokens(x, n), bank, frames)
    yield compare("parts/audio_tokens", got, c["parts/audio_tokens"], MODULE)
    ids = c["parts/history_input_ids"]
    memory = memory_positions(ids, c.config["mem_token_id"])
    got = run(model, lambda m, x, p: m.mamba_compressor(x, p), ids, memory)
    yield compare("parts/history_tokens", got, c["parts/history_tokens"], MODULE)


def expand(c: Component, case: str, about: dict, config: MultiMoodConfig):
    """The reference's inputs as a batch of ours: real tokens only, placeholders written out.

    Returns the batch (padded on the right) and, per row, the positions of its tokens in the
    reference's output.
    """
    index = c.config["modal_index"]
    get = c.io.get
    ids = c[f"{case}/input_ids"]
    mask = get(f"{case}/attention_mask", np.ones_like(ids)).astype(bool)
    labels = get(f"{case}/labels", np.full_like(ids, -100))
    history = get(f"{case}/history_input_ids")
    history_rows = None
    if history is not None:
        history_rows = history[None] if history.ndim == 1 else history
    spans = c.config["tokens"]
    images = iter(about["images"])
    number = iter(range(len(about["images"])))
    rows, frames, banks, histories = [], [], [], []
    num_frames = c.config["multimodal"]["num_frames"]
    for b in range(len(ids)):
        tokens, targets, video, bank, own = [], [], None, None, None
        used = False
        for token, label in zip(ids[b][mask[b]], labels[b][mask[b]], strict=True):
            if token in (index["image"], index["video"], index["audio"]):
                image, i = next(images), next(number)
                used = True
                piece = []
                if "image" in image["has"]:
                    video = np.repeat(c[f"{case}/images_{i}_image"], num_frames, axis=0)
                if "video" in image["has"]:
                    video = c[f"{case}/images_{i}_video"]
                if "audio" in image["has"]:
                    bank = c[f"{case}/images_{i}_audio"][0]
                if video is not None:
                    piece += [config.video_token_id] * spans["video"]
                if bank is not None:
                    piece += [config.audio_token_id] * (len(bank) // 16 * 8)
            elif token == index["history"]:
                row = history_rows[min(b, len(history_rows) - 1)]
                own = row[row >= 0]
                piece = [config.history_token_id] * int((own == c.config["mem_token_id"]).sum())
            else:
                tokens.append(int(token))
                targets.append(int(label))
                continue
            tokens += piece
            targets += [-100] * len(piece)
        if not used and about["images"]:
            next(images, None), next(number, None)  # a text-only sample uses up one entry
        rows.append((tokens, targets))
        frames.append(video)
        banks.append(bank)
        histories.append(own)
    length = max(len(t) for t, _ in rows)
    videos = [v for v in frames if v is not None]
    shape = channels_last(videos[0]).shape if videos else (0, 1, 1, 3)
    mel = max((len(b) for b in banks if b is not None), default=0)
    longest = max((len(h) for h in histories if h is not None), default=0)
    history_tokens = np.stack(
        [
            np.pad(h if h is not None else [], (0, longest - (0 if h is None else len(h))))
            for h in histories
        ]
    ).astype(np.int32)
    batch = FakeBatch(
        tokens=np.array([t + [0] * (length - len(t)) for t, _ in rows], np.int32),
        mask=np.array([[True] * len(t) + [False] * (length - len(t)) for t, _ in rows]),
        labels=np.array([g + [-100] * (length - len(g)) for _, g in rows], np.int32),
        frames=np.stack(
            [np.zeros(shape, np.float32) if v is None else channels_last(v) for v in frames]
        ),
        fbank=np.stack(
            [
                np.zeros((mel, 128), np.float32)
                if b is None
                else np.pad(b, ((0, mel - len(b)), (0, 0)))
                for b in banks
            ]
        ),
        fbank_frames=np.array([0 if b is None else len(b) for b in banks], np.int32),
        history_tokens=history_tokens,
        memory_index=memory_positions(history_tokens, c.config["mem_token_id"]),
    )
    left = about["padding_side"] == "left"
    want_length = c[f"{case}/logits"].shape[1]
    offsets = []
    for tokens, _ in rows:
        start = 0
        if left:  # the reference pads ids on the left and features on the right of the batch
            row = len(offsets)
            start = int((~mask[row]).sum())
        offsets.append((start, len(tokens)))
        if start + len(tokens) > want_length:
            raise ValueError(f"{case}: row of {len(tokens)} tokens does not fit {want_length}")
    return batch, offsets


def scatter(values: np.ndarray, rows, shape: tuple[int, ...]) -> np.ndarray:
    """Row b of `values`, its real part, at the reference's positions; zeros elsewhere."""
    out = np.zeros(shape, np.float64)
    for b, (start, length) in enumerate(rows):
        out[b, start : start + length] = values[b, :length]
    return out


def check_losses(c: Component) -> Iterator[Result]:
    """The log-probabilities; the policy losses belong to reinforcement learning."""
    logits = c["logps/logits"] / c.config["logps"]["temperature"]
    logps, _ = token_log_probs(
        jnp.asarray(logits), jnp.eye(logits.shape[-1]), jnp.asarray(c["logps/ids"]), chunk=4
    )
    want = c["logps/selective_log_softmax"]
    yield compare("logps/selective_log_softmax", logps, want, MODULE)


COMPONENTS = {
    "audio_frontend": check_audio_frontend,
    "beats": check_beats,
    "siglip": check_siglip,
    "stc": check_stc,
    "mamba": check_mamba,
    "compressor": check_compressor,
    "qwen2": check_qwen2,
    "multimood_full": check_multimood_full,
}
OPTIONAL = {"losses": check_losses}


def check(golden: pathlib.Path, names: list[str]) -> list[Result]:
    """All comparisons of the named components; a missing folder is a failed result."""
    results = []
    for name in names:
        folder = golden / name
        if not (folder / "io.npz").is_file():
            if name in COMPONENTS:
                results.append(Result(name, float("nan"), "component is missing", False))
            continue
        component_check = {**COMPONENTS, **OPTIONAL}[name]
        try:
            found = list(component_check(Component(folder)))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            message = f"{type(error).__name__}: {error}"
            found = [Result("could not be run", float("nan"), message, False)]
        if not found:
            found = [Result("nothing to compare", float("nan"), "no known case in io.npz", False)]
        results += [dataclasses.replace(r, name=f"{name}/{r.name}") for r in found]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--golden", required=True, type=pathlib.Path, help="folder of components")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here too")
    parser.add_argument(
        "--components",
        nargs="*",
        default=[*COMPONENTS, *OPTIONAL],
        choices=[*COMPONENTS, *OPTIONAL],
        help="only these (default: all)",
    )
    args = parser.parse_args()
    if not args.golden.is_dir():
        parser.error(f"--golden: {args.golden} is not a folder")
    results = check(args.golden, args.components)
    width = max(len(r.name) for r in results)
    for r in results:
        print(f"{r.name:<{width}}  {r.error:9.2e}  {'pass' if r.passed else 'FAIL'}  {r.tolerance}")
    failed = [r.name for r in results if not r.passed]
    print(f"\n{len(results) - len(failed)} of {len(results)} comparisons pass")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
