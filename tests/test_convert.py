# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""EDM checkpoints as teachers: the same function as the original network, a null class, and nothing half converted."""

import hashlib
import json
import shutil
from pathlib import Path

import edm_reference
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from edm_reference import EDMPrecond, OpenAINet, nvidia_pickle, openai_state_dict
from test_scripts import SHORT, run

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.convert import convert_edm, load_edm_state_dict
from diffusers_msd.denoiser import NULL_CLASS, denoiser_for, null_class, num_classes
from diffusers_msd.files import model_fingerprint
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.students import create_student
from diffusers_msd.teachers import load_teacher


SIGMAS = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64)

NVIDIA_NETS = [
    {},
    {"labels": 0, "attention": (8, 4)},
    {"augment": 9, "blocks": 2, "labels": 7, "attention": ()},
    {"multipliers": (1, 2, 3), "attention": (8, 2), "images": 1},
    {"channels": 192, "multipliers": (1,), "attention": (8,), "embedding": 2},
    {"multipliers": (1, 1, 1), "side": 12, "attention": (6,), "sigma_data": 0.7},
]
OPENAI_NETS = [
    {},
    {"classes": 0, "attention": (True, True)},
    {"multipliers": (1, 2, 3), "blocks": 2, "attention": (True, False, True), "images": 1},
    {"multipliers": (1,), "attention": (False,), "channels": 128},
    {"multipliers": (1, 1), "attention": (False, False), "blocks": 3},
]


def write(path: Path, net) -> Path:
    if isinstance(net, OpenAINet):
        torch.save(openai_state_dict(net), path)
    else:
        path.write_bytes(nvidia_pickle(net))
    return path


def one_hot(labels: torch.Tensor, n: int) -> torch.Tensor:
    """The label n, the null class, is a row of zeros."""
    return torch.nn.functional.one_hot(labels, n + 1)[:, :n].to(torch.get_default_dtype())


def converted(path: Path, **kwargs) -> UNet2DModel:
    state_dict, config = load_edm_state_dict(path, **kwargs)
    model = UNet2DModel(**config["unet"])
    model.load_state_dict(state_dict)
    return model.eval()


@torch.no_grad()
def nvidia_differences(net: EDMPrecond, model: UNet2DModel, schedule: NoiseSchedule, dtype: torch.dtype):
    """(largest output, largest difference of F, largest difference of D) on random images, null class included."""
    net, model, n = net.to(dtype), model.to(dtype), net.label_dim
    x = torch.randn(4, net.img_channels, net.img_resolution, net.img_resolution, dtype=torch.float64).to(dtype)
    labels = torch.tensor([0, n - 1, n, n]) if n else None
    rows = one_hot(labels, n).to(dtype) if n else None
    time = SIGMAS.log() / 4
    theirs = net.model(x, time.to(dtype), rows)
    ours = model(x, time.to(dtype), class_labels=labels).sample
    noisy = x * SIGMAS.reshape(-1, 1, 1, 1).to(dtype)
    denoised = denoiser_for(model, schedule)(noisy, schedule.from_ratio(SIGMAS), labels)
    expected = net(noisy, SIGMAS.to(dtype), rows)
    return float(theirs.abs().max()), float((ours - theirs).abs().max()), float((denoised - expected).abs().max())


@pytest.mark.parametrize("settings", NVIDIA_NETS)
def test_nvidia_networks_are_the_same_function(tmp_path, settings):
    torch.manual_seed(0)
    net = EDMPrecond(**settings)
    convert_edm(write(tmp_path / "net.pkl", net), tmp_path / "teacher")
    model = UNet2DModel.from_pretrained(tmp_path / "teacher", subfolder="unet")
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "teacher").scheduler
    schedule = NoiseSchedule.from_scheduler(scheduler)
    size, f, d = nvidia_differences(net, model, schedule, torch.float32)
    assert size > 0.5 and f < 1e-5 and d < 1e-5
    size, f, d = nvidia_differences(net, model, schedule, torch.float64)
    # The time embedding of diffusers is float32 always, hence not 1e-15. D takes c_out <= 0.5 and c_noise in float32.
    assert f < 1e-7 * size and d < 1e-6


@pytest.mark.parametrize("settings", OPENAI_NETS)
def test_openai_networks_are_the_same_function(tmp_path, settings):
    torch.manual_seed(0)
    net, side = OpenAINet(**settings), 8
    model = converted(write(tmp_path / "net.pt", net), sample_size=side)
    x = torch.randn(4, net.out[2].out_channels, side, side)
    labels = torch.tensor([0, 1, 2, 4]) if settings.get("classes", 5) else None
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-7)):
        net, model, x, time = net.to(dtype), model.to(dtype), x.to(dtype), (250 * SIGMAS.log()).float()
        with torch.no_grad():
            theirs, ours = net(x, time, labels), model(x, time, class_labels=labels).sample
        assert theirs.abs().max() > 0.5 and (ours - theirs).abs().max() < bound


