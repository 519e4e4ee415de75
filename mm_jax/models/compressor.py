"""The conversation compressor: one memory vector per history utterance (spec section 3)."""

from __future__ import annotations

import math

import jax
from flax import nnx

from mm_jax.models.layers import Dtypes, linear
from mm_jax.models.mamba import Mamba, MambaConfig, MambaState


class Compressor(nnx.Module):
    """Projects Mamba's final hidden states at the `<MEM>` tokens to the LLM's width."""

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
        # Memory vectors start out with the norm of the language model's embeddings.
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
        """Compresses tokens int32[B, H] into memory vectors [B, U, D_llm].

        memory_index int32[B, U] holds the positions of `<MEM>`; `resets` bool[B, H], as in
        `Mamba.extend`, separates several conversations in one row.
        """
        return self.vectors(self.mamba(tokens, resets), memory_index)

    def extend(
        self, tokens: jax.Array, memory_index: jax.Array, lengths: jax.Array, state: MambaState
    ) -> tuple[jax.Array, MambaState]:
        """Reads the next tokens int32[B, H] of running conversations, lengths int32[B] of them
        real; returns their memory vectors [B, U, D_llm] and the new state."""
        hidden, state = self.mamba.extend(tokens, state, lengths)
        return self.vectors(hidden, memory_index), state

    def vectors(self, hidden: jax.Array, memory_index: jax.Array) -> jax.Array:
        picked = jax.vmap(lambda rows, i: rows[i])(hidden, memory_index)
        return self.memory_projection(picked)
