# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Publishing: the card says what the run recorded, its snippets run, uploads are whole, bad input stops before them."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import random_prompts, tiny_pipeline, tiny_stable_diffusion, tiny_text_pipeline
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_adapters import adapter, lora_pipeline
from test_hub import ROOT, WEIGHTS, run_python, tree

from diffusers_msd.adapters import base_of
from diffusers_msd.files import write_json
from diffusers_msd.model_card import PICTURE, is_own_card
from diffusers_msd.publishing import conditions_by_student, picture, push
from diffusers_msd.run_report import read_results, results_section, run_sections


ABOUT = {"teacher": "tester/teacher", "data": "digits", "partition": "consecutive"}
SETTINGS = {
    **{"teacher": "0123456789abcdef", "num_students": 2, "stages": ["dm", "adm"], "seed": 7},
    **{"student_channels": None, "student_blocks": None, "student_type": "full", "rank": 64},
}


def write_run(folder, about=ABOUT, **settings):
    """What a run leaves beside its pipeline."""
    write_json(folder / "run.json", {**SETTINGS, **settings, "about": about})
    for k, stage in itertools.product(range(2), ("dm", "adm")):
        account = {"steps": 1000 + k, "images_seen": {"pairs": 640}, "flops": 3 * 10**12, "seconds": 12.5}
        write_json(folder / f"student_{k}/{stage}/final/summary.json", {**account, "hardware": ["a small computer"]})
    write_json(folder / "pairs.json", {"pairs": 2000, "flops": 10**12, "seconds": 30.0})


def write_results(file, folder="K2"):
    """What evaluate.py leaves, with a teacher and a pipeline in two parts."""
    metrics = {"fd": 2.25, "kid": 5.0, "precision": 0.75, "recall": 0.5, "class_accuracy": 0.97}
    parts = {str(k): {**metrics, "fd": 3.125 + k} for k in range(2)}
    rows = [{"model": "teacher", **metrics, "fd": 1.5}, {"model": "K=2", **metrics, "parts": parts}]
    models = ["teacher=assets/teacher", f"K=2=somewhere/{folder}"]
    write_json(file, {"rows": rows, "protocol": "2000 images | made", "config": {"models": models}})
    return file


def snippet(card: bytes | str) -> str:
    return re.search(r"```python\n(.*?)```", card.decode() if isinstance(card, bytes) else card, re.S)[1]


def text_lora_pipeline(folder):
    """Two LoRA students of prompts on the UNet of `tiny_stable_diffusion`."""
    base = tiny_stable_diffusion(folder).unet
    students = {f"unet_{k}": adapter(base_of(base), k)[0] for k in range(2)}
    return tiny_text_pipeline(folder, 2, unet=base, **students)


# What is written


def test_card_of_a_run_says_how_it_was_trained_and_what_it_cost(tmp_path):
    write_run(tmp_path)
    text = run_sections(tmp_path)
    assert "- Teacher: `tester/teacher` (fingerprint `0123456789ab`)" in text
    assert "- Stages: DM (distribution matching), then ADM" in text and "- Data: digits" in text
    assert "| student 1 | 2,002 | 1,280 | 6 | 25 |" in text
    assert "| pairs of the teacher | - | - | 1 | 30 |" in text
    assert "| all students | 4,002 | 2,560 | 12 | 50 |" in text and "a small computer" in text


def test_run_of_an_earlier_version_and_one_without_its_students_still_have_a_card(tmp_path):
    assert run_sections(tmp_path) == ""
    write_json(tmp_path / "run.json", {name: SETTINGS[name] for name in list(SETTINGS)[:-2]})
    text = run_sections(tmp_path)
    assert "(fingerprint `0123456789ab`)" in text and "Data" not in text and "Compute" not in text


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"student_type": "lora"}, "LoRA adapters of rank 64 on the teacher"),
        ({"student_channels": [8, 16], "student_init": "inherit"}, "inherited from the teacher at the start"),
    ],
)
def test_card_names_the_kind_of_students(settings, words, tmp_path):
    write_run(tmp_path, **settings)
    assert words in run_sections(tmp_path)


