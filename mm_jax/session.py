"""A run folder and the model in it, as every command needs them."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from ml_collections import ConfigDict

from mm_jax import build
from mm_jax.config import ConfigError
from mm_jax.evaluation.predict import Predictor
from mm_jax.training.checkpoint import Checkpoints
from mm_jax.training.sharding import make_mesh
from mm_jax.training.state import Abstract, abstract_model

STAGES_FILE = "stages.json"
MEDIA_FILE = "media_spec.json"


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
        tok = build.run_tokenizer(config, workdir)
        model_config = build.model_config(config, tok)
        create = build.create_model(config, model_config)
        try:
            mesh = make_mesh(config.mesh.to_dict())
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return cls(
            config,
            workdir,
            tok,
            model_config,
            build.prompter(config, model_config, tok),
            abstract_model(create, mesh),
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

    def stage_params(self, name: str, step: int | None = None, abstract: Abstract | None = None):
        """Parameters of a stage's checkpoint (the best by default), as those of `abstract`
        (default: the plain model)."""
        abstract = abstract or self.abstract
        checkpoints = Checkpoints(self.workdir / "checkpoints" / name)
        try:
            step = checkpoints.best_step() if step is None else step
            params = checkpoints.restore_params(step, abstract.params, abstract.shardings)
        finally:
            checkpoints.close()
        return params, step


def read_stages(workdir: pathlib.Path) -> dict[str, int]:
    """Finished stage -> its best step."""
    path = workdir / STAGES_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def write_stages(workdir: pathlib.Path, finished: dict[str, int]) -> None:
    partial = workdir / (STAGES_FILE + ".partial")
    partial.write_text(json.dumps(finished, indent=1))
    partial.rename(workdir / STAGES_FILE)
