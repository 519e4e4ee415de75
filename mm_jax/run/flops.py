"""Counts the FLOPs of a training step analytically, and computes MFU from them.

XLA's own cost analysis counts the body of a scan once, whatever its length, so it is never used.
Counted are the multiply-adds (2 FLOPs each) of matrix products, convolutions, attention and the
selective scan at padded lengths, without what rematerialisation computes again:

* forward: every part the batch uses; causal attention counts half of its square;
* backward: gradients of the weights (as much as the forward pass) in trained parts, and gradients
  of the inputs (as much again) in every part between the loss and a trained part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection

import numpy as np

from mm_jax.data.batch import Batch, Responses, Shape
from mm_jax.models.beats import BeatsConfig
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.mamba import MambaConfig
from mm_jax.models.multimood import MultiMoodConfig
from mm_jax.models.siglip import SiglipConfig
from mm_jax.models.stc import StcConfig

# Dense bfloat16 FLOP/s of a device by the start of its jax `device_kind` (vendor data sheets).
PEAK_BF16 = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX A6000": 155e12,
    # With sums in float32, which training needs, not the doubled figure of games' data sheets.
    "NVIDIA GeForce RTX 5090": 210e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns a device's peak bfloat16 FLOP/s; None where it is unknown (and there is no MFU)."""
    for prefix, peak in PEAK_BF16.items():
        if device_kind.startswith(prefix):
            return peak
    return None


def decoder_flops(c: DecoderConfig, batch: int, tokens: int) -> dict[str, float]:
    """Counts the forward FLOPs of the layers' matrices, of attention, and of the head."""
    d, queries = c.hidden_size, c.num_attention_heads * c.head_dim
    keys = c.num_key_value_heads * c.head_dim
    matrices = 2 * d * queries + 2 * d * keys + 3 * d * c.intermediate_size
    layers, positions = c.num_hidden_layers, batch * tokens
    return {
        "matrices": 2.0 * layers * positions * matrices,
        "attention": 2.0 * layers * positions * tokens * queries,  # two products, half the square
        "head": 2.0 * positions * d * c.vocab_size,
    }


def shared_prefix_flops(
    c: DecoderConfig, batch: int, tokens: int, group: int, responses: int
) -> float:
    """Counts the forward FLOPs of prompts with G responses each (`Decoder.shared_prefix`): a
    response's token sees the prompt and on average half of its response; the head reads responses
    alone."""
    tails = batch * group * responses
    prompt = decoder_flops(c, batch, tokens)
    own = decoder_flops(c, batch * group, responses)
    across = 4.0 * c.num_hidden_layers * tails * tokens * c.num_attention_heads * c.head_dim
    return prompt["matrices"] + prompt["attention"] + sum(own.values()) + across


def siglip_flops(c: SiglipConfig, images: int, layers: int) -> float:
    """Counts the forward FLOPs of the first `layers` layers over whole images."""
    patches, d = c.patches_per_side**2, c.hidden_size
    per_layer = 2 * patches * (4 * d * d + 2 * d * c.intermediate_size) + 4 * patches**2 * d
    return float(images) * (2 * patches * 3 * c.patch_size**2 * d + layers * per_layer)


