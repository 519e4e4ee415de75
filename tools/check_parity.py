"""Compares every network component with golden values of the reference implementation.

    python tools/check_parity.py --golden DIR [--json OUT]

DIR holds one folder per component (config.json, weights*.safetensors, io.npz); sizes, shapes and
cases are read from them. Prints name, largest error, tolerance and result of every comparison;
exits with 1 if one fails or a component is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from tools.parity.compare import Component, Result
from tools.parity.language import check_compressor, check_losses, check_mamba, check_qwen2
from tools.parity.towers import check_audio_frontend, check_beats, check_siglip, check_stc
from tools.parity.whole import check_multimood_full

jax.config.update("jax_default_matmul_precision", "highest")

COMPONENTS = {
    "audio_frontend": check_audio_frontend,
    "beats": check_beats,
    "siglip": check_siglip,
    "stc": check_stc,
    "mamba": check_mamba,
    "compressor": check_compressor,
    "qwen2": check_qwen2,
    "multimood_full": check_multimood_full,
}
OPTIONAL = {"losses": check_losses}


def check(golden: pathlib.Path, names: list[str]) -> list[Result]:
    """Runs all comparisons of the named components; a missing folder is a failed result."""
    results = []
    for name in names:
        folder = golden / name
        if not (folder / "io.npz").is_file():
            if name in COMPONENTS:
                results.append(Result(name, float("nan"), "component is missing", False))
            continue
        component_check = {**COMPONENTS, **OPTIONAL}[name]
        try:
            found = list(component_check(Component(folder)))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            message = f"{type(error).__name__}: {error}"
            found = [Result("could not be run", float("nan"), message, False)]
        if not found:
            found = [Result("nothing to compare", float("nan"), "no known case in io.npz", False)]
        results += [dataclasses.replace(r, name=f"{name}/{r.name}") for r in found]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--golden", required=True, type=pathlib.Path, help="folder of components")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    parser.add_argument(
        "--components",
        nargs="*",
        default=[*COMPONENTS, *OPTIONAL],
        choices=[*COMPONENTS, *OPTIONAL],
        help="only these (default: all)",
    )
    args = parser.parse_args()
    if not args.golden.is_dir():
        parser.error(f"--golden: {args.golden} is not a folder")
    results = check(args.golden, args.components)
    width = max(len(r.name) for r in results)
    for r in results:
        print(f"{r.name:<{width}}  {r.error:9.2e}  {'pass' if r.passed else 'FAIL'}  {r.tolerance}")
    failed = [r.name for r in results if not r.passed]
    print(f"\n{len(results) - len(failed)} of {len(results)} comparisons pass")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
