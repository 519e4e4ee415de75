"""MultiMood: a language model that reads video, audio, history and text (spec section 3)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mm_jax.models.beats import Beats, BeatsConfig
from mm_jax.models.compressor import Compressor
from mm_jax.models.decoder import Decoder
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.layers import Dtypes, linear
from mm_jax.models.mamba import MambaConfig
from mm_jax.models.siglip import Siglip, SiglipConfig, normalise_pixels
from mm_jax.models.stc import StcConfig, StcConnector
from mm_jax.ops.partition import rows_apart

AUDIO_PROJECTORS = ("linear", "mlp2x_gelu")


@dataclasses.dataclass(frozen=True)
class MultiMoodConfig:
    """Holds the configs of the parts; None means that the model lacks the part.

    The placeholder ids are vocabulary entries of the tokenizer; the LLM never embeds them.
    """

    llm: DecoderConfig = DecoderConfig()
    vision: SiglipConfig | None = SiglipConfig()
    audio: BeatsConfig | None = BeatsConfig()
    compressor: MambaConfig | None = MambaConfig()
    connector_type: str = "stc_connector_v35"
    connector_depth: int = 4
    vision_select_layer: int = -2
    audio_projector_type: str = "linear"
    video_token_id: int = 151647
    audio_token_id: int = 151648
    history_token_id: int = 151649

    def __post_init__(self):
        if self.audio_projector_type not in AUDIO_PROJECTORS:
            raise ValueError(
                f"audio_projector_type: expected one of {AUDIO_PROJECTORS}, got "
                f"{self.audio_projector_type!r}"
            )

    @property
    def stc(self) -> StcConfig:
        return StcConfig(
            self.vision.hidden_size,
            self.llm.hidden_size,
            self.connector_type,
            self.connector_depth,
        )

    @property
    def vision_layers(self) -> int:
        """Counts the tower's layers that run: `hidden_states[-2]` is the output of all but one."""
        return self.vision.num_hidden_layers + 1 + self.vision_select_layer


