# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Saves are whole, the card is right, and the Hub route works with the real client in fresh processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from helpers import generators, tiny_pipeline, tiny_unet
from hub_server import HubServer
from huggingface_hub import ModelCard

from diffusers_msd import ClassRouter, MultiStudentPipeline
from diffusers_msd.model_card import CARD_MARK


ROOT = Path(__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run_python(code: str, cwd: Path, all_output: bool = False, **environment: str) -> str:
    """Runs code in a fresh process, offline unless told otherwise, and returns what it printed (or all, with errors)."""
    search_path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr if all_output else result.stdout


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_students(a: MultiStudentPipeline, b: MultiStudentPipeline) -> None:
    assert a.students.keys() == b.students.keys()
    for k, unet in a.students.items():
        other = b.students[k].state_dict()
        assert unet.state_dict().keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in unet.state_dict().items())


# Saving and loading a folder


def test_save_and_load_are_bit_exact(tmp_path):
    pipe = tiny_pipeline(3)
    pipe.save_pretrained(tmp_path / "p")
    loaded = MultiStudentPipeline.from_pretrained(tmp_path / "p")
    assert_same_students(pipe, loaded)
    assert loaded.router.class_to_student.tolist() == pipe.router.class_to_student.tolist()
    assert loaded.scheduler.to_json_string() == pipe.scheduler.to_json_string()
    images = [p(class_labels=[0, 3], generator=generators(1, 2), output_type="pt").images for p in (pipe, loaded)]
    assert torch.allclose(*images, atol=1e-5)


def test_index_lists_present_components_only_and_no_path(tmp_path):
    tiny_pipeline(2).save_pretrained(tmp_path / "a")
    MultiStudentPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    index = json.loads((tmp_path / "b/model_index.json").read_text())
    components = {name for name in index if not name.startswith("_")}
    assert components == {"scheduler", "router", "unet_0", "unet_1"}
    assert index["router"] == ["diffusers_msd", "ClassRouter"]
    assert str(tmp_path) not in (tmp_path / "b/model_index.json").read_text()


def test_each_student_loads_alone_as_a_stock_model(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path / "p")
    alone = UNet2DModel.from_pretrained(tmp_path / "p", subfolder="unet_1")
    assert all(torch.equal(v, alone.state_dict()[k]) for k, v in pipe.unet_1.state_dict().items())


def test_generic_loader_gives_our_class(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path / "p")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert type(loaded) is MultiStudentPipeline
    assert_same_students(pipe, loaded)


def test_variant_and_full_precision_share_a_folder(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path / "p")
    full = tree(tmp_path / "p")
    tiny_pipeline(2).to(torch.float16).save_pretrained(tmp_path / "p", variant="fp16")
    both = tree(tmp_path / "p")
    assert full[f"unet_1/{WEIGHTS}"] == both[f"unet_1/{WEIGHTS}"]
    half = MultiStudentPipeline.from_pretrained(tmp_path / "p", variant="fp16", dtype=torch.float16)
    assert {unet.dtype for unet in half.students.values()} == {torch.float16}
    assert torch.equal(half.unet_1.conv_in.weight, pipe.unet_1.conv_in.weight.half())
    assert_same_students(pipe, MultiStudentPipeline.from_pretrained(tmp_path / "p"))


def test_dtype_is_per_student_and_routing_is_untouched(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path / "p")
    loaded = MultiStudentPipeline.from_pretrained(tmp_path / "p", dtype={"unet_1": torch.bfloat16})
    assert (loaded.unet_0.dtype, loaded.unet_1.dtype) == (torch.float32, torch.bfloat16)
    half = MultiStudentPipeline.from_pretrained(tmp_path / "p", dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.route(class_labels=range(4)) == pipe.route(class_labels=range(4))
    images = half(class_labels=[0, 3], generator=generators(1, 2), output_type="pt").images
    reference = pipe(class_labels=[0, 3], generator=generators(1, 2), output_type="pt").images
    assert images.dtype == torch.float32
    assert (images - reference).abs().mean() < 0.02


def test_sharded_weights_load_and_stale_shards_do_not_survive(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path / "p", max_shard_size="100KB")
    assert (tmp_path / "p/unet_0" / f"{WEIGHTS}.index.json").exists()
    assert_same_students(pipe, MultiStudentPipeline.from_pretrained(tmp_path / "p"))
    other = tiny_pipeline(2)
    other.unet_0.conv_in.weight.data.add_(1.0)
    other.save_pretrained(tmp_path / "p")
    assert_same_students(other, MultiStudentPipeline.from_pretrained(tmp_path / "p"))
    assert sorted(p.name for p in (tmp_path / "p/unet_0").iterdir()) == ["config.json", WEIGHTS]


def test_left_out_student_is_not_loaded_and_its_folder_not_needed(tmp_path):
    tiny_pipeline(2).save_pretrained(tmp_path / "p")
    (tmp_path / "p/unet_1" / WEIGHTS).unlink()
    pipe = MultiStudentPipeline.from_pretrained(tmp_path / "p", unet_1=None)
    assert list(pipe.students) == [0]
    with pytest.raises(ValueError, match="class_labels: label 3 belongs to student 1, which is absent"):
        pipe(class_labels=[0, 3])


def test_router_with_more_parts_than_students_is_refused_at_load(tmp_path):
    tiny_pipeline(2).save_pretrained(tmp_path / "p")
    ClassRouter.consecutive(4, 3).save_pretrained(tmp_path / "p/router")
    with pytest.raises(ValueError, match="router: it has 3 parts.*no unet_2; pass None"):
        MultiStudentPipeline.from_pretrained(tmp_path / "p")


def test_loading_never_unpickles(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path / "p")
    pipe.unet_1.save_pretrained(tmp_path / "p/unet_1", safe_serialization=False)
    (tmp_path / "p/unet_1" / WEIGHTS).unlink()
    assert list((tmp_path / "p/unet_1").glob("*.bin"))
    with pytest.raises(FileNotFoundError, match="pretrained_model_name_or_path.*safetensors"):
        MultiStudentPipeline.from_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match="use_safetensors: only True is allowed, got False"):
        MultiStudentPipeline.from_pretrained(tmp_path / "p", use_safetensors=False)
    pipe.save_pretrained(tmp_path / "q", safe_serialization=False)
    assert (tmp_path / "q/unet_1" / WEIGHTS).exists() and not list(tmp_path.glob("q/*/*.bin"))