def test_results_are_found_where_evaluations_put_them_and_shown_per_part(tmp_path):
    folder = tmp_path / "K2"
    folder.mkdir()
    assert read_results(None, folder) is None
    write_results(tmp_path / "results/results.json", "another")
    assert read_results(None, folder) is None
    write_results(tmp_path / "results/results.json")
    text = results_section(*read_results(None, folder))
    assert "|  | FD | KID | class accuracy | precision | recall |" in text
    assert "| all | 2.25 |" in text and "| part 1 | 4.125 |" in text and "| the teacher, all | 1.5 |" in text
    assert text.endswith("2000 images | made")


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "results: .*missing.json is missing"),
        ("not JSON", "results: .*is no results.json"),
        ("[1]", "results: .*is no results.json"),
        ('{"rows": [{"model": 3}], "protocol": "", "config": {"models": []}}', "results: .*is no results.json"),
    ],
)
def test_bad_results_are_refused(content, words, tmp_path):
    file = tmp_path / "missing.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        read_results(file, tmp_path)


def test_results_of_other_models_are_refused_when_they_were_named(tmp_path):
    with pytest.raises(ValueError, match="results: .*0 models in a folder named K2.*K=2=somewhere/other"):
        read_results(write_results(tmp_path / "r.json", "other"), tmp_path / "K2")


def test_picture_has_a_row_per_student_and_is_the_same_each_time():
    pipe = tiny_pipeline(2)
    shown = conditions_by_student(pipe, None, None, None)
    assert shown == {0: [0, 1], 1: [2, 3]}
    first, again = (picture(pipe, shown) for _ in range(2))
    assert first == again
    assert Image.open(io.BytesIO(first)).size == (8 * 70, 2 * 70)
    assert picture(pipe, {0: [1]}) != picture(pipe, {0: [0]})


def test_picture_shows_at_most_eight_students():
    assert list(conditions_by_student(tiny_pipeline(12, 12), None, None, None)) == [0, 2, 4, 6, 8, 10]


def test_prompts_come_from_the_partition_of_the_run_or_from_the_caller(tmp_path):
    pipe, prompts = tiny_text_pipeline(tmp_path, 2), random_prompts()
    by = dict(zip(prompts, pipe.route(prompts)))
    lines = [f"  typical   1.5  {p}" for p in prompts[:6]] + ["  typical   1.5  long ...", "  ambiguous 0.1  no"]
    with pytest.raises(ValueError, match="prompts: some to be shown are needed"):
        conditions_by_student(pipe, tmp_path, None, None)
    (tmp_path / "partition.txt").write_text("\n".join(lines))
    shown = conditions_by_student(pipe, tmp_path, None, None)
    assert shown == {k: [p for p in prompts[:6] if by[p] == k] for k in sorted({by[p] for p in prompts[:6]})}
    own = [p for p in prompts if by[p] == 1]
    assert conditions_by_student(pipe, tmp_path, prompts, 1) == {1: own}
    with pytest.raises(ValueError, match="prompts: none of them is answered by student 0"):
        conditions_by_student(pipe, tmp_path, own, 0)


def test_a_card_without_text_is_ours_to_write(tmp_path):
    card = tmp_path / "README.md"
    for text, own in (
        ("---\nlicense: mit\n---\n", True),
        ("---\nlicense: mit\n---\nWords\n", False),
        ("Words", False),
    ):
        card.write_text(text)
        assert is_own_card(card) is own


