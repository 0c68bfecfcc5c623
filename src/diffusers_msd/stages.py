# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What each stage of the method trains: TSM, DM and ADM students, their critic, and the teacher itself.

A stage is a list of turns. A turn owns the networks one optimizer updates, says how often it runs and what data it
needs, and computes its loss; the trainer knows nothing else about the method.
"""

from collections.abc import Callable

import torch
from diffusers import ModelMixin
from torch import nn

from .adapters import trainable_parameters
from .denoiser import Denoiser, sample_shape
from .discriminator import DiscriminatorHead
from .draws import Draws
from .objectives import (
    DISTANCES,
    denoising_loss,
    dm_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    regression_loss,
    tsm_loss,
)
from .stage_config import StageConfig


STAGES = ("tsm", "dm", "adm")

Losses = dict[str, torch.Tensor]


class Turn(nn.Module):
    """One optimizer's share of an iteration. Of its parameters, that optimizer updates those that `claim` frees.

    Networks a turn only reads are kept in `frozen`, a plain dict, so that they are not among its parameters.

    Attributes:
        name: names its optimizer and its losses in logs and checkpoints.
        interval, start: it runs at iterations start, start + interval, start + 2 interval, ...
        needs: the datasets it takes a batch from, among "images" and "pairs".
    """

    name: str = ""
    interval: int = 1
    start: int = 0
    needs: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.frozen: dict[str, nn.Module] = {}

    def runs_before(self, step: int) -> int:
        """How often it has run before iteration `step`."""
        return max(0, -(-(step - self.start) // self.interval))

    def models(self) -> dict[str, ModelMixin]:
        """The trained networks by the name of their checkpoint folder; the first one is what the stage is for."""
        raise NotImplementedError

    def networks(self) -> dict[str, ModelMixin]:
        """All networks it runs, trained and frozen, by their role; what is no network (an exact denoiser) is left out."""
        frozen = {role: [m for m in part.modules() if isinstance(m, ModelMixin)] for role, part in self.frozen.items()}
        # The first, since a network may contain others.
        return {**{role: models[0] for role, models in frozen.items() if models}, **self.models()}

    def claim(self):
        """Makes this turn's networks trainable and the others not, until another turn claims them.

        It holds through the backward pass, since gradient checkpointing runs the forward again in there.
        """
        for module in self.frozen.values():
            module.requires_grad_(False)
        for model in self.models().values():
            for parameter in trainable_parameters(model):
                parameter.requires_grad_(True)

    def forward(self, batch: dict[str, dict[str, torch.Tensor]], draw: Draws) -> Losses:
        """The per-sample losses [B] by name; the one called "loss" is to be minimised."""
        raise NotImplementedError


class DenoisingTurn(Turn):
    """Trains a teacher by denoising score matching.

    Args:
        denoiser: the network to train.
        log_sigma: mean and standard deviation of ln(sigma/alpha), EDM's P_mean and P_std (arXiv 2206.00364, table 1);
            None draws t uniformly (arXiv 2006.11239, algorithm 1).
        cond_dropout: share of samples that are trained with the denoiser's null condition (arXiv 2207.12598,
            algorithm 1).
    """

    name = "teacher"
    needs = ("images",)

    def __init__(
        self, denoiser: Denoiser, log_sigma: tuple[float, float] | None = (-1.2, 1.2), cond_dropout: float = 0.0
    ):
        super().__init__()
        self.denoiser = denoiser
        self.log_sigma = log_sigma
        self.cond_dropout = cond_dropout

    def models(self):
        return {"unet": self.denoiser.model}

    def forward(self, batch, draw):
        x0, cond = batch["images"]["images"], batch["images"]["cond"]
        schedule = self.denoiser.schedule
        if self.cond_dropout > 0:
            dropped = draw.index(0, 9999) < round(10_000 * self.cond_dropout)
            cond[dropped] = self.denoiser.null_cond.to(cond)
        if self.log_sigma is None:
            t = draw.index(0, schedule.last)
        else:
            mean, std = self.log_sigma
            ratio = (draw.normal().double().cpu() * std + mean).exp().clamp(*schedule.ratios[[0, -1]].tolist())
            t = schedule.from_ratio(ratio)
        x_t = schedule.add_noise(x0, draw.normal(*x0.shape[1:]), t)
        return {"loss": denoising_loss(self.denoiser(x_t, t, cond), x0, schedule.loss_weight(t))}


class TSMTurn(Turn):
    """Teacher score matching: a student without the teacher's weights first learns the teacher's denoiser."""

    name = "student"
    needs = ("images",)

    def __init__(self, student: Denoiser, teacher: Denoiser):
        super().__init__()
        self.student = student
        self.frozen = {"teacher": teacher}

    def models(self):
        return {"student": self.student.model}

    def forward(self, batch, draw):
        x0, cond = batch["images"]["images"], batch["images"]["cond"]
        schedule = self.student.schedule
        t = draw.index(0, schedule.last)
        x_t = schedule.add_noise(x0, draw.normal(*x0.shape[1:]), t)
        with torch.no_grad():
            teacher_x0 = self.frozen["teacher"](x_t, t, cond)
        return {"loss": tsm_loss(self.student(x_t, t, cond), teacher_x0, schedule.loss_weight(t))}


class StudentTurn(Turn):
    """The generator's turn of DM and ADM: KL gradient, plus regression on pairs (DM) or the GAN term (ADM).

    Args:
        student, teacher, fake_score: the three networks; only the student is trained here.
        conditions: the part's conditions [n, ...], drawn from uniformly.
        config: weights.
        discriminator: the GAN head; with it the GAN term is added, without it the regression.
        decode: samples to images, applied before the regression's distance; None compares the samples themselves.
    """

    name = "student"

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        fake_score: Denoiser,
        conditions: torch.Tensor,
        config: StageConfig,
        discriminator: DiscriminatorHead | None = None,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__()
        self.student = student
        self.decode = decode
        self.frozen = {"teacher": teacher, "fake_score": fake_score}
        if discriminator is not None:
            self.frozen["discriminator"] = discriminator
        self.conditions = conditions
        self.config = config
        self.interval = config.student_update_interval[0]
        self.start = 0 if discriminator is None else config.gan_warmup_steps
        self.regression = discriminator is None and config.regression_weight > 0
        self.distance = DISTANCES[config.regression_distance]() if self.regression else None
        self.needs = ("pairs",) if self.regression else ()

    def models(self):
        return {"student": self.student.model}

    def forward(self, batch, draw):
        z, cond = draw_inputs(self.student, self.conditions, draw)
        if self.regression:
            pairs = batch["pairs"]
            # One forward for both terms: the network is called once per backward, as DDP wants it.
            both = torch.cat([z, pairs["noise"]]), torch.cat([cond, pairs["cond"]])
            x, x_pairs = self.student.generate(*both).chunk(2)
        else:
            x = self.student.generate(z, cond)
        losses = {"dm": self.dm(x, cond, draw)}
        loss = losses["dm"]
        if self.regression:
            target = pairs["images"]
            if self.decode is not None:
                x_pairs, target = self.decode(x_pairs), self.decode(target)
            losses["regression"] = regression_loss(x_pairs, target, self.distance)
            loss = loss + self.config.regression_weight * losses["regression"]
        if "discriminator" in self.frozen:
            losses["gan"] = gan_generator_loss(self.fake_logits(x, cond, draw))
            loss = loss + self.config.gan_generator_weight / x[0].numel() * losses["gan"]
        return {"loss": loss, **losses}

    def dm(self, x: torch.Tensor, cond: torch.Tensor, draw: Draws) -> torch.Tensor:
        """`dm_loss` [B] at t uniform in [dm_t_min, dm_t_max]; the teacher alone is guided."""
        schedule = self.student.schedule
        t = draw.index(*schedule.index_range(self.config.dm_t_min, self.config.dm_t_max))
        with torch.no_grad():
            x_t = schedule.add_noise(x, draw.normal(*x.shape[1:]), t)
            teacher_x0 = self.frozen["teacher"](x_t, t, cond, self.config.guidance_scale)
            fake_x0 = self.frozen["fake_score"](x_t, t, cond)
        return dm_loss(x, teacher_x0, fake_x0)

    def fake_logits(self, x: torch.Tensor, cond: torch.Tensor, draw: Draws) -> torch.Tensor:
        """The head's logits [B] on the noised samples, with gradient to x."""
        schedule = self.student.schedule
        t = draw.index(*schedule.index_range(0, self.config.gan_t_max))
        x_t = schedule.add_noise(x, draw.normal(*x.shape[1:]), t)
        return self.frozen["discriminator"](self.frozen[self.config.gan_features].features(x_t, t, cond))


