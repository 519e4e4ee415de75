"""Checks the whole network against golden values, with the reference's inputs as our batches."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from mm_jax.models.beats import BeatsConfig
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.mamba import MambaConfig
from mm_jax.models.multimood import MultiMood, MultiMoodConfig
from mm_jax.models.siglip import SiglipConfig
from mm_jax.weights import keymap
from tools.parity.compare import (
    EXACT,
    LOGITS,
    LOSS,
    MODULE,
    Component,
    Result,
    compare,
    gradient_results,
    gradients,
    run,
)
from tools.parity.language import greedy, memory_positions, next_token_loss
from tools.parity.towers import channels_last

FakeBatch = collections.namedtuple(
    "FakeBatch",
    "tokens mask labels frames fbank fbank_frames history_tokens memory_index",
)


def check_multimood_full(c: Component) -> Iterator[Result]:
    m = c.config["multimodal"]
    llm = DecoderConfig.from_hf_config(c.config["qwen2"])
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

            def continuation(m, x, steps):
                return greedy(m.language_model, x, jnp.ones(x.shape[:2], bool), steps)[0]

            got = run(model, continuation, embeds[row : row + 1, :length], steps=steps)
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
    """Turns the reference's inputs into our batch: only real tokens, with placeholders repeated.

    Returns the batch (padded on the right) and, per row, (start, length) of its tokens in the
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
    """Puts the real part of each row of `values` at the reference's positions; zeros elsewhere."""
    out = np.zeros(shape, np.float64)
    for b, (start, length) in enumerate(rows):
        out[b, start : start + length] = values[b, :length]
    return out
