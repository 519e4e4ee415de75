"""Tests the counting of what collectives move: on a function whose traffic can be worked out by
hand, and on XLA's ways of writing groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mm_jax.config.errors import ConfigError
from mm_jax.models.sharding import make_mesh
from mm_jax.training import traffic
from mm_jax.training.traffic import Collective, Links

LAYERS, ROWS, WIDTH = 5, 64, 256


def program(sizes):
    """Returns what a training step of five layers, their weights sharded like the decoder's, moves
    on a mesh; the rows per device are the same on each."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    rows = NamedSharding(mesh, P(("data", "fsdp")))

    def layer(x, w):
        y = jnp.tanh(x @ w.astype(jnp.bfloat16))
        return jax.lax.with_sharding_constraint(y, rows), None

    def step(w, x):
        total = lambda w: jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32))  # noqa: E731
        return w - jax.grad(total)(w)

    where = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=where)
    count = ROWS // 4 * sizes["data"] * sizes["fsdp"]
    x = jax.ShapeDtypeStruct((count, WIDTH), jnp.bfloat16, sharding=rows)
    with jax.set_mesh(mesh):
        _, text = traffic.partitioned(jax.jit(step, out_shardings=where).lower(w, x))
    return {one[:2]: one for one in traffic.collectives(text, sizes)}


def test_a_step_of_five_layers():
    """Forward and backward gather a layer's bfloat16 weights over fsdp; backward scatters their
    gradient over fsdp and adds it up over data; tensor gathers and adds activations."""
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    found = program(sizes)
    kernel = WIDTH * WIDTH // 2 * 2  # bytes of bfloat16, on one of two tensor places
    states = ROWS // 4 * WIDTH * 2
    assert found == {
        key: Collective(*key, size, calls)
        for key, size, calls in (
            (("all-gather", ("fsdp",)), kernel, 2 * LAYERS),
            (("reduce-scatter", ("fsdp",)), kernel, LAYERS),
            (("all-reduce", ("data",)), kernel / 2, LAYERS),
            (("all-gather", ("tensor",)), states, LAYERS),
            (("all-reduce", ("tensor",)), states, LAYERS),
        )
    }
    assert found["all-gather", ("fsdp",)].moved(sizes) == kernel / 2 * 2 * LAYERS
    assert found["all-reduce", ("data",)].moved(sizes) == kernel / 2 * LAYERS


def test_a_wider_data_axis_changes_group_sizes_alone():
    small, wide = (program({"data": n, "fsdp": 2, "tensor": 1}) for n in (2, 4))
    assert small == wide
    assert traffic.widened(list(small.values()), 2) == list(wide.values())
    gradient = small["all-reduce", ("data",)]
    moved = [gradient.moved({"data": n, "fsdp": 2, "tensor": 1}) for n in (2, 4, 32)]
    np.testing.assert_allclose(np.array(moved) / moved[0], [1, 1.5, 31 / 16])


def test_what_is_gathered_from_all_rows_grows_with_the_data_axis():
    def gathered(n):
        sizes = {"data": n, "fsdp": 2, "tensor": 1}
        mesh = make_mesh(sizes, jax.devices()[: n * 2])
        rows, everywhere = (NamedSharding(mesh, P(a)) for a in (("data", "fsdp"), None))
        x = jax.ShapeDtypeStruct((512 * n * 2, 8), jnp.float32, sharding=rows)
        with jax.set_mesh(mesh):
            lowered = jax.jit(lambda x: x + 1, out_shardings=everywhere).lower(x)
        return traffic.collectives(traffic.partitioned(lowered)[1], sizes)

    small, wide = gathered(2), gathered(4)
    assert small == [Collective("all-gather", ("data", "fsdp"), 2048 * 8 * 4, 1)]
    assert traffic.widened(small, 2) == wide


