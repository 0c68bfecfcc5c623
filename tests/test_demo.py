# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import io

import gradio as gr
import numpy as np
import pytest
from helpers import edm_scheduler, sd_scheduler, tiny_pipeline, tiny_text_pipeline, tiny_text_unet, tiny_unet
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_msd import EmbeddingRouter, MultiStudentPipeline
from diffusers_msd.app import EXAMPLES, NOTHING, ROUTER, TEACHER, Desk, build_demo, quickstart_pipeline, read_prompts
from diffusers_msd.image_requests import Accepted, ImageRequest, make_images
from diffusers_msd.many_steps import ManyStepTeacher
from diffusers_msd.routing_map import Plane, RoutingMap
from diffusers_msd.teachers import save_teacher


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def save_png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# The map


def test_a_cloud_that_is_flat_is_seen_whole():
    generator = np.random.default_rng(0)
    flat = generator.standard_normal((20, 2)) @ np.linalg.qr(generator.standard_normal((5, 2)))[0].T + 3
    plane = Plane.through(flat)
    seen = plane.project(flat)
    assert plane.share == pytest.approx(1)
    for a, b in ((0, 1), (2, 3)):
        assert np.linalg.norm(seen[a] - seen[b]) == pytest.approx(np.linalg.norm(flat[a] - flat[b]))
    # The first axis has the most of it.
    assert seen[:, 0].var() > seen[:, 1].var()


def test_prompts_lie_by_the_embeddings_of_the_router(tmp_path):
    pipe = tiny_text_pipeline(tmp_path, 4)
    prompts = [f"{word} {i}" for i in range(20) for word in ("cat", "a much longer prompt", "x")]
    routing_map = RoutingMap(pipe, prompts)
    assert routing_map.students == pipe.route(prompts) and len(set(routing_map.students)) > 1
    assert routing_map.margins == pytest.approx(pipe.margins(prompts), abs=1e-4)
    assert routing_map.place(prompts[7]) == pytest.approx(routing_map.points[7], abs=1e-4)
    assert not np.allclose(routing_map.place("something else"), routing_map.points[7])


def test_classes_lie_by_the_class_embeddings_or_in_a_grid(tmp_path):
    pipe = tiny_pipeline(2, num_classes=5)
    routing_map = RoutingMap(pipe)
    assert routing_map.conditions == [0, 1, 2, 3, 4] and routing_map.students == [0, 0, 0, 1, 1]
    assert routing_map.margins == [float("inf")] * 5
    weight = pipe.students[0].class_embedding.weight.detach().numpy()
    assert np.linalg.norm(routing_map.points[0]) <= np.linalg.norm(weight[0] - weight.mean(0)) + 1e-5
    pipe.save_pretrained(tmp_path)
    # Students that are loaded when needed have no weights to look at.
    in_grid = RoutingMap(MultiStudentPipeline.from_pretrained(tmp_path, max_resident_students=1))
    assert in_grid.points.tolist() == [[0, 0], [1, 0], [2, 0], [0, -1], [1, -1]]


def test_a_map_can_be_drawn_whatever_the_prompts_say(tmp_path):
    pipe = tiny_text_pipeline(tmp_path, 2)
    routing_map = RoutingMap(pipe, ["$\\frac{1$", "猫", "a very long prompt that goes on and on", "<b>"])
    plain, marked = save_png(routing_map.draw()), save_png(routing_map.draw("$x_$"))
    assert plain.startswith(b"\x89PNG") and plain != marked
    assert save_png(RoutingMap(tiny_pipeline(2)).draw(3)).startswith(b"\x89PNG")


def test_what_cannot_be_mapped_is_refused(tmp_path):
    pipe = tiny_text_pipeline(tmp_path, 2)
    for prompts in (None, [], ["one"]):
        with pytest.raises(ValueError, match="^prompts: at least 2"):
            RoutingMap(pipe, prompts)
    with pytest.raises(ValueError, match="^prompts: this pipeline goes by class_label"):
        RoutingMap(tiny_pipeline(2), ["a", "b"])
    pipe.register_modules(router=None)
    with pytest.raises(ValueError, match="^pipe: it has no router"):
        RoutingMap(pipe, ["a", "b"])