class Mlp2xGelu(nnx.Module):
    """Two dense layers with a GELU in between: VideoLLaMA2's `mlp2x_gelu` projector."""

    def __init__(self, inputs: int, width: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        args = dict(bias=True, dtypes=dtypes, rngs=rngs)
        self.linear_0 = linear(inputs, width, ("embed", "mlp"), **args)
        self.linear_2 = linear(width, width, ("mlp", "embed"), **args)

    def __call__(self, x: jax.Array) -> jax.Array:
        # The exact GELU, as in torch; jax's default is the tanh approximation.
        return self.linear_2(jax.nn.gelu(self.linear_0(x), approximate=False))


class Features(NamedTuple):
    """Outputs of the towers, kept so that frozen towers run only once per batch.

    video [B, F, P, D_vision], audio [B, A // 16 * 8, D_audio]; axis 1 has size 0 where absent.
    """

    video: jax.Array
    audio: jax.Array


class MultiMood(nnx.Module):
    """The whole network; a batch is a `data.batch.Batch` or anything with the same fields."""

    def __init__(
        self,
        config: MultiMoodConfig,
        *,
        dtypes: Dtypes = Dtypes(),
        rngs: nnx.Rngs,
        remat: str = "none",
        attention: str = "auto",
    ):
        args = dict(dtypes=dtypes, rngs=rngs)
        width = config.llm.hidden_size
        self.config = config
        self.language_model = Decoder(config.llm, remat=remat, attention=attention, **args)
        if config.vision is not None:
            self.vision_tower = Siglip(config.vision, remat=remat, attention=attention, **args)
            self.mm_projector = StcConnector(config.stc, remat=remat, **args)
        if config.audio is not None:
            self.audio_tower = Beats(config.audio, remat=remat, **args)
            inputs = config.audio.encoder_embed_dim
            if config.audio_projector_type == "linear":
                self.mm_projector_a = linear(inputs, width, ("embed", "mlp"), bias=True, **args)
            else:
                self.mm_projector_a = Mlp2xGelu(inputs, width, **args)
        if config.compressor is not None:
            self.mamba_compressor = Compressor(config.compressor, width, remat=remat, **args)

    def frame_features(self, frames: jax.Array) -> jax.Array:
        """Encodes uint8 (or normalised float) frames [B, F, S, S, 3] as [B, F, P, D_vision]."""
        batch, count = frames.shape[:2]
        # Normalised on the device: uint8 frames are a quarter of the transfer of float32 ones.
        pixels = normalise_pixels(frames).reshape(batch * count, *frames.shape[2:])
        features = self.vision_tower(pixels, layers=self.config.vision_layers)
        return features.reshape(batch, count, *features.shape[1:])

    def features(self, batch) -> Features:
        """Runs the towers on a batch."""
        # Which modalities a batch has is part of its shapes: each combination is compiled apart,
        # and an absent tower costs nothing at run time.
        video = audio = jnp.zeros((len(batch.tokens), 0, 1))
        if batch.frames.shape[1]:
            self._require("vision", "frames")
            video = self.frame_features(batch.frames)
        if batch.fbank.shape[1]:
            self._require("audio", "fbank")
            audio = self.audio_tower(batch.fbank, batch.fbank_frames)
        return Features(video, audio)

    def video_tokens(self, frames: jax.Array) -> jax.Array:
        """Encodes frames [B, F, S, S, 3] as tokens [B, M, D]."""
        return self.mm_projector(self.frame_features(frames))

    def audio_tokens(self, fbank: jax.Array, frames: jax.Array) -> jax.Array:
        """Encodes float32[B, A, 128] with int32[B] real frames as tokens [B, A // 16 * 8, D]."""
        return self.mm_projector_a(self.audio_tower(fbank, frames))

    def embed(
        self, batch, features: Features | None = None, memory: jax.Array | None = None
    ) -> jax.Array:
        """Embeds a batch as [B, T, D], with features in place of their placeholders.

        Pass `features` if the towers have already run on the batch, and `memory` [B, U, D] if the
        compressor has.
        """
        c, tokens = self.config, batch.tokens
        places = {
            "video": tokens == c.video_token_id,
            "audio": tokens == c.audio_token_id,
            "history": tokens == c.history_token_id,
        }
        is_text = ~(places["video"] | places["audio"] | places["history"])
        # Placeholder ids may lie outside the table. `place` overwrites the row 0 that they get
        # here, which therefore gets no gradient from them.
        x = self.language_model.embed(jnp.where(is_text, tokens, 0))
        features = self.features(batch) if features is None else features
        if features.video.shape[1]:
            x = place(x, places["video"], self.mm_projector(features.video))
        if features.audio.shape[1]:
            x = place(x, places["audio"], self.mm_projector_a(features.audio))
        if memory is None and batch.memory_index.shape[1]:
            self._require("compressor", "history_tokens")
            memory = self.mamba_compressor(batch.history_tokens, batch.memory_index)
        if memory is not None and memory.shape[1]:
            x = place(x, places["history"], memory)
        return x

    def __call__(
        self,
        batch,
        *,
        right_padded: bool = True,
        dropout_key: jax.Array | None = None,
        token_dropout: float = 0.0,
    ) -> jax.Array:
        """Returns the hidden states [B, T, D] of a batch after the LLM's final norm.

        `token_dropout` zeroes that share of the prompt's embeddings, never a target's.
        """
        x = self.embed(batch)
        if dropout_key is not None and token_dropout:
            dropout_key, key = jax.random.split(dropout_key)
            kept = jax.random.bernoulli(key, 1 - token_dropout, batch.tokens.shape)
            x = jnp.where((kept | (batch.loss_weights > 0))[..., None], x, 0)
        return self.language_model(
            x, batch.mask, right_padded=right_padded, dropout_key=dropout_key
        )

    def _require(self, part: str, field: str) -> None:
        if getattr(self.config, part) is None:
            raise ValueError(f"multimood: the batch has {field}, but the model has no {part} part")


def place(x: jax.Array, where: jax.Array, features: jax.Array) -> jax.Array:
    """Puts features [B, M, D], in order, where bool[B, T] is True into x [B, T, D]."""
    # Every position gathers one feature, most of them in vain: shapes then do not depend on how
    # many placeholders a row has. Clipped, because -1 would wrap around to the last feature.
    index = jnp.clip(jnp.cumsum(where, axis=1) - 1, 0, features.shape[1] - 1)
    # Apart: XLA picked wrong features where all three axes of the mesh are wider than 1.
    picked = jax.vmap(lambda rows, i: rows[i])(rows_apart(features), index)
    return jnp.where(where[..., None], picked.astype(x.dtype), x)
