"""Building blocks of all models: dense layers with logical axes, layer stacks, activations.

Modules name logical axes; `models.sharding.RULES` maps them to a mesh. Attributes are named as in
the Hugging Face modules, so that `weights.keymap` can derive checkpoint keys.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from mm_jax.ops.partition import rows_apart
from mm_jax.ops.products import dot_general, needs_float32_result

# Parameters carry logical axes only as metadata; the sharding rules place them on the mesh.
flax.config.update("flax_always_shard_variable", False)


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """The precision of a module: parameters are stored in `param`, arithmetic runs in `compute`."""

    param: Any = jnp.float32
    compute: Any = jnp.float32


def normal_init(axes: Sequence[str | None], std: float):
    return nnx.with_partitioning(nnx.initializers.normal(std), tuple(axes))


def zeros_init(axes: Sequence[str | None]):
    return nnx.with_partitioning(nnx.initializers.zeros_init(), tuple(axes))


def ones_init(axes: Sequence[str | None]):
    return nnx.with_partitioning(nnx.initializers.ones_init(), tuple(axes))


def linear(
    inputs: int,
    outputs: int,
    axes: tuple[str | None, str | None],
    *,
    bias: bool,
    dtypes: Dtypes,
    rngs: nnx.Rngs,
    std: float | None = None,
) -> nnx.Linear:
    """Builds a dense layer, kernel[inputs, outputs] on logical `axes`; default std 1/sqrt(in)."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=normal_init(axes, std or 1 / math.sqrt(inputs)),
        bias_init=zeros_init(axes[1:]),
        dtype=dtypes.compute,
        param_dtype=dtypes.param,
        dot_general=dot_general,
        rngs=rngs,
    )


def embedding(
    count: int, width: int, axes: tuple[str | None, str | None], *, dtypes: Dtypes, rngs: nnx.Rngs
) -> nnx.Embed:
    """Builds an embedding table [count, width] on logical `axes`, std 1/sqrt(width)."""
    return nnx.Embed(
        count,
        width,
        embedding_init=normal_init(axes, 1 / math.sqrt(width)),
        dtype=dtypes.compute,
        param_dtype=dtypes.param,
        rngs=rngs,
    )


