"""Matrix products of dense layers, in the form that is fast where they run."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp

_stands_for_gpu = False


@contextlib.contextmanager
def standing_for_gpu(yes: bool = True):
    """Traces what a GPU would compile: for `plan`, whose CPU stands in for GPUs."""
    global _stands_for_gpu
    before, _stands_for_gpu = _stands_for_gpu, yes
    try:
        yield
    finally:
        _stands_for_gpu = before


def needs_float32_result(dtype) -> bool:
    """Says whether products of this type are fast only if their result is float32: bfloat16 on a
    CPU, where XLA converts whole arrays for whatever it cannot do in bfloat16."""
    return dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and not _stands_for_gpu


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes x [..., I] times kernel [I, O], both of one type, which the result has."""
    # A CPU's bfloat16 units (AMX) give float32. Asked for bfloat16, XLA converts both operands and
    # multiplies in float32, at a fifth of the speed; GPUs round while they store.
    return _rounded(x, kernel) if needs_float32_result(x.dtype) else x @ kernel


def dot_general(x: jax.Array, kernel: jax.Array, *_, **__) -> jax.Array:
    """Multiplies for `nnx.Linear`: the last axis of x with the first of the kernel."""
    return product(x, kernel)


@jax.custom_vjp
def _rounded(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes `product` in float32 and rounds it, and its gradients alike."""
    return _contract(x, x.ndim - 1, kernel, 0)


def _forward(x, kernel):
    return _rounded(x, kernel), (x, kernel)


def _backward(saved, d_y):
    x, kernel = saved
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    if rows.shape[1] <= d_rows.shape[1]:
        d_kernel = _contract(_columns(rows), 1, d_rows, 0)
    else:
        d_kernel = _contract(_columns(d_rows), 1, rows, 0).T
    return _contract(d_y, d_y.ndim - 1, kernel, 1), d_kernel


def _columns(a: jax.Array) -> jax.Array:
    """Transposes a [M, N] into an array of its own.

    XLA makes a plain transpose part of the product, and that form it multiplies in float32.
    """
    half = a.shape[1] // 2
    return jnp.concatenate([a[:, :half].T, a[:, half:].T])


def _contract(a: jax.Array, a_axis: int, b: jax.Array, b_axis: int) -> jax.Array:
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32).astype(a.dtype)


_rounded.defvjp(_forward, _backward)
