# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints and writes, exit codes, and that nothing typed at it crashes."""

import json
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest
from helpers import generators, tiny_pipeline, tiny_text_pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusers_msd import cli


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels") / "p"
    tiny_pipeline(2, num_classes=4).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    tiny_text_pipeline(folder, 2).save_pretrained(folder / "p")
    return str(folder / "p")


def status_of(*argv: str) -> int:
    try:
        cli.main(list(argv))
    except SystemExit as end:
        return end.code or 0
    return 0


def refused(capsys, *argv: str) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert status_of(*argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_help_and_version_name_every_command(capsys):
    assert status_of("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("quickstart", "generate", "route", "info", "push", "demo", "serve"))
    assert status_of("--version") == 0
    assert capsys.readouterr().out.strip() == version("diffusers_msd")
    assert status_of("generate", "--help") == 0 and "--num_images" in capsys.readouterr().out


def test_the_installed_command_is_this_one():
    installed = entry_points(group="console_scripts", name="diffusers-msd")
    assert [entry.load() for entry in installed] == [cli.main]


def test_generated_files_are_what_the_pipeline_makes(labels, tmp_path, capsys):
    out = tmp_path / "out"
    assert status_of("generate", labels, "3", "0", "--seed", "5", "--num_images", "2", "--output", str(out)) == 0
    pipe = tiny_pipeline(2, num_classes=4)
    for row, label in enumerate((3, 0)):
        (student,) = pipe.route(class_labels=[label])
        images = pipe(class_labels=[label], num_images_per_prompt=2, generator=generators(5, 6)).images
        for seed, image in zip((5, 6), images):
            path = out / f"{row:03d}_seed_{seed}_student_{student}.png"
            assert Image.open(path).tobytes() == image.tobytes()
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == sorted(str(path) for path in out.iterdir()) and len(printed) == 4


def test_a_png_is_one_grid(prompts, tmp_path):
    out = tmp_path / "grid.png"
    assert status_of("generate", prompts, "red apple", "../../up", "--num_images", "3", "--output", str(out)) == 0
    width, height = Image.open(out).size
    assert width * 2 == height * 3
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_a_prompt_is_never_part_of_a_path(prompts, tmp_path):
    folder = tmp_path / "deep" / "images"
    assert status_of("generate", prompts, "../../up", "/etc/x", "a\nb", "--output", str(folder)) == 0
    assert sorted(p.name[:3] for p in folder.iterdir()) == ["000", "001", "002"]
    assert [p.name for p in tmp_path.iterdir()] == ["deep"] and len(list((tmp_path / "deep").iterdir())) == 1


def test_the_route_of_labels_and_prompts(labels, prompts, capsys):
    assert status_of("route", labels, "0", "3", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    students = tiny_pipeline(2, num_classes=4).route(class_labels=[0, 3])
    assert rows == [{"condition": c, "student": s, "margin": None} for c, s in zip((0, 3), students)]
    assert status_of("route", prompts, "red apple") == 0
    header, line = capsys.readouterr().out.splitlines()
    student, margin, *words = line.split()
    assert int(student) in (0, 1) and float(margin) > 0 and words == ["red", "apple"]


def test_info_says_what_is_there(labels, capsys):
    assert status_of("info", labels, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    pipe = tiny_pipeline(2, num_classes=4)
    assert info["students"] == {f"unet_{k}": pipe.students[k].num_parameters() for k in (0, 1)}
    assert info["conditions"] == "4 classes" and info["training"] == {}
    assert status_of("info", labels) == 0
    text = capsys.readouterr().out
    assert f"{info['parameters_total']:,} in all" in text and "not recorded" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "LABELS", "4"], "class_label: "),
        (["generate", "LABELS", "apple"], "conditions: "),
        (["generate", "LABELS", "9" * 5000], "conditions: "),
        (["generate", "LABELS", "1", "--seed", "1e400"], "argument --seed: "),
        (["generate", "LABELS", "1", "--seed", "-1"], "seed: "),
        (["generate", "LABELS", "1", "--num_images", "0"], "num_images: "),
        (["generate", "LABELS", "1", "--student", "2"], "student: "),
        (["generate", "LABELS", "1", "--output", "/proc/nothing"], "output: "),
        (["generate", "LABELS", "1", "--dtype", "int8"], "argument --dtype: "),
        (["generate", "LABELS"], "the following arguments are required: conditions"),
        (["generate", "no/such/folder", "1"], "pretrained_model_name_or_path: "),
        (["generate", "PROMPTS", " "], "prompt: "),
        (["generate", "PROMPTS", "half \ud83d"], "prompt: "),
        (["route", "PROMPTS", "x" * 2000], "prompt: "),
        (["info", "nosuchfolder"], "path: "),
        (["info", "LABELS", "--results", "no.json"], "results: "),
        (["push", "LABELS", "you/x"], "license: "),
        (["push", "LABELS", "../x", "--license", "mit"], "repo_id: "),
        (["push", "nosuchfolder", "you/x", "--license", "mit"], "path: "),
        (["demo"], "pipeline: "),
        (["demo", "LABELS", "--prompts", "no.txt"], "prompts: "),
        (["demo", "LABELS", "--teacher", "nosuchfolder"], "teacher: "),
        (["demo", "LABELS", "--teacher", "nosuchfolder", "--num_inference_steps", "0"], "num_inference_steps: "),
        (["demo", "LABELS", "--teacher", "nosuchfolder", "--guidance_scale", "2"], "guidance_scale: "),
        (["serve", "nosuchfolder"], "path: "),
        (["serve", "LABELS", "--deadline", "0"], "deadline: "),
        (["serve", "LABELS", "--replicas", "1", "2", "3"], "replicas: "),
        (["paint"], "argument command: "),
        ([], "the following arguments are required: command"),
    ],
)
def test_bad_arguments_are_one_line(arguments, named, labels, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *({"LABELS": labels, "PROMPTS": prompts}.get(a, a) for a in arguments))
    assert line.startswith(f"error: {named}") and len(line) < 600
    # The default folder may have been made, with nothing in it.
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


words = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["--seed", "--num_images", "--student", "--output", "--", "-", "../x", "~", "NaN", "1" * 400]),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command=st.sampled_from(["generate", "route"]), rest=st.lists(words, min_size=1, max_size=4))
def test_nothing_typed_crashes_or_writes_elsewhere(command, rest, labels, tmp_path, capsys, monkeypatch):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    output = ["--output", "images"] if command == "generate" else []
    status = status_of(command, labels, *rest, *output)
    captured = capsys.readouterr()
    assert status in (0, 2) and "Traceback" not in captured.err
    if status == 2:
        assert captured.err.strip().splitlines()[-1].startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"work"}
    assert {path.name for path in work.iterdir()} <= {"images"}


def test_as_a_process(labels, tmp_path):
    command = [sys.executable, "-m", "diffusers_msd.cli", "route", labels, "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "student" in done.stdout and "Traceback" not in done.stderr
    done = subprocess.run([*command, "x"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: conditions: ")