# Bad input. No network is allowed here, so it is refused before any of it.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "K2"
    tiny_pipeline(2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        *(
            (ValueError, "repo_id: name or owner/name", {"repo_id": bad})
            for bad in ("../x", "a/../b", "a/b/c", "", ".", "a b", "a/b\n", "/etc/passwd", "a--b", "ü/b", "a" * 10**6)
        ),
        (TypeError, "repo_id: text expected", {"repo_id": None}),
        (TypeError, "repo_id: text expected", {"repo_id": 3}),
        (ValueError, "license: nothing is published without one", {"license": None}),
        (TypeError, "license: text expected", {"license": ["mit"]}),
        *((ValueError, "license: an identifier", {"license": bad}) for bad in ("", "MIT\nx: y", "Apache 2.0", "mit ")),
        (ValueError, "teacher: name or owner/name", {"teacher": "../../teacher"}),
        (ValueError, "token: letters, digits", {"token": "hf_secret\n"}),
        *((ValueError, "student: one of 0, 1 expected", {"student": bad}) for bad in (2, 10**5000)),
        (ValueError, "student: a whole number >= 0", {"student": -1}),
        *((TypeError, "student: a whole number expected", {"student": bad}) for bad in (True, "0", [1], 0.0)),
        (ValueError, "prompts: this pipeline goes by class labels", {"prompts": ["a cat"]}),
        (FileNotFoundError, "results: .*is missing", {"results": "nowhere.json"}),
        (FileNotFoundError, "path: .*holds no model_index.json", {"path": "nowhere"}),
        (FileNotFoundError, "path: .*holds no model_index.json", {"path": ROOT / "docs"}),
    ],
)
def test_bad_input_is_an_error_of_one_line_before_any_upload(error, words, arguments, saved):
    with pytest.raises(error, match=words) as raised:
        push(**{"path": saved, "repo_id": "me/mine", "license": "mit", **arguments})
    text = str(raised.value)
    assert "\n" not in text and len(text) < 500 and "hf_secret" not in text


@pytest.mark.parametrize(
    "index, words",
    [
        ("no JSON", "path: .*is no index"),
        ("[]", "path: .*is no index"),
        ('{"_class_name": "DDPMPipeline"}', "path: .*holds a DDPMPipeline"),
        ('{"_class_name": "MultiStudentPipeline"}', "path: "),
    ],
)
def test_a_folder_that_is_no_whole_pipeline_is_refused(index, words, saved, tmp_path):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        push(tmp_path, "me/mine", "mit")


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_weights_are_not_published(damage, tmp_path):
    tiny_pipeline(2).save_pretrained(tmp_path / "p")
    weights = tmp_path / "p/unet_1" / WEIGHTS
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises((ValueError, FileNotFoundError), match="path: .*unet_1"):
        push(tmp_path / "p", "me/mine", "mit")


def test_students_that_need_their_teacher_ask_for_its_id(tmp_path):
    lora_pipeline(2).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="teacher: its Hub id is needed"):
        push(tmp_path / "lora", "me/mine", "mit", student=0)


def test_without_network_the_error_says_that_nothing_shows(saved):
    with pytest.raises(ConnectionError, match="me/mine: the upload did not finish .*run the same again"):
        push(saved, "me/mine", "mit")


# With the real client, in fresh processes

# Of an earlier push: in the way of the new weights, and not.
OLD_SHARDS = {f"unet_0/{WEIGHTS}.index.json", "unet_0/diffusion_pytorch_model-00001-of-00002.safetensors"}
OTHER_FILES = {"unet_0/diffusion_pytorch_model.fp16.safetensors", "unet_0/other.safetensors"}
PIPELINE, STUDENT = "your-name/digits-k2", "your-name/digits-k2-student-1"

PUSH_ALL = """
for arguments in ({"license": "no-such-license"}, {"license": "mit", "private": True}):
    try:
        push("runs/quickstart/K2", "tester/public", **arguments)
    except ValueError as error:
        print(error)
push("lora", "tester/lora-0", "mit", student=0, teacher="tester/class-teacher")
push("text", "text", "mit", private=True, prompts=PROMPTS, teacher="tester/sd")
push("text", "tester/text-1", "mit", student=1, prompts=PROMPTS, teacher="tester/sd")
push("text_lora", "tester/text-lora-1", "mit", student=1, prompts=PROMPTS, teacher="tester/sd")
"""

