# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What people ask for is checked before anything is computed, and an image depends on its condition and seed alone."""

import pytest
import torch
from helpers import tiny_pipeline, tiny_text_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_msd.image_requests import MAX_SEED, Accepted, ImageRequest, make_images


LABELS = Accepted(num_classes=10, students=(0, 1))
PROMPTS = Accepted(num_classes=None, students=(0, 1, 2))


def test_a_request_is_read():
    assert LABELS.read(class_label=3, seed=5, num_images=2, student=1) == ImageRequest(3, 5, 2, 1)
    assert PROMPTS.read(prompt="a cat") == ImageRequest("a cat")
    assert list(ImageRequest(3, 5, 2).seeds) == [5, 6]


@pytest.mark.parametrize(
    ("accepted", "fields", "named"),
    [
        (LABELS, {}, "class_label: it is missing"),
        (LABELS, {"prompt": "a cat"}, "prompt: this pipeline goes by class_label"),
        (LABELS, {"class_label": 10}, "class_label: a whole number in"),
        (LABELS, {"class_label": -1}, "class_label: a whole number in"),
        (LABELS, {"class_label": "3"}, "class_label: a whole number expected, got str"),
        (LABELS, {"class_label": 3.0}, "class_label: a whole number expected, got float"),
        (LABELS, {"class_label": True}, "class_label: a whole number expected, got bool"),
        (LABELS, {"class_label": 3, "seed": -1}, "seed: "),
        (LABELS, {"class_label": 3, "seed": 10**5000}, "seed: "),
        (LABELS, {"class_label": 3, "seed": MAX_SEED, "num_images": 2}, "seed: "),
        (LABELS, {"class_label": 3, "seed": float("nan")}, "seed: "),
        (LABELS, {"class_label": 3, "num_images": 0}, "num_images: "),
        (LABELS, {"class_label": 3, "num_images": 17}, "num_images: "),
        (LABELS, {"class_label": 3, "student": 2}, "student: one of 0, 1 expected"),
        (LABELS, {"class_label": 3, "student": "0"}, "student: "),
        (PROMPTS, {"class_label": 3}, "class_label: this pipeline goes by prompt"),
        (PROMPTS, {"prompt": "  "}, "prompt: "),
        (PROMPTS, {"prompt": ["a cat"]}, "prompt: text expected, got list"),
        (PROMPTS, {"prompt": "a" * 1001}, "prompt: at most 1000 characters"),
        (PROMPTS, {"prompt": "half \ud83d"}, "prompt: number 0 is not valid Unicode"),
    ],
)
def test_what_is_no_request_is_refused_by_name(accepted, fields, named):
    with pytest.raises((TypeError, ValueError)) as error:
        accepted.read(**fields)
    assert str(error.value).startswith(named) and len(str(error.value)) < 300


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([LABELS, PROMPTS]),
    st.dictionaries(st.sampled_from(["prompt", "class_label", "seed", "num_images", "student"]), anything),
)
def test_anything_else_is_a_request_or_one_line(accepted, fields):
    try:
        request = accepted.read(**fields)
    except (TypeError, ValueError) as error:
        assert str(error).split(":")[0] in {"prompt", "class_label", "seed", "num_images", "student"}
    else:
        assert 1 <= request.num_images <= 16 and 0 <= request.seed and request.seeds[-1] <= MAX_SEED


def test_a_pipeline_says_what_it_takes(tmp_path):
    pipe = tiny_pipeline(2)
    accepted = Accepted.by(pipe, max_images=3)
    assert accepted == Accepted(len(pipe.router.class_to_student), (0, 1), max_images=3)
    assert Accepted.by(tiny_text_pipeline(tmp_path, 2)).num_classes is None


def test_an_image_depends_on_its_condition_and_seed_alone(tmp_path):
    for pipe, condition in ((tiny_pipeline(2), 1), (tiny_text_pipeline(tmp_path, 2), "a cat")):
        together = make_images(pipe, ImageRequest(condition, 7, 3), "pt")
        alone = make_images(pipe, ImageRequest(condition, 9), "pt")
        assert torch.allclose(together.images[2], alone.images[0], atol=1e-5)
        assert not torch.allclose(together.images[0], together.images[2], atol=1e-3)


def test_a_student_can_be_forced():
    pipe = tiny_pipeline(2)
    (own,) = pipe.route(class_labels=[0])
    other = make_images(pipe, ImageRequest(0, student=1 - own))
    assert other.student_indices == [1 - own]