def beats_flops(c: BeatsConfig, batch: int, fbank_frames: int, mel_bins: int = 128) -> float:
    size, d = c.input_patch_size, c.encoder_embed_dim
    n = fbank_frames // size * (mel_bins // size)
    per_layer = 2 * n * (4 * d * d + 2 * d * c.encoder_ffn_embed_dim) + 4 * n * n * d
    front = 2 * n * (size * size * c.embed_dim + c.embed_dim * d)
    position = 2 * n * c.conv_pos * (d // c.conv_pos_groups) * d
    return float(batch) * (front + position + c.encoder_layers * per_layer)


def stc_flops(c: StcConfig, batch: int, frames: int, side: int) -> float:
    d = c.hidden_size

    def stage(width: int, images: int, side: int) -> float:
        total = 0.0
        for i in range(c.depth):
            inputs = width if i == 0 else d
            shortcut = inputs * d if inputs != d else 0
            total += 2 * side**2 * (inputs * d + 9 * d + d * d + shortcut)
            total += 2 * 2 * d * round(inputs * 0.25)  # squeeze and excite
        return images * total

    halve = lambda n: (n + 2 * c.padding - 2) // 2 + 1  # noqa: E731
    out_side, out_frames = halve(side), halve(frames)
    positions = batch * out_frames * out_side**2
    return (
        stage(c.mm_hidden_size, batch * frames, side)
        + 2.0 * positions * 8 * d * d
        + stage(d, batch * out_frames, out_side)
        + 2.0 * positions * 2 * d * d
    )


def mamba_flops(c: MambaConfig, batch: int, tokens: int) -> float:
    d, e, n, r = c.hidden_size, c.inner_size, c.state_size, c.time_step_rank
    matrices = 2 * d * e + e * (r + 2 * n) + r * e + e * d + c.conv_kernel * e
    scan = 3 * e * n  # decay, input and output of every state
    return 2.0 * batch * tokens * c.num_hidden_layers * (matrices + scan)


def forward_flops(
    c: MultiMoodConfig, shapes: dict[str, tuple[int, ...]], head: bool = True
) -> dict[str, float]:
    """Counts every part's forward FLOPs for a batch of these shapes (field name -> shape);
    "responses" (B, G, R), if given, are G responses to every prompt. Without `head` the language
    model's is left out: supervised training computes it where answers are, which shapes do not
    tell."""
    batch, tokens = shapes["tokens"]
    if "responses" in shapes:
        _, group, length = shapes["responses"]
        llm = shared_prefix_flops(c.llm, batch, tokens, group, length)
    else:
        own = decoder_flops(c.llm, batch, tokens)
        llm = sum(flops for name, flops in own.items() if head or name != "head")
    parts = {"language_model": llm}
    frames = shapes["frames"][1]
    if frames:
        parts["vision_tower"] = siglip_flops(c.vision, batch * frames, c.vision_layers)
        parts["mm_projector"] = stc_flops(c.stc, batch, frames, c.vision.patches_per_side)
    fbank = shapes["fbank"][1]
    if fbank:
        parts["audio_tower"] = beats_flops(c.audio, batch, fbank)
        audio_tokens = fbank // c.audio.input_patch_size * (128 // c.audio.input_patch_size)
        width = c.audio.encoder_embed_dim * c.llm.hidden_size
        parts["mm_projector_a"] = 2.0 * batch * audio_tokens * width
    history, memories = shapes["history_tokens"][1], shapes["memory_index"][1]
    if memories:
        project = 2.0 * batch * memories * c.compressor.hidden_size * c.llm.hidden_size
        parts["mamba_compressor"] = mamba_flops(c.compressor, batch, history) + project
    return parts


# Parts that feed a part: its inputs need gradients where one of these is trained.
FED_BY = {
    "language_model": ("mm_projector", "mm_projector_a", "mamba_compressor", "vision_tower",
                       "audio_tower"),
    "mm_projector": ("vision_tower",),
    "mm_projector_a": ("audio_tower",),
    "vision_tower": (),
    "audio_tower": (),
    "mamba_compressor": (),
}  # fmt: skip


def train_flops(
    c: MultiMoodConfig,
    shapes: dict[str, tuple[int, ...]],
    trainable: Collection[str],
    adapters: bool = False,
    head: bool = True,
) -> float:
    """Counts the FLOPs of one forward and backward pass over a batch, all devices together.

    With `adapters` the language model is trained by LoRA: its own kernels get no gradients (those
    of the adapters, a few percent, are not counted).
    """
    total = 0.0
    forward = forward_flops(c, shapes, head)
    for part, flops in forward.items():
        trained = part in trainable
        # Inside a trained part gradients flow through its own layers as well.
        passes_on = trained or any(p in trainable and p in forward for p in FED_BY[part])
        own_gradients = trained and not (adapters and part == "language_model")
        total += flops * (1 + own_gradients + passes_on)
    return total


def policy_flops(
    c: MultiMoodConfig,
    shapes: dict[str, tuple[int, ...]],
    trainable: Collection[str],
    adapters: bool,
    scorings: int,
    updates: int,
) -> float:
    """Counts the FLOPs of a reinforcement step: a rollout, `scorings` forward passes (reference,
    and the policy where an update is off policy) and `updates` passes over the responses. Frozen
    towers run once, in the rollout."""
    forward = forward_flops(c, shapes)
    frozen = {"vision_tower", "audio_tower"} - set(trainable)
    towers = 0.0
    if len(frozen) == 2:
        towers = sum(flops for part, flops in forward.items() if part in frozen)
    update = train_flops(c, shapes, trainable, adapters)
    return sum(forward.values()) * (1 + scorings) + update * updates - towers * (scorings + updates)


def row_cost(c: MultiMoodConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what a forward pass over rows of shapes int[N, 5] (`data.batch.Shape`) costs, [N]."""

    def flops(tokens=0, frames=0, fbank=0, history=0, memory=0) -> float:
        lengths = dict(tokens=tokens, frames=frames, fbank=fbank)
        lengths |= dict(history_tokens=history, memory_index=memory)
        return sum(forward_flops(c, {k: (1, int(n)) for k, n in lengths.items()}, False).values())

    # Each part depends on one length alone, but for the compressor, which is linear in both.
    alone = [functools.cache(lambda n, name=name: flops(**{name: n})) for name in Shape._fields[:3]]
    by_memory = flops(memory=1) if c.compressor else 0.0
    by_history = flops(history=1, memory=1) - by_memory if c.compressor else 0.0

    def cost(shapes: np.ndarray) -> np.ndarray:
        out = shapes[:, 3] * by_history + shapes[:, 4] * by_memory
        for column, part in zip(shapes.T, alone, strict=False):
            values, where = np.unique(column, return_inverse=True)
            out = out + np.array([part(int(n)) for n in values])[where]
        return out

    return cost


def batch_shapes(batch: Batch | Responses) -> dict[str, tuple[int, ...]]:
    if isinstance(batch, Responses):
        return {**batch_shapes(batch.batch), "responses": tuple(batch.tokens.shape)}
    return {name: tuple(getattr(batch, name).shape) for name in batch._fields}


def mfu(flops: float, seconds: float, devices: int, device_kind: str) -> float | None:
    """Computes model FLOPs utilisation in [0, 1]; None on a device whose peak is unknown."""
    peak = peak_flops(device_kind)
    if peak is None or not math.isfinite(seconds) or seconds <= 0:
        return None
    return flops / (seconds * devices * peak)
