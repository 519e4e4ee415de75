"""Checks the encoders and the connector against golden values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

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
from mm_jax.models.siglip import Siglip, SiglipConfig, normalise_pixels
from mm_jax.models.stc import PADDING, StcConfig, StcConnector
from mm_jax.weights import keymap
from mm_jax.weights.save import to_checkpoint
from tools.parity.compare import (
    EXACT,
    GRADIENT,
    MODULE,
    Bound,
    Component,
    Result,
    compare,
    gradient_results,
    gradients,
    run,
)


def fbank_result(name: str, got: np.ndarray, want: np.ndarray) -> Result:
    """Compares by the golden README's rule for fbanks: energies, and logs of the loudest bins."""
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
        samples = np.array(fbank_lib.clip_ranges(len(wave)))
        yield compare(f"{case}_clip_sample_ranges", samples, c[f"{case}_clip_sample_ranges"], EXACT)
        got = fbank_lib.fbank(fbank_lib.released_waveform(wave, of_video=True, seconds=seconds))
        yield compare(f"{case}_num_frames", len(got), c[f"{case}_num_frames"], EXACT)
        rows = c[f"{case}_fbank_rows"]
        yield fbank_result(f"{case}_fbank", got[rows], c[f"{case}_fbank"])
    for match in c.cases(r"clips_seconds_(.+)_f64"):
        got = np.array(fbank_lib.spread_clips(float(match[1])), np.float64)
        yield compare(match[0], got, c[match[0]], Bound(1e-9))


def mask_lengths(mask: np.ndarray) -> np.ndarray:
    """Counts the real frames int32[B] of a mask bool[B, A] or [B, A, 128], True at padding."""
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
    """Moves channels last: [..., 3, S, S] to [..., S, S, 3]."""
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