def test_missing_or_truncated_files_are_named(tmp_path):
    tiny_pipeline(2).save_pretrained(tmp_path / "p")
    with pytest.raises(FileNotFoundError, match="pretrained_model_name_or_path.*model_index.json"):
        MultiStudentPipeline.from_pretrained(tmp_path / "p/router")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MultiStudentPipeline.from_pretrained(tmp_path / "nowhere")
    weights = tmp_path / "p/unet_1" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises((ValueError, FileNotFoundError), match="pretrained_model_name_or_path.*unet_1"):
        MultiStudentPipeline.from_pretrained(tmp_path / "p")


# Whole or not at all


def test_failed_save_leaves_the_old_pipeline_and_no_rest(tmp_path):
    pipe = tiny_pipeline(2)
    for target in (tmp_path / "old", tmp_path / "new"):
        if target.name == "old":
            pipe.save_pretrained(target)
        before = tree(tmp_path)
        broken = tiny_pipeline(2)
        broken.unet_0.conv_in.weight.data.zero_()
        # Its config cannot be written as JSON, which shows after student 0 and the router were written.
        broken.unet_1.register_to_config(unwritable=object())
        with pytest.raises(TypeError):
            broken.save_pretrained(target)
        assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_save_into_a_used_folder_keeps_what_is_not_ours(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2/state.json").write_text("{}")
    (folder / "README.md").write_text("my own words")
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(folder)
    assert (folder / "checkpoint-2/state.json").read_text() == "{}"
    assert (folder / "README.md").read_text() == "my own words"
    assert not list(folder.glob(".saving-*"))
    assert_same_students(pipe, MultiStudentPipeline.from_pretrained(folder))


def test_own_card_is_rewritten_with_the_record_of_training(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path / "p")
    pipe.model_card_details = "## Training\n\n1234 steps of DM."
    pipe.save_pretrained(tmp_path / "p")
    assert "1234 steps of DM." in (tmp_path / "p/README.md").read_text()


def test_unwritable_save_directory_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match="save_directory: .*file"):
            tiny_pipeline(1).save_pretrained(target)


# The card


def test_card_has_metadata_parts_and_parameters(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path / "p")
    card = ModelCard.load(tmp_path / "p/README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "diffusers_msd" in card.data.tags
    count = pipe.unet_0.num_parameters()
    assert CARD_MARK in card.text
    assert f"| `unet_1` | {count:,} |" in card.text and f"| total | {2 * count:,} |" in card.text
    assert pipe.router.report() in card.text
    assert str(tmp_path) not in card.content


def test_usage_snippet_of_the_card_runs_as_printed(tmp_path):
    tiny_pipeline(2).save_pretrained(tmp_path / "digits-k2")
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "digits-k2/README.md").read_text(), re.S)[1]
    assert run_python(snippet + "print(len(images), images[0].size)", tmp_path).split("\n")[-2] == "4 (8, 8)"


# Fresh processes and the Hub


