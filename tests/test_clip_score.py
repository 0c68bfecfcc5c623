# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""CLIP scores against torchmetrics, on a tiny random model."""

import pytest
import torch
from helpers import tiny_clip
from torchmetrics.multimodal.clip_score import CLIPScore
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


def test_torchmetrics_gives_the_same_numbers(score, images):
    pixels = ((images + 1) * 127.5).round().byte()
    ours = score(images, CAPTIONS)
    assert len(ours.unique()) == 3 and (ours > 0).all()
    for image, caption, number in zip(pixels, CAPTIONS, ours):
        theirs = CLIPScore(model_name_or_path=lambda: (score.model, score.processor))
        assert number.item() == pytest.approx(theirs(image, caption).item(), rel=1e-5, abs=1e-5)


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
