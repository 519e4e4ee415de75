"""The BEATs audio encoder (microsoft/unilm BEATs, iter3+; spec section 3)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.config.model import AudioTower
from mm_jax.models.layers import (
    Dtypes,
    activation,
    conv,
    from_fields,
    layer_norm,
    linear,
    normal_init,
    scale_gradient,
    scan_layers,
    stack_layers,
)
from mm_jax.ops.attention import attention
from mm_jax.ops.partition import on_own_rows

FBANK_MEAN, FBANK_STD = 15.41663, 6.55582
NORM_EPS = 1e-5
MEL_BINS = 128


SIZES = AudioTower()


@dataclasses.dataclass(frozen=True)
class BeatsConfig:
    """The fields of the released BEATs config.

    `layer_wise_gradient_decay_ratio` multiplies the gradient into each layer's input (0.6 in the
    release, off by default here, see docs/deviations.md); `predictor_class` is the size of the
    unused classifier, 0 for none.
    """

    input_patch_size: int = SIZES.input_patch_size
    embed_dim: int = SIZES.embed_dim
    encoder_layers: int = SIZES.encoder_layers
    encoder_embed_dim: int = SIZES.encoder_embed_dim
    encoder_ffn_embed_dim: int = SIZES.encoder_ffn_embed_dim
    encoder_attention_heads: int = SIZES.encoder_attention_heads
    conv_pos: int = SIZES.conv_pos
    conv_pos_groups: int = SIZES.conv_pos_groups
    num_buckets: int = SIZES.num_buckets
    max_distance: int = SIZES.max_distance
    layer_wise_gradient_decay_ratio: float = SIZES.layer_wise_gradient_decay_ratio
    predictor_class: int = SIZES.predictor_class

    @property
    def residual_scale(self) -> float:
        """Returns DeepNorm's alpha, which keeps deep post-norm layers stable (Wang et al. 2022)."""
        return (2 * self.encoder_layers) ** 0.25

    @classmethod
    def from_hf_config(cls, values: dict) -> BeatsConfig:
        fixed = {
            "layer_norm_first": False,
            "deep_norm": True,
            "gru_rel_pos": True,
            "relative_position_embedding": True,
            "conv_bias": False,
            "activation_fn": "gelu",
        }
        sizes = {f.name for f in dataclasses.fields(cls)}
        sizes -= {"layer_wise_gradient_decay_ratio", "predictor_class"}
        lacking = sorted((sizes | set(fixed)) - set(values))
        if lacking:
            raise ValueError(f"beats: the config lacks {lacking}")
        wrong = {k: values[k] for k, v in fixed.items() if values[k] != v}
        if wrong:
            raise ValueError(f"beats: expected {fixed}, got {wrong}")
        if not values.get("finetuned_model", True):
            values = {**values, "predictor_class": 0}
        return from_fields(cls, values)

    def to_hf_config(self) -> dict:
        return {
            **dataclasses.asdict(self),
            "layer_norm_first": False,
            "deep_norm": True,
            "gru_rel_pos": True,
            "relative_position_embedding": True,
            "conv_bias": False,
            "activation_fn": "gelu",
            "finetuned_model": self.predictor_class > 0,
        }


