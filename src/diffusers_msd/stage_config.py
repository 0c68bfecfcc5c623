# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights and schedules of the distillation stages."""

from dataclasses import dataclass, field

from .objectives import DISTANCES


GAN_FEATURES = ("fake_score", "teacher")


@dataclass
class StageConfig:
    """Weights and schedules of the distillation stages. A list has one value for all stages, or one per stage."""

    student_update_interval: list[int] = field(
        default_factory=lambda: [5],
        metadata={
            "help": "The student is updated every so many iterations, the critic (fake score and discriminator) at "
            "every one: the two-time-scale rule of DMD2 (5). One value, or one per stage."
        },
    )
    dm_t_min: float = field(
        default=0.02, metadata={"help": "Lowest noise level of the DM loss, as a fraction of the schedule in [0, 1)."}
    )
    dm_t_max: float = field(
        default=0.98, metadata={"help": "Highest noise level of the DM loss, as a fraction of the schedule in (0, 1]."}
    )
    gan_t_max: float = field(
        default=1.0,
        metadata={
            "help": "Highest noise level at which the discriminator compares, as a fraction of the schedule in (0, 1]; "
            "small images drown in less noise than DMD2's full range has."
        },
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance on the teacher in the DM loss (none by default)."}
    )
    regression_weight: float = field(
        default=0.25,
        metadata={"help": "Weight of the regression on the teacher's pairs in the DM stage; 0 leaves it out."},
    )
    regression_distance: str = field(
        default="l2",
        metadata={"help": "Distance of the regression: l2, l1, or lpips (extra `lpips`).", "choices": list(DISTANCES)},
    )
    gan_generator_weight: float = field(
        default=37.0,
        metadata={
            "help": "Weight of the generator's GAN loss in the ADM stage times the number of elements of a sample "
            "(DMD2: 3e-3 * 12288 = 37 on ImageNet-64), so that it carries over to other image sizes."
        },
    )
    gan_features: str = field(
        default="fake_score",
        metadata={
            "help": "Whose features the discriminator sees: those of the fake score, which learns with it (DMD2), or of "
            "the frozen teacher.",
            "choices": list(GAN_FEATURES),
        },
    )
    gan_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Iterations at the start of the ADM stage in which only the critic learns, so that the student "
            "does not follow an untrained discriminator; DMD2 has none."
        },
    )
    gan_critic_weight: float = field(
        default=1e-2,
        metadata={"help": "Weight of the discriminator's loss against the fake score's in the ADM stage."},
    )

    def __post_init__(self):
        if min(self.student_update_interval) < 1:
            raise ValueError(f"student_update_interval: numbers >= 1 expected, got {self.student_update_interval}")
        if not 0 < self.gan_t_max <= 1:
            raise ValueError(f"gan_t_max: a number in (0, 1] expected, got {self.gan_t_max}")
        if not 0 <= self.dm_t_min < self.dm_t_max <= 1:
            raise ValueError(
                f"dm_t_min, dm_t_max: 0 <= dm_t_min < dm_t_max <= 1 expected, got {self.dm_t_min}, {self.dm_t_max}"
            )
        for name in ("regression_weight", "gan_generator_weight", "gan_critic_weight", "gan_warmup_steps"):
            if not vars(self)[name] >= 0:  # a NaN is refused too
                raise ValueError(f"{name}: a number >= 0 expected, got {vars(self)[name]}")
        for name, allowed in (("regression_distance", DISTANCES), ("gan_features", GAN_FEATURES)):
            if vars(self)[name] not in allowed:
                raise ValueError(f"{name}: one of {', '.join(allowed)} expected, got {vars(self)[name]!r}")
