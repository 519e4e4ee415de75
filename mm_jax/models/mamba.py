"""Mamba-1 (transformers `MambaModel`): chunked scan over sequences, one-token recurrent step."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mm_jax.config.model import Compressor
from mm_jax.models.layers import (
    DepthwiseConv,
    Dtypes,
    RMSNorm,
    embedding,
    from_fields,
    linear,
    scan_layers,
    stack_layers,
)
from mm_jax.ops.selective_scan import causal_conv, selective_scan, selective_step

SIZES = Compressor()


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Field names of transformers' MambaConfig; defaults: mamba-370m. Raises ValueError for a size
    below 1."""

    vocab_size: int = 151647
    hidden_size: int = SIZES.hidden_size
    state_size: int = SIZES.state_size
    num_hidden_layers: int = SIZES.num_hidden_layers
    conv_kernel: int = SIZES.conv_kernel
    expand: int = SIZES.expand
    time_step_rank: int = SIZES.time_step_rank
    layer_norm_epsilon: float = SIZES.layer_norm_epsilon
    use_bias: bool = SIZES.use_bias
    use_conv_bias: bool = SIZES.use_conv_bias

    def __post_init__(self):
        if self.time_step_rank == 0:
            object.__setattr__(self, "time_step_rank", math.ceil(self.hidden_size / 16))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"mamba: {field.name}: expected at least 1, got {value}")

    @property
    def inner_size(self) -> int:
        return self.expand * self.hidden_size

    @classmethod
    def from_hf_config(cls, values: dict) -> MambaConfig:
        """Raises ValueError for another activation than SiLU."""
        values = {**HF_DEFAULTS, **values}
        if values.get("hidden_act", "silu") != "silu":
            raise ValueError(f"mamba: hidden_act: expected 'silu', got {values['hidden_act']!r}")
        if values.get("time_step_rank") == "auto":
            del values["time_step_rank"]
        return from_fields(cls, values)

    def to_hf_config(self) -> dict:
        return {
            "model_type": "mamba",
            "architectures": ["MambaForCausalLM"],
            "intermediate_size": self.inner_size,
            **dataclasses.asdict(self),
        }


# What a config.json that leaves them out means (transformers' own defaults).
HF_DEFAULTS = dict(vocab_size=50280, hidden_size=768, num_hidden_layers=32)


class MambaState(NamedTuple):
    """Recurrent state of all layers: the last inputs of the convolution [L, B, K, E] (oldest
    first) and the scan state float32[L, B, E, N]."""

    conv: jax.Array
    ssm: jax.Array


def on_flat(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """A dense layer on [..., D] as [tokens, D]: the gradients of 3-D products are slow on CPU."""
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class MambaMixer(nnx.Module):
    def __init__(self, config: MambaConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        d, e, n, r = (
            config.hidden_size,
            config.inner_size,
            config.state_size,
            config.time_step_rank,
        )
        args = dict(dtypes=dtypes, rngs=rngs)
        self.config = config
        self.in_proj = linear(d, 2 * e, ("embed", "mlp"), bias=config.use_bias, **args)
        self.conv1d = DepthwiseConv(e, (config.conv_kernel,), bias=config.use_conv_bias, **args)
        # With 1/sqrt(e) a token 27 places back was 1 % of what varies in an output, now 15 %.
        std = 4 / math.sqrt(e)
        self.x_proj = linear(e, r + 2 * n, ("mlp", None), bias=False, std=std, **args)
        self.dt_proj = linear(r, e, (None, "mlp"), bias=True, std=r**-0.5, **args)
        # softplus(bias) is log-uniform in [1e-3, 1e-1], as mamba_ssm initialises it.
        low, high = math.log(1e-3), math.log(1e-1)
        dt = jnp.exp(jax.random.uniform(rngs.params(), (e,)) * (high - low) + low)
        self.dt_proj.bias.set_value((dt + jnp.log(-jnp.expm1(-dt))).astype(dtypes.param))
        a = jnp.broadcast_to(jnp.log(jnp.arange(1, n + 1, dtype=jnp.float32)), (e, n))
        self.A_log = nnx.Param(a.astype(dtypes.param), out_sharding=("mlp", None))
        self.D = nnx.Param(jnp.ones((e,), dtypes.param), out_sharding=("mlp",))
        std = 1 / math.sqrt(e * config.num_hidden_layers)
        self.out_proj = linear(e, d, ("mlp", "embed"), bias=config.use_bias, std=std, **args)

    def scan_inputs(self, x: jax.Array):
        """x [..., E] after the convolution -> dt [..., E], B and C [..., N], float32."""
        n, r = self.config.state_size, self.config.time_step_rank
        dt, b, c = jnp.split(on_flat(self.x_proj, x), (r, r + n), axis=-1)
        dt = jax.nn.softplus(on_flat(self.dt_proj, dt).astype(jnp.float32))
        return dt, b.astype(jnp.float32), c.astype(jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        state: tuple[jax.Array, jax.Array],
        lengths: jax.Array | None = None,
        resets: jax.Array | None = None,
    ):
        """[B, L, D], (conv [B, K, E], ssm [B, E, N]) -> output [B, L, D] and the new state.

        `lengths` and `resets` as in `Mamba.extend`.
        """
        inner, gate = jnp.split(on_flat(self.in_proj, x), 2, axis=-1)
        conv_state, h = state
        kernel = self.conv1d.kernel[...][:, 0].astype(inner.dtype)
        bias = self.conv1d.bias
        bias = None if bias is None else bias[...].astype(inner.dtype)
        u, conv_state = causal_conv(inner, kernel, bias, conv_state, lengths, resets)
        u = jax.nn.silu(u)
        dt, b, c = self.scan_inputs(u)
        if lengths is not None:  # dt = 0 leaves the state as it is
            dt = jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], dt, 0)
        a = -jnp.exp(self.A_log[...].astype(jnp.float32))
        d = self.D[...].astype(jnp.float32)
        u32 = u.astype(jnp.float32)
        if x.shape[1] == 1 and resets is None:
            h, y = selective_step(h, u32[:, 0], dt[:, 0], a, b[:, 0], c[:, 0])
            y = (y + u32[:, 0] * d)[:, None]
        else:
            y, h = selective_scan(u32, dt, a, b, c, d, h, resets)
        out = on_flat(self.out_proj, y.astype(x.dtype) * jax.nn.silu(gate))
        return out, (conv_state, h)


