# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""EDM checkpoints as diffusers folders: NVIDIA's pickles and OpenAI's state dicts, both of the ADM network.

Both hold the network of arXiv 2105.05233 under the preconditioning of arXiv 2206.00364. In diffusers the network is a
`UNet2DModel` whose blocks resample inside of residual blocks, and the preconditioning is the scheduler's.
"""

import hashlib
from pathlib import Path

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, EDMEulerScheduler, UNet2DModel

from .denoiser import NULL_CLASS, num_classes
from .edm_layouts import NVIDIA, OPENAI, Tensors, rename
from .files import atomic_directory
from .schedule import IDENTITY_SIGMA
from .teachers import save_teacher
from .untrusted import SavedModule, SavedTensor, read_checkpoint


SCHEDULERS = {"EDMEulerScheduler": EDMEulerScheduler, "CMStochasticIterativeScheduler": CMStochasticIterativeScheduler}
# The classes of NVIDIA's layers, with the settings for which UNet2DModel has one fixed value.
FIXED: dict[str, dict] = {
    **dict.fromkeys(("DhariwalUNet", "ModuleDict", "Conv2d", "Linear"), {}),
    "GroupNorm": {"num_groups": 32, "eps": 1e-5},
    "UNetBlock": {"skip_scale": 1, "adaptive_scale": True},
    "PositionalEmbedding": {"max_positions": 10000, "endpoint": False},
}
# OpenAI's file does not say how wide its heads are; all networks of this name have heads of 64.
OPENAI_HEAD_DIM = 64


def convert_edm(path: str | Path, output_dir: str | Path, sample_size: int = 64) -> dict:
    """Converts an EDM checkpoint into a folder that diffusers loads, and `train_msd.py` takes for a teacher.

    The folder holds `unet/` (a `UNet2DModel`), `scheduler/`, `model_index.json` (of a `ConsistencyModelPipeline`, the
    only class-conditional pipeline of diffusers for images in pixels) and `teacher.json`, which is returned.

    Args:
        path, sample_size: as for `load_edm_state_dict`.
        output_dir: a free name, or an empty folder.

    Returns:
        {"converted_from": name of the file, "sha256": of the file, "network": what it is, in words, "fingerprint": of
        network and scheduler}.

    Raises:
        FileNotFoundError, ValueError: as for `load_edm_state_dict`; or `output_dir` is not free. Nothing is written.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output_dir: {output_dir} is there already; a free name or an empty folder is needed")
    state_dict, config = load_edm_state_dict(path, sample_size)
    with torch.device("meta"):
        model = UNet2DModel(**config["unet"])
    model.load_state_dict(state_dict, assign=True)
    settings = dict(config["scheduler"])
    scheduler = SCHEDULERS[settings.pop("_class_name")].from_config(settings)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = {"converted_from": Path(path).name, "sha256": digest, "network": _describe(model, config)}
    with atomic_directory(output_dir) as folder:
        record = save_teacher(folder, model.eval(), scheduler, record)
        ConsistencyModelPipeline(model, scheduler).save_config(folder)
    return record


def _describe(model: UNet2DModel, config: dict) -> str:
    classes, side = num_classes(model), model.config.sample_size
    known = "unconditional; only class-conditional teachers can be distilled"
    if classes is not None:
        known = (
            f"{classes} classes, and class {classes} for none; without label in training: {config['label_dropout']:.0%}"
            + " (guidance needs more)" * (config["label_dropout"] == 0)
        )
    parameters = model.num_parameters() / 1e6
    return f"UNet2DModel of {parameters:.1f} M parameters for {side}x{side}; {known}; {config['scheduler']['_class_name']}"


def load_edm_state_dict(path: str | Path, sample_size: int = 64) -> tuple[Tensors, dict]:
    """Reads an EDM checkpoint as weights of a `UNet2DModel`; nothing in the file is executed.

    NVIDIA's networks know "no class" as a label of zeros. Here it is a class of its own: one more row of the class
    embedding, the last one, of zeros. OpenAI's networks get it too, so that both forms are the same.

    Args:
        path: a pickle of NVIDIA's EDM with a `DhariwalUNet`, such as edm-imagenet-64x64-cond-adm.pkl, or OpenAI's
            edm_imagenet64_ema.pt.
        sample_size: side of the images, for OpenAI's layout, which does not say it.

    Returns:
        (weights in float32 by the names of `UNet2DModel`,
        {"unet": arguments of `UNet2DModel`, "scheduler": {"_class_name": ..., and its arguments}, "label_dropout": share
        of the training images that were shown without their label}).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds something else than weights and plain values, or a network that `UNet2DModel`
            cannot be. The text begins with "checkpoint:".
    """
    saved = read_checkpoint(path)
    if isinstance(saved, dict) and isinstance(saved.get("ema"), SavedModule):
        tensors, config = _read_nvidia(saved["ema"])
    elif isinstance(saved, dict) and "input_blocks.0.0.weight" in saved:
        tensors, config = _read_openai(saved, sample_size)
    else:
        raise ValueError(
            f'checkpoint: {path} holds neither a network under "ema" (NVIDIA) nor input_blocks.0.0.weight (OpenAI)'
        )
    with torch.device("meta"):
        expected = UNet2DModel(**config["unet"]).state_dict()
    wrong = [name for name in {**expected, **tensors} if _shape(expected, name) != _shape(tensors, name)]
    if wrong:
        differ = [name[:80] for name in wrong[:3]]
        raise ValueError(f"checkpoint: no UNet2DModel has the layers of this network; the first that differ: {differ}")
    return tensors, config