def relative_buckets(relative: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Maps (key - query) positions to T5's bidirectional buckets, int in [0, num_buckets)."""
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    # float32 as in torch: at a bucket's border the rounding decides.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int64), half - 1)
    return (relative > 0) * half + np.where(distance < exact, distance, far)


class BeatsAttention(nnx.Module):
    """Self-attention with a gated relative position bias (WavLM, Chen et al. 2022)."""

    def __init__(self, config: BeatsConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d, n = config.encoder_embed_dim, config.encoder_attention_heads
        args = dict(bias=True, dtypes=dtypes, rngs=rngs)
        self.heads = n
        self.q_proj = linear(d, d, ("embed", "heads"), **args)
        self.k_proj = linear(d, d, ("embed", "heads"), **args)
        self.v_proj = linear(d, d, ("embed", "heads"), **args)
        self.out_proj = linear(d, d, ("heads", "embed"), **args)
        self.grep_linear = linear(d // n, 8, (None, None), **args)
        self.grep_a = nnx.Param(
            jnp.ones((1, n, 1, 1), dtypes.param), out_sharding=(None, None, None, None)
        )

    def __call__(self, x: jax.Array, bias: jax.Array, allowed: jax.Array) -> jax.Array:
        """Attends over x [B, T, D] with bias [N, T, T] of the shared table and keys `allowed`."""
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (p(x).reshape(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        gates = self.grep_linear(q).reshape(*q.shape[:3], 2, 4).sum(-1)
        # In float32, so that only the gated bias is rounded, once.
        gates = jax.nn.sigmoid(gates.astype(jnp.float32)).transpose(0, 2, 1, 3)  # [B, N, T, 2]
        scale = self.grep_a[...].astype(jnp.float32)
        gate = gates[..., :1] * (gates[..., 1:] * scale - 1.0) + 2.0
        gated = (gate * bias).astype(q.dtype)
        out = attention(q, k, v, bias=gated, mask=allowed[:, None, None, :])
        return self.out_proj(out.reshape(x.shape))


class BeatsLayer(nnx.Module):
    def __init__(self, config: BeatsConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d, f = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        args = dict(dtypes=dtypes, rngs=rngs)
        self.alpha = config.residual_scale
        self.self_attn = BeatsAttention(config, **args)
        self.self_attn_layer_norm = layer_norm(d, NORM_EPS, **args)
        self.fc1 = linear(d, f, ("embed", "mlp"), bias=True, **args)
        self.fc2 = linear(f, d, ("mlp", "embed"), bias=True, **args)
        self.final_layer_norm = layer_norm(d, NORM_EPS, **args)

    def __call__(self, x: jax.Array, bias: jax.Array, allowed: jax.Array) -> jax.Array:
        x = self.self_attn_layer_norm(x * self.alpha + self.self_attn(x, bias, allowed))
        y = self.fc2(activation("gelu")(self.fc1(x)))
        return self.final_layer_norm(x * self.alpha + y)


class PositionalConv(nnx.Module):
    """A grouped convolution with weight normalisation over the kernel axis, then GELU."""

    def __init__(self, config: BeatsConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d, k, g = config.encoder_embed_dim, config.conv_pos, config.conv_pos_groups
        self.groups, self.kernel, self.dtype = g, k, dtypes.compute
        std = math.sqrt(4.0 / (k * d))
        v = nnx.initializers.normal(std)(rngs.params(), (d, d // g, k), dtypes.param)
        self.weight_v = nnx.Param(v, out_sharding=("mlp", None, None))
        norms = jnp.sqrt(jnp.sum(v.astype(jnp.float32) ** 2, axis=(0, 1), keepdims=True))
        self.weight_g = nnx.Param(norms.astype(dtypes.param), out_sharding=(None, None, None))
        self.bias = nnx.Param(jnp.zeros((d,), dtypes.param), out_sharding=("mlp",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        # The norm sums tens of thousands of squares, too many for bfloat16.
        v = self.weight_v[...].astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(v * v, axis=(0, 1), keepdims=True) + 1e-6)
        kernel = (self.weight_g[...].astype(jnp.float32) * v / norm).transpose(2, 1, 0)
        half = self.kernel // 2
        convolve = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1,),
            padding=[(half, half)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        y = on_own_rows(convolve, x.astype(self.dtype), kernel.astype(self.dtype))
        y = y + self.bias[...].astype(y.dtype)
        if self.kernel % 2 == 0:  # an even kernel gives one output too many (fairseq's SamePad)
            y = y[:, :-1]
        return activation("gelu")(y)


class Beats(nnx.Module):
    """The encoder: 16 x 16 patches, positional convolution, post-norm layers."""

    def __init__(
        self,
        config: BeatsConfig,
        *,
        dtypes: Dtypes = Dtypes(),
        rngs: nnx.Rngs,
        remat: str = "none",
    ):
        p, d = config.input_patch_size, config.encoder_embed_dim
        args = dict(dtypes=dtypes, rngs=rngs)
        self.config = config
        self.remat = remat
        self.patch_embedding = conv(1, config.embed_dim, (p, p), **args)
        self.layer_norm = layer_norm(config.embed_dim, NORM_EPS, **args)
        self.post_extract_proj = linear(config.embed_dim, d, ("embed", "mlp"), bias=True, **args)
        self.pos_conv = PositionalConv(config, **args)
        self.encoder_layer_norm = layer_norm(d, NORM_EPS, **args)
        self.relative_attention_bias = nnx.Embed(
            config.num_buckets,
            config.encoder_attention_heads,
            embedding_init=normal_init((None, None), 0.02),
            param_dtype=dtypes.param,
            dtype=jnp.float32,
            rngs=rngs,
        )
        self.layers = stack_layers(
            lambda r: BeatsLayer(config, dtypes=dtypes, rngs=r), config.encoder_layers, rngs
        )
        if config.predictor_class:
            self.predictor = linear(d, config.predictor_class, ("embed", None), bias=True, **args)

    def __call__(self, fbank: jax.Array, frames: jax.Array | None = None) -> jax.Array:
        """Encodes raw fbank float32[B, A, 128] as [B, A // 16 * 8, D], patches in time-major order.

        frames int32[B]: real frames of each row. Values at padded patches are meaningless; a row
        whose `frames` is a multiple of 16 gets the same values as in a batch of its own.
        """
        return self.encode(fbank, frames)[0]

    def encode(self, fbank: jax.Array, frames: jax.Array | None = None):
        """Encodes as `__call__` does; also returns the intermediate values that tests compare."""
        c = self.config
        x = (fbank - FBANK_MEAN) / (2 * FBANK_STD)  # twice the deviation, as in the reference
        x = self.patch_embedding(x[..., None])
        batch, time, mels, width = x.shape
        x = self.layer_norm(x.reshape(batch, time * mels, width))
        taps = {"patch_norm": x}
        x = self.post_extract_proj(x)
        if frames is None:
            frames = jnp.full((batch,), fbank.shape[1], jnp.int32)
        # As in the reference, a row's frames are divided evenly among its patches (2 of a time
        # step's 16 frames each); a patch is padding if its whole share is.
        share = fbank.shape[1] // (time * mels)
        allowed = jnp.arange(time * mels)[None] * share < frames[:, None]
        # The convolution mixes neighbours, so the mask in attention would come too late.
        x = jnp.where(allowed[..., None], x, 0)
        positions = self.pos_conv(x)
        taps["pos_conv"] = positions
        x = self.encoder_layer_norm(x + positions)
        taps["encoder_norm"] = x
        # In numpy: lengths are static, so the buckets are a constant of the compiled program.
        t = np.arange(time * mels)
        buckets = relative_buckets(t[None, :] - t[:, None], c.num_buckets, c.max_distance)
        bias = self.relative_attention_bias(jnp.asarray(buckets)).transpose(2, 0, 1)

        def body(layer, x, _):
            x = scale_gradient(x, c.layer_wise_gradient_decay_ratio)
            x = layer(x, bias, allowed)
            return x, x

        x, taps["layers"] = scan_layers(self.layers, body, x, remat=self.remat)
        taps["allowed"] = allowed
        return x, taps

    def predict(self, fbank: jax.Array, frames: jax.Array | None = None) -> jax.Array:
        """Returns probabilities [B, classes] of the released classifier, unused by MultiMood."""
        x, taps = self.encode(fbank, frames)
        allowed = taps["allowed"][..., None]
        logits = jnp.sum(jnp.where(allowed, self.predictor(x), 0), axis=1)
        return jax.nn.sigmoid(logits / jnp.sum(allowed, axis=1))