def test_openai_networks_denoise_as_edm_does(tmp_path):
    torch.manual_seed(0)
    net = OpenAINet().double()
    convert_edm(write(tmp_path / "net.pt", net), tmp_path / "teacher", sample_size=8)
    model, scheduler = load_teacher(tmp_path / "teacher")
    x0, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    sigma = SIGMAS.reshape(-1, 1, 1, 1)
    x = x0 + sigma * torch.randn_like(x0)
    with torch.no_grad():
        output = net(x / (sigma**2 + 0.25).sqrt(), (250 * SIGMAS.log()).float(), labels)
        expected = 0.25 / (sigma**2 + 0.25) * x + 0.5 * sigma * (sigma**2 + 0.25).rsqrt() * output
        schedule = NoiseSchedule.from_scheduler(scheduler)
        ours = denoiser_for(model.double(), schedule)(x, schedule.from_ratio(SIGMAS), labels)
        # What the scheduler of consistency models would make of it, by its own boundary.
        scheduler.register_to_config(_identity_sigma=scheduler.config.sigma_min)
        schedule = NoiseSchedule.from_scheduler(scheduler)
        other = denoiser_for(model, schedule)(x, schedule.from_ratio(SIGMAS), labels)
    # 250 ln(sigma) in float32 is a phase that is right to 1e-4.
    assert (ours - expected).abs().max() < 1e-4
    assert (other - expected).abs().max() > 5e-4


def test_half_precision_files_become_float32(tmp_path):
    net = OpenAINet()
    torch.save({name: value.half() for name, value in net.state_dict().items()}, tmp_path / "net.pt")
    assert {p.dtype for p in converted(tmp_path / "net.pt").parameters()} == {torch.float32}


@pytest.mark.parametrize("net", [EDMPrecond(), OpenAINet()], ids=["nvidia", "openai"])
def test_the_folder_is_a_teacher_and_a_pipeline_of_diffusers(tmp_path, net):
    file = write(tmp_path / "net.pkl", net)
    record = convert_edm(file, tmp_path / "teacher", sample_size=8)
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record == json.loads((tmp_path / "teacher" / "teacher.json").read_text())
    assert sorted(p.name for p in (tmp_path / "teacher").iterdir()) == [
        *("model_index.json", "scheduler", "teacher.json", "unet")
    ]
    model, scheduler = load_teacher(tmp_path / "teacher")
    assert record["fingerprint"] == model_fingerprint(model, scheduler)
    assert (num_classes(model), int(null_class(model)), model.config.num_class_embeds) == (5, 5, 6)
    assert not model.class_embedding.weight[5].any()

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "ConsistencyModelPipeline" and type(pipe.scheduler) is type(scheduler)
    images = pipe(batch_size=2, class_labels=[0, 4], num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    # Saved by diffusers and loaded again, it is the same teacher.
    pipe.save_pretrained(tmp_path / "again")
    again, again_scheduler = load_teacher(tmp_path / "again")
    assert model_fingerprint(again, again_scheduler) == record["fingerprint"]
    assert again.config[NULL_CLASS] == 5 and again_scheduler.config.get("_identity_sigma") == scheduler.config.get(
        "_identity_sigma"
    )


def test_stock_euler_sampling_is_that_of_the_original(tmp_path):
    """`ConsistencyModelPipeline` with the scheduler of EDM is a class-conditional Euler sampler."""
    net = EDMPrecond()
    convert_edm(write(tmp_path / "net.pkl", net), tmp_path / "teacher")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 3])
    images = pipe(2, class_labels=labels, num_inference_steps=4, latents=z, output_type="np").images
    x = z * pipe.scheduler.init_noise_sigma
    with torch.no_grad():
        for now, after in zip(pipe.scheduler.sigmas[:-1], pipe.scheduler.sigmas[1:]):
            x = x + (after - now) * (x - net(x, now.expand(2), one_hot(labels, 5))) / now
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(images - expected).max() < 1e-4


def test_guidance_takes_the_null_class(tmp_path):
    net = EDMPrecond()
    convert_edm(write(tmp_path / "net.pkl", net), tmp_path / "teacher")
    model, scheduler = load_teacher(tmp_path / "teacher")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    denoiser = denoiser_for(model, schedule, null_cond=null_class(model))
    x, labels = 5 * torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    sigma = torch.tensor([5.0, 5.0])
    with torch.no_grad():
        cond, none = net(x, sigma, one_hot(labels, 5)), net(x, sigma, torch.zeros(2, 5))
        guided = denoiser(x, schedule.from_ratio(5.0), labels, guidance_scale=3.0)
    assert (guided - (none + 3 * (cond - none))).abs().max() < 1e-4
    assert (cond - none).abs().max() > 1e-2


