"""A run folder and the model in it, as every command needs them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import shlex
from collections.abc import Sequence

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import read_json, write_whole
from mm_jax.generation.predictor import Predictor
from mm_jax.models.abstract import Abstract, abstract_model
from mm_jax.models.sharding import make_mesh
from mm_jax.run import build
from mm_jax.run.host_memory import give_back_compiler_memory
from mm_jax.training.checkpoint import Checkpoints

STAGES_FILE = "stages.json"
IMPORTED = "imported"  # the stage of a run folder whose weights were not trained here
MEDIA_FILE = "media_spec.json"
COMMANDS_FILE = "commands.jsonl"


def mesh_of(config: ConfigDict) -> Mesh:
    """Raises ConfigError."""
    try:
        return make_mesh(config.mesh.to_dict())
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclasses.dataclass
class Session:
    """Everything a command needs to work with the model of a run."""

    config: ConfigDict
    workdir: pathlib.Path
    tokenizer: object
    model_config: object
    prompter: object
    abstract: Abstract
    create: object

    @classmethod
    def open(cls, config: ConfigDict, workdir: pathlib.Path) -> Session:
        build.validate(config)
        give_back_compiler_memory()
        tok = build.run_tokenizer(config, workdir)
        model_config = build.model_config(config, tok)
        create = build.create_model(config, model_config)
        return cls(
            config,
            workdir,
            tok,
            model_config,
            build.prompter(config, model_config, tok),
            abstract_model(create, mesh_of(config)),
            create,
        )

    def predictor(self) -> Predictor:
        return Predictor(
            self.abstract,
            self.prompter,
            build.buckets(self.config),
            self.config.predict,
            self.config.seed,
        )

    def stage_params(
        self,
        name: str,
        step: int | None = None,
        abstract: Abstract | None = None,
        as_stored: bool = False,
    ):
        """Parameters of a stage's checkpoint (the best by default), as those of `abstract`
        (default: the plain model); `as_stored`: in the dtypes they were saved in."""
        abstract = abstract or self.abstract
        checkpoints = Checkpoints(self.workdir / "checkpoints" / name)
        try:
            step = checkpoints.best_step() if step is None else step
            params = checkpoints.restore_params(
                step, abstract.params, abstract.shardings, as_stored
            )
        finally:
            checkpoints.close()
        return params, step


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def record_command(run: pathlib.Path, argv: Sequence[str]) -> None:
    """Notes in a run folder that exists what was run on it, for its report."""
    if run.is_dir():
        entry = {"date": timestamp(), "command": f"python -m mm_jax {shlex.join(argv)}"}
        with open(run / COMMANDS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_commands(run: pathlib.Path) -> list[dict[str, str]]:
    """The {"date", "command"} of what was run on a folder, oldest first."""
    path = run / COMMANDS_FILE
    return [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []


def finished_stage(config: ConfigDict, workdir: pathlib.Path, name: str | None, flag: str) -> str:
    """Stage `name`, or the last finished one, that trained the model itself (no learned reward).
    Raises ConfigError, naming `flag` as what gave the run folder."""
    finished = read_stages(workdir)
    able = [s for s in config.stages if config.stage[s].objective != "preference"]
    name = name or next((s for s in reversed(able) if s in finished), None)
    require(
        name is not None,
        f"{flag}: no stage of {workdir} is finished; go on with `train --resume`, or name --stage "
        "and --step",
    )
    require(name in able, f"--stage: expected one of {able}, got {name!r}")
    return name


def read_stages(workdir: pathlib.Path) -> dict[str, int]:
    """Finished stage -> its best step."""
    path = workdir / STAGES_FILE
    return read_json(path) if path.is_file() else {}


def write_stages(workdir: pathlib.Path, finished: dict[str, int]) -> None:
    write_whole(workdir / STAGES_FILE, json.dumps(finished, indent=1))
