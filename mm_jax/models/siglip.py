"""SigLIP vision tower (transformers `SiglipVisionModel`)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mm_jax.config.model import VisionTower
from mm_jax.models.layers import (
    Dtypes,
    activation,
    conv,
    embedding,
    from_fields,
    layer_norm,
    linear,
    scan_layers,
    stack_layers,
)
from mm_jax.ops.attention import full_attention

SIZES = VisionTower()


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """The fields of transformers' SiglipVisionConfig; the defaults are so400m patch14-384."""

    hidden_size: int = SIZES.hidden_size
    intermediate_size: int = SIZES.intermediate_size
    num_hidden_layers: int = SIZES.num_hidden_layers
    num_attention_heads: int = SIZES.num_attention_heads
    num_channels: int = SIZES.num_channels
    image_size: int = SIZES.image_size
    patch_size: int = SIZES.patch_size
    hidden_act: str = SIZES.hidden_act
    layer_norm_eps: float = SIZES.layer_norm_eps

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @classmethod
    def from_hf_config(cls, values: dict) -> SiglipConfig:
        return from_fields(cls, {**HF_DEFAULTS, **values})

    def to_hf_config(self) -> dict:
        return {"model_type": "siglip_vision_model", **dataclasses.asdict(self)}


# Defaults of transformers (the base model), for config.json files that leave fields out.
HF_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=16,
)


class SiglipMLP(nnx.Module):
    def __init__(self, config: SiglipConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        args = dict(bias=True, dtypes=dtypes, rngs=rngs)
        self.fc1 = linear(d, f, ("embed", "mlp"), **args)
        self.fc2 = linear(f, d, ("mlp", "embed"), **args)
        self.act = activation(config.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.act(self.fc1(x)))


class SiglipAttention(nnx.Module):
    def __init__(self, config: SiglipConfig, attention: str, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d = config.hidden_size
        self.attention = attention
        args = dict(bias=True, dtypes=dtypes, rngs=rngs)
        self.heads = config.num_attention_heads
        self.q_proj = linear(d, d, ("embed", "heads"), **args)
        self.k_proj = linear(d, d, ("embed", "heads"), **args)
        self.v_proj = linear(d, d, ("embed", "heads"), **args)
        self.out_proj = linear(d, d, ("heads", "embed"), **args)

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (p(x).reshape(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(full_attention(q, k, v, self.attention).reshape(x.shape))


class SiglipLayer(nnx.Module):
    def __init__(self, config: SiglipConfig, attention: str, *, dtypes: Dtypes, rngs: nnx.Rngs):
        args = dict(dtypes=dtypes, rngs=rngs)
        self.layer_norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, **args)
        self.self_attn = SiglipAttention(config, attention, **args)
        self.layer_norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, **args)
        self.mlp = SiglipMLP(config, **args)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipHead(nnx.Module):
    """Attention pooling: torch's `MultiheadAttention` with a learned probe.

    MultiMood does not use it; it is here so that released towers can be read and written whole.
    """

    def __init__(self, config: SiglipConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d = config.hidden_size
        args = dict(dtypes=dtypes, rngs=rngs)
        self.heads = config.num_attention_heads
        self.probe = nnx.Param(
            nnx.initializers.normal(1.0)(rngs.params(), (1, 1, d), dtypes.param),
            out_sharding=(None, None, "norm"),
        )
        self.in_proj = linear(d, 3 * d, ("embed", "heads"), bias=True, **args)
        self.out_proj = linear(d, d, ("heads", "embed"), bias=True, **args)
        self.layernorm = layer_norm(d, config.layer_norm_eps, **args)
        self.mlp = SiglipMLP(config, **args)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Pools [B, T, D] into [B, D]."""
        b, _, d = x.shape
        kernels = jnp.split(self.in_proj.kernel[...].astype(x.dtype), 3, axis=1)
        biases = jnp.split(self.in_proj.bias[...].astype(x.dtype), 3)
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (b, 1, d))
        q, k, v = (
            (t @ kernel + bias).reshape(b, t.shape[1], self.heads, -1)
            for t, kernel, bias in zip((probe, x, x), kernels, biases, strict=True)
        )
        pooled = self.out_proj(full_attention(q, k, v, "xla").reshape(b, 1, d))
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class Siglip(nnx.Module):
    """The vision tower: patches, layers, final norm and pooling head."""

    def __init__(
        self,
        config: SiglipConfig,
        *,
        dtypes: Dtypes = Dtypes(),
        rngs: nnx.Rngs,
        remat: str = "none",
        attention: str = "auto",
    ):
        d, p = config.hidden_size, config.patch_size
        args = dict(dtypes=dtypes, rngs=rngs)
        self.config = config
        self.remat = remat
        self.patch_embedding = conv(config.num_channels, d, (p, p), bias=True, **args)
        self.position_embedding = embedding(
            config.patches_per_side**2, d, (None, "embed_in"), dtypes=dtypes, rngs=rngs
        )
        self.layers = stack_layers(
            lambda r: SiglipLayer(config, attention, dtypes=dtypes, rngs=r),
            config.num_hidden_layers,
            rngs,
        )
        self.post_layernorm = layer_norm(d, config.layer_norm_eps, **args)
        self.head = SiglipHead(config, **args)

    def embeddings(self, pixels: jax.Array) -> jax.Array:
        """Embeds pixels [B, S, S, 3] in [-1, 1] as [B, P, D]; cuts off incomplete patches."""
        x = self.patch_embedding(pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return x + self.position_embedding.embedding[...].astype(x.dtype)

    def __call__(self, pixels: jax.Array, *, layers: int | None = None) -> jax.Array:
        """Returns hidden states [B, P, D] after `layers` layers (default: all), without final norm.

        `hidden_states[-2]` of the reference is `layers = num_hidden_layers - 1`.
        """

        def body(layer, x, _):
            return layer(x), None

        x, _ = scan_layers(
            self.layers, body, self.embeddings(pixels), count=layers, remat=self.remat
        )
        return x

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """Returns the pooler's output [B, D] for the last layer's hidden states."""
        return self.head(self.post_layernorm(hidden))


def normalise_pixels(frames: jax.Array) -> jax.Array:
    """Maps uint8 to float32 in [-1, 1] (mean 0.5, deviation 0.5); returns floats unchanged."""
    if frames.dtype != jnp.uint8:
        return frames
    return (frames.astype(jnp.float32) / 255.0 - 0.5) / 0.5