def test_students_know_the_null_class_too(tmp_path):
    convert_edm(write(tmp_path / "net.pkl", EDMPrecond()), tmp_path / "teacher")
    teacher, _ = load_teacher(tmp_path / "teacher")
    for student in (create_student(teacher), create_student(teacher, channels=[64, 128])):
        assert num_classes(student) == 5 and student.config.num_class_embeds == 6


REFUSED = {
    "a level of 64 channels": (lambda: EDMPrecond(channels=64), "num_groups of .* is 16.*less than 128 channels"),
    "SongUNet": (lambda: rename_model("SongUNet"), "DhariwalUNet is needed, got 'SongUNet'.*DDPM"),
    "VPPrecond": (lambda: rename("VPPrecond"), "EDMPrecond is needed, got 'VPPrecond'"),
    "another filter": (lambda: changed(resample_filter), r"resample_filter of .* is not that of \[1, 1\]"),
    "another skip scale": (lambda: changed(lambda n: setattr(block(n), "skip_scale", 0.5)), "skip_scale .* is 0.5"),
    "another eps": (lambda: changed(lambda n: setattr(block(n).norm0, "eps", 1e-6)), "eps of .* is 1e-06"),
    "heads of two sizes": (lambda: changed(lambda n: setattr(block(n), "num_heads", 1)), "heads of"),
    "no layers": (lambda: changed(lambda n: n.model.dec.clear()), "no UNet2DModel has the layers"),
    "a layer too much": (lambda: changed(lambda n: setattr(n.model, "more", block(n).conv0)), "there twice"),
    "another layer": (lambda: changed(lambda n: setattr(n.model, "more", edm_reference.Linear(3, 3))), "no place for"),
    "a layer of another class": (lambda: changed(other_class), "map_noise is a 'FourierEmbedding'"),
    "itself": (lambda: changed(contain_itself), "inside of itself"),
    "sigma_data": (lambda: EDMPrecond(sigma_data=-1.0), "sigma_data is -1.0"),
    "odd width": (lambda: EDMPrecond(channels=144, attention=(4,)), "channels"),
    "first level wider than the time embedding": (lambda: EDMPrecond(multipliers=(2, 2)), "time_embedding.linear_1"),
}


def block(net: EDMPrecond):
    return net.model.dec["4x4_block0"]


def changed(change) -> EDMPrecond:
    net = EDMPrecond()
    change(net)
    return net


def rename(name: str) -> EDMPrecond:
    net = EDMPrecond()
    net.__class__ = type(name, (EDMPrecond,), {})
    return net


def rename_model(name: str) -> EDMPrecond:
    net = EDMPrecond()
    net.model.__class__ = type(name, (edm_reference.DhariwalUNet,), {})
    return net


def resample_filter(net: EDMPrecond):
    net.model.enc["4x4_down"].conv0.resample_filter = torch.ones(1, 1, 4, 4) / 16


def other_class(net: EDMPrecond):
    net.model.map_noise.__class__ = type("FourierEmbedding", (edm_reference.PositionalEmbedding,), {})


def contain_itself(net: EDMPrecond):
    net.model.more = torch.nn.ModuleDict()
    net.model.more._modules["more"] = net.model.more


