"""Mamba-1 (transformers `MambaModel`): a scan over sequences and a recurrent one-token step."""

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
    """The fields of transformers' MambaConfig; the defaults are mamba-370m.

    Raises ValueError for a size below 1.
    """

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
        """Reads a config.json; raises ValueError for an activation other than SiLU."""
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


# Defaults of transformers, for config.json files that leave fields out.
HF_DEFAULTS = dict(vocab_size=50280, hidden_size=768, num_hidden_layers=32)


class MambaState(NamedTuple):
    """The recurrent state of all layers.

    conv [L, B, K, E]: the convolution's last inputs, oldest first; ssm float32[L, B, E, N].
    """

    conv: jax.Array
    ssm: jax.Array


def on_flat(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """Applies a layer to [..., D] as [tokens, D]: gradients of 3-D products are slow on CPU."""
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
        # Lets states tell of distant tokens: a token 27 positions back accounted for 1 % of an
        # output's variation with 1/sqrt(e), and for 15 % with this.
        std = 4 / math.sqrt(e)
        self.x_proj = linear(e, r + 2 * n, ("mlp", None), bias=False, std=std, **args)
        self.dt_proj = linear(r, e, (None, "mlp"), bias=True, std=r**-0.5, **args)
        # softplus(bias) is log-uniform in [1e-3, 1e-1], as mamba_ssm initialises it; below, the
        # inverse of softplus.
        low, high = math.log(1e-3), math.log(1e-1)
        dt = jnp.exp(jax.random.uniform(rngs.params(), (e,)) * (high - low) + low)
        self.dt_proj.bias.set_value((dt + jnp.log(-jnp.expm1(-dt))).astype(dtypes.param))
        # A = -(1, ..., N) in every channel (S4D-Real). Its logarithm is trained, so that A stays
        # negative and states decay.
        a = jnp.broadcast_to(jnp.log(jnp.arange(1, n + 1, dtype=jnp.float32)), (e, n))
        self.A_log = nnx.Param(a.astype(dtypes.param), out_sharding=("mlp", None))
        self.D = nnx.Param(jnp.ones((e,), dtypes.param), out_sharding=("mlp",))
        std = 1 / math.sqrt(e * config.num_hidden_layers)
        self.out_proj = linear(e, d, ("mlp", "embed"), bias=config.use_bias, std=std, **args)

    def scan_inputs(self, x: jax.Array):
        """Computes float32 dt [..., E], B and C [..., N] from the convolution's output [..., E]."""
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
        """Maps x [B, L, D] and state (conv [B, K, E], ssm [B, E, N]) to an output and a new state.

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
        if lengths is not None:  # dt = 0 leaves the state unchanged: it decays by exp(0)
            dt = jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], dt, 0)
        # The scan runs in float32: rounding errors of a recurrence add up along the sequence.
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
    """The model: embeddings, stacked layers with float32 residuals, final norm.

    It is causal, so padding on the right never changes what precedes it.
    """

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
        """Reads int32[B, L] after what `state` has seen; returns hidden [B, L, D] and a new state.

        `lengths` int32[B] counts a row's real tokens (default: all); the new state is the one after
        the last of them. `resets` bool[B, L] is True at the first token of a conversation, which
        then sees nothing of what precedes it in the row. L = 1 takes one recurrent step. With
        `with_layers` it also returns the layers' outputs [L, B, T, D].
        """

        def body(layer, x, layer_state):
            y, new = layer.mixer(layer.norm(x), tuple(layer_state), lengths, resets)
            x = x + y.astype(jnp.float32)  # as `residual_in_fp32` of the released configs
            return x, (MambaState(*new), x if with_layers else None)

        if lengths is not None and resets is not None:  # resets in the padding would clear states
            resets = resets & (jnp.arange(tokens.shape[1]) < lengths[:, None])
        x = self.embeddings(tokens).astype(jnp.float32)
        x, (state, outputs) = scan_layers(self.layers, body, x, state, remat=self.remat)
        hidden = self.norm_f(x)
        return (hidden, state, outputs) if with_layers else (hidden, state)

    def __call__(self, tokens: jax.Array, resets: jax.Array | None = None) -> jax.Array:
        """Maps int32[B, L] to [B, L, D] after the final norm; `resets` as in `extend`."""
        return self.extend(tokens, self.empty_state(tokens.shape[0]), resets=resets)[0]
