"""Tests that a stage's programs are compiled ahead, and none of them twice."""

import collections
import logging
import re

import jax
import pytest

from mm_jax.models.sharding import make_mesh
from mm_jax.run.ahead import Ahead, compile_for
from tests.support.runs import letters, train

COMPILED = re.compile(r"Finished XLA compilation of jit\((\w+)\)")
ROWS = {"data": 2, "fsdp": 4, "tensor": 1}
ALL = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture
def compiled(caplog):
    """Returns how often every function is compiled."""
    jax.config.update("jax_log_compiles", True)  # in all threads
    with caplog.at_level(logging.WARNING, logger="jax"):
        yield lambda: collections.Counter(
            found[1] for r in caplog.records if (found := COMPILED.match(r.getMessage()))
        )
    jax.config.update("jax_log_compiles", False)


def test_supervised_programs_are_compiled_once(config, tmp_path, compiled):
    config.mesh.update(ALL)
    config.model.parts = ("audio", "compressor")
    config.stages = ("sft",)
    config.data.shapes = 2
    config.stage.sft.update(steps=3, batch_size=8, eval_every=2, select_by="labels")
    train(config, tmp_path)
    found = compiled()
    shapes = found["train_step"]
    assert 1 <= shapes <= 2
    assert found["validation_step"] == 1  # half as many shapes
    assert 1 <= found["_score_rows"] <= 2


@pytest.mark.parametrize(("objective", "mesh"), [("grpo", ROWS), ("ppo", ALL)])
def test_reinforcement_programs_are_compiled_once(config, tmp_path, compiled, mesh, objective):
    config.mesh.update(mesh)
    config.model.parts = ()
    config.data.shapes = 1
    config.stages = ("sft",)
    stage = config.stage.sft
    stage.update(objective=objective, steps=2, batch_size=16, eval_examples=8, select_by="loss")
    stage.trainable = ("language_model",)
    stage.label_weight = 1.0
    # Replies of a random model never end, so that all responses have the most tokens.
    stage.rl.update(group=2, max_new_tokens=8, truncated="keep", chunks=1, minibatches=2)
    stage.rl.length_window = (0, 0)
    config.reward.update(trust=0.0, similarity=0.0, function=f"{letters.__module__}:letters")
    train(config, tmp_path)
    found = compiled()
    assert {found[name] for name in ("read", "score", "update", "_decode")} == {1}


def test_an_error_of_a_compilation_is_raised():
    def wrong(x):
        raise ValueError("no such program")

    told = []
    ahead = Ahead(make_mesh(ALL), told.append)
    x = jax.ShapeDtypeStruct((2,), "float32")
    programs = [ahead.add(compile_for, jax.jit(f), x) for f in (lambda x: x + 1, wrong)]
    with pytest.raises(ValueError, match="no such program"):
        ahead.wait(programs)
    ahead.close()
    assert told[0].startswith("compiling, ")
