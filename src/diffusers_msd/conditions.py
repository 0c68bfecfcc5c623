# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What teachers are conditioned on, in training: all conditions, their parts, their data, and how samples are shown.

One class per family, with the same members, so that scripts and stages ask for none by name:

    values        all conditions [n, ...], as the networks take them
    null          the condition that stands for "none" in guidance, or None
    identity      names these conditions, in this order
    partition()   a router fitted on them
    assign()      the student of each condition, by any router
    images()      the training images (or latents), labelled with the number of their condition
    shown()       some conditions of a part, for a grid of samples
    decoder()     samples to images in [-1, 1]
    components()  what a pipeline needs beside scheduler, router and students
    report()      describes a partition
    example()     a condition of the right shape, from a teacher's config alone
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig

from .captions import CaptionCache, vae_fingerprint
from .data import DataConfig, ImageDataset, load_images
from .denoiser import null_class, num_classes, sample_shape
from .embedding_routing import EmbeddingRouter
from .files import atomic_write
from .pairs import CLASSES
from .plots import plot_margins
from .prompts import POOLINGS, check_prompts, embed_prompts, encoder_fingerprint, pool_embeddings
from .routing import ClassRouter, ConditionRouter
from .shards import Rows
from .teachers import decode_latents, load_text_encoder, load_text_parts, load_vae


@dataclass
class ConditionConfig:
    """Classes or captions, and how they are split among the students."""

    captions_dir: str | None = field(
        default=None, metadata={"help": "Folder of cache_captions.py; text-conditional teachers need it."}
    )
    partition: str | None = field(
        default=None,
        metadata={
            "help": "How conditions are split. Classes: consecutive (default), random, kmeans on the teacher's class "
            "embeddings. Captions: quadrants (default; K a power of two), kmeans, random. All are balanced and seeded "
            "by --seed."
        },
    )
    router: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a fitted router, instead of --partition."}
    )
    pooling: str = field(
        default="mean",
        metadata={
            "help": "What captions are routed by: the mean over the embeddings of their tokens, or eos, the embedding "
            "of the end of text.",
            "choices": list(POOLINGS),
        },
    )
    validation_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "Prompts of the sample grids, each shown by its student; default: captions of the part."},
    )


