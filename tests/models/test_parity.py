"""Tests every component against the reference's golden values (tools/check_parity.py)."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import GOLDEN, ROOT
from tools import check_parity


@pytest.mark.parametrize("component", [*check_parity.COMPONENTS, *check_parity.OPTIONAL])
def test_component_agrees_with_the_reference(component):
    results = check_parity.check(GOLDEN, [component])
    assert len(results) >= 1
    failed = [(r.name, r.error, r.tolerance) for r in results if not r.passed]
    assert not failed


def test_tool_exits_with_an_error_for_changed_weights_and_missing_components(tmp_path):
    shutil.copytree(GOLDEN / "stc", tmp_path / "stc")
    weights = load_file(tmp_path / "stc" / "weights.safetensors")
    weights["readout.0.bias"] = weights["readout.0.bias"] + np.float32(1e-2)
    save_file(weights, tmp_path / "stc" / "weights.safetensors")
    command = [sys.executable, "tools/check_parity.py", "--golden", str(tmp_path)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json"), "--components", "stc", "mamba"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    results = {r["name"]: r for r in json.loads((tmp_path / "out.json").read_text())}
    assert not results["mamba"]["passed"]
    assert results["mamba"]["tolerance"] == "component is missing"
    assert not results["stc/b1_t2_n49_output"]["passed"]
    assert "FAIL" in done.stdout