def test_prompts_are_read_line_by_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dög \n", encoding="utf-8")
    assert read_prompts(file) == ["a cat", "a dög"]
    for content in (b"", b"one\n", b"a\n" * 1001, b"\xff\xfe\n\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="^prompts: "):
            read_prompts(file)
    with pytest.raises(FileNotFoundError, match="^prompts: "):
        read_prompts(tmp_path / "no.txt")


def test_without_a_quickstart_the_error_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^pipeline: .*diffusers-msd quickstart"):
        quickstart_pipeline()
    tiny_pipeline(2).save_pretrained(tmp_path / "runs" / "quickstart" / "K2")
    assert MultiStudentPipeline.from_pretrained(quickstart_pipeline()).router.num_students == 2


# The teacher


def test_one_step_of_a_teacher_is_what_its_copy_makes(tmp_path):
    """Same noise, same condition, same way to pixels; Heun's and DPM-Solver's one step go straight to x0."""
    pipe = tiny_pipeline(2)
    save_teacher(tmp_path / "classes", pipe.students[1], pipe.scheduler)
    request = ImageRequest(3, seed=5, num_images=3)
    teacher = ManyStepTeacher(tmp_path / "classes", pipe, num_inference_steps=1)
    assert np.array_equal(pixels(teacher.make_images(request)), pixels(make_images(pipe, request).images))
    pipe = tiny_text_pipeline(tmp_path, 2)
    (student,) = pipe.route("a cat")
    save_teacher(tmp_path / "prompts", pipe.students[student], pipe.scheduler)
    request = ImageRequest("a cat", seed=5, num_images=2)
    own = pixels(make_images(pipe, request).images).astype(int)
    for guidance_scale, alike in ((1.0, True), (4.0, False)):
        teacher = ManyStepTeacher(tmp_path / "prompts", pipe, num_inference_steps=1, guidance_scale=guidance_scale)
        assert np.allclose(pixels(teacher.make_images(request)).astype(int), own, atol=1) == alike


def test_more_steps_make_other_images(tmp_path):
    pipe = tiny_pipeline(2)
    save_teacher(tmp_path, pipe.students[0], pipe.scheduler)
    one, many = (pixels(ManyStepTeacher(tmp_path, pipe, n).make_images(ImageRequest(0))) for n in (1, 18))
    assert not np.array_equal(one, many)


def test_a_teacher_of_others_is_refused(tmp_path):
    pipe = tiny_pipeline(2)
    save_teacher(tmp_path / "classes", tiny_unet(num_classes=7), edm_scheduler())
    save_teacher(tmp_path / "prompts", tiny_text_unet(), sd_scheduler())
    with pytest.raises(ValueError, match="^teacher: num_class_embeds is 7"):
        ManyStepTeacher(tmp_path / "classes", pipe)
    with pytest.raises(TypeError, match="^teacher: a UNet2DModel is needed"):
        ManyStepTeacher(tmp_path / "prompts", pipe)
    with pytest.raises(FileNotFoundError, match="^teacher: "):
        ManyStepTeacher(tmp_path / "nothing", pipe)
    with pytest.raises(ValueError, match="^num_inference_steps: "):
        ManyStepTeacher(tmp_path / "classes", pipe, num_inference_steps=0)
    with pytest.raises(ValueError, match="^guidance_scale: it is for prompts"):
        ManyStepTeacher(tmp_path / "classes", pipe, guidance_scale=2.0)
    with pytest.raises(ValueError, match="^guidance_scale: a finite number"):
        ManyStepTeacher(tmp_path / "prompts", tiny_text_pipeline(tmp_path, 2), guidance_scale=float("nan"))


# Answers


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    pipe, folder = tiny_pipeline(2), tmp_path_factory.mktemp("teacher")
    save_teacher(folder, tiny_unet(seed=7), edm_scheduler())
    return Desk(pipe, Accepted.by(pipe), RoutingMap(pipe), ManyStepTeacher(folder, pipe, num_inference_steps=2))


def test_the_answer_names_the_student_and_has_its_images(desk):
    answers = list(desk.answer(3, 7, 2, ROUTER, NOTHING))
    assert len(answers) == 1
    text, first, second, figure = answers[0]
    assert text.startswith("**Student 1** answered. A table of classes has no cuts")
    assert "| student 1 |" in text and "teacher" not in text
    assert first.label == "student 1" and not second.visible
    assert save_png(figure).startswith(b"\x89PNG")


def test_a_student_can_be_forced_and_compared_with(desk):
    text = next(desk.answer(3, 7, 2, 0, NOTHING))[0]
    assert text.startswith("**Student 0** was asked for. The router takes student 1.")
    for compare, name in ((0, "student 0"), (TEACHER, "teacher, 2 steps")):
        before, after = desk.answer(3, 7, 2, ROUTER, compare)
        assert f"| {name} |" not in before[0] and f"| {name} |" in after[0]
        assert after[2].visible and after[2].label == name


def test_prompts_are_told_how_far_the_next_student_is(tmp_path):
    pipe = tiny_text_pipeline(tmp_path, 4)
    desk = Desk(pipe, Accepted.by(pipe), RoutingMap(pipe, EXAMPLES))
    text = next(desk.answer("a cat", 0, 1, ROUTER, NOTHING))[0]
    assert f"**Student {pipe.route('a cat')[0]}** answered" in text and f"{pipe.margins('a cat')[0]:.3g} away" in text


def test_a_student_that_was_left_out_is_an_error_on_the_page():
    pipe = tiny_pipeline(2)
    pipe.register_modules(unet_1=None)
    with pytest.raises(gr.Error, match="student 1, which is absent"):
        next(Desk(pipe, Accepted.by(pipe), RoutingMap(pipe)).answer(3, 0, 1, ROUTER, NOTHING))


anything = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()))


@settings(max_examples=100, deadline=None)
@given(anything, anything, anything, st.one_of(st.just(ROUTER), anything))
def test_anything_is_answered_or_refused_in_one_line(desk, condition, seed, num_images, student):
    try:
        text, *_ = next(desk.answer(condition, seed, num_images, student, NOTHING))
    except gr.Error as error:
        assert error.message.split(":")[0] in {"class_label", "seed", "num_images", "student"}
        assert "\n" not in error.message and len(error.message) < 300
    else:
        assert text.startswith("**Student ")


def test_the_page_is_built_for_labels_and_prompts(tmp_path):
    assert isinstance(build_demo(tiny_pipeline(2)), gr.Blocks)
    pipe = tiny_text_pipeline(tmp_path, 1)
    assert isinstance(pipe.router, EmbeddingRouter) and isinstance(build_demo(pipe), gr.Blocks)
    assert isinstance(build_demo(tiny_pipeline(1, num_classes=30), max_images=2), gr.Blocks)