@pytest.mark.parametrize("case", REFUSED)
def test_networks_that_cannot_convert_are_refused_before_anything_is_written(tmp_path, case):
    make, text = REFUSED[case]
    file = write(tmp_path / "net.pkl", make())
    with pytest.raises(ValueError, match=f"^checkpoint: .*{text}"):
        convert_edm(file, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_a_small_file_cannot_show_its_numbers_in_many_layers(tmp_path):
    state = openai_state_dict(OpenAINet())
    for n in range(3):
        state[f"input_blocks.{n + 10}.0.weight"] = state["input_blocks.1.0.in_layers.2.weight"]
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="^checkpoint: .* numbers of another layer"):
        convert_edm(tmp_path / "net.pt", tmp_path / "teacher")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("out.2.weight"), "conv_out"),
        (lambda s: s.pop("output_blocks.0.0.in_layers.2.bias"), "conv1.bias"),
        (lambda s: s.update(more=torch.zeros(1)), "no place for"),
        (lambda s: s.update(step=3), "something else than tensors"),
        (lambda s: s.update({"middle_block.1.qkv.weight": torch.zeros(5, 3, 1, 1)}), "multiple of 3"),
        (lambda s: s.update({"time_embed.0.weight": torch.zeros(3)}), "time_embedding.linear_1"),
        (lambda s: s.update({"label_emb.weight": torch.zeros(3)}), "1 dimensions"),
        (lambda s: s.clear(), "neither"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("output_blocks")], "its decoder has 0 blocks"),
        (lambda s: [s.pop(n) for n in list(s) if "output_blocks.0.1" in n], "attentions.0"),
        (lambda s: s.update({"input_blocks.1.0.in_layers.2.weight": torch.zeros(0, 64, 3, 3)}), "levels of"),
    ],
)
def test_other_state_dicts_are_refused(tmp_path, change, text):
    state = dict(OpenAINet().state_dict())
    change(state)
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=f"^checkpoint: .*{text}"):
        convert_edm(tmp_path / "net.pt", tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_an_output_folder_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="^output_dir: .*is there already"):
        convert_edm(tmp_path / "missing.pkl", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"
    with pytest.raises(FileNotFoundError, match="^checkpoint: .*missing.pkl"):
        convert_edm(tmp_path / "missing.pkl", tmp_path / "teacher")
    with pytest.raises(ValueError, match="^sample_size: "):
        convert_edm(write(tmp_path / "net.pt", OpenAINet()), tmp_path / "teacher", sample_size=0)


def test_from_a_pickle_to_a_pipeline_with_guidance(tmp_path, capsys):
    """The commands of docs/teacher.md: convert, pairs, train."""
    file = write(tmp_path / "net.pkl", EDMPrecond(labels=4))
    assert run("convert_edm.py", "--checkpoint", file, "--output_dir", tmp_path / "teacher") == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "teacher" / "teacher.json").read_text())
    assert record["sha256"] in said and record["fingerprint"] in said and "4 classes, and class 4 for none" in said
    assert f"train_msd.py --pretrained_teacher_model {tmp_path / 'teacher'}" in said
    teacher = ["--pretrained_teacher_model", tmp_path / "teacher", "--guidance_scale", 1.5]
    few = ["--num_pairs", 8, "--num_inference_steps", 2]
    assert run("generate_pairs.py", *teacher, "--output_dir", tmp_path / "pairs", *few) == 0
    arguments = ["--num_students", 2, "--stages", "dm", "--partition", "kmeans", *SHORT]
    folders = ["--pairs_dir", tmp_path / "pairs", "--output_dir", tmp_path / "run"]
    assert run("train_msd.py", *teacher, *folders, *arguments) == 0
    pipe = MultiStudentPipeline.from_pretrained(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.router.class_to_student) == 4 and len(pipe(class_labels=[0, 1, 2, 3]).images) == 4
    for student in (None, 0):
        with pytest.raises(ValueError, match=r"class_labels: allowed are 0 \.\.\. 3, got \[4\]"):
            pipe(class_labels=4, student=student)


def test_the_script_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / "net.pkl").write_bytes(b"cos\nsystem\n(tR.")
    assert run("convert_edm.py", "--checkpoint", tmp_path / "net.pkl", "--output_dir", tmp_path / "teacher") == 2
    assert capsys.readouterr().err.startswith("error: checkpoint: the name 'os.system' is refused")


@pytest.mark.slow
def test_the_full_size_network_is_the_same_function(tmp_path):
    """edm-imagenet-64x64-cond-adm: 295.9 M parameters."""
    torch.manual_seed(0)
    net = EDMPrecond(64, 3, 1000, 0, 192, (1, 2, 3, 4), 4, 3, (32, 16, 8))
    record = convert_edm(write(tmp_path / "net.pkl", net), tmp_path / "teacher")
    assert record["network"].startswith("UNet2DModel of 295.9 M parameters for 64x64; 1000 classes")
    model, scheduler = load_teacher(tmp_path / "teacher")
    # Gigabytes; what is loaded stays.
    shutil.rmtree(tmp_path)
    x, labels = torch.randn(1, 3, 64, 64), torch.tensor([207])
    with torch.no_grad():
        theirs = net.model(x, torch.tensor([0.4]), one_hot(labels, 1000))
        ours = model(x, torch.tensor([0.4]), class_labels=labels).sample
        schedule = NoiseSchedule.from_scheduler(scheduler)
        denoised = denoiser_for(model, schedule)(5 * x, schedule.from_ratio(5.0), labels)
        expected = net(5 * x, torch.tensor([5.0]), one_hot(labels, 1000))
    assert theirs.abs().max() > 0.5
    assert (ours - theirs).abs().max() < 1e-5 and (denoised - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_the_full_size_network_of_openai_is_the_same_function(tmp_path):
    torch.manual_seed(0)
    net = OpenAINet(3, 1000, 192, (1, 2, 3, 4), 3, (False, True, True, True))
    model = converted(write(tmp_path / "net.pt", net))
    (tmp_path / "net.pt").unlink()
    x, labels, time = torch.randn(1, 3, 64, 64), torch.tensor([207]), torch.tensor([250 * 5.0])
    with torch.no_grad():
        theirs, ours = net(x, time, labels), model(x, time, class_labels=labels).sample
    assert theirs.abs().max() > 0.5 and (ours - theirs).abs().max() < 1e-5
