"""Opens and resumes run folders, and records finished stages and commands in them."""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import json
import logging
import pathlib
import shlex
import shutil
from collections.abc import Iterator, Sequence

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import read_json, write_whole
from mm_jax.config.load import flatten, read_config, save_config
from mm_jax.config.schema import Config

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
STAGES_FILE = "stages.json"
MEDIA_FILE = "media_spec.json"
COMMANDS_FILE = "commands.jsonl"
LOCK_FILE = ".lock"  # see lock.py
IMPORTED = "imported"  # the stage of a run folder whose weights were not trained here

# Fields that a resumed run may change: where and how it runs, not what it computes. (With another
# mesh or accumulation sums run in another order: results agree up to round-off and dropout masks.)
MAY_CHANGE = (
    "mesh.*",
    "stage.*.accumulation",
    "stage.*.checkpoint_every",
    "model.remat",
    "data.reader_threads",
    "data.reader_processes",
    "data.prefetch",
    "log_every",
    "profile_steps",
    "keep_checkpoints",
    "predict.*",
    "reward.judge.base_url",
    "reward.second_judge.base_url",
    "reward.similarity_url",
    "reward.limits.*",
    "reward.failure_limit",
    "reward.function_timeout",
)


def open_workdir(config: Config, workdir: pathlib.Path, resume: bool, overwrite: bool) -> None:
    """Creates or resumes a run folder; never deletes a folder that holds anything else."""
    saved = workdir / CONFIG_FILE
    inside = [p for p in workdir.iterdir() if p.name != LOCK_FILE] if workdir.exists() else []
    if inside:
        if overwrite:
            require(saved.is_file(), f"--overwrite: {workdir} is not a run folder; not deleted")
            for path in inside:  # not the folder itself, which may be a link
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        elif not resume:
            raise ConfigError(f"--workdir: {workdir} is not empty; pass --resume or --overwrite")
    if resume and saved.is_file():
        before = read_config(saved)
        old, new = flatten(before.model_dump()), flatten(config.model_dump())
        changed = sorted(k for k in {**old, **new} if old.get(k) != new.get(k))
        free = MAY_CHANGE + added_stages(before, config)
        fixed = [k for k in changed if not any(fnmatch.fnmatch(k, p) for p in free)]
        require(
            not fixed,
            f"--resume: the config differs from {saved} in {fixed}; only {', '.join(MAY_CHANGE)} "
            "may change, and stages may be added at the end",
        )
        for key in changed:
            log.info("--resume: %s changed from %s to %s", key, old.get(key), new.get(key))
    workdir.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def added_stages(before: Config, config: Config) -> tuple[str, ...]:
    """Returns patterns of the fields that come with the stages added after those of `before`."""
    old, new = before.stages, config.stages
    if new[: len(old)] != old or len(new) == len(old):
        return ()
    patterns = [f"stage.{name}.*" for name in new[len(old) :]]
    if not any(before.stage[name].reinforces for name in old):
        patterns.append("reward.*")  # no earlier stage has used it
    return ("stages", *patterns)


def timestamp() -> str:
    """Returns the time now, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def record_command(workdir: pathlib.Path, argv: Sequence[str]) -> None:
    """Records a command in an existing run folder, for its report."""
    if workdir.is_dir():
        entry = {"date": timestamp(), "command": f"python -m mm_jax {shlex.join(argv)}"}
        with open(workdir / COMMANDS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@contextlib.contextmanager
def recorded(workdir: pathlib.Path, argv: Sequence[str]) -> Iterator[None]:
    """Records a command for the report that it may write itself; one that fails leaves no trace."""
    path = workdir / COMMANDS_FILE
    record_command(workdir, argv)
    own = path.read_text().splitlines()[-1:] if path.is_file() else []
    try:
        yield
    except BaseException:
        if own:  # others may have recorded theirs meanwhile
            lines = path.read_text().splitlines()
            lines.reverse()
            lines.remove(own[0])
            write_whole(path, "".join(f"{line}\n" for line in reversed(lines)))
        raise


def read_commands(workdir: pathlib.Path) -> list[dict[str, str]]:
    """Lists the {"date", "command"} of the commands run on a folder, oldest first."""
    path = workdir / COMMANDS_FILE
    return [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []


def finished_stage(config: Config, workdir: pathlib.Path, name: str | None, flag: str) -> str:
    """Checks stage `name`, or picks the last finished stage that trained the model itself (not a
    reward model). Raises ConfigError, naming `flag` as the source of the run folder."""
    finished = read_stages(workdir)
    able = [s for s in config.stages if config.stage[s].objective != "preference"]
    name = name or next((s for s in reversed(able) if s in finished), None)
    require(
        name is not None,
        f"{flag}: no stage of {workdir} is finished; continue with `train --resume`, or name "
        "--stage and --step",
    )
    require(name in able, f"--stage: expected one of {able}, got {name!r}")
    return name


def read_stages(workdir: pathlib.Path) -> dict[str, int]:
    """Maps each finished stage to its best step."""
    path = workdir / STAGES_FILE
    return read_json(path) if path.is_file() else {}


def write_stages(workdir: pathlib.Path, finished: dict[str, int]) -> None:
    write_whole(workdir / STAGES_FILE, json.dumps(finished, indent=1))
