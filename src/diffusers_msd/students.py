# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Students: copies of the teacher, or nets of its family that are narrower or shallower."""

from dataclasses import dataclass, field
from typing import Optional

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel

from .denoiser import NULL_CLASS
from .inheritance import inherit_weights


# What a student must share with its teacher: it takes the same noise and conditions and gives the same images.
_SHARED_FIELDS = (
    "in_channels",
    "out_channels",
    "sample_size",
    "class_embed_type",
    "num_class_embeds",
    "cross_attention_dim",
)

# How the weights of a student of another size than the teacher start.
INITS = ("random", "inherit")

# The published smaller students (arXiv 2410.23274): the teacher they are of, minus per cent of its parameters.
PRESETS = {
    "imagenet64-42": {"channels": [160, 320, 320, 640], "blocks": 3},
    "imagenet64-71": {"channels": [128, 256, 256, 512], "blocks": 2},
    "sd15-83": {"channels": [160, 320, 320, 640], "blocks": 2},
}
# The same of their teachers, by the presets' first word.
PRESET_TEACHERS = {
    "imagenet64": (UNet2DModel, {"channels": [192, 384, 576, 768], "blocks": 3}),
    "sd15": (UNet2DConditionModel, {"channels": [320, 640, 1280, 1280], "blocks": 2}),
}


@dataclass
class StudentConfig:
    """The size of the students; a same-size copy of the teacher by default."""

    student_channels: Optional[list[int]] = field(
        default=None,
        metadata={"help": "Channels of each resolution level of a smaller student; the teacher's when left out."},
    )
    student_blocks: Optional[int] = field(
        default=None,
        metadata={"help": "Residual blocks per level of a smaller student; the teacher's when left out."},
    )
    student_preset: Optional[str] = field(
        default=None,
        metadata={
            "help": "A published smaller student of EDM's ImageNet-64 or Stable Diffusion's network, in place of "
            "channels and blocks.",
            "choices": list(PRESETS),
        },
    )
    student_init: str = field(
        default="random",
        metadata={
            "help": "Weights that a smaller student starts from: random ones, or the teacher's most important channels "
            "and outer blocks.",
            "choices": list(INITS),
        },
    )

    def __post_init__(self):
        if self.student_preset is not None:
            if self.student_channels is not None or self.student_blocks is not None:
                raise ValueError("student_preset: it says student_channels and student_blocks, leave these out")
            size = PRESETS[self.student_preset]
            self.student_channels, self.student_blocks = size["channels"], size["blocks"]


def create_student(teacher, channels=None, blocks=None, seed=0, init="random"):
    """Makes a student from a teacher.

    A description that changes nothing gives an exact copy, so that two nets of one architecture always start from the
    teacher's weights. Any other gives the teacher's config at the new size, with random weights or a part of the
    teacher's; a random one learns to denoise first (the TSM stage). Published sizes are in `PRESETS`:
    `create_student(teacher, **PRESETS["sd15-83"])`.

    Args:
        teacher (`ModelMixin`): A `UNet2DModel` or `UNet2DConditionModel` of any dtype; any model when only copied. It
            is not changed.
        channels (sequence of `int`, *optional*): `block_out_channels`, one per level of the teacher, each a multiple
            of its `norm_num_groups` and, where the level has attention, of its `attention_head_dim`.
        blocks (`int`, *optional*): `layers_per_block` at every level, at least 1.
        seed (`int`): Of the random weights; torch's global generators are left alone.
        init (`str`): `"random"`, or `"inherit"` for the teacher's most important channels and outer blocks, which
            needs a student that is nowhere wider or deeper (see `inheritance.inherit_weights`).

    Returns:
        `ModelMixin`: A net of the teacher's class on its device, in float32 and training mode, sharing no storage.

    Raises:
        TypeError: `teacher` is no diffusers model, or no UNet although a size is given; a size is no integer.
        ValueError: `channels` or `blocks` does not fit the teacher; `init` is unknown, or the teacher has layers that
            cannot be inherited.
    """
    if not isinstance(teacher, ModelMixin):
        raise TypeError(f"teacher: got a {type(teacher).__name__}; a diffusers model is needed.")
    if init not in INITS:
        raise ValueError(f"init: one of {', '.join(INITS)} expected, got {init!r}")
    size = {}
    if channels is not None or blocks is not None:
        if not isinstance(teacher, (UNet2DModel, UNet2DConditionModel)):
            raise TypeError(
                f"teacher: got a {type(teacher).__name__}; channels and blocks are allowed for UNet2DModel and "
                "UNet2DConditionModel."
            )
    if channels is not None:
        size["block_out_channels"] = _check_channels(channels, _public_config(teacher))
    if blocks is not None:
        size["layers_per_block"] = _check_blocks(blocks, _public_config(teacher))

    # Without the private entries, which name the teacher's path and let diffusers put defaults back over `size`; but
    # the student takes the same labels.
    config = {n: value for n, value in teacher.config.items() if not n.startswith("_") or n == NULL_CLASS}
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the accelerators' generators, and those are not forked.
        torch.random.default_generator.manual_seed(seed)
        student = type(teacher).from_config({**config, **size}).to(teacher.device)
    if is_same_architecture(student, teacher):
        student.load_state_dict(teacher.state_dict())
    elif init == "inherit":
        inherit_weights(student, teacher)
    return student.train()


