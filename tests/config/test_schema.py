"""Tests that the schema agrees with the code's tables, its page, and the rules of the tests."""

import re
import typing

import pytest

from mm_jax.config.model import Model
from mm_jax.config.schema import Data
from mm_jax.config.stage import Stage, Target
from mm_jax.data.history import HISTORY_REGIMES
from mm_jax.data.prompts import SYSTEM
from mm_jax.models.layers import REMAT
from mm_jax.models.lora import TARGETS
from mm_jax.models.multimood import AUDIO_PROJECTORS
from mm_jax.stages import TRAIN
from tests.conftest import ROOT
from tools.config_reference import TARGET, reference


def choices(section, field):
    return typing.get_args(section.model_fields[field].annotation)


def test_the_page_of_all_fields_is_fresh():
    assert TARGET.read_text() == reference(), "run `make docs`"


@pytest.mark.parametrize(
    ("declared", "table"),
    [
        (choices(Data, "template"), SYSTEM),
        (choices(Data, "history_labels"), HISTORY_REGIMES),
        (choices(Model, "remat"), REMAT),
        (choices(Model, "audio_projector_type"), AUDIO_PROJECTORS),
        (typing.get_args(Target), TARGETS),
    ],
)
def test_choices_are_those_of_the_code(declared, table):
    assert set(declared) == set(table)


def test_every_objective_has_its_trainer():
    assert set(choices(Stage, "objective")) == set(TRAIN)


def test_no_test_imports_a_test():
    pattern = re.compile(r"^\s*(?:from|import) (tests\.[\w.]*test_\w+)", re.MULTILINE)
    found = {p.name: pattern.findall(p.read_text()) for p in (ROOT / "tests").rglob("*.py")}
    assert not {name: modules for name, modules in found.items() if modules}


def test_files_that_the_architecture_page_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"[a-z_0-9/]+\.py\b", text)) - {"__init__.py"}
    named = {name for name in named if not name.startswith("_dataset_builder")}
    listed = {p.relative_to(ROOT / "mm_jax").as_posix() for p in (ROOT / "mm_jax").rglob("*.py")}
    for folder in ("configs", "tools", "tests"):
        listed |= {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py")}
    short = {p.rsplit("/")[-1] for p in listed}  # a row names files next to its first one
    assert len(named) > 40
    assert not {name for name in named if name not in (listed if "/" in name else short)}
