"""STC connector: turns video features into language-model tokens (VideoLLaMA2's `mm_projector`).

RegStage and its bottleneck follow timm's `regnet.RegStage` (spec section 3).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mm_jax.models.layers import (
    DepthwiseConv,
    Dtypes,
    activation,
    call_layer,
    conv,
    layer_norm,
    linear,
)
from mm_jax.ops.partition import rows_apart

PADDING = {"stc_connector_v35": 0, "stc_connector": 1}
NORM_EPS = 1e-5  # timm's LayerNormAct2d


@dataclasses.dataclass(frozen=True)
class StcConfig:
    """Sizes: mm_hidden_size in, hidden_size out; `mm_projector_type` sets the conv's padding."""

    mm_hidden_size: int = 1152
    hidden_size: int = 3584
    mm_projector_type: str = "stc_connector_v35"
    depth: int = 4

    def __post_init__(self):
        if self.mm_projector_type not in PADDING:
            raise ValueError(
                f"mm_projector_type: expected one of {sorted(PADDING)}, got "
                f"{self.mm_projector_type!r}"
            )

    @property
    def padding(self) -> int:
        return PADDING[self.mm_projector_type]


class ConvNorm(nnx.Module):
    """A 1x1 or depthwise 3x3 convolution without bias, then LayerNorm over channels (`bn`)."""

    def __init__(self, inputs, outputs, *, depthwise=False, dtypes, rngs):
        args = dict(dtypes=dtypes, rngs=rngs)
        if depthwise:
            self.conv = DepthwiseConv(outputs, (3, 3), padding=1, **args)
        else:
            self.conv = conv(inputs, outputs, (1, 1), **args)
        self.bn = layer_norm(outputs, NORM_EPS, **args)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


class SqueezeExcite(nnx.Module):
    def __init__(self, width: int, squeezed: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.fc1 = conv(width, squeezed, (1, 1), bias=True, dtypes=dtypes, rngs=rngs)
        self.fc2 = conv(squeezed, width, (1, 1), bias=True, dtypes=dtypes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        s = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.fc2(jax.nn.silu(self.fc1(s))))


class Bottleneck(nnx.Module):
    """A residual block: 1x1, depthwise 3x3, squeeze-excite, 1x1; channels last [B, h, w, D]."""

    def __init__(self, inputs: int, outputs: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        args = dict(dtypes=dtypes, rngs=rngs)
        self.conv1 = ConvNorm(inputs, outputs, **args)
        self.conv2 = ConvNorm(outputs, outputs, depthwise=True, **args)
        self.se = SqueezeExcite(outputs, round(inputs * 0.25), **args)
        self.conv3 = ConvNorm(outputs, outputs, **args)
        # A zero scale makes each block start as its shortcut, as in timm's RegNet.
        self.conv3.bn.scale.set_value(jnp.zeros_like(self.conv3.bn.scale[...]))
        self.downsample = ConvNorm(inputs, outputs, **args) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = jax.nn.silu(self.conv1(x))
        x = self.se(jax.nn.silu(self.conv2(x)))
        return jax.nn.silu(self.conv3(x) + shortcut)


class RegStage(nnx.Module):
    """A stage of blocks b1, b2, ..., named as in timm; the first one changes the width."""

    def __init__(
        self, depth: int, inputs: int, outputs: int, *, dtypes: Dtypes, rngs: nnx.Rngs, remat: str
    ):
        self.depth, self.remat = depth, remat
        for i in range(depth):
            width = inputs if i == 0 else outputs
            setattr(self, f"b{i + 1}", Bottleneck(width, outputs, dtypes=dtypes, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = call_layer(getattr(self, f"b{i + 1}"), x, self.remat)
        # Without this, XLA splits the gradient of a later reshape wrongly where all three axes of
        # the mesh are wider than 1.
        return rows_apart(x)


class StcConnector(nnx.Module):
    """The connector: RegStage per frame, Conv3d over time and space, RegStage, two-layer MLP."""

    def __init__(
        self,
        config: StcConfig,
        *,
        dtypes: Dtypes = Dtypes(),
        rngs: nnx.Rngs,
        remat: str = "none",
    ):
        d = config.hidden_size
        args = dict(dtypes=dtypes, rngs=rngs)
        self.config = config
        self.s1 = RegStage(config.depth, config.mm_hidden_size, d, remat=remat, **args)
        self.sampler = conv(d, d, (2, 2, 2), padding=config.padding, bias=True, **args)
        self.s2 = RegStage(config.depth, d, d, remat=remat, **args)
        self.readout_0 = linear(d, d, ("embed", "mlp"), bias=True, **args)
        self.readout_2 = linear(d, d, ("mlp", "embed"), bias=True, **args)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps [B, F, P, D_vision], P = side * side, to [B, F' * side' * side', D_llm]."""
        batch, frames, patches, width = features.shape
        side = round(patches**0.5)
        if side * side != patches:
            raise ValueError(f"stc: expected a square number of patches, got {patches}")
        x = self.s1(features.reshape(batch * frames, side, side, width))
        x = jax.nn.silu(self.sampler(x.reshape(batch, frames, side, side, -1)))
        _, t, h, w, d = x.shape
        x = self.s2(x.reshape(batch * t, h, w, d)).reshape(batch, t * h * w, d)
        return self.readout_2(activation("gelu")(self.readout_0(x)))
