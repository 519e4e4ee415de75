"""Decodes with a cache: prefill, label scoring, and generation, each a pure jittable function.

Prompts are padded on the right: masked slots of the cache are never seen and positions count
visible slots only, so rows of different lengths need no alignment. A prompt is read once; all
continuations sampled from it share its cache and keep caches of their own new tokens only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mm_jax.models.decoder import Cache, Decoder
from mm_jax.models.multimood import MultiMood
from mm_jax.ops.attention import OwnCache, heads_first
from mm_jax.ops.log_probs import project_logits


class Decoding(NamedTuple):
    """Holds the decoding state of a batch: the cache, the next free slot, and the next token's
    logits float32[B, V]."""

    cache: Cache
    slot: jax.Array
    logits: jax.Array


def prefill(model: MultiMood, batch, extra_slots: int = 0, features=None, memory=None) -> Decoding:
    """Reads the prompts of a batch into a cache with room for `extra_slots` more tokens.

    `features` and `memory` as in `MultiMood.embed`.
    """
    lm = model.language_model
    # Logits are taken of one position per row: of all of them they would be [B, T, V].
    hidden, cache = lm.prefill(model.embed(batch, features, memory), batch.mask, extra_slots)
    logits = lm.logits(_last(hidden, jnp.sum(batch.mask, axis=1)))
    return Decoding(cache, jnp.int32(batch.tokens.shape[1]), logits)


def force(lm: Decoder, at: Decoding, tokens: jax.Array, mask: jax.Array) -> Decoding:
    """Appends given tokens int32[B, N] (mask bool[B, N], padding on the right) to every row."""
    hidden, cache = lm.extend(lm.embed(tokens), mask, at.cache, at.slot)
    count = jnp.sum(mask, axis=1)
    # A row without a token here keeps the logits that it had.
    new = jnp.where((count > 0)[:, None], lm.logits(_last(hidden, count)), at.logits)
    return Decoding(cache, at.slot + tokens.shape[1], new)


def _last(hidden: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the states [B, D] at the last of `count` positions of hidden [B, T, D]."""
    return jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]


def score_labels(lm: Decoder, at: Decoding, labels: jax.Array, lengths: jax.Array) -> jax.Array:
    """Computes log p(label | what a row has read) of every candidate label.

    labels int32[C, N] (padded on the right), lengths int32[C] >= 1; returns float32[B, C], the sum
    of token log-probabilities. The cache stays as it was.
    """
    first = jax.nn.log_softmax(at.logits)  # [B, V]
    rows, width = at.logits.shape[0], labels.shape[1]

    def one(candidate):
        tokens, length = candidate
        total = first[:, tokens[0]]
        if width == 1:
            return total
        inner = jnp.broadcast_to(tokens[:-1], (rows, width - 1))
        real = jnp.arange(1, width) < length
        hidden, _ = lm.extend(
            lm.embed(inner), jnp.broadcast_to(real, inner.shape), at.cache, at.slot
        )
        logps = jax.nn.log_softmax(lm.logits(hidden))
        picked = jnp.take_along_axis(
            logps, jnp.broadcast_to(tokens[1:], inner.shape)[..., None], axis=-1
        )[..., 0]
        return total + jnp.sum(jnp.where(real, picked, 0.0), axis=1)

    # One candidate at a time, so that only one extended cache and its logits exist at once.
    return jax.lax.map(one, (labels, lengths)).T


class Samples(NamedTuple):
    """Holds G continuations of every row.

    tokens int32[B, G, R], the pad id after the end; logps float32[B, G, R] of the sampled tokens,
    0 after the end; lengths int32[B, G] with the stop token; ended bool[B, G]: by a stop token.
    """

    tokens: jax.Array
    logps: jax.Array
    lengths: jax.Array
    ended: jax.Array


def row_keys(key: jax.Array, seeds: jax.Array) -> jax.Array:
    """Makes one key per seed, so that a row's samples do not depend on the other rows."""
    flat = jax.vmap(lambda s: jax.random.fold_in(key, s))(seeds.reshape(-1))
    return flat.reshape(seeds.shape)