RUN_ALL = """
import json, torch
from pathlib import Path
from safetensors.torch import save_file
for name, code in json.loads(Path("snippets.json").read_text()).items():
    torch.manual_seed(0)
    variables = {}
    exec(code, variables)
    images = variables["images"]
    if isinstance(images, torch.Tensor):
        save_file({"images": images, "noise": variables["noise"]}, f"{name}.safetensors")
    else:
        for i, image in enumerate(images):
            image.save(f"{name}-{i}.png")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Pipelines and students of each kind on a Hub; gives (hub, folder of the client, what it printed)."""
    work = tmp_path_factory.mktemp("published")
    (work / "sd").mkdir()
    pipes = {
        **{"runs/quickstart/K2": tiny_pipeline(2), "lora": lora_pipeline(2)},
        **{"text": tiny_text_pipeline(work / "sd", 2), "text_lora": text_lora_pipeline(work / "sd")},
    }
    for name, pipe in pipes.items():
        pipe.save_pretrained(work / name)
    write_run(work / "runs/quickstart/K2")
    write_results(work / "runs/quickstart/results/results.json")
    tiny_stable_diffusion(work / "sd").save_pretrained(work / "sd")
    with HubServer() as hub:
        hub.add_folder("tester/sd", work / "sd")
        hub.add_folder("tester/class-teacher", work / "lora")
        hub.repos["tester/public"] = {"README.md": b"my own words"}
        hub.repos[PIPELINE] = dict.fromkeys((*OLD_SHARDS, *OTHER_FILES), b"")
        # The recipe's own lines push the pipeline and its student 1.
        recipe = re.findall(r"```python\n(.*?)```", (ROOT / "docs/recipes/publish.md").read_text(), re.S)
        code = "".join([*recipe, PUSH_ALL.replace("PROMPTS", repr(random_prompts()))])
        printed = run_python(code, work, all_output=True, **hub.environment(work / "home"))
        yield hub, work, printed


def card_of(hub, repo_id) -> str:
    return hub.repos[repo_id]["README.md"].decode()


def test_a_licence_that_the_hub_does_not_know_and_a_public_repository_for_a_private_model_are_refused(published):
    hub, _, printed = published
    assert re.search(r"^license: the Hub refuses the card's metadata: .*must be one of", printed, re.M)
    assert re.search(r"^private: tester/public is there already and public", printed, re.M)
    assert hub.repos["tester/public"] == {"README.md": b"my own words"}


def test_each_push_is_one_commit_of_the_model_its_card_and_a_picture(published):
    hub, work, _ = published
    assert [repo_id for repo_id, _ in hub.commits] == [
        *(PIPELINE, STUDENT, "tester/lora-0"),
        *("tester/text", "tester/text-1", "tester/text-lora-1"),
    ]
    assert hub.private == {"tester/text"}
    for repo_id, paths in hub.commits:
        assert set(hub.repos[repo_id]) - OTHER_FILES == set(paths) - OLD_SHARDS and {"README.md", PICTURE} < set(paths)
        assert Image.open(io.BytesIO(hub.repos[repo_id][PICTURE])).format == "PNG"
    # Checkpoints, accounts and the like stay where they are.
    saved = {f"{name}/{file}" for name in ("unet_0", "unet_1") for file in ("config.json", WEIGHTS)}
    saved |= {"model_index.json", "router/config.json", "scheduler/scheduler_config.json", "README.md", PICTURE}
    assert set(hub.repos[PIPELINE]) == saved | OTHER_FILES
    for repo_id in (STUDENT, "tester/lora-0", "tester/text-1", "tester/text-lora-1"):
        assert set(hub.repos[repo_id]) == {"README.md", PICTURE, "config.json", WEIGHTS}
    assert hub.repos[STUDENT][WEIGHTS] == (work / "runs/quickstart/K2/unet_1" / WEIGHTS).read_bytes()


