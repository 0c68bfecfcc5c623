# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The scripts on a tiny Stable Diffusion teacher: captions, pairs, students, pipeline, table."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import tiny_clip, tiny_stable_diffusion, tiny_text_encoder
from PIL import Image
from test_distributed import launch
from test_scripts import SCRIPTS, SHORT, assert_refused, hashes, picture, run

from diffusers_msd import ClassRouter, EmbeddingRouter, MultiStudentPipeline
from diffusers_msd.captions import CaptionCache
from diffusers_msd.pairs import PairDataset
from diffusers_msd.retrieval import ContrastiveNet


COLORS, THINGS = ("red", "green", "blue"), ("cat", "dog", "sun", "moon", "house", "tree", "boat", "bird")
CAPTIONS = [f"{color} {thing}" for color in COLORS for thing in THINGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def teacher(folder):
    (folder / "tokenizer").mkdir()
    tiny_stable_diffusion(folder / "tokenizer").save_pretrained(folder / "teacher")
    return folder / "teacher"


@pytest.fixture(scope="module")
def data(folder):
    (folder / "data").mkdir()
    generator = np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        image = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "data" / f"{i:02d}.png")
    lines = [json.dumps({"file_name": f"{i:02d}.png", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    return folder / "data"


@pytest.fixture(scope="module")
def captions(folder, teacher, data):
    arguments = ["--train_data_dir", data, "--resolution", 16, "--shard_size", 10, "--output_dir", folder / "captions"]
    assert run("cache_captions.py", "--pretrained_teacher_model", teacher, *arguments) == 0
    return folder / "captions"


def make_pairs(teacher, captions, output_dir, *arguments) -> int:
    settings = ["--pretrained_teacher_model", teacher, "--captions_dir", captions, "--output_dir", output_dir]
    sampling = ["--sampler", "ddim", "--num_inference_steps", 2, "--guidance_scale", 2]
    return run("generate_pairs.py", *settings, *sampling, "--num_pairs", 30, *arguments)


@pytest.fixture(scope="module")
def pairs(folder, teacher, captions):
    assert make_pairs(teacher, captions, folder / "pairs") == 0
    return folder / "pairs"


def distil(teacher, captions, pairs, output_dir, *arguments) -> int:
    settings = ["--pretrained_teacher_model", teacher, "--captions_dir", captions, "--pairs_dir", pairs]
    return run("train_msd.py", *settings, "--output_dir", output_dir, *SHORT, "--guidance_scale", 1.75, *arguments)


@pytest.fixture(scope="module")
def students(folder, teacher, captions, pairs):
    """K = 4 by quadrants, every stage."""
    arguments = ["--num_students", 4, "--stages", "tsm", "dm", "adm", "--validation_prompts", "red cat", "blue moon"]
    assert distil(teacher, captions, pairs, folder / "students", *arguments) == 0
    return folder / "students"


def test_the_run_becomes_a_pipeline_that_answers_prompts_by_its_parts(students, captions):
    pipe = MultiStudentPipeline.from_pretrained(students)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.router, EmbeddingRouter) and pipe.router.part_sizes == [6, 6, 6, 6]
    generator = [torch.Generator().manual_seed(i) for i in range(len(CAPTIONS))]
    output = pipe(CAPTIONS, generator=generator)
    assert sorted(output.student_indices) == [k for k in range(4) for _ in range(6)]
    assert output.images[0].size == (16, 16)
    # Embeddings on disk are float16: they are routed as the pipeline routes the words.
    assert pipe.route(CaptionCache(captions).captions) == output.student_indices
    assert "6 prompts" in (students / "partition.txt").read_text()
    assert picture(students / "partition.png").width > 400


def test_a_grid_shows_the_validation_prompts_of_the_part(students):
    pipe = MultiStudentPipeline.from_pretrained(students)
    chosen = pipe.route(["red cat", "blue moon"])
    for k in range(4):
        # A part that none of them belongs to shows its own captions, six at most here.
        rows = chosen.count(k) or 6
        assert picture(students / f"student_{k}" / "dm" / "samples-0000002.png").height == rows * 36


def test_students_are_stock_unets_that_a_stable_diffusion_pipeline_takes(students, teacher):
    unet = UNet2DConditionModel.from_pretrained(students, subfolder="unet_2")
    pipe = StableDiffusionPipeline.from_pretrained(teacher, unet=unet)
    assert pipe.unet is unet


def test_jobs_of_single_students_and_a_fitted_router_give_the_same_weights(
    folder, teacher, captions, pairs, students, tmp_path, capsys
):
    arguments = ["--num_students", 4, "--stages", "dm", "--validation_prompts", "red cat", "blue moon"]
    assert distil(teacher, captions, pairs, tmp_path / "all", *arguments) == 0
    arguments += ["--router", students / "router"]
    for k in (2, 0, 3, 1):
        assert distil(teacher, captions, pairs, tmp_path / "jobs", *arguments, "--student_index", k) == 0
    for k in range(4):
        assert hashes(tmp_path / "jobs" / f"unet_{k}") == hashes(tmp_path / "all" / f"unet_{k}")


def test_pairs_are_of_the_captions_in_turn_and_guided(pairs, captions):
    cache = CaptionCache(captions)
    dataset = PairDataset(pairs, None, cache.embeddings, cache.identity)
    assert dataset.labels.tolist() == [*range(24), *range(6)]
    batch = dataset.__getitems__([25, 3])
    assert torch.equal(batch["cond"], cache.embeddings[[1, 3]])
    assert json.loads((pairs / "index.json").read_text())["guidance_scale"] == 2.0


@pytest.fixture(scope="module")
def evaluation(folder, teacher, students, captions, data):
    """The command, without output folder."""
    torch.manual_seed(0)
    ContrastiveNet(sample_size=16, channels=(8,), feature_dim=4, text_dim=16, projection_dim=8).save_pretrained(
        folder / "contrastive"
    )
    arguments = ["--captions_dir", captions, "--train_data_dir", data, "--resolution", 16, "--num_inference_steps", 2]
    arguments += ["--contrastive_net", folder / "contrastive", "--clip_model", tiny_clip(folder / "clip")]
    arguments += ["--num_shown", 3, "--images_per_caption", 2, "--sample_batch_size", 20]
    return ["--models", f"teacher={teacher}", f"K=4={students}", *arguments]


@pytest.fixture(scope="module")
def results(folder, evaluation):
    assert run("evaluate_text.py", *evaluation, "--output_dir", folder / "results") == 0
    return folder / "results"


def rows_of(output) -> list[dict]:
    rows = json.loads((output / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "latency")} for row in rows]


def test_evaluation_compares_teacher_and_pipeline_part_by_part(results):
    rows = rows_of(results)
    assert [row["model"] for row in rows] == ["teacher", "K=4"]
    for row in rows:
        assert row["num_generated"] == 48 and row["fd"] > 0 and set(row["parts"]) == {"0", "1", "2", "3"}
        assert 0 <= row["class_accuracy"] <= row["retrieval@5"] <= 1
        assert 0 <= row["clip_score"] <= 100 and row["diversity"] > 0 and "inception_score" not in row
        for key in ("class_accuracy", "retrieval@5", "clip_score"):  # parts have 12 images each
            assert row[key] == pytest.approx(sum(part[key] for part in row["parts"].values()) / 4, rel=1e-6)
    table = (results / "results.md").read_text()
    assert "retrieval@5" in table and "CLIP score" in table and "class accuracy" not in table
    assert picture(results / "samples.png").width > 300
    assert not (results / ".features").exists()


def test_evaluation_on_two_processes_gives_the_same_numbers(evaluation, results, tmp_path):
    command = [str(SCRIPTS / "evaluate_text.py"), *map(str, evaluation), "--output_dir", str(tmp_path)]
    result = launch(*command, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS=str(torch.get_num_threads()))
    assert result.returncode == 0, result.stderr
    assert rows_of(tmp_path) == rows_of(results)


def test_images_are_resized_by_lanczos_to_the_resolution_of_the_evaluation():
    resized = runpy.run_path(str(SCRIPTS / "evaluate_text.py"))["resized"]
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = pixels.float() / 127.5 - 1
    for image, small in zip(pixels, resized(images, 16)):
        whole = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.LANCZOS)
        assert np.array_equal(((small + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(whole))
    assert resized(images, 32) is images


@pytest.mark.parametrize(
    "arguments, texts",
    [
        (["--clip_model", "runs/none/at/all"], ["clip_model: ", "runs/none/at/all"]),
        (["--images_per_caption", 0], ["images_per_caption: at least 1", "got 0"]),
        (["--lpips_conditions", 2], ["lpips_conditions: ", "diffusers_msd[lpips]"]),
    ],
)
def test_bad_evaluations_are_refused(arguments, texts, evaluation, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lpips", None)
    status = run("evaluate_text.py", *evaluation, "--output_dir", tmp_path, *arguments)
    assert_refused(capsys, status, *texts)


def test_an_evaluation_without_a_feature_network_is_refused(teacher, captions, tmp_path, capsys):
    arguments = ["--models", f"a={teacher}", "--captions_dir", captions, "--output_dir", tmp_path]
    assert_refused(capsys, run("evaluate_text.py", *arguments), "contrastive_net: ", "feature_net")


@pytest.mark.parametrize(
    "arguments, texts",
    [
        (["--num_students", 3], ["k: got 3", "power of two"]),
        (["--num_students", 30], ["num_students: 1 to 24", "got 30"]),
        (["--partition", "consecutive"], ["partition: one of quadrants, kmeans, random", "'consecutive'"]),
        (["--num_students", 2, "--partition", "kmeans", "--router", "x"], ["partition: ", "--router"]),
    ],
)
def test_bad_partitions_are_refused(arguments, texts, teacher, captions, pairs, tmp_path, capsys):
    assert_refused(capsys, distil(teacher, captions, pairs, tmp_path, *arguments), *texts)


def test_a_router_of_classes_is_refused(teacher, captions, pairs, tmp_path, capsys):
    ClassRouter.consecutive(4, 2).save_pretrained(tmp_path / "router")
    arguments = ["--num_students", 2, "--router", tmp_path / "router"]
    status = distil(teacher, captions, pairs, tmp_path / "out", *arguments)
    assert_refused(capsys, status, "router: ", "ClassRouter", "EmbeddingRouter")


def test_a_text_teacher_without_captions_and_a_class_teacher_with_them_are_refused(teacher, pairs, tmp_path, capsys):
    arguments = ["--pretrained_teacher_model", teacher, "--pairs_dir", pairs, "--output_dir", tmp_path, *SHORT]
    assert_refused(capsys, run("train_msd.py", *arguments), "captions_dir: ", "cache_captions.py")


def test_captions_and_pairs_of_another_text_encoder_are_refused(teacher, captions, pairs, tmp_path, capsys):
    other = StableDiffusionPipeline.from_pretrained(teacher, text_encoder=tiny_text_encoder(seed=5))
    other.save_pretrained(tmp_path / "other")
    status = distil(tmp_path / "other", captions, pairs, tmp_path / "out")
    assert_refused(capsys, status, "captions_dir: ", "another text encoder")


def test_pairs_of_other_captions_are_refused(teacher, captions, data, folder, tmp_path, capsys):
    arguments = [
        "--train_data_dir",
        data,
        "--resolution",
        16,
        "--max_train_samples",
        12,
        "--output_dir",
        tmp_path / "c",
    ]
    assert run("cache_captions.py", "--pretrained_teacher_model", teacher, *arguments) == 0
    assert make_pairs(teacher, tmp_path / "c", tmp_path / "p") == 0
    status = distil(teacher, captions, tmp_path / "p", tmp_path / "out")
    assert_refused(capsys, status, "pairs_dir: ", "other conditions")


def test_a_router_with_other_pooling_is_refused(students, teacher, captions, pairs, tmp_path, capsys):
    arguments = ["--num_students", 4, "--router", students / "router", "--pooling", "eos"]
    assert_refused(capsys, distil(teacher, captions, pairs, tmp_path, *arguments), "router: ", "pooling mean")