class CriticTurn(Turn):
    """The critic's turn of DM and ADM: the fake score follows the student, the head tells its samples from real ones.

    The head's gradient reaches the fake score's encoder; its decoder learns from the denoising loss alone. With
    `gan_features="teacher"` it reaches the head alone.

    Args:
        student: read only here.
        fake_score: trained.
        conditions: the part's conditions [n, ...], drawn from uniformly.
        config: weights.
        discriminator: the GAN head, trained; None in the DM stage.
        teacher: read for `gan_features="teacher"`.
    """

    name = "critic"

    def __init__(
        self,
        student: Denoiser,
        fake_score: Denoiser,
        conditions: torch.Tensor,
        config: StageConfig,
        discriminator: DiscriminatorHead | None = None,
        teacher: Denoiser | None = None,
    ):
        super().__init__()
        self.fake_score = fake_score
        self.discriminator = discriminator
        self.frozen = {"student": student}
        if discriminator is not None and config.gan_features == "teacher":
            self.frozen["teacher"] = teacher
        self.conditions = conditions
        self.config = config
        self.needs = () if discriminator is None else ("images",)

    def models(self):
        models = {"fake_score": self.fake_score.model}
        return models if self.discriminator is None else {**models, "discriminator": self.discriminator}

    def forward(self, batch, draw):
        schedule = self.fake_score.schedule
        z, cond = draw_inputs(self.frozen["student"], self.conditions, draw)
        with torch.no_grad():
            x = self.frozen["student"].generate(z, cond)
        t = draw.index(0, schedule.last)
        x_t = schedule.add_noise(x, draw.normal(*x.shape[1:]), t)
        fake_loss = denoising_loss(self.fake_score(x_t, t, cond), x, schedule.loss_weight(t))
        if self.discriminator is None:
            return {"loss": fake_loss, "fake_score": fake_loss}
        real, real_cond = batch["images"]["images"], batch["images"]["cond"]
        # Real and fake get independent noise and levels, and run through the encoder as one batch.
        levels = schedule.index_range(0, self.config.gan_t_max)
        t = torch.cat([draw.index(*levels), draw.index(*levels)])
        noise = torch.cat([draw.normal(*x.shape[1:]), draw.normal(*x.shape[1:])])
        x_t = schedule.add_noise(torch.cat([x, real]), noise, t)
        encoder = self.frozen.get("teacher", self.fake_score)
        logits = self.discriminator(encoder.features(x_t, t, torch.cat([cond, real_cond])))
        fake_logits, real_logits = logits.chunk(2)
        gan_loss = gan_discriminator_loss(fake_logits, real_logits)
        accuracy = ((fake_logits < 0).float() + (real_logits > 0).float()) / 2
        loss = fake_loss + self.config.gan_critic_weight * gan_loss
        return {"loss": loss, "fake_score": fake_loss, "gan": gan_loss, "gan_accuracy": accuracy.detach()}


