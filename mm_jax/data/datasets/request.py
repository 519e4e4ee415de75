"""Describes which data set to build, from which raw files, and where."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from mm_jax.config.errors import ConfigError, one_of, require
from mm_jax.config.files import read_json
from mm_jax.data.datasets.common import BUILD_REPORT, BuilderConfig, SampleBuilder
from mm_jax.data.labels import built_in
from mm_jax.data.media import Clip, MediaSpec

if TYPE_CHECKING:
    from mm_jax.data.datasets.corpus import CorpusBuilder

DATASETS = ("dialogues", "mesc", "dfew", "meld", "esconv", "cremad", "ravdess", "iemocap")
DATASETS += ("synthetic",)


@dataclasses.dataclass(frozen=True)
class DataRequest:
    """The options of `prepare`; its help explains each of them."""

    dataset: str
    data_dir: pathlib.Path = pathlib.Path("data")
    raw: pathlib.Path | None = None
    media: pathlib.Path | None = None
    num_frames: int = 8
    image_size: int = 384
    max_audio_seconds: float = 30.0
    audio_mode: str = "whole"
    frame_codec: str = "webp"
    clues: bool = False
    check_counts: bool = True
    fold: int = 1
    classes: int = 4
    val_share: float = 0.1
    size: int = 480
    seed: int = 0
    transcribe: str | None = None
    language: str | None = None

    @property
    def folder(self) -> pathlib.Path:
        """Returns the folder where the data set is or will be. Raises as `builder` does."""
        return self.folder_of(*self.builder())

    def folder_of(self, builder: type[SampleBuilder], config: BuilderConfig) -> pathlib.Path:
        return self.data_dir / self.dataset / config.name / str(builder.VERSION)

    def builder(self) -> tuple[type[SampleBuilder], BuilderConfig]:
        """Returns the TFDS builder and its config; the config's name distinguishes builds.

        Raises ConfigError.
        """
        try:
            spec = MediaSpec(
                self.num_frames, self.image_size, self.max_audio_seconds, self.audio_mode
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        shape = f"f{spec.num_frames}_s{spec.image_size}"
        shape += "_released" if spec.audio_mode == "released" else ""
        shape += f"_{self.frame_codec}" if self.frame_codec != DataRequest.frame_codec else ""
        raw, media = self.raw, self.media
        space = built_in("dfew" if self.dataset == "dfew" else "mesc")
        if self.dataset != "synthetic":
            require(raw is not None, f"--raw: {self.dataset} needs the folder of its raw files")
            require(raw.is_dir(), f"--raw: {raw} is not a folder")
        for option, given, belongs in (
            ("--media", media is not None, ("mesc", "meld")),
            ("--clues", self.clues, ("mesc",)),
            ("--fold", self.fold != 1, ("dfew", "dialogues", "iemocap")),
            ("--classes", self.classes != DataRequest.classes, ("iemocap",)),
            ("--size", self.size != DataRequest.size, ("synthetic",)),
        ):
            require(
                not given or self.dataset in belongs,
                f"{option} belongs to {', '.join(belongs)}, not to {self.dataset}",
            )
        if self.dataset in ("dfew", "iemocap"):
            one_of("--fold", self.fold, range(1, 6))
        if self.dataset == "mesc":
            from mm_jax.data.datasets.mesc.mesc_dataset_builder import Builder

            require(media is None or media.is_dir(), f"--media: {media} is not a folder")
            name = (shape if media else "text") + ("_clues" if self.clues else "")
            options = dict(clues=self.clues, check_counts=self.check_counts)
        elif self.dataset == "dfew":
            from mm_jax.data.datasets.dfew.dfew_dataset_builder import Builder

            require(
                0 < self.val_share < 1,
                f"--val_share: expected between 0 and 1, got {self.val_share}",
            )
            name, media = f"fold{self.fold}_{shape}", None
            options = dict(fold=self.fold, val_share=self.val_share, seed=self.seed)
        elif self.dataset == "synthetic":
            from mm_jax.data.datasets.synthetic.synthetic_dataset_builder import Builder

            require(self.size >= 10, f"--size: expected at least 10 dialogues, got {self.size}")
            source = f"n{self.size}_seed{self.seed}"
            name, media = f"{source}_{shape}", None
            raw = self.data_dir / "synthetic" / f"raw_{source}"
            options = dict(size=self.size, seed=self.seed)
        else:
            Builder = corpus_builder(self.dataset)
            require(
                0 < self.val_share < 0.5,
                f"--val_share: expected between 0 and 0.5, got {self.val_share}",
            )
            require(media is None or media.is_dir(), f"--media: {media} is not a folder")
            described = Builder.describe(self)
            space, media = described.space, described.media
            name = "_".join(filter(None, (described.name, shape if media else "text")))
            options = dict(fold=self.fold, val_share=self.val_share, seed=self.seed)
            options |= described.options
        if self.transcribe:
            require(
                self.dataset in ("dfew", "dialogues"),
                f"--transcribe: the utterances of {self.dataset} have their words",
            )
            name += "_words"
            options |= dict(transcribe=self.transcribe, language=self.language or "")
        require(bool(self.transcribe) or not self.language, "--language belongs to --transcribe")
        config = BuilderConfig(
            name=name,
            raw=str(raw),
            media=str(media or ""),
            # Records without pictures stay as they are.
            frame_codec=self.frame_codec if shape in name else "zlib",
            transcribe=self.transcribe or "",
            language=self.language or "",
            spec=spec,
            space=space,
            options=options,
        )
        return Builder, config


def corpus_builder(dataset: str) -> type[CorpusBuilder]:
    """Returns the builder of a data set that is read as a corpus. Raises ConfigError."""
    match dataset:
        case "dialogues":
            from mm_jax.data.datasets.dialogues.dialogues_dataset_builder import Builder
        case "meld":
            from mm_jax.data.datasets.meld.meld_dataset_builder import Builder
        case "esconv":
            from mm_jax.data.datasets.esconv.esconv_dataset_builder import Builder
        case "cremad":
            from mm_jax.data.datasets.cremad.cremad_dataset_builder import Builder
        case "ravdess":
            from mm_jax.data.datasets.ravdess.ravdess_dataset_builder import Builder
        case "iemocap":
            from mm_jax.data.datasets.iemocap.iemocap_dataset_builder import Builder
        case _:
            raise ConfigError(f"--dataset: expected one of {DATASETS}, got {dataset!r}")
    return Builder


def clips_of(
    folder: pathlib.Path, split: str, raw: pathlib.Path | None, media: pathlib.Path | None
) -> dict[str, tuple[Clip, ...]]:
    """Finds the recordings that a built data set's samples were made from: sample id -> clips.

    raw, media: as `prepare` was given them; synthetic clips lie next to the data set. Raises
    ConfigError.
    """
    report, above = read_json(folder / BUILD_REPORT), folder.resolve().parents
    name = report["dataset"].partition("/")[0]
    require(len(above) > 2, f"{folder}: expected a folder of data_dir/{name}/BUILD/VERSION")
    request = DataRequest(name, data_dir=above[2], raw=raw, media=media, **report["options"])
    builder, config = request.builder()
    require(
        name != "synthetic" or pathlib.Path(config.raw).is_dir(),
        f"{config.raw}: the clips that {folder} was made of are not there",
    )
    made = builder(config=config, data_dir=str(request.data_dir), file_format="array_record")
    return {pending.sample.id: pending.clips for pending in made.splits()[split]()}