class ClassConditions:
    """The classes of a class-conditional `UNet2DModel`."""

    identity = CLASSES
    router_class = ClassRouter
    default_partition = "consecutive"
    partitions = {
        "consecutive": lambda self, k, seed: ClassRouter.consecutive(len(self.values), k),
        "random": lambda self, k, seed: ClassRouter.random(len(self.values), k, seed),
        "kmeans": lambda self, k, seed: ClassRouter.from_embeddings(
            self.teacher.class_embedding.weight[: len(self.values)], k
        ),
    }

    @staticmethod
    def example(teacher: UNet2DModel, path: str) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.long)

    def __init__(self, teacher: UNet2DModel, path: str, captions_dir=None, pooling="mean", validation_prompts=()):
        if captions_dir is not None or validation_prompts:
            raise ValueError(
                "captions_dir, validation_prompts: this teacher is class-conditional, it knows no captions"
            )
        self.teacher = teacher
        self.values, self.null = torch.arange(num_classes(teacher)), null_class(teacher)

    def assign(self, router: ConditionRouter) -> torch.Tensor:
        return router(class_labels=self.values)

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        return self.values[rows]

    def images(self, data: DataConfig) -> ImageDataset:
        channels, size, _ = sample_shape(self.teacher)
        images = load_images(data, channels, size)
        if images.num_classes != len(self.values):
            raise ValueError(
                f"dataset_name: the images have {images.num_classes} classes, the teacher {len(self.values)}"
            )
        return images

    def shown(self, router: ConditionRouter, k: int, rows: torch.Tensor) -> torch.Tensor:
        # Of a part of 250 classes the grid would have 2,000 images.
        return self.values[rows[torch.linspace(0, len(rows) - 1, min(16, len(rows))).long()]]

    def decoder(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda samples: samples

    def components(self) -> dict:
        return {}

    def report(self, router: ConditionRouter, folder: Path):
        atomic_write(folder / "partition.txt", router.report() + "\n")


class TextConditions:
    """The captions of a text-conditional `UNet2DConditionModel`, each a condition of its own.

    Text encoder and VAE are loaded to be compared with the cache where it is used, and given back; embeddings and
    latents come from the cache.
    """

    router_class = EmbeddingRouter
    default_partition = "quadrants"
    partitions = {
        "quadrants": lambda self, k, seed: EmbeddingRouter.fit_quadrants(self.pooled, k, seed, **self.recorded),
        "kmeans": lambda self, k, seed: EmbeddingRouter.fit_kmeans(self.pooled, k, seed=seed, **self.recorded),
        "random": lambda self, k, seed: EmbeddingRouter.fit_random(self.pooled, k, seed, **self.recorded),
    }

    @staticmethod
    def example(teacher: UNet2DConditionModel, path: str) -> torch.Tensor:
        length = CLIPTextConfig.from_pretrained(path, subfolder="text_encoder").max_position_embeddings
        return torch.zeros(1, length, teacher.config.cross_attention_dim, dtype=torch.float16)

    def __init__(
        self, teacher: UNet2DConditionModel, path: str, captions_dir=None, pooling="mean", validation_prompts=()
    ):
        if captions_dir is None:
            raise ValueError("captions_dir: a text-conditional teacher needs it; make it with cache_captions.py")
        self.path, self.pooling = path, pooling
        self.cache = CaptionCache(captions_dir)
        tokenizer, text_encoder = load_text_encoder(path)
        if self.cache.text_encoder_fingerprint != encoder_fingerprint(text_encoder):
            raise ValueError(
                f"captions_dir: the embeddings in {captions_dir} are of another text encoder than the teacher's; "
                "make new ones with cache_captions.py in another --output_dir"
            )
        if self.cache.embeddings.shape[-1] != teacher.config.cross_attention_dim:
            raise ValueError(
                f"pretrained_teacher_model: its text encoder gives {self.cache.embeddings.shape[-1]} numbers a token, "
                f"its unet takes cross_attention_dim={teacher.config.cross_attention_dim}"
            )
        self.values, self.null, self.identity = self.cache.embeddings, self.cache.null_embedding, self.cache.identity
        self.pooled = self.cache.pooled(pooling)
        self.recorded = {"pooling": pooling, "text_encoder_fingerprint": self.cache.text_encoder_fingerprint}
        self.prompts = None
        if validation_prompts:
            self.prompts = embed_prompts(tokenizer, text_encoder, check_prompts(validation_prompts))

    def assign(self, router: ConditionRouter) -> torch.Tensor:
        known = (router.config.pooling, router.config.text_encoder_fingerprint)
        if known != tuple(self.recorded.values()):
            raise ValueError(
                f"router: it was fitted with pooling {known[0]} on the encoder {str(known[1])[:12]}, here they are "
                f"{self.pooling} and {self.cache.text_encoder_fingerprint[:12]}; a router of these embeddings is needed"
            )
        return torch.cat([router(embeddings=shard) for shard in self.pooled])

    def part(self, rows: torch.Tensor) -> Rows:
        return self.values.part(rows)

    def images(self, data: DataConfig) -> ImageDataset:
        return self.cache.images(vae_fingerprint(load_vae(self.path)))

    def shown(self, router: ConditionRouter, k: int, rows: torch.Tensor) -> torch.Tensor:
        if self.prompts is not None:
            embeddings, mask = self.prompts
            mine = router(embeddings=pool_embeddings(embeddings, mask, self.pooling)) == k
            if mine.any():
                return embeddings[mine].half()
        return self.values[rows[torch.linspace(0, len(rows) - 1, min(8, len(rows))).long()]]

    def decoder(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        vae = load_vae(self.path).to(device)
        return lambda samples: decode_latents(vae, samples.to(device))

    def components(self) -> dict:
        return load_text_parts(self.path)._asdict()

    def report(self, router: ConditionRouter, folder: Path):
        pooled = torch.cat(self.pooled)
        atomic_write(folder / "partition.txt", router.report(self.cache.captions, pooled) + "\n")
        if router.num_students > 1:
            plot_margins(router, pooled, folder / "partition.png")


CONDITIONS: dict[type, type] = {UNet2DModel: ClassConditions, UNet2DConditionModel: TextConditions}


def conditions_for(
    teacher: ModelMixin,
    path: str,
    captions_dir: str | None = None,
    pooling: str = "mean",
    validation_prompts: Sequence[str] = (),
) -> ClassConditions | TextConditions:
    """The conditions of a teacher that was loaded from `path`; the other arguments as in `ConditionConfig`.

    Raises:
        FileNotFoundError, ValueError: captions are missing, or are not this teacher's.
    """
    return CONDITIONS[type(teacher)](teacher, path, captions_dir, pooling, validation_prompts)


def fit_router(
    conditions: ClassConditions | TextConditions, config: ConditionConfig, num_students: int, seed: int
) -> ConditionRouter:
    """The router of a run: the one at `config.router`, else one fitted by `config.partition`.

    Raises:
        FileNotFoundError, ValueError: no such router or partition, or it has another number of students.
    """
    if config.router is not None:
        if config.partition is not None:
            raise ValueError("partition: it is given beside --router, which is fitted already; leave one out")
        router = ConditionRouter.from_pretrained(config.router)
        if not isinstance(router, conditions.router_class):
            raise ValueError(
                f"router: {config.router} holds a {type(router).__name__}, this teacher's conditions need one of class "
                f"{conditions.router_class.__name__}"
            )
        if router.num_students != num_students:
            raise ValueError(f"router: it has {router.num_students} parts, num_students is {num_students}")
        return router
    name = config.partition or conditions.default_partition
    if name not in conditions.partitions:
        raise ValueError(f"partition: one of {', '.join(conditions.partitions)} expected here, got {name!r}")
    return conditions.partitions[name](conditions, num_students, seed)