def fold_each(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Folds a number into every key [...]."""
    fold = jax.vmap(lambda key: jax.random.fold_in(key, number))
    return fold(keys.reshape(-1)).reshape(keys.shape)


def sample_token(
    keys: jax.Array,
    logits: jax.Array,
    temperature: float | jax.Array,
    top_k: int,
    top_p: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Samples next tokens int32[...] from logits float32[..., V] with keys [...]; returns them and
    their log-probabilities over the whole vocabulary, at the temperature.

    temperature 0 is greedy (log-probabilities then at 1). top_k > 0 keeps only the likeliest k
    tokens, and top_p < 1 the smallest set of those whose probability reaches it. All are static,
    or temperature and top_p are float32[...], one for every key.
    """
    each = not isinstance(temperature, int | float)
    if each:
        greedy = temperature == 0
        logits = logits / jnp.where(greedy, 1.0, temperature)[..., None]
    else:
        logits = logits / (temperature or 1.0)
    top = jnp.max(logits, axis=-1, keepdims=True)
    p = jnp.exp(logits - top)  # not normalised: every pass over the vocabulary counts
    log_total = jnp.log(jnp.sum(p, axis=-1))
    with_logp = lambda token: (token, _picked(logits - top, token) - log_total)  # noqa: E731
    if not each and temperature == 0:
        return with_logp(jnp.argmax(logits, axis=-1))
    if 0 < top_k < logits.shape[-1]:  # a tie with the k-th keeps all tokens of the tie
        p = jnp.where(logits >= jax.lax.top_k(logits, top_k)[0][..., -1:], p, 0)
    blocks = _blocks(p)

    def draw(keys):
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys.reshape(-1))
        return _inverse_cdf(*blocks, uniform.reshape(*keys.shape, 3))

    token = draw(keys)
    if each:
        token = jnp.where(greedy, jnp.argmax(logits, axis=-1), token)
    elif top_p >= 1:
        return with_logp(token)
    # Rejection: a token is drawn again until it is in the nucleus. That takes a few passes over the
    # vocabulary, where finding the border of the nucleus takes some twenty.
    # The likeliest token, of probability p = 1 here, is inside however small top_p is.
    limit = jnp.maximum(top_p, 1e-6) * jnp.sum(blocks[1], axis=-1)
    if each:
        limit = jnp.where(greedy | (top_p >= 1), jnp.inf, limit)

    def inside(token):
        """Tells whether the tokens likelier than this one do not reach top_p; True for NaN."""
        likelier = p > _picked(p, token)[..., None]
        # "Not >=" instead of "<": NaN logits would otherwise draw for ever.
        return ~(jnp.sum(jnp.where(likelier, p, 0), axis=-1) >= limit)

    def again(carry):
        i, token, done = carry
        token = jnp.where(done, token, draw(fold_each(keys, i)))
        return i + 1, token, done | inside(token)

    # The likeliest token is always inside, so this ends.
    start = (jnp.int32(1), token, inside(token))
    _, token, _ = jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), again, start)
    return with_logp(token)


def _picked(values: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, token[..., None], axis=-1)[..., 0]


def _blocks(p: jax.Array, block: int = 128) -> tuple[jax.Array, jax.Array]:
    """Cuts p [..., V] into blocks [..., V / block, block]; returns them and their sums."""
    p = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -p.shape[-1] % block)])
    p = p.reshape(*p.shape[:-1], -1, block)
    return p, jnp.sum(p, axis=-1)


