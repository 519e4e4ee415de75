"""The language model: one decoder for the families Qwen2, Qwen3, Llama and Mistral.

They are transformers' `Qwen2ForCausalLM` and so on (Llama's includes SmolLM2, Mistral's is without
sliding window). Qwen2 has biases on queries, keys and values, Qwen3 norms on queries and keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mm_jax.models import lora
from mm_jax.models.decoder_config import FAMILIES, DecoderConfig, inverse_frequencies
from mm_jax.models.layers import (
    Dtypes,
    RMSNorm,
    activation,
    embedding,
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


class Cache(NamedTuple):
    """Keys and values [L, B, S, K, H] of all layers; mask bool[B, S] marks the visible slots."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def rotary(x: jax.Array, positions: jax.Array, config: DecoderConfig) -> jax.Array:
    """Rotates x [B, T, N, H] by positions int32[B, T]: RoPE, half-split as in HF weights."""
    frequencies, scale = inverse_frequencies(config)
    # In float32: bfloat16 holds no odd position above 256.
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = scale * jnp.cos(angles)[:, :, None], scale * jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * h, config.num_key_value_heads * h
        self.config = config
        args = dict(dtypes=dtypes, rngs=rngs)
        family = FAMILIES[config.family]
        bias = family.qkv_bias
        self.q_proj = linear(d, queries, ("embed", "heads"), bias=bias, **args)
        self.k_proj = linear(d, keys, ("embed", "kv_heads"), bias=bias, **args)
        self.v_proj = linear(d, keys, ("embed", "kv_heads"), bias=bias, **args)
        if family.qk_norm:  # over each head's values
            self.q_norm = RMSNorm(h, config.rms_norm_eps, **args)
            self.k_norm = RMSNorm(h, config.rms_norm_eps, **args)
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
        if FAMILIES[c.family].qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotary(q, positions, c), rotary(k, positions, c), v

    def output(self, heads: jax.Array, key=None) -> jax.Array:
        batch, length = heads.shape[:2]
        flat = lora.apply(self.o_proj, heads.reshape(batch * length, -1), key)
        return flat.reshape(batch, length, -1)


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
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


class Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        args = dict(dtypes=dtypes, rngs=rngs)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **args)
        self.self_attn = Attention(config, **args)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **args)
        self.mlp = MLP(config, **args)


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0)


class Decoder(nnx.Module):
    """The language model with its head; the layers are stacked and scanned.

    Random weights scale with the width: std 1/sqrt(inputs), 1/sqrt(hidden_size) for the embedding,
    and sqrt(2 L) times smaller for the matrices that write to the residual stream. (A fixed 0.02
    suits the widths of released models, but narrow models do not learn from it.)
    """

    def __init__(
        self,
        config: DecoderConfig,
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
            lambda r: Layer(config, dtypes=dtypes, rngs=r), config.num_hidden_layers, rngs
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

    def block(self, layer: Layer, x: jax.Array, positions: jax.Array, attend, keys=(None,) * 9):
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

        x, cache = scan_layers(self.layers, body, embeds.astype(self.dtype), differentiated=False)
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
            differentiated=False,
        )
        return self.norm(x), Cache(k, v, visible)

    def shared_prefix(
        self,
        embeds: jax.Array,
        mask: jax.Array,
        tails: jax.Array,
        tail_mask: jax.Array,
        places: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes hidden states of G continuations per prompt, each prompt once (training).

        embeds [B, T, D] and mask bool[B, T] of the prompts, tails [B, G, R, D] and tail_mask
        bool[B, G, R] of the continuations, both padded on the right. A continuation attends to the
        prompt and causally to itself: T + G R tokens instead of G (T + R). Returns the prompts'
        last hidden states [B, D] and the continuations' [B, G, R, D].

        `places` int32[B, G, R]: where each token stands in its continuation, if rows hold several:
        each begins at a 0.
        """
        batch, length, _ = embeds.shape
        _, group, tail, width = tails.shape
        lengths = jnp.sum(mask, axis=-1, dtype=jnp.int32)
        # Positions continue after the prompt's real tokens, as if each response stood alone.
        own = jnp.maximum(jnp.cumsum(tail_mask, axis=-1) - 1, 0) if places is None else places
        own = lengths[:, None, None] + own
        positions = jnp.concatenate([token_positions(mask), own.reshape(batch, -1)], axis=1)
        t = jnp.arange(tail)
        allowed = (t[None, :] <= t[:, None]) & tail_mask[:, :, None, :]
        if places is not None:
            number = jnp.cumsum(places == 0, axis=-1)
            allowed &= number[..., :, None] == number[..., None, :]

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
        """Decodes token `step` (from 0; int32[], or int32[B]) of G continuations of every prefix,
        after `unstack`.

        tokens int32[B, G]; `prefix` holds tuples of k [B, K, H, S] and v [B, K, S, H], one per
        layer; `own` holds the layers' caches, filled up to `step`. Returns hidden states [B, G, D]
        and `own`.
        """
        lengths = jnp.sum(prefix.mask, axis=-1, dtype=jnp.int32)
        positions = jnp.broadcast_to((lengths + step)[:, None], tokens.shape)
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
