# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import json
import resource
import shutil

import pytest
import torch
from helpers import tiny_unet
from safetensors.torch import load_file, save_file
from test_training import STEPS, Images, different, hashes, log_of, make_trainer, tensors_in

from diffusers_msd.checkpoint import checkpoints, find_checkpoint, load_optimizer, load_weights, prune, save_optimizer


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A TSM run with checkpoint-5 and checkpoint-8, read or copied, never changed."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer("tsm", folder, {"images": Images()}).fit()
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    shutil.rmtree(folder / "final")
    return folder


def resume(folder, name="latest", **changes):
    return make_trainer("tsm", folder, {"images": Images()}, resume_from_checkpoint=name, **changes).fit()


def make_checkpoints(folder, *steps):
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "state.json").write_text("{}")


# ------------------------------------------------------------------ which checkpoints there are


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "max_train_steps": [4]}
    make_trainer("tsm", tmp_path, {"images": Images()}, **settings).fit()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_without_a_limit_all_checkpoints_are_kept(tmp_path):
    make_checkpoints(tmp_path, 1, 2, 3)
    prune(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 3


def test_checkpoints_are_ordered_by_step_and_nothing_else_counts_as_one(tmp_path):
    make_checkpoints(tmp_path, 9, 100, 20)
    for name in ("checkpoint-x", ".checkpoint-300.abc", "checkpoint-300.old", "final"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-400").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path, None) is None
    prune(tmp_path, 1)
    assert (tmp_path / "checkpoint-x").is_dir() and [p.name for p in checkpoints(tmp_path)] == ["checkpoint-100"]


def test_latest_of_an_empty_folder_starts_from_the_beginning(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    assert resume(tmp_path, max_train_steps=[1]).is_dir()


def test_an_older_checkpoint_can_be_resumed_by_name(finished, copy):
    """The newer ones, and the log beyond, belong to the past that is done again."""
    resume(copy, max_train_steps=[6], checkpointing_steps=100)
    resume(copy, "checkpoint-5")
    assert different(finished / f"checkpoint-{STEPS}", copy / f"checkpoint-{STEPS}") == []
    assert [line["step"] for line in log_of(copy)] == [3, 6, 8]


def test_checkpoint_made_after_resuming_an_older_one_is_not_the_one_pruned(finished, copy):
    shutil.copytree(finished / f"checkpoint-{STEPS}", copy / "checkpoint-900")
    limits = {"checkpoints_total_limit": 1, "checkpointing_steps": 1, "max_train_steps": [STEPS - 1]}
    resume(copy, "checkpoint-5", **limits)
    assert find_checkpoint(copy, "latest").name == f"checkpoint-{STEPS - 1}"


def test_networks_of_a_checkpoint_load_alone_with_diffusers(finished):
    folder = finished / "checkpoint-5" / "student"
    unet = type(tiny_unet()).from_pretrained(folder)
    saved = load_file(folder / WEIGHTS)
    assert all(torch.equal(value, saved[name]) for name, value in unet.state_dict().items())


# ------------------------------------------------------------------ optimizers


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "sgd, states that are no tensors": lambda p: torch.optim.SGD(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_loaded_optimizer_goes_on_bit_for_bit(make, tmp_path):
    def network():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))

    def step(model, optimizer, n):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(n))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, other = network(), network()
    optimizer = make(model.parameters())
    step(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.037
    save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    before = hashes(tmp_path)
    other.load_state_dict(model.state_dict())
    loaded = make(other.parameters())
    load_optimizer(loaded, tmp_path / "optimizer.safetensors")
    assert loaded.param_groups[0]["lr"] == 0.037
    for n in (2, 3):
        step(model, optimizer, n)
        step(other, loaded, n)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
    # The states are not maps of the file: going on has not written into it.
    assert hashes(tmp_path) == before


def test_optimizer_of_another_network_is_refused_by_name(tmp_path):
    path = tmp_path / "optimizer.safetensors"
    save_optimizer(torch.optim.AdamW(torch.nn.Linear(3, 5).parameters()), path)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*{path.name}"):
        load_optimizer(
            torch.optim.AdamW(torch.nn.Sequential(*[torch.nn.Linear(3, 5)] * 2, torch.nn.Linear(5, 1)).parameters()),
            path,
        )


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    tiny_unet(block_out_channels=(8, 24)).save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: {tmp_path / 'student'} holds .* another shape"):
        load_weights(tiny_unet(), tmp_path / "student")


# ------------------------------------------------------------------ atomic saves


def test_save_that_fails_halfway_leaves_no_checkpoint_and_the_older_one_loads(finished, copy):
    """The disk is full: no file may grow beyond 4 KB, which is enough for a config but not for weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(call, images):
        # The second batch after the resume, so the checkpoint of step 7 is the one that fails.
        if call == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return images

    before = hashes(copy / "checkpoint-5")
    settings = {"resume_from_checkpoint": "latest", "checkpointing_steps": 7, "checkpoints_total_limit": 1}
    trainer = make_trainer("tsm", copy, {"images": Images(fill_the_disk)}, **settings)
    try:
        with pytest.raises(Exception, match="(?i)file too large"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # Nothing of it is left, not even a hidden folder.
    assert sorted(path.name for path in copy.iterdir()) == ["checkpoint-5", "log.jsonl"]
    assert hashes(copy / "checkpoint-5") == before
    resume(copy)
    assert different(finished / f"checkpoint-{STEPS}", copy / f"checkpoint-{STEPS}") == []


def test_remains_of_a_killed_save_do_not_disturb(finished, copy):
    shutil.copytree(copy / "checkpoint-5" / "student", copy / ".checkpoint-7.0123abcd" / "student")
    resume(copy)
    assert different(finished / "final", copy / "final") == []


# ------------------------------------------------------------------ missing, damaged, of another run


def test_missing_checkpoint_is_an_error_that_lists_those_there_are(copy):
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint: .*checkpoint-4.*there are: checkpoint-5"):
        resume(copy, "checkpoint-4")


@pytest.mark.parametrize("name", ["student", "student_ema", "optimizer_student.safetensors", "state.json"])
def test_checkpoint_without_one_of_its_parts_is_an_error(name, copy):
    path = copy / "checkpoint-5" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=f"resume_from_checkpoint: .*checkpoint-5.*{name.split('.')[0]}"):
        resume(copy)


@pytest.mark.parametrize("name", [
    f"student/{WEIGHTS}", f"student_ema/{WEIGHTS}", "optimizer_student.safetensors", "state.json",
    "student/config.json",
])  # fmt: skip
@pytest.mark.parametrize("damage", ["truncated", "noise", "empty"])
def test_damaged_checkpoint_is_an_error(name, damage, copy):
    path = copy / "checkpoint-5" / name
    content = path.read_bytes()
    noise = bytes(torch.randint(128, 256, (200,), dtype=torch.uint8).tolist())
    path.write_bytes({"truncated": content[: len(content) // 2], "noise": noise, "empty": b""}[damage])
    log = (copy / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="resume_from_checkpoint: .*checkpoint-5"):
        resume(copy)
    # It stopped before the log was cut to the checkpoint.
    assert (copy / "log.jsonl").read_bytes() == log


def test_optimizer_file_without_its_settings_is_an_error(copy):
    path = copy / "checkpoint-5" / "optimizer_student.safetensors"
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="resume_from_checkpoint: .*optimizer_student"):
        resume(copy)


def test_state_without_its_entries_is_an_error(copy):
    (copy / "checkpoint-5" / "state.json").write_text(json.dumps({"step": 5}))
    with pytest.raises(ValueError, match="resume_from_checkpoint: .*state.json"):
        resume(copy)


@pytest.mark.parametrize("changes, text", [
    ({"seed": 1}, "seed = 0, now it is 1"),
    ({"train_batch_size": 8}, "global_batch_size = 4, now it is 8"),
    ({"gradient_accumulation_steps": 2}, "global_batch_size = 4, now it is 8"),
    ({"ema_decay": 0.0}, "ema = True, now it is False"),
])  # fmt: skip
def test_resuming_with_other_settings_is_an_error(changes, text, copy):
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*checkpoint-5 was made with {text}"):
        resume(copy, **changes)


def test_same_global_batch_in_other_micro_batches_may_resume(finished, copy):
    resume(copy, train_batch_size=2, gradient_accumulation_steps=2, adam_epsilon=1e-8)
    whole, split = tensors_in(finished / "final"), tensors_in(copy / "final")
    for name, weight in whole.items():
        assert (split[name] - weight).abs().max() < 5e-3, name
    assert [line["step"] for line in log_of(copy)] == [3, 6, 8]


def test_starting_anew_over_checkpoints_is_an_error(copy):
    before = hashes(copy)
    with pytest.raises(ValueError, match="output_dir: .*earlier run.*--resume_from_checkpoint latest"):
        make_trainer("tsm", copy, {"images": Images()}).fit()
    assert hashes(copy) == before


def test_log_line_cut_short_by_a_crash_does_not_stop_a_resume(copy):
    with (copy / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "student/lo')
    resume(copy)
    assert [line["step"] for line in log_of(copy)] == [3, 6, 8]
