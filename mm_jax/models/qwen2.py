"""Qwen2 and Qwen2.5: the language model (transformers `Qwen2ForCausalLM`)."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mm_jax.config.model import LanguageModel
from mm_jax.models import lora
from mm_jax.models.layers import (
    Dtypes,
    RMSNorm,
    activation,
    embedding,
    from_fields,
    linear,
    scan_layers,
    stack_layers,
    unstack_layers,
)
from mm_jax.ops.attention import (
    OwnCache,
    attention,
    causal_attention,
    decode_attention,
    heads_first,
    prefix_attention,
)
from mm_jax.ops.log_probs import project_logits

SIZES = LanguageModel()


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """The fields of transformers' Qwen2Config, and two of ours.

    `residual_dropout` is 0 in every release. The last `vocab_padding` of the `vocab_size` rows are
    no tokens and never get probability.
    """

    vocab_size: int = 152064
    hidden_size: int = SIZES.hidden_size
    intermediate_size: int = SIZES.intermediate_size
    num_hidden_layers: int = SIZES.num_hidden_layers
    num_attention_heads: int = SIZES.num_attention_heads
    num_key_value_heads: int = SIZES.num_key_value_heads
    rms_norm_eps: float = SIZES.rms_norm_eps
    rope_theta: float = SIZES.rope_theta
    max_position_embeddings: int = SIZES.max_position_embeddings
    tie_word_embeddings: bool = SIZES.tie_word_embeddings
    hidden_act: str = SIZES.hidden_act
    residual_dropout: float = SIZES.residual_dropout
    vocab_padding: int = 0

    def __post_init__(self):
        if min(self.num_attention_heads, self.num_key_value_heads) < 1:
            raise ValueError("qwen2: expected at least one attention and key-value head")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"qwen2: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"qwen2: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf_config(cls, values: dict) -> Qwen2Config:
        """Reads a config.json; raises ValueError for scaled positions or sliding windows."""
        values = {**HF_DEFAULTS, **values}
        # transformers 5 writes rope_parameters, with the base inside; earlier ones rope_scaling.
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"qwen2: rope_type: expected 'default', got {kind!r}")
        if values.get("use_sliding_window"):
            raise ValueError("qwen2: use_sliding_window: expected false, got true")
        config = from_fields(cls, values)
        if (values.get("head_dim") or config.head_dim) != config.head_dim:
            raise ValueError(
                f"qwen2: head_dim: expected {config.head_dim}, got {values['head_dim']}"
            )
        return config

    def to_hf_config(self) -> dict:
        values = dataclasses.asdict(self)
        del values["residual_dropout"], values["vocab_padding"]
        return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **values}


# Defaults of transformers, for config.json files that leave fields out.
HF_DEFAULTS = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    rope_theta=1e4,
)


class Cache(NamedTuple):
    """Keys and values [L, B, S, K, H] of all layers; mask bool[B, S] marks the visible slots."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates x [B, T, N, H] by positions int32[B, T]: RoPE, half-split as in HF weights."""
    half = x.shape[-1] // 2
    # In float32: bfloat16 holds no odd position above 256.
    frequencies = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Qwen2Attention(nnx.Module):
    def __init__(self, config: Qwen2Config, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * h, config.num_key_value_heads * h
        self.config = config
        args = dict(dtypes=dtypes, rngs=rngs)
        # Qwen2 has biases here and nowhere else.
        self.q_proj = linear(d, queries, ("embed", "heads"), bias=True, **args)
        self.k_proj = linear(d, keys, ("embed", "kv_heads"), bias=True, **args)
        self.v_proj = linear(d, keys, ("embed", "kv_heads"), bias=True, **args)
        std = 1 / math.sqrt(queries * 2 * config.num_hidden_layers)
        self.o_proj = linear(queries, d, ("heads", "embed"), bias=False, std=std, **args)

    def project(self, x: jax.Array, positions: jax.Array, keys=(None,) * 3):
        """Returns rotated q [B, T, N, H] and k [B, T, K, H], and v; `keys` drive LoRA's dropout."""
        c = self.config
        shape = (*x.shape[:2], -1, c.head_dim)
        flat = x.reshape(-1, x.shape[-1])  # XLA's gradients of 3-D products are slow on CPU
        q, k, v = (
            lora.apply(layer, flat, key).reshape(shape)
            for layer, key in zip((self.q_proj, self.k_proj, self.v_proj), keys, strict=True)
        )
        return rotary(q, positions, c.rope_theta), rotary(k, positions, c.rope_theta), v

    def output(self, heads: jax.Array, key=None) -> jax.Array:
        batch, length = heads.shape[:2]
        flat = lora.apply(self.o_proj, heads.reshape(batch * length, -1), key)
        return flat.reshape(batch, length, -1)


class Qwen2MLP(nnx.Module):
    def __init__(self, config: Qwen2Config, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        args = dict(bias=False, dtypes=dtypes, rngs=rngs)
        self.gate_proj = linear(d, f, ("embed", "mlp"), **args)
        self.up_proj = linear(d, f, ("embed", "mlp"), **args)
        std = 1 / math.sqrt(f * 2 * config.num_hidden_layers)
        self.down_proj = linear(f, d, ("mlp", "embed"), std=std, **args)
        self.act = activation(config.hidden_act)

    def __call__(self, x: jax.Array, keys=(None,) * 3) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        gate = lora.apply(self.gate_proj, flat, keys[0])
        up = lora.apply(self.up_proj, flat, keys[1])
        return lora.apply(self.down_proj, self.act(gate) * up, keys[2]).reshape(x.shape)


class Qwen2Layer(nnx.Module):
    def __init__(self, config: Qwen2Config, *, dtypes: Dtypes, rngs: nnx.Rngs):
        args = dict(dtypes=dtypes, rngs=rngs)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **args)
        self.self_attn = Qwen2Attention(config, **args)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **args)
        self.mlp = Qwen2MLP(config, **args)


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0)