def check_preset(name, teacher):
    """Refuses a preset of another teacher; the UNets of all Stable Diffusion 1.x and 2.x have the same size.

    Args:
        name (`str`): Of `PRESETS`.
        teacher (`ModelMixin`): A diffusers model.

    Raises:
        ValueError: The teacher's class, channels or blocks are others.
    """
    family, size = PRESET_TEACHERS[name.split("-")[0]]
    config = _public_config(teacher)
    actual = {"channels": config["block_out_channels"], "blocks": config["layers_per_block"]}
    if not isinstance(teacher, family) or actual != size:
        raise ValueError(
            f"student_preset: {name} is of a {family.__name__} with {size}, the teacher is a "
            f"{type(teacher).__name__} with {actual}"
        )


def is_same_architecture(student, teacher):
    """Whether the teacher's weights fit the student and mean the same in it.

    Args:
        student (`ModelMixin`): A diffusers model.
        teacher (`ModelMixin`): A diffusers model.

    Returns:
        `bool`: Same class and same config.
    """
    return type(student) is type(teacher) and _public_config(student) == _public_config(teacher)


def check_student(student, teacher):
    """Refuses a student that cannot stand in for the teacher.

    Args:
        student (`ModelMixin`): A diffusers model.
        teacher (`ModelMixin`): A diffusers model.

    Raises:
        TypeError: The classes differ.
        ValueError: Channels, sample size or conditioning differ.
    """
    if type(student) is not type(teacher):
        raise TypeError(
            f"student: got a {type(student).__name__}; the teacher's class {type(teacher).__name__} is needed."
        )
    config, teacher_config = _public_config(student), _public_config(teacher)
    for name in _SHARED_FIELDS:
        # A family without the field, such as UNet2DModel without cross-attention, has None on both sides.
        if config.get(name) != teacher_config.get(name):
            raise ValueError(
                f"student: it has {name}={config.get(name)}; "
                f"the teacher's {name}={teacher_config.get(name)} is needed."
            )


def _public_config(model):
    # Private entries name versions, paths and defaults. Sequences are lists when loaded and tuples when made in code.
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


def _check_blocks(blocks, config):
    if type(blocks) is not int:
        raise TypeError(f"blocks: got {blocks!r}; an int is allowed.")
    if blocks < 1:
        raise ValueError(f"blocks: got {blocks}; at least 1 block per level is needed.")
    per_level = config["layers_per_block"]
    # The same depth written per level is still the same depth.
    return per_level if isinstance(per_level, list) and set(per_level) == {blocks} else blocks


def _check_channels(channels, config):
    channels = list(channels)
    levels = len(config["block_out_channels"])
    if any(type(width) is not int for width in channels):
        raise TypeError(f"channels: got {channels}; integers are allowed.")
    if len(channels) != levels or min(channels) < 1:
        raise ValueError(
            f"channels: got {channels}; the teacher has {levels} levels, so {levels} widths >= 1 are needed."
        )
    with_attention = _levels_with_attention(config)
    for level, width in enumerate(channels):
        needs = {"norm_num_groups": config["norm_num_groups"]}
        if level in with_attention:
            head = config["attention_head_dim"]
            needs["attention_head_dim"] = head[level] if isinstance(head, list) else head
        if level == levels - 1:
            # Of the middle block; UNet2DConditionModel has no such setting.
            needs["attn_norm_num_groups"] = config.get("attn_norm_num_groups")
        for name, divisor in needs.items():
            if divisor is not None and width % divisor:
                raise ValueError(
                    f"channels: got {channels}; level {level} is {width} wide, and a multiple of the teacher's "
                    f"{name}={divisor} is needed."
                )
    return channels


def _levels_with_attention(config):
    last = len(config["down_block_types"]) - 1
    types = zip(config["down_block_types"], reversed(config["up_block_types"]), strict=True)
    levels = {level for level, (down, up) in enumerate(types) if "Attn" in down or "Attn" in up}
    middle = config["mid_block_type"]
    # UNet2DModel says it by a flag, UNet2DConditionModel by the block's name.
    if middle is not None and config.get("add_attention", "Attn" in middle):
        levels.add(last)
    return levels