def _inverse_cdf(p: jax.Array, sums: jax.Array, uniform: jax.Array) -> jax.Array:
    """Samples int32[...] from unnormalised `_blocks` with uniform [..., 3]: first a block, then a
    token in it."""
    # Two levels, because a cumulative sum over the vocabulary would be a loop over it. Rounding
    # gives each near-zero token about 1e-7 of extra mass, and a large vocabulary has a thousand
    # block starts where that counts. So each level draws its own number instead of reusing the rest
    # of the first one, and the third number rejects an index, in favour of the likeliest one, in
    # proportion to its extra mass.

    def pick(p, uniform, reject):
        upto = jnp.cumsum(p, axis=-1)
        whole = upto[..., -1]
        index = jnp.argmax(upto > (uniform * whole)[..., None], axis=-1)
        got = _picked(upto, index) - jnp.where(index > 0, _picked(upto, index - 1), 0)
        got = jnp.maximum(got, whole * 2**-23)  # float32 uniforms are this far apart
        return jnp.where(reject * got < _picked(p, index), index, jnp.argmax(p, axis=-1))

    first = pick(sums, uniform[..., 0], uniform[..., 2])
    inner = jnp.take_along_axis(p, first[..., None, None], axis=-2)[..., 0, :]
    second = pick(inner, uniform[..., 1], uniform[..., 2])
    return (first * p.shape[-1] + second).astype(jnp.int32)


def generate(
    lm: Decoder,
    at: Decoding,
    keys: jax.Array,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Samples:
    """Samples G continuations of every row of `at`, until a stop token or `max_new_tokens`.

    keys [B, G] (see `row_keys`). All G read one cache of their prompt; the loop stops when every
    continuation has ended. Arguments after the `*` are static. Leaves `lm` unstacked.
    """
    group = keys.shape[1]
    # Caches are laid out once as the products of every step read them, keys transposed; otherwise
    # each step would transpose them again.
    prefix = Cache(
        tuple(jnp.swapaxes(heads_first(k), -1, -2) for k in at.cache.k),
        tuple(map(heads_first, at.cache.v)),
        at.cache.mask,
    )
    kernel = lm.head_kernel()
    lm.unstack()  # in the loop, slices of stacked layers would be a second copy of the weights
    stop = jnp.asarray(stop_ids, jnp.int32)

    def sample(t, logits):  # a token's key depends on its row and place alone
        return sample_token(fold_each(keys, t), logits, temperature, top_k, top_p)

    def write(t, token, logp, out, done):
        tokens, logps = out
        tokens = tokens.at[:, :, t].set(jnp.where(done, pad_id, token))
        logps = logps.at[:, :, t].set(jnp.where(done, 0.0, logp))
        return (tokens, logps), done | jnp.isin(token, stop)

    # A while loop, not a scan: a batch rarely needs all of `max_new_tokens`.
    def cond(carry):
        t, _, _, done, *_ = carry
        return (t < max_new_tokens) & ~jnp.all(done)

    def body(carry):
        t, own, out, done, lengths, token = carry
        hidden, own = lm.decode(token, prefix, own, t - 1)
        token, logp = sample(t, project_logits(hidden, kernel, lm.config.vocab_padding))
        lengths = lengths + ~done
        out, done = write(t, token, logp, out, done)
        return t + 1, own, out, done, lengths, token

    shape = (*keys.shape, max_new_tokens)
    logits = jnp.broadcast_to(at.logits[:, None], (*keys.shape, at.logits.shape[-1]))
    token, logp = sample(0, logits)
    out = (jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape, jnp.float32))
    out, done = write(0, token, logp, out, jnp.zeros(keys.shape, bool))
    c = lm.config
    shape = (keys.shape[0], c.num_key_value_heads, group, max_new_tokens, c.head_dim)
    empty = OwnCache(jnp.zeros((*shape[:3], *shape[:2:-1]), lm.dtype), jnp.zeros(shape, lm.dtype))
    own = (empty,) * c.num_hidden_layers
    ones = jnp.ones(keys.shape, jnp.int32)
    carry = (jnp.int32(1), own, out, done, ones, token)
    _, _, (tokens, logps), done, lengths, _ = jax.lax.while_loop(cond, body, carry)
    return Samples(tokens, logps, lengths, done)