def _shape(tensors: Tensors, name: str) -> tuple | None:
    return tuple(tensors[name].shape) if name in tensors else None


# NVIDIA


def _read_nvidia(precond: SavedModule) -> tuple[Tensors, dict]:
    """Weights under our names and the configs; the augmentation layer, which serves training, is left out."""
    model = precond.entries("_modules").get("model")
    for module, needed, why in (
        (precond, "EDMPrecond", "no other preconditioning is known here"),
        (model, "DhariwalUNet", "a SongUNet (DDPM++, NCSN++) cannot be a UNet2DModel"),
    ):
        if _class_name(module) != needed:
            raise ValueError(f"checkpoint: a network of class {needed} is needed, got {_class_name(module)!r}; {why}")
    modules = _modules(model)
    tensors = _nvidia_tensors(modules)
    tensors.pop("map_augment.weight", None)

    side, encoder = precond.state.get("img_resolution"), modules.get("enc", SavedModule("", {})).entries("_modules")
    if type(side) is not int or not 1 <= side <= 4096:
        raise ValueError(f"checkpoint: img_resolution is {_plain(side)}, a number of pixels is needed")
    levels = 1 + sum(name.endswith("_down") for name in encoder)
    blocks = sum(name.startswith(f"{side}x{side}_block") for name in encoder)
    layout = NVIDIA._replace(ends={**NVIDIA.ends, "conv_in": f"enc.{side}x{side}_conv"})
    classes = tensors.pop("map_label.weight", None)
    ours = rename(tensors, layout, levels, blocks, side)
    unet = _unet_config(ours, levels, blocks, side, _head_dim(modules))
    _add_classes(ours, unet, None if classes is None else classes.T)
    sigma_data = precond.state.get("sigma_data")
    if type(sigma_data) not in (int, float) or not 0 < sigma_data < 1e6:
        raise ValueError(f"checkpoint: sigma_data is {_plain(sigma_data)}, a standard deviation is needed")
    scheduler = {"_class_name": "EDMEulerScheduler", "sigma_data": float(sigma_data)}
    dropout = model.state.get("label_dropout")
    return ours, {
        "unet": unet,
        "scheduler": scheduler,
        "label_dropout": float(dropout) if type(dropout) in (int, float) else 0.0,
    }


def _class_name(module) -> str | None:
    return module.class_name[:50] if isinstance(module, SavedModule) else None


def _plain(value):
    # Whatever else it is may be as long as the file.
    return value if type(value) in (int, float, bool, type(None)) else f"a {type(value).__name__}"


def _modules(model: SavedModule) -> dict[str, SavedModule]:
    """All layers by their names, as `named_modules` would give them; refuses what is no tree of EDM's depth."""
    found, seen, ahead = {}, set(), [("", model)]
    while ahead:
        name, module = ahead.pop()
        if id(module) in seen or name.count(".") > 8:
            raise ValueError(f"checkpoint: layer {name[:80]} is inside of itself, there twice, or nested too deeply")
        found[name] = module
        seen.add(id(module))
        children = {child: value for child, value in module.entries("_modules").items() if value is not None}
        if any(not isinstance(value, SavedModule) for value in children.values()):
            raise ValueError(f"checkpoint: layer {name[:80]} holds something that is no layer")
        ahead += [(f"{name}.{child}".lstrip("."), value) for child, value in children.items()]
    return found


def _nvidia_tensors(modules: dict[str, SavedModule]) -> Tensors:
    """Parameters of all layers, once their settings are those of a `UNet2DModel`."""
    tensors = {}
    for name, module in modules.items():
        if module.class_name not in FIXED:
            raise ValueError(f"checkpoint: {name} is a {_class_name(module)!r}, no layer of a DhariwalUNet")
        for setting, needed in FIXED[module.class_name].items():
            got = _plain(module.state.get(setting))
            if got != needed:
                why = " (EDM gives layers of less than 128 channels fewer groups)" * (setting == "num_groups")
                raise ValueError(f"checkpoint: {setting} of {name} is {got}, UNet2DModel can only have {needed}{why}")
        for key, value in module.entries("_buffers").items():
            if isinstance(value, SavedTensor) and not torch.equal(value.build(), torch.full((1, 1, 2, 2), 0.25)):
                raise ValueError(f"checkpoint: {key[:50]} of {name} is not that of [1, 1], the filter of UNet2DModel")
        for key, value in module.entries("_parameters").items():
            if isinstance(value, SavedTensor):
                tensors[f"{name}.{key}"] = value.build()
    return tensors