def draw_inputs(student: Denoiser, conditions: torch.Tensor, draw: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise z [B, C, H, W] and conditions [B, ...] for the one step."""
    rows = draw.index(0, len(conditions) - 1)
    return draw.normal(*sample_shape(student.model)), conditions[rows].to(draw.device)


def create_discriminator(fake_score: Denoiser, cond: torch.Tensor) -> DiscriminatorHead:
    """A fresh head that fits the features of `fake_score`; `cond` [1, ...] is any valid condition.

    Raises:
        ValueError: images that are not square, or features whose size is no power of two.
    """
    with torch.no_grad():
        x = torch.zeros(1, *sample_shape(fake_score.model), device=cond.device)
        _, channels, size, width = fake_score.features(x, fake_score.schedule.last, cond).shape
    if size != width:
        raise ValueError(
            f"sample_size: the discriminator of the adm stage needs square images, got {tuple(x.shape[2:])}"
        )
    return DiscriminatorHead(channels, size)


def build_stage(
    name: str,
    student: Denoiser,
    teacher: Denoiser,
    fake_score: Denoiser | None,
    conditions: torch.Tensor,
    config: StageConfig,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[Turn]:
    """The turns of stage "tsm", "dm" or "adm" in the order they run (arXiv 2410.23274; method of arXiv 2405.14867).

    Args:
        name: one of `STAGES`.
        student, teacher, fake_score: the networks; `fake_score` is not used by "tsm".
        conditions: the conditions of the student's part [n, ...].
        config: weights and schedules.
        decode: samples to images, for a regression distance between images.

    Raises:
        ValueError: for an unknown stage.
    """
    if name == "tsm":
        return [TSMTurn(student, teacher)]
    if name == "dm":
        head = None
    elif name == "adm":
        head = create_discriminator(fake_score, conditions[[0]])
    else:
        raise ValueError(f"stages: {name!r} is none of {', '.join(STAGES)}")
    return [
        StudentTurn(student, teacher, fake_score, conditions, config, head, decode),
        CriticTurn(student, fake_score, conditions, config, head, teacher),
    ]
