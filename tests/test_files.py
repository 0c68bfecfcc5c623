# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from helpers import edm_scheduler, tiny_unet

from diffusers_msd.files import (
    atomic_directory,
    atomic_write,
    check_writable,
    fingerprint,
    load_model,
    load_tensors,
    model_fingerprint,
    save_tensors,
    write_json,
)


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "net")
    return tmp_path / "net"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_folder_write_leaves_the_old_folder_and_no_litter(tmp_path, error):
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(error):
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "a").write_text("half of the ne")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_replaced_folder_holds_only_the_new_files(tmp_path):
    for name in ("old", "new"):
        with atomic_directory(tmp_path / "deep" / "out") as folder:
            (folder / name).mkdir()
            (folder / name / "file").write_text(name)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == ["new"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "a").read_text() == "new"


def test_a_killed_process_leaves_the_old_folder_whole(tmp_path):
    write_json(tmp_path / "out" / "a.json", {"old": True})
    script = (
        "import os, signal, sys\n"
        "from diffusers_msd.files import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as folder:\n"
        "    (folder / 'a.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env=environment)
    assert result.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "a.json").read_text() == '{\n  "old": true\n}\n'


def test_two_writers_of_one_folder_leave_one_whole_folder(tmp_path):
    def write(writer):
        for _ in range(20):
            with atomic_directory(tmp_path / "out") as folder:
                for name in "ab":
                    (folder / name).write_text(str(writer))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "out" / "b").read_text()


def test_a_folder_is_not_written_over_a_file(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ValueError, match="path: .*out is a file; a folder"):
        with atomic_directory(tmp_path / "out"):
            pass
    assert (tmp_path / "out").read_text() == "precious"


def test_a_failed_file_write_leaves_the_old_file_and_no_litter(tmp_path):
    atomic_write(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(tmp_path / "a", "no text: \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_saved_files_and_folders_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", b"")
        with atomic_directory(tmp_path / "out"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_tensors_come_back_as_saved_even_when_they_share_storage(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base[1], "t": base.T, "h": base.bfloat16(), "n": torch.tensor(3), "e": base[:0]}
    save_tensors(tmp_path / "t.safetensors", tensors, {"k": "v"})
    loaded, metadata = load_tensors(tmp_path / "t.safetensors", "path")
    assert metadata == {"k": "v"} and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_a_truncated_tensor_file_is_named(tmp_path, size):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="resume: .*t.safetensors is truncated or corrupt"):
        load_tensors(path, "resume")
    with pytest.raises(FileNotFoundError, match="resume: .*missing"):
        load_tensors(tmp_path / "none.safetensors", "resume")


def test_fingerprint_sees_every_change_of_content_and_none_of_order():
    a, b = torch.arange(4.0), torch.zeros(2, 2)
    reference = fingerprint({"a": a, "b": b}, {"x": 1, "y": [1, 2]})
    assert reference == fingerprint({"b": b, "a": a}, {"y": (1, 2), "x": 1, "_version": "9"})
    flipped = a.clone()
    flipped.view(torch.int32)[3] ^= 1
    others = [
        fingerprint({"a": flipped, "b": b}, {"x": 1, "y": [1, 2]}),
        fingerprint({"c": a, "b": b}, {"x": 1, "y": [1, 2]}),
        fingerprint({"a": a.view(torch.int32), "b": b}, {"x": 1, "y": [1, 2]}),
        fingerprint({"a": a, "b": b.reshape(4)}, {"x": 1, "y": [1, 2]}),
        fingerprint({"a": a, "b": b}, {"x": 2, "y": [1, 2]}),
        fingerprint({"a": a}, {"x": 1, "y": [1, 2]}),
    ]
    assert len({reference, *others}) == 1 + len(others)


def test_model_fingerprint_survives_saving_and_knows_the_scheduler(tmp_path):
    net, scheduler = tiny_unet(), edm_scheduler()
    reference = model_fingerprint(net, scheduler)
    net.save_pretrained(tmp_path / "net")
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = load_model(UNet2DModel, tmp_path / "net", "path")
    assert model_fingerprint(loaded, load_model(EDMEulerScheduler, tmp_path / "scheduler", "path")) == reference
    assert model_fingerprint(net, EDMEulerScheduler(sigma_max=79)) != reference
    assert model_fingerprint(tiny_unet(seed=1), scheduler) != reference


def test_an_unwritable_output_folder_is_named(tmp_path):
    assert check_writable(tmp_path / "a" / "b", "output_dir").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir: cannot write in .*file"):
        check_writable(tmp_path / "file" / "out", "output_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="output_dir: cannot write in"):
        check_writable(tmp_path, "output_dir")


def test_a_loaded_model_has_the_saved_weights(saved):
    net, loaded = tiny_unet(), load_model(UNet2DModel, saved.parent, "teacher", subfolder="net")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("size", [0, 1000, -4])
def test_truncated_weights_are_named(saved, size):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:size])
    with pytest.raises(ValueError, match="teacher: a file of .*net is truncated, corrupt"):
        load_model(UNet2DModel, saved, "teacher")


def test_a_config_that_does_not_fit_the_weights_is_an_error(saved):
    config = (saved / "config.json").read_text()
    for old, new in (
        ('"layers_per_block": 1', '"layers_per_block": 2'),
        ('"num_class_embeds": 4', '"num_class_embeds": 5'),
    ):
        assert old in config
        (saved / "config.json").write_text(config.replace(old, new))
        with pytest.raises(ValueError, match="teacher: .*net.* fit its config.json"):
            load_model(UNet2DModel, saved, "teacher")
    (saved / "config.json").write_text(config[:50])
    with pytest.raises(ValueError, match="teacher: a file of .*net is truncated, corrupt"):
        load_model(UNet2DModel, saved, "teacher")


def test_weights_that_are_not_safetensors_are_never_read(saved):
    (saved / WEIGHTS).rename(saved / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="teacher: .*net holds no .*safetensors"):
        load_model(UNet2DModel, saved, "teacher")


def test_a_missing_local_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/teacher", "./teacher", "runs/a/teacher", tmp_path / "teacher"):
        with pytest.raises(FileNotFoundError, match="teacher: .*teacher holds no config.json"):
            load_model(UNet2DModel, path, "teacher")
    with pytest.raises(FileNotFoundError, match="scheduler: .*runs holds no scheduler_config.json"):
        load_model(EDMEulerScheduler, "runs", "scheduler")


def test_an_unknown_hub_id_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="teacher: owner/name is neither a local folder nor a Hub repository"):
        load_model(UNet2DModel, "owner/name", "teacher", local_files_only=True)
