# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""CLIP scores of a tiny random model."""

import pytest
import torch
from helpers import tiny_clip
from PIL import Image
from transformers import CLIPModel

from diffusers_msd.clip_score import ClipScore


CAPTIONS = ["red cat", "a very long name of a blue moon above a green boat", "sun"]


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    # Of the first seeds one that finds all three captions alike enough for a score above 0.
    return ClipScore(tiny_clip(tmp_path_factory.mktemp("clip") / "model", seed=8), "cpu")


@pytest.fixture(scope="module")
def images():
    """Those of 8 bits, larger than the model's."""
    return torch.randint(256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(0)) / 127.5 - 1


def test_score_is_a_hundred_times_the_cosine_that_the_model_gives_for_each_pair_alone(score, images):
    """CLIP's logits are cosines times exp(logit_scale). torchmetrics cannot be asked: it fails with transformers 5."""
    pictures = [Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for image in images]
    ours = score(images, CAPTIONS)
    assert len(ours.unique()) == 3 and (ours > 0).all()
    for picture, caption, number in zip(pictures, CAPTIONS, ours):
        inputs = score.processor(text=caption, images=picture, return_tensors="pt", truncation=True)
        cosine = score.model(**inputs).logits_per_image / score.model.logit_scale.exp()
        assert number.item() == pytest.approx(100 * cosine.item(), rel=1e-4)


def test_a_score_does_not_depend_on_the_batch(score, images):
    alone = [score(images[i : i + 1], CAPTIONS[i : i + 1]).item() for i in range(3)]
    assert alone == pytest.approx(score(images, CAPTIONS).tolist(), rel=1e-4, abs=1e-4)


def test_the_name_says_which_weights(score, tmp_path):
    other = ClipScore(tiny_clip(tmp_path / "other", seed=1), "cpu")
    assert score.name.startswith("CLIPModel ") and score.name != other.name


def test_a_folder_without_a_whole_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="^clip_model: .*none"):
        ClipScore(str(tmp_path / "none"), "cpu")
    CLIPModel.from_pretrained(tiny_clip(tmp_path / "model")).save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="^clip_model: .*processor"):
        ClipScore(str(tmp_path / "bare"), "cpu")