def test_card_of_a_published_pipeline_has_all_that_the_run_recorded(published):
    hub, *_ = published
    card = ModelCard(card_of(hub, PIPELINE))
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "tester/teacher")
    for words in (
        *(f"]({PICTURE})", "A row is a student (0, 1)", "student 1: 2 classes: 2-3", "Stages: DM"),
        *("| all students | 4,002 |", "| part 0 | 3.125 |", "Partition: consecutive", "| total |"),
    ):
        assert words in card.text
    text = ModelCard(card_of(hub, "tester/text")).text
    prompt = random_prompts()[0]
    assert "## Examples" in text and re.search(rf"\| [01] \| .*\b{prompt}\b", text)


def test_card_of_a_student_names_its_part_its_teacher_and_its_base(published):
    hub, *_ = published
    student = ModelCard(card_of(hub, STUDENT))
    assert "number 1 of 2 one-step students of the teacher tester/teacher" in student.text
    assert "this is number 1" in student.text and "student 1: 2 classes: 2-3" in student.text
    adapter_card = ModelCard(card_of(hub, "tester/lora-0"))
    assert adapter_card.data.base_model == "tester/class-teacher"
    assert adapter_card.data.base_model_relation == "adapter" and "LoRA adapter" in adapter_card.text


@pytest.fixture(scope="module")
def made_by_snippets(published):
    """The folder with what the snippets of all cards made, run as they are printed."""
    hub, work, _ = published
    write_json(work / "snippets.json", {name.split("/")[1]: snippet(card_of(hub, name)) for name, _ in hub.commits})
    run_python(RUN_ALL, work, **hub.environment(work / "reader"))
    return work


def test_snippet_of_a_pipelines_card_makes_images(made_by_snippets):
    for name, side in (("digits-k2", 8), ("text", 16)):
        assert [Image.open(made_by_snippets / f"{name}-{i}.png").size for i in range(4)] == [(side, side)] * 4


@pytest.mark.parametrize(
    "name, label, make", [(STUDENT.split("/")[1], 2, tiny_pipeline), ("lora-0", 0, lora_pipeline)]
)
def test_snippet_of_a_student_of_classes_makes_the_pipelines_images(name, label, make, made_by_snippets):
    made = load_file(made_by_snippets / f"{name}.safetensors")
    latents = made["noise"] / 80
    expected = make(2)(class_labels=[label] * 4, latents=latents, output_type="latent").images
    assert torch.allclose(made["images"], expected, atol=1e-5)


@pytest.mark.parametrize("name, make", [("text-1", tiny_text_pipeline), ("text-lora-1", text_lora_pipeline)])
def test_snippet_of_a_student_of_prompts_makes_the_pipelines_images(name, make, published, made_by_snippets, tmp_path):
    pipe = make(tmp_path, 2) if make is tiny_text_pipeline else make(tmp_path)
    prompt = json.loads(re.search(r'pipe\((".*?"),', card_of(published[0], f"tester/{name}"))[1])
    assert pipe.route(prompt) == [1]
    torch.manual_seed(0)
    latents = torch.randn(4, 4, 8, 8)
    expected = pipe([prompt] * 4, latents=latents).images
    for i in range(4):
        image = Image.open(made_by_snippets / f"{name}-{i}.png")
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected[i], dtype=int)).max() <= 1


def test_no_token_is_printed_or_saved_and_no_path_of_this_machine_published(published):
    hub, work, printed = published
    assert hub.tokens == {TOKEN}
    assert TOKEN not in printed
    for content in [*tree(work).values(), *(c for files in hub.repos.values() for c in files.values())]:
        assert TOKEN.encode() not in content
    for repo_id, _ in hub.commits:
        assert all(str(work).encode() not in content for content in hub.repos[repo_id].values())


# Uploads that fail

