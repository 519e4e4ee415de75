"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

import pathlib

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mm_jax.config.errors import ConfigError, require
from mm_jax.weights.tensors import summary


def check_target(name: str, dry_run: bool) -> None:
    """Raises ConfigError unless `name` can be a repository and the hub knows the token."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push: expected OWNER/NAME or NAME, got {name!r}: {error}") from error
    if dry_run:
        return
    require(
        huggingface_hub.get_token() is not None,
        "--push: expected a token that may write in the environment variable HF_TOKEN",
    )
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # offline, refused: the hub's own classes change often
        raise ConfigError(f"--push: the hub does not take the token: {summary(error)}") from error


def push(folder: pathlib.Path, name: str, public: bool, dry_run: bool) -> None:
    """Lists what a folder holds, and uploads it as repository `name` in one commit.

    A new repository is private unless `public`. What one that exists held before is removed:
    loaders would take older files of other names first. Raises ConfigError.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        print(f"  {path.stat().st_size / 1e6:12,.2f} MB  {path.relative_to(folder)}")
    total = sum(p.stat().st_size for p in files) / 1e6
    what = f"{len(files)} files, {total:,.2f} MB"
    if dry_run:
        print(f"dry run: {what} would go to {name}")
        return
    hub = huggingface_hub.HfApi()
    try:
        where = hub.create_repo(name, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=where.repo_id,
            folder_path=folder,
            commit_message=f"Upload {folder.name} by mm_jax",
            delete_patterns="*",
        )
    except Exception as error:  # offline, refused, full: the hub's own classes change often
        raise ConfigError(
            f"--push: {name}: {summary(error)}; the folder {folder} is complete, and "
            f"`hf upload {name} {folder} . --delete '*'` tries again"
        ) from error
    print(f"uploaded {what} to {where}")
