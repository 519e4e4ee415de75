"""Provides shared fixtures: 8 virtual CPU devices, a small synthetic data set, a tiny config."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time: a cold suite takes 21 % less without LLVM's
# optimisations, and programs compile in a third less time without MLIR's fusion emitters.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
cache = os.path.join(os.path.expanduser("~"), ".cache", "mm_jax", "xla-tests")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import pathlib
import shutil
import tempfile
import types

MODULES = tempfile.TemporaryDirectory()  # of this process: the code of exported folders
os.environ["HF_MODULES_CACHE"] = MODULES.name

import jax
import pytest
from filelock import FileLock

from mm_jax.__main__ import parse
from mm_jax.commands import prepare
from mm_jax.config.load import load_config
from tests.support.runs import train

jax.config.update("jax_default_matmul_precision", "highest")

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def run_prepare(*arguments: str) -> pathlib.Path:
    """Runs `prepare` as on the command line; returns the built folder."""
    args, _ = parse(["prepare", *arguments])
    prepare.main(args, [])
    return prepare.request_of(args).folder


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> types.SimpleNamespace:
    """Builds a synthetic data set of 24 dialogues once for all workers: (folder, raw folder)."""
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    data = base / "synthetic_data"
    arguments = [
        "--dataset=synthetic",
        f"--data_dir={data}",
        "--size=24",
        "--num_frames=4",
        "--image_size=32",
    ]
    folder = prepare.request_of(parse(["prepare", *arguments])[0]).folder
    with FileLock(str(base / "synthetic.lock")):
        if not folder.exists():
            run_prepare(*arguments)
    return types.SimpleNamespace(folder=folder, raw=data / "synthetic" / "raw_n24_seed0")


def tiny_config(folder: pathlib.Path):
    """Returns a smaller demo config: every part of the network, a mesh of one device."""
    c = load_config(str(ROOT / "configs" / "demo.py"))
    c.data.folder = str(folder)
    c.data.vocab_size = 400
    c.data.shapes = 1
    c.model.llm.update(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    c.model.vision.update(hidden_size=24, intermediate_size=32, num_hidden_layers=2, image_size=32)
    c.model.audio.update(
        embed_dim=16, encoder_layers=1, encoder_embed_dim=24, encoder_ffn_embed_dim=32
    )
    c.model.compressor.update(hidden_size=24, state_size=4, num_hidden_layers=1)
    c.model.connector_depth = 1
    c.mesh.update(data=8, fsdp=1, tensor=1)
    c.stages = ("utterances", "sft")
    for name in c.stages:
        c.stage[name].update(batch_size=8, steps=2, epochs=1.0, eval_examples=8)
        c.stage[name].eval_reconstructions = 0
    c.stage.sft.select_by = "loss"
    c.log_every = 1
    c.predict.update(batch_size=8, max_new_tokens=6)
    return c


@pytest.fixture(scope="session")
def trained(synthetic, tmp_path_factory) -> pathlib.Path:
    """Trains one step of SFT once for all workers; its run folder must not be written into."""
    base = synthetic.folder.parents[3]
    with FileLock(str(base / "trained.lock")):
        workdir = base / "trained"
        if not (workdir / "stages.json").exists():
            config = tiny_config(synthetic.folder)
            config.stages = ("sft",)
            config.stage.sft.steps = 1
            train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> pathlib.Path:
    """Copies the trained run for the tests of a module."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("copy") / "run")


@pytest.fixture
def config(synthetic):
    return tiny_config(synthetic.folder)