def test_what_is_compiled_for_a_large_mesh():
    mesh = {"data": 64, "fsdp": 8, "tensor": 1}
    assert traffic.compiled_mesh(mesh) == {"data": 8, "fsdp": 8, "tensor": 1}
    assert traffic.compiled_mesh({"data": 1, "fsdp": 64, "tensor": 1})["fsdp"] == 64
    for bad in ({"data": 1, "fsdp": 128, "tensor": 1}, {"data": 9, "fsdp": 8, "tensor": 1}):
        with pytest.raises(ConfigError, match="--mesh: expected at most 64 devices"):
            traffic.compiled_mesh(bad)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[4,2]<=[4,2]T(1,0)", [[0, 2], [4, 6], [1, 3], [5, 7]]),
        ("[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (
            "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        (
            "mesh['a'=2,'b'=4], device_ids=([2,2,2]T(0,2,1)) {'b':(2)2}",
            [[0, 2], [1, 3], [4, 6], [5, 7]],
        ),
        ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_groups_in_every_form(written, groups):
    assert traffic._groups(f"%x), channel_id=1, replica_groups={written}, dimensions={{0}}", 8) == (
        groups
    )


def test_seconds_inside_and_between_hosts():
    links = Links(host_devices=8, inside=400e9, between=50e9)
    mesh = {"data": 2, "fsdp": 8, "tensor": 1}
    gather = Collective("all-gather", ("fsdp",), 8e9, 3)
    assert links.seconds(gather, mesh) == pytest.approx(3 * 7e9 / 400e9)
    # Each device has a peer on the other host.
    reduced = Collective("all-reduce", ("data",), 1e9, 1)
    assert links.seconds(reduced, mesh) == pytest.approx(2 * 0.5e9 / 50e9)
    # A group of 16 over two hosts: an eighth of half of the bytes by every device's card.
    wide = {"data": 1, "fsdp": 16, "tensor": 1}
    one = Collective("all-gather", ("fsdp",), 8e9, 1)
    assert links.seconds(one, wide) == pytest.approx(7e9 / 400e9 + 0.5e9 / 50e9)
    # In an all-to-all every device sends half of its own bytes to the other host.
    exchange = Collective("all-to-all", ("fsdp",), 1e9, 1)
    assert links.seconds(exchange, wide) == pytest.approx(0.875e9 / 400e9 + 0.5e9 / 50e9)
    # Groups of 12 on hosts of 8 are three parts of 4.
    uneven = {"data": 2, "fsdp": 12, "tensor": 1}
    expected = 6e9 / 400e9 + 8e9 * 2 / 3 / 4 / 50e9
    assert links.seconds(one, uneven) == pytest.approx(expected)


def test_a_loop_without_a_known_end_is_named():
    text = """HloModule m

%body (p: (s32[], f32[4096])) -> (s32[], f32[4096]) {
  %p = (s32[], f32[4096]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4096] get-tuple-element(%p), index=1
  %y = f32[4096] all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[4096]) tuple(%i, %y)
}

%until (p: (s32[], f32[4096])) -> pred[] {
  %p = (s32[], f32[4096]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=0
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[4096])) -> (s32[], f32[4096]) {
  %a = (s32[], f32[4096]) parameter(0)
  ROOT %loop = (s32[], f32[4096]) while(%a), condition=%until, body=%body
}
"""
    sizes = {"data": 2, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="the loop loop has collectives and no known end"):
        traffic.collectives(text, sizes)
    known = text.replace("%n = s32[] get-tuple-element(%p), index=0", "%n = s32[] constant(7)")
    (one,) = traffic.collectives(known, sizes)
    assert one == Collective("all-reduce", ("data",), 4 * 4096, 7)
    for old, new, message in (
        ("all-reduce(", "all-reduce-start(", "y is of an unknown kind: all-reduce-start"),
        ("{{0,1}}", "<0,1>", "replica groups in an unknown form: %x"),
        ("direction=LT", "direction=GT", "no known end"),
    ):
        with pytest.raises(ValueError, match=message):
            traffic.collectives(known.replace(old, new), sizes)