def test_serving_import_needs_neither_training_nor_metrics(tmp_path):
    code = (
        "import sys, diffusers_msd\n"
        "heavy = {'datasets', 'sklearn', 'torchmetrics', 'tensorboard'}\n"
        "heavy |= {'diffusers_msd.' + name for name in ('data', 'metrics', 'objectives', 'stages', 'training')}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code, tmp_path) == "[]\n"


def test_register_classes_makes_diffusers_know_us_in_a_fresh_process(tmp_path):
    code = (
        "import diffusers, diffusers_msd\n"
        "from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES\n"
        "print(diffusers.MultiStudentPipeline is diffusers_msd.MultiStudentPipeline)\n"
        "print(all(hasattr(diffusers_msd, base) for base in LOADABLE_CLASSES['diffusers_msd']))"
    )
    assert run_python(code, tmp_path) == "True\nTrue\n"


PUSH = """
from helpers import tiny_pipeline
pipe = tiny_pipeline(3)
pipe.model_card_details = "trained on nothing"
print(pipe.push_to_hub("multi", license="apache-2.0").commit_url)
"""

LOAD = """
import torch, diffusers_msd
from diffusers import DiffusionPipeline, UNet2DModel
from helpers import tiny_pipeline
original = tiny_pipeline(3)
for cls in (diffusers_msd.MultiStudentPipeline, DiffusionPipeline):
    pipe = cls.from_pretrained("tester/multi")
    assert type(pipe) is diffusers_msd.MultiStudentPipeline
    for k, unet in original.students.items():
        assert all(torch.equal(v, pipe.students[k].state_dict()[n]) for n, v in unet.state_dict().items())
assert pipe.route(class_labels=[0, 3]) == [0, 2]
"""


def test_push_then_load_by_repo_id_with_both_loaders(tmp_path):
    with HubServer() as hub:
        run_python(PUSH, tmp_path, **hub.environment(tmp_path / "push"))
        files = set(hub.repos["tester/multi"])
        assert files == {"README.md", "model_index.json", "scheduler/scheduler_config.json", "router/config.json"} | {
            f"unet_{k}/{name}" for k in range(3) for name in ("config.json", WEIGHTS)
        }
        card = hub.repos["tester/multi"]["README.md"].decode()
        assert 'from_pretrained("tester/multi")' in card and "trained on nothing" in card
        assert "\nlicense: apache-2.0\n" in card
        run_python(LOAD, tmp_path, **hub.environment(tmp_path / "load"))


def test_left_out_student_and_other_variants_are_not_downloaded(tmp_path):
    tiny_pipeline(2).save_pretrained(tmp_path / "p")
    tiny_pipeline(2).to(torch.float16).save_pretrained(tmp_path / "p", variant="fp16")
    common = {"model_index.json", "scheduler/scheduler_config.json", "router/config.json", "unet_0/config.json"}
    load = "from diffusers_msd import MultiStudentPipeline as P\nP.from_pretrained('tester/p', {})"
    alone = "from diffusers import UNet2DModel\nUNet2DModel.from_pretrained('tester/p', subfolder='unet_1')"
    expected = {
        load.format("unet_1=None"): common | {f"unet_0/{WEIGHTS}"},
        load.format("unet_1=None, variant='fp16'"): common | {f"unet_0/{WEIGHTS.replace('.', '.fp16.')}"},
        alone: {"unet_1/config.json", f"unet_1/{WEIGHTS}"},
    }
    with HubServer() as hub:
        hub.add_folder("tester/p", tmp_path / "p")
        for i, (code, files) in enumerate(expected.items()):
            hub.downloads.clear()
            run_python(code, tmp_path, **hub.environment(tmp_path / f"home{i}"))
            assert {name for _, name in hub.downloads} == files


def test_pickled_weights_on_the_hub_are_refused_and_not_downloaded(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path / "p")
    pipe.unet_1.save_pretrained(tmp_path / "p/unet_1", safe_serialization=False)
    (tmp_path / "p/unet_1" / WEIGHTS).unlink()
    code = (
        "from diffusers_msd import MultiStudentPipeline as P\n"
        "try:\n    P.from_pretrained('tester/p')\nexcept FileNotFoundError as error:\n    print(error)"
    )
    with HubServer() as hub:
        hub.add_folder("tester/p", tmp_path / "p")
        printed = run_python(code, tmp_path, **hub.environment(tmp_path / "home"))
        assert "pretrained_model_name_or_path: tester/p" in printed and "safetensors" in printed
        assert not any(name.endswith(".bin") for _, name in hub.downloads)


def test_push_keeps_a_card_written_on_the_hub_and_uploads_the_pipeline_only(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/secret.txt").write_text("not for the Hub")
    code = (
        "from helpers import tiny_pipeline\n"
        "tiny_pipeline(2).save_pretrained('run', push_to_hub=True, repo_id='multi', commit_message='again')"
    )
    with HubServer() as hub:
        hub.repos["tester/multi"] = {"README.md": b"my own words"}
        run_python(code, tmp_path, **hub.environment(tmp_path / "home"))
        assert hub.repos["tester/multi"]["README.md"] == b"my own words"
        assert f"unet_1/{WEIGHTS}" in hub.repos["tester/multi"]
        assert "secret.txt" not in hub.repos["tester/multi"]


def test_students_of_different_seeds_differ():
    # The comparisons above would pass for any mix-up of students if all had the same weights.
    assert not torch.equal(tiny_unet(seed=0).conv_in.weight, tiny_unet(seed=1).conv_in.weight)