class PatchConv(nnx.Conv):
    """Computes a convolution without overlapping windows as a matrix product over patches.

    On an H200, cuDNN took 2 to 3 times as long for 1x1 kernels. x [B, *spatial, inputs].
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        sizes = self.kernel_size
        x = jnp.pad(x.astype(self.dtype), [(0, 0), *self.padding, (0, 0)])
        counts = [n // k for n, k in zip(x.shape[1:-1], sizes, strict=True)]
        whole = (slice(None), *(slice(n * k) for n, k in zip(counts, sizes, strict=True)))
        split = [side for pair in zip(counts, sizes, strict=True) for side in pair]
        x = x[whole].reshape(len(x), *split, x.shape[-1])
        rank = len(sizes)
        order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
        patches = x.transpose(order).reshape(len(x) * math.prod(counts), -1)
        kernel = self.kernel[...].astype(self.dtype)
        y = patches @ kernel.reshape(-1, kernel.shape[-1])
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return y.reshape(len(x), *counts, -1)


def conv(
    inputs: int,
    outputs: int,
    sizes: Sequence[int],
    *,
    rngs: nnx.Rngs,
    dtypes: Dtypes,
    padding: int = 0,
    bias: bool = False,
) -> PatchConv:
    """Builds a channels-last convolution, kernel[*sizes, inputs, outputs], with stride `sizes`."""
    rank = len(sizes)
    return PatchConv(
        inputs,
        outputs,
        kernel_size=tuple(sizes),
        strides=tuple(sizes),
        padding=[(padding, padding)] * rank,
        use_bias=bias,
        kernel_init=normal_init(
            (None,) * rank + ("embed", "mlp"), 1 / math.sqrt(math.prod(sizes) * inputs)
        ),
        bias_init=zeros_init(("mlp",)),
        dtype=dtypes.compute,
        param_dtype=dtypes.param,
        rngs=rngs,
    )


class DepthwiseConv(nnx.Module):
    """A depthwise convolution over any number of axes, channels last: x [B, *spatial, C].

    Written as shifted multiply-adds, which XLA fuses; its gradient of a grouped convolution is far
    slower on CPU. kernel [*sizes, 1, C] as in `nnx.Conv`.
    """

    def __init__(
        self,
        channels: int,
        sizes: Sequence[int],
        *,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
        padding: int = 0,
        bias: bool = False,
    ):
        self.sizes, self.padding, self.dtype = tuple(sizes), padding, dtypes.compute
        std = 1 / math.sqrt(math.prod(sizes))
        value = nnx.initializers.normal(std)(rngs.params(), (*sizes, 1, channels), dtypes.param)
        self.kernel = nnx.Param(value, out_sharding=(*(None,) * len(sizes), None, "mlp"))
        zeros = nnx.Param(jnp.zeros((channels,), dtypes.param), out_sharding=("mlp",))
        self.bias = zeros if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        kernel = self.kernel[...].astype(self.dtype)
        p = self.padding
        x = jnp.pad(x, [(0, 0), *[(p, p)] * len(self.sizes), (0, 0)])
        out_shape = [n - k + 1 for n, k in zip(x.shape[1:-1], self.sizes, strict=True)]
        y = 0
        for offset in itertools.product(*map(range, self.sizes)):
            window = tuple(slice(o, o + n) for o, n in zip(offset, out_shape, strict=True))
            y = y + x[(slice(None), *window)] * kernel[(*offset, 0)]
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def layer_norm(width: int, eps: float, *, dtypes: Dtypes, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Builds a LayerNorm over the last axis, with statistics in float32."""
    return nnx.LayerNorm(
        width,
        epsilon=eps,
        use_fast_variance=False,
        scale_init=ones_init(("norm",)),
        bias_init=zeros_init(("norm",)),
        dtype=dtypes.compute,
        param_dtype=dtypes.param,
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """Computes x / rms(x) * scale in float32 (Qwen2 and Mamba)."""

    def __init__(self, width: int, eps: float, *, dtypes: Dtypes, rngs: nnx.Rngs):
        del rngs
        self.eps = eps
        self.dtype = dtypes.compute
        self.scale = nnx.Param(jnp.ones((width,), dtypes.param), out_sharding=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        # Broadcast by hand, for the reason given in `causal_conv`.
        scale = self.scale[...].astype(jnp.float32)
        return (h * jnp.broadcast_to(scale, h.shape)).astype(self.dtype)


# What the forward pass saves of each layer; the backward pass recomputes the rest.
REMAT = {
    "none": None,  # everything: no rematerialisation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of weight matrices
    "outputs": jax.checkpoint_policies.save_only_these_names("attention", "mlp"),
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input alone
}


def stack_layers(create: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs):
    """Builds one module whose parameters are stacked [count, ...] (logical axis "layers")."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs):
        return create(rngs)

    return make(rngs)


def unstack_layers(layers: nnx.Module, count: int) -> nnx.List:
    """Splits stacked layers into a list of `count` layers with separate parameters."""
    graph, state = nnx.split(layers)

    def sliced(variable, i):
        names = variable.get_metadata().get("out_sharding")
        own = variable.replace(variable.get_value()[i])
        if names is not None:
            own.set_metadata(out_sharding=tuple(names)[1:])
        return own

    flat = nnx.to_flat_state(state)
    return nnx.List(
        nnx.merge(graph, nnx.from_flat_state([(path, sliced(v, i)) for path, v in flat]))
        for i in range(count)
    )


# Scans over at most this many layers are unrolled: the backward pass then needs no stacked copies
# of what it saved of each layer, at the price of a longer compilation.
UNROLLED = 8


def scan_layers(
    layers: nnx.Module,
    body: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any = None,
    *,
    count: int | None = None,
    remat: str = "none",
    differentiated: bool = True,
) -> tuple[Any, Any]:
    """Runs `carry, out = body(layer, carry, input)` over stacked layers with `lax.scan`, or over a
    list of layers (inference) one by one.

    `inputs` are per-layer pytrees [L, ...]; `count` runs only the first layers; `remat` is a key of
    REMAT; what is not `differentiated` stays a loop, which compiles in less time.
    """
    if isinstance(layers, nnx.List):
        outs = []
        for i, layer in enumerate(list(layers)[:count]):
            own = jax.tree.map(lambda a: a[i], inputs)  # noqa: B023 (used at once)
            carry, out = body(layer, carry, own)
            outs.append(out)
        return carry, jax.tree.map(lambda *a: jnp.stack(a), *outs)
    graph, state = nnx.split(layers)
    if count is not None:
        state = jax.tree.map(lambda a: a[:count], state)

    def step(carry, xs):
        layer_state, layer_input = xs
        # Only the residual stream [B, ...]: carried caches have the layers as their first axis.
        if isinstance(carry, jax.Array):
            carry = rows_apart(carry)
        return body(nnx.merge(graph, layer_state), carry, layer_input)

    length = jax.tree.leaves(state)[0].shape[0]
    # In a loop, XLA would convert the whole stack of saved arrays again for every layer.
    unroll = differentiated and length <= UNROLLED
    unroll |= needs_float32_result(jax.tree.leaves(carry)[0].dtype)
    if remat != "none":
        # In a loop, jax.checkpoint needs no barriers against common-subexpression elimination.
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=unroll)
    return jax.lax.scan(step, carry, (state, inputs), unroll=length if unroll else 1)


def call_layer(layer: nnx.Module, x: jax.Array, remat: str) -> jax.Array:
    """Computes `layer(x)` of a single layer, with `remat` as in `scan_layers`."""
    x = rows_apart(x)
    if remat == "none":
        return layer(x)
    graph, state = nnx.split(layer)
    return jax.checkpoint(lambda s, x: nnx.merge(graph, s)(x), policy=REMAT[remat])(state, x)


def scale_gradient(x: jax.Array, ratio: float) -> jax.Array:
    """Returns x unchanged and multiplies its gradient by `ratio`."""
    return x if ratio == 1.0 else ratio * x + jax.lax.stop_gradient((1.0 - ratio) * x)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def from_fields(cls, values: dict):
    """Builds a config dataclass from a Hugging Face style dict, ignoring unknown keys.

    Raises ValueError for a value whose type is not the default's.
    """
    own = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, kind = values[field.name], type(field.default)
        fits = (int, float) if kind is float else kind
        if not isinstance(value, fits) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{field.name}: expected {kind.__name__}, got {value!r}")
        if kind is int and value < 0:
            raise ValueError(f"{field.name}: expected a positive number, got {value}")
        own[field.name] = value
    return cls(**own)