def _head_dim(modules: dict[str, SavedModule]) -> int:
    """Channels of a head of attention, the same in all blocks."""
    dims = set()
    for name, module in modules.items():
        heads, channels = module.state.get("num_heads"), module.state.get("out_channels")
        if module.class_name == "UNetBlock" and heads:
            if type(heads) is not int or type(channels) is not int or not 0 < heads <= channels or channels % heads:
                raise ValueError(f"checkpoint: {name} has {_plain(heads)} heads for {_plain(channels)} channels")
            dims.add(channels // heads)
    if len(dims) != 1:
        raise ValueError(f"checkpoint: heads of {sorted(dims)} channels; UNet2DModel has heads of one size")
    return dims.pop()


# OpenAI


def _read_openai(saved: dict, sample_size: int) -> tuple[Tensors, dict]:
    """Weights under our names and the configs.

    OpenAI's networks see 250 ln(sigma) where NVIDIA's see ln(sigma) / 4, and no setting of `UNet2DModel` makes up for
    a factor of time. Of diffusers' schedulers, that of consistency models speaks of time so, but it has another
    boundary. The field IDENTITY_SIGMA, which diffusers keeps and does not look at, says that the boundary is EDM's.
    """
    tensors = {name: value.build() for name, value in saved.items() if isinstance(value, SavedTensor)}
    if len(tensors) < len(saved) or any(type(name) is not str for name in saved):
        raise ValueError("checkpoint: beside input_blocks.0.0.weight there is something else than tensors")
    if type(sample_size) is not int or not 1 <= sample_size <= 4096:
        raise ValueError(f"sample_size: a number of pixels expected, got {sample_size!r}")
    outputs = len({name.split(".")[1] for name in tensors if name.startswith("output_blocks.")})
    # The last block of each level but the first one ends with a residual block that doubles the size.
    ends = [n for n in range(outputs) for m in (1, 2) if f"output_blocks.{n}.{m}.in_layers.0.weight" in tensors]
    blocks = ends[0] if ends else outputs - 1
    if blocks < 1:
        raise ValueError(f"checkpoint: its decoder has {outputs} blocks, 2 or more are needed")
    levels = outputs // (blocks + 1)
    classes = tensors.pop("label_emb.weight", None)
    ours = rename(tensors, OPENAI, levels, blocks, sample_size)
    unet = _unet_config(ours, levels, blocks, sample_size, OPENAI_HEAD_DIM)
    _add_classes(ours, unet, classes)
    scheduler = {"_class_name": "CMStochasticIterativeScheduler", IDENTITY_SIGMA: 0.0}
    return ours, {"unet": unet, "scheduler": scheduler, "label_dropout": 0.0}


# Both


def _add_classes(tensors: Tensors, unet: dict, rows: torch.Tensor | None):
    """Puts the class embedding [n, E] in, with the null class behind it; None for an unconditional network."""
    if rows is None:
        return
    if rows.ndim != 2:
        raise ValueError(f"checkpoint: its class embedding has {rows.ndim} dimensions, 2 are needed")
    tensors["class_embedding.weight"] = torch.cat([rows.float(), torch.zeros(1, rows.shape[1])])
    unet.update({"num_class_embeds": len(rows) + 1, NULL_CLASS: len(rows)})


def _unet_config(tensors: Tensors, levels: int, blocks: int, side: int, head_dim: int) -> dict:
    """Arguments of `UNet2DModel`, from the shapes of weights under our names."""

    def shape(name: str, dimensions: int) -> tuple:
        found = _shape(tensors, f"{name}.weight") or ()
        if len(found) != dimensions:
            raise ValueError(f"checkpoint: it has no layer that would be {name} of a UNet2DModel")
        return found

    channels = [shape(f"down_blocks.{i}.resnets.0.conv1", 4)[0] for i in range(levels)]
    if any(c < 1 or c % 32 or c % head_dim for c in channels):
        raise ValueError(
            f"checkpoint: levels of {channels} channels; UNet2DModel needs multiples of 32 and of its heads' {head_dim}"
        )
    attention = [f"down_blocks.{i}.attentions.0.to_q.weight" in tensors for i in range(levels)]
    embedding = shape("time_embedding.linear_1", 2)[0]
    return {
        "sample_size": side,
        "in_channels": shape("conv_in", 4)[1],
        "out_channels": shape("conv_out", 4)[0],
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attention],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attention)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": head_dim,
        "attn_norm_num_groups": 32,
        "time_embedding_dim": None if embedding == 4 * channels[0] else embedding,
    }