class MambaLayer(nnx.Module):
    def __init__(self, config: MambaConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        args = dict(dtypes=dtypes, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, **args)
        self.mixer = MambaMixer(config, **args)


class Mamba(nnx.Module):
    """Embeddings, stacked layers with float32 residuals, final norm. Causal: padding on the right
    never changes what is before it."""

    def __init__(
        self,
        config: MambaConfig,
        *,
        dtypes: Dtypes = Dtypes(),
        rngs: nnx.Rngs,
        remat: str = "none",
    ):
        self.config = config
        self.remat = remat
        self.dtype = dtypes.compute
        self.embeddings = embedding(
            config.vocab_size,
            config.hidden_size,
            ("vocab_in", "embed_in"),
            dtypes=dtypes,
            rngs=rngs,
        )
        self.layers = stack_layers(
            lambda r: MambaLayer(config, dtypes=dtypes, rngs=r), config.num_hidden_layers, rngs
        )
        self.norm_f = RMSNorm(
            config.hidden_size, config.layer_norm_epsilon, dtypes=dtypes, rngs=rngs
        )

    def empty_state(self, batch: int) -> MambaState:
        c = self.config
        return MambaState(
            jnp.zeros((c.num_hidden_layers, batch, c.conv_kernel, c.inner_size), self.dtype),
            jnp.zeros((c.num_hidden_layers, batch, c.inner_size, c.state_size), jnp.float32),
        )

    def extend(
        self,
        tokens: jax.Array,
        state: MambaState,
        lengths: jax.Array | None = None,
        resets: jax.Array | None = None,
        with_layers: bool = False,
    ):
        """int32[B, L] after what `state` has seen -> hidden [B, L, D] and the new state.

        `lengths` int32[B]: real tokens of a row (default: all); the state is the one after the last
        of them. `resets` bool[B, L]: True at the first token of a conversation, which then knows
        nothing of what is before it in the row. L = 1 takes one recurrent step. With `with_layers`
        also the layers' outputs [L, B, T, D].
        """

        def body(layer, x, layer_state):
            y, new = layer.mixer(layer.norm(x), tuple(layer_state), lengths, resets)
            x = x + y.astype(jnp.float32)
            return x, (MambaState(*new), x if with_layers else None)

        if lengths is not None and resets is not None:  # those of the padding are none
            resets = resets & (jnp.arange(tokens.shape[1]) < lengths[:, None])
        x = self.embeddings(tokens).astype(jnp.float32)
        x, (state, outputs) = scan_layers(self.layers, body, x, state, remat=self.remat)
        hidden = self.norm_f(x)
        return (hidden, state, outputs) if with_layers else (hidden, state)

    def __call__(self, tokens: jax.Array, resets: jax.Array | None = None) -> jax.Array:
        """int32[B, L] -> [B, L, D] after the final norm; `resets` as in `extend`."""
        return self.extend(tokens, self.empty_state(tokens.shape[0]), resets=resets)[0]
