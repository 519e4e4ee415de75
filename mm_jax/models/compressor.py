"""The conversation compressor: one memory vector for every history utterance (spec section 3)."""

from __future__ import annotations

import math

import jax
from flax import nnx

from mm_jax.models.layers import Dtypes, linear
from mm_jax.models.mamba import Mamba, MambaConfig, MambaState


class Compressor(nnx.Module):
    """Mamba, its final hidden states at the `<MEM>` tokens, a linear layer to the LLM's width."""

    def __init__(
        self,
        config: MambaConfig,
        llm_width: int,
        *,
        dtypes: Dtypes = Dtypes(),
        rngs: nnx.Rngs,
        remat: str = "none",
    ):
        self.mamba = Mamba(config, dtypes=dtypes, rngs=rngs, remat=remat)
        # Memory vectors start at the size of the language model's embeddings.
        self.memory_projection = linear(
            config.hidden_size,
            llm_width,
            ("embed", "mlp"),
            bias=True,
            std=1 / math.sqrt(config.hidden_size * llm_width),
            dtypes=dtypes,
            rngs=rngs,
        )

    def __call__(
        self, tokens: jax.Array, memory_index: jax.Array, resets: jax.Array | None = None
    ) -> jax.Array:
        """tokens int32[B, H], memory_index int32[B, U] (positions of `<MEM>`) -> [B, U, D_llm].

        `resets` bool[B, H] as in `Mamba.extend`: several conversations in a row.
        """
        return self.vectors(self.mamba(tokens, resets), memory_index)

    def extend(
        self, tokens: jax.Array, memory_index: jax.Array, lengths: jax.Array, state: MambaState
    ) -> tuple[jax.Array, MambaState]:
        """The next tokens int32[B, H] of running conversations, of which lengths int32[B] are real:
        their memory vectors [B, U, D_llm] and the state after them."""
        hidden, state = self.mamba.extend(tokens, state, lengths)
        return self.vectors(hidden, memory_index), state

    def vectors(self, hidden: jax.Array, memory_index: jax.Array) -> jax.Array:
        picked = jax.vmap(lambda rows, i: rows[i])(hidden, memory_index)
        return self.memory_projection(picked)