CHANGE_AND_PUSH = """
from diffusers_msd.publishing import push
from helpers import tiny_pipeline
pipe = tiny_pipeline(2)
for unet in pipe.students.values():
    unet.conv_in.weight.data += 1
pipe.save_pretrained("K2")
for attempt in range(ATTEMPTS):
    try:
        print(push("K2", "tester/K2", "mit").oid)
    except ConnectionError as error:
        print("failed:", error)
"""


@pytest.fixture
def earlier(tmp_path, saved):
    """A Hub that has an earlier version of what `CHANGE_AND_PUSH` pushes."""
    with HubServer() as hub:
        hub.add_folder("tester/K2", saved)
        yield hub


def weights_of(hub):
    return {path: content for path, content in hub.repos["tester/K2"].items() if path.endswith(WEIGHTS)}


def test_a_dropped_connection_and_a_failed_commit_leave_the_old_state_and_nothing_is_sent_twice(earlier, tmp_path):
    hub, before = earlier, dict(earlier.repos["tester/K2"])
    # The client tries a dropped upload again by itself. The repository is looked at while the second commit runs.
    hub.upload_faults = iter(["", "drop"])
    seen = []
    hub.commit_faults = (status for status in (503, 200) if seen.append(dict(hub.repos["tester/K2"])) is None)
    printed = run_python(CHANGE_AND_PUSH.replace("ATTEMPTS", "2"), tmp_path, **hub.environment(tmp_path / "home"))
    failed, oid = printed.splitlines()
    assert "failed: tester/K2: the upload did not finish (" in failed and "503" in failed
    assert seen == [before, before] and len(hub.commits) == 1
    assert oid == hub.commit_hash("tester/K2")
    assert len(hub.uploads) == len(set(hub.uploads)) == 2
    assert weights_of(hub) == {k: v for k, v in tree(tmp_path / "K2").items() if k.endswith(WEIGHTS)}


@pytest.mark.services
def test_a_client_that_is_killed_leaves_the_old_state_and_the_next_one_goes_on(earlier, tmp_path):
    hub, before = earlier, dict(earlier.repos["tester/K2"])
    hub.upload_faults = iter(["", "stall"])
    code, environment = CHANGE_AND_PUSH.replace("ATTEMPTS", "1"), hub.environment(tmp_path / "home")
    search_path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    client = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": search_path, **environment}
    )
    try:
        assert hub.stalled.wait(550)
        while not hub.uploads:
            assert client.poll() is None
            time.sleep(0.1)
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()
    assert hub.repos["tester/K2"] == before and not hub.commits
    run_python(code, tmp_path, **environment)
    assert len(hub.commits) == 1 and len(hub.uploads) == len(set(hub.uploads)) == 2
    assert weights_of(hub) == {k: v for k, v in tree(tmp_path / "K2").items() if k.endswith(WEIGHTS)}


@pytest.mark.services
def test_a_training_run_pushes_its_pipeline_and_keeps_no_token(tmp_path):
    settings = ["--pretrained_teacher_model", ROOT / "training_scripts/assets/digits-teacher", "--num_students", 2]
    settings += ["--stages", "dm", "--regression_weight", 0, "--train_batch_size", 4, "--max_train_steps", 2]
    settings += [
        "--push_to_hub",
        "--hub_model_id",
        "tester/run",
        "--hub_license",
        "mit",
        "--hub_token",
        "hf_of_the_run",
    ]
    command = [sys.executable, ROOT / "training_scripts/train_msd.py", *settings, "--output_dir", tmp_path / "run"]
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stderr
        card = card_of(hub, "tester/run")
        assert "Teacher: `digits-teacher`" in card and "| all students | 4 |" in card and "license: mit" in card
        assert hub.tokens == {"hf_of_the_run"} and len(hub.commits) == 1
        for content in [*tree(tmp_path).values(), *hub.repos["tester/run"].values(), done.stdout.encode()]:
            assert b"hf_of_the_run" not in content and TOKEN.encode() not in content
        assert "hf_of_the_run" not in done.stderr