class Qwen2(nnx.Module):
    """The language model with its head; the layers are stacked and scanned.

    Random weights scale with the width: std 1/sqrt(inputs), 1/sqrt(hidden_size) for the embedding,
    and sqrt(2 L) times smaller for the matrices that write to the residual stream. (A fixed 0.02
    suits the widths of released models, but narrow models do not learn from it.)
    """

    def __init__(
        self,
        config: Qwen2Config,
        *,
        dtypes: Dtypes = Dtypes(),
        rngs: nnx.Rngs,
        remat: str = "none",
        attention: str = "auto",
    ):
        self.config = config
        self.remat, self.attention = remat, attention
        self.dtype = dtypes.compute
        self.embed_tokens = embedding(
            config.vocab_size,
            config.hidden_size,
            ("vocab_in", "embed_in"),
            dtypes=dtypes,
            rngs=rngs,
        )
        self.layers = stack_layers(
            lambda r: Qwen2Layer(config, dtypes=dtypes, rngs=r), config.num_hidden_layers, rngs
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtypes=dtypes, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(
                config.hidden_size,
                config.vocab_size,
                ("embed", "vocab"),
                bias=False,
                dtypes=dtypes,
                rngs=rngs,
            )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeds int32[B, T] as [B, T, D]."""
        return self.embed_tokens(tokens)

    def head_kernel(self) -> jax.Array:
        """Returns the output matrix [D, V], the transposed embedding if they are tied."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [..., D] to logits float32[..., V]."""
        return project_logits(hidden, self.head_kernel(), self.config.vocab_padding)

    def block(
        self, layer: Qwen2Layer, x: jax.Array, positions: jax.Array, attend, keys=(None,) * 9
    ):
        """Applies one layer to x [B, T, D]; returns x and what `attend` returned after the heads.

        attend(q, k, v) -> (heads [B, T, N, H], anything). keys: two for dropout on the residual
        branches, four for the adapters of attention, three for those of the MLP.
        """
        q, k, v = layer.self_attn.project(layer.input_layernorm(x), positions, keys[2:5])
        heads, extra = attend(q, k, v)
        # REMAT's "outputs" saves what has these names.
        y = checkpoint_name(layer.self_attn.output(heads, keys[5]), "attention")
        x = x + dropout(y, keys[0], self.config.residual_dropout)
        y = layer.mlp(layer.post_attention_layernorm(x), keys[6:])
        y = checkpoint_name(y, "mlp")
        return x + dropout(y, keys[1], self.config.residual_dropout), extra

    def __call__(
        self,
        embeds: jax.Array,
        mask: jax.Array,
        *,
        right_padded: bool = True,
        dropout_key: jax.Array | None = None,
        with_layers: bool = False,
    ):
        """Returns hidden states [B, T, D] after the final norm, without a cache.

        embeds [B, T, D]; mask bool[B, T] is True at real tokens. Positions count real tokens, so
        either padding side works (`right_padded=False` for left padding). With `with_layers` it
        also returns the layers' stacked outputs [L, B, T, D] before the final norm.
        """
        positions = token_positions(mask)
        lengths = jnp.sum(mask, axis=-1, dtype=jnp.int32)
        if not right_padded:
            # Lengths cannot describe padding on the left, so this side has no flash attention.
            t = jnp.arange(mask.shape[1])
            allowed = (t[None, :] <= t[:, None])[None, None] & mask[:, None, None, :]

        def attend(q, k, v):
            if right_padded:
                return causal_attention(q, k, v, lengths, self.attention), None
            return attention(q, k, v, mask=allowed), None

        def body(layer, x, key):
            keys = (None,) * 9 if key is None else jax.random.split(key, 9)
            x, _ = self.block(layer, x, positions, attend, keys)
            return x, x if with_layers else None

        # Scanned over with the parameters, so that every layer draws its own dropout.
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.config.num_hidden_layers)
        # Cast first: the carry of a scan cannot change its type.
        x, outputs = scan_layers(
            self.layers, body, embeds.astype(self.dtype), keys, remat=self.remat
        )
        hidden = self.norm(x)
        return (hidden, outputs) if with_layers else hidden

    def prefill(
        self, embeds: jax.Array, mask: jax.Array, extra_slots: int = 0
    ) -> tuple[jax.Array, Cache]:
        """Returns hidden states [B, T, D] of right-padded rows and a cache of T + extra_slots."""
        positions = token_positions(mask)
        lengths = jnp.sum(mask, axis=-1, dtype=jnp.int32)

        def attend(q, k, v):
            return causal_attention(q, k, v, lengths, self.attention), (k, v)

        def body(layer, x, _):
            return self.block(layer, x, positions, attend)

        x, cache = scan_layers(self.layers, body, embeds.astype(self.dtype))
        wider = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, extra_slots), (0, 0), (0, 0)))  # noqa: E731
        k, v = map(wider, cache) if extra_slots else cache
        return self.norm(x), Cache(k, v, jnp.pad(mask, ((0, 0), (0, extra_slots))))

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Creates a cache that `extend` fills from slot 0 on, also for left-padded prompts."""
        c = self.config
        shape = (c.num_hidden_layers, batch, slots, c.num_key_value_heads, c.head_dim)
        zeros = jnp.zeros(shape, self.dtype)
        return Cache(zeros, zeros, jnp.zeros((batch, slots), bool))

    def extend(
        self, embeds: jax.Array, mask: jax.Array, cache: Cache, slot: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        """Appends T tokens to every row, in cache slots [slot, slot + T).

        embeds [B, T, D], mask bool[B, T] (False: padding, whose slot is never visible). Positions
        continue from the number of visible slots. Returns hidden states [B, T, D] and the cache.
        """
        # Positions count visible slots, not slots, so that padding on the left does not shift them.
        seen = jnp.sum(cache.mask, axis=-1, dtype=jnp.int32)[:, None]
        positions = jnp.maximum(seen + jnp.cumsum(mask, axis=-1) - 1, 0)
        visible = jax.lax.dynamic_update_slice(cache.mask, mask, (0, slot))
        t, s = embeds.shape[1], cache.mask.shape[1]
        causal = jnp.arange(s)[None, :] <= slot + jnp.arange(t)[:, None]
        allowed = causal[None, None] & visible[:, None, None, :]

        def body(layer, carry, index):
            x, keys, values = carry

            def attend(q, k, v):
                at = (index, 0, slot, 0, 0)
                all_k = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), at)
                all_v = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), at)
                return attention(q, all_k[index], all_v[index], mask=allowed), (all_k, all_v)

            x, cache = self.block(layer, x, positions, attend)
            return (x, *cache), None

        # The cache is carried: as an output of the scan it would be a second copy of itself.
        (x, k, v), _ = scan_layers(
            self.layers,
            body,
            (embeds.astype(self.dtype), cache.k, cache.v),
            jnp.arange(self.config.num_hidden_layers),
        )
        return self.norm(x), Cache(k, v, visible)

    def shared_prefix(
        self, embeds: jax.Array, mask: jax.Array, tails: jax.Array, tail_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Computes hidden states of G continuations per prompt, each prompt once (training).

        embeds [B, T, D] and mask bool[B, T] of the prompts, tails [B, G, R, D] and tail_mask
        bool[B, G, R] of the continuations, both padded on the right. A continuation attends to the
        prompt and causally to itself: T + G R tokens instead of G (T + R). Returns the prompts'
        last hidden states [B, D] and the continuations' [B, G, R, D].
        """
        batch, length, _ = embeds.shape
        _, group, tail, width = tails.shape
        lengths = jnp.sum(mask, axis=-1, dtype=jnp.int32)
        # Positions continue after the prompt's real tokens, as if each response stood alone.
        own = lengths[:, None, None] + jnp.maximum(jnp.cumsum(tail_mask, axis=-1) - 1, 0)
        positions = jnp.concatenate([token_positions(mask), own.reshape(batch, -1)], axis=1)
        t = jnp.arange(tail)
        allowed = (t[None, :] <= t[:, None]) & tail_mask[:, :, None, :]

        def attend(q, k, v):
            split = lambda x: x[:, length:].reshape(batch, group, tail, *x.shape[2:])  # noqa: E731
            prompt_k, prompt_v = k[:, :length], v[:, :length]
            heads = causal_attention(q[:, :length], prompt_k, prompt_v, lengths, self.attention)
            tail_heads = prefix_attention(
                split(q),
                heads_first(prompt_k),
                heads_first(prompt_v),
                mask,
                heads_first(split(k)),
                heads_first(split(v)),
                allowed,
            )
            tail_heads = tail_heads.reshape(batch, group * tail, *heads.shape[2:])
            return jnp.concatenate([heads, tail_heads], axis=1), None

        def body(layer, x, _):
            return self.block(layer, x, positions, attend)

        x = jnp.concatenate([embeds, tails.reshape(batch, -1, width)], axis=1)
        x, _ = scan_layers(self.layers, body, x.astype(self.dtype), remat=self.remat)
        # Only the prompt's last state is needed: it predicts each continuation's first token.
        last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        return self.norm(last), self.norm(x[:, length:].reshape(batch, group, tail, width))

    def unstack(self) -> None:
        """Gives every layer separate parameters, as `decode` needs them.

        In a decoding loop, slices of stacked parameters would be a second copy of the weights.
        """
        if not isinstance(self.layers, nnx.List):
            self.layers = unstack_layers(self.layers, self.config.num_hidden_layers)

    def decode(
        self, tokens: jax.Array, prefix: Cache, own: tuple[OwnCache, ...], step: jax.Array
    ) -> tuple[jax.Array, tuple[OwnCache, ...]]:
        """Decodes token `step` (from 0) of G continuations of every prefix, after `unstack`.

        tokens int32[B, G]; `prefix` holds tuples of k [B, K, H, S] and v [B, K, S, H], one per
        layer; `own` holds the layers' caches, filled up to `step`. Returns hidden states [B, G, D]
        and `own`.
        """
        lengths = jnp.sum(prefix.mask, axis=-1, dtype=jnp.int32)
        positions = jnp.broadcast_to(lengths[:, None] + step, tokens.shape)
        x, caches = self.embed(tokens), []
        # Unrolled: each layer's cache is a buffer of its own, which XLA updates in place.
        for layer, prefix_k, prefix_v, cache in zip(
            self.layers, prefix.k, prefix.v, own, strict=True
        ):

            def attend(q, k, v, cache=cache, prefix_k=prefix_k, prefix_v=prefix_v):
                return decode_attention(q, prefix_k, prefix_v, prefix.mask, cache, k, v, step)

            x, cache = self.block(layer, x, positions, attend)
            caches.append(cache)
        return self.norm(x), tuple(caches)


def token_positions(mask: jax.Array) -> jax.Array:
    """Returns int32[B, T]: the number of real tokens before each, for either padding side."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
