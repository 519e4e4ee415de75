"""LoRA on the language model's dense layers, over full-precision or quantised frozen kernels.

An adapted model keeps the plain model's parameters at their paths, with `lora_a` and `lora_b` next
to every adapted kernel (and `kernel_scale` next to a quantised one). `add_adapters` and `plain`
convert between the two, so that checkpoints, prediction and later stages need not know about LoRA.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mm_jax.config.stage import NF4_BLOCK, Lora
from mm_jax.ops.products import product

# The LLM's dense layers: attribute -> the module of a layer that has it.
TARGETS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
# The 16 levels of NormalFloat4: quantiles of a standard normal in [-1, 1] (QLoRA, appendix E).
NF4 = np.array(
    [-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0],
    np.float32,
)  # fmt: skip


class LoraLinear(nnx.Module):
    """Computes y = x W + bias + scale * (x A) B for a stacked dense layer, kernel [L, I, O]."""

    def __init__(self, base: nnx.Linear, config: Lora, rngs: nnx.Rngs):
        self.config, self.dtype = config, base.dtype
        kernel = base.kernel[...]
        layers, inputs, outputs = kernel.shape
        axes = base.kernel.get_metadata("out_sharding")
        if config.base == "none":
            self.kernel = base.kernel
        else:
            codes, scale = quantise(kernel, config.base)
            self.kernel = nnx.Param(codes, out_sharding=axes)
            self.kernel_scale = nnx.Param(scale, out_sharding=axes)
        self.bias = base.bias
        # Adapters are trained, so they are float32 whatever the frozen kernel is.
        a = jax.random.normal(rngs.params(), (layers, inputs, config.rank), jnp.float32)
        self.lora_a = nnx.Param(a / math.sqrt(inputs), out_sharding=(*axes[:2], None))
        b = jnp.zeros((layers, config.rank, outputs), jnp.float32)
        self.lora_b = nnx.Param(b, out_sharding=(axes[0], None, axes[2]))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps x [..., I] to [..., O] inside a scan, where parameters lack their layer axis."""
        x = x.astype(self.dtype)
        if self.config.base == "none":
            kernel = self.kernel[...].astype(self.dtype)
        else:
            # Here, inside the scan, so that only the layer at hand needs its full kernel.
            scale = self.kernel_scale[...]
            kernel = dequantise(self.kernel[...], scale, self.config.base, self.dtype)
        y = product(x, kernel)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if key is not None and self.config.dropout:
            kept = jax.random.bernoulli(key, 1 - self.config.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.config.dropout), 0)
        # Scaled on the narrow side: on the wide one it would be a pass over the whole output.
        low = product(x, self.lora_a[...].astype(self.dtype)) * self.config.scale
        return y + product(low, self.lora_b[...].astype(self.dtype))


def quantise(kernel: jax.Array, base: str) -> tuple[jax.Array, jax.Array]:
    """Quantises a kernel [..., I, O]; returns codes and scales.

    int8: int8[..., I, O], one scale per output column, float32[..., 1, O]. nf4: uint8[..., I/2, O]
    with two codes per byte (inputs 2i and 2i + 1) and one scale per block of 64 inputs,
    bfloat16[..., I/64, O]. Raises ValueError if I is not a multiple of 64 (nf4).
    """
    kernel = kernel.astype(jnp.float32)
    # The floor of both scales keeps columns and blocks of zeros from dividing by zero.
    if base == "int8":
        scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=-2, keepdims=True), 1e-12) / 127
        return jnp.round(kernel / scale).astype(jnp.int8), scale
    *lead, inputs, outputs = kernel.shape
    if inputs % NF4_BLOCK:
        raise ValueError(f"lora: base nf4: inputs {inputs} are not a multiple of {NF4_BLOCK}")
    blocks = kernel.reshape(*lead, inputs // NF4_BLOCK, NF4_BLOCK, outputs)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-2), 1e-12).astype(jnp.bfloat16)
    # The nearest level, measured with the rounded scale: the one that `dequantise` multiplies by.
    borders = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
    codes = jnp.searchsorted(borders, blocks / scale[..., None, :].astype(jnp.float32))
    codes = codes.astype(jnp.uint8).reshape(*lead, inputs // 2, 2, outputs)
    return codes[..., 0, :] | (codes[..., 1, :] << 4), scale


def dequantise(codes: jax.Array, scale: jax.Array, base: str, dtype) -> jax.Array:
    """Restores the kernel [..., I, O] from the codes and scales of `quantise`."""
    if base == "int8":
        return (codes.astype(jnp.float32) * scale).astype(dtype)
    *lead, half, outputs = codes.shape
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-2).reshape(*lead, 2 * half, outputs)
    values = jnp.asarray(NF4)[pairs].reshape(*lead, -1, NF4_BLOCK, outputs)
    values = values * scale[..., None, :].astype(jnp.float32)
    return values.reshape(*lead, 2 * half, outputs).astype(dtype)


def apply(layer: nnx.Linear | LoraLinear, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Applies a dense layer to x; `key` drives the dropout of an adapter."""
    return layer(x, key) if isinstance(layer, LoraLinear) else layer(x)


def add_adapters(model: nnx.Module, config: Lora, rngs: nnx.Rngs) -> nnx.Module:
    """Adds adapters to the language model of a MultiMood, in place.

    A is random and B zero, so that the model's outputs do not change.
    """
    layers = model.language_model.layers
    for name in config.targets:
        module = getattr(layers, TARGETS[name])
        setattr(module, name, LoraLinear(getattr(module, name), config, rngs))
    return model


def is_adapter(path: tuple) -> bool:
    return path[-1] in ("lora_a", "lora_b")


def plain(adapted: nnx.State, like: nnx.State, config: Lora, dtype) -> nnx.State:
    """Returns the parameters of the plain model `like`, with the adapters merged into the kernels.

    Kernels are merged in float32 and returned in `dtype`; all other parameters stay as they are.
    """
    flat = dict(nnx.to_flat_state(adapted))

    def value(path):
        parent, found = path[:-1], flat[path].get_value()
        if path[-1] != "kernel" or (*parent, "lora_a") not in flat:
            return found
        if config.base != "none":
            scale = flat[(*parent, "kernel_scale")].get_value()
            found = dequantise(found, scale, config.base, jnp.float32)
        a, b = (flat[(*parent, n)].get_value().astype(jnp.float32) for n in ("lora_a", "lora_b"))
        # In float32: added to a bfloat16 kernel, small updates would round away.
        update = jnp.einsum("lir,lro->lio", a, b) * config.scale
        return (found.astype(jnp.float32) + update).astype(dtype)

    paths = nnx.to_flat_state(like)
    return nnx.from_flat_state([(path, variable.replace(value(path))) for path, variable in paths])
