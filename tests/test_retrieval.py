# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Images and captions in one space."""

import math

import pytest
import torch

from diffusers_msd.files import load_model
from diffusers_msd.retrieval import ContrastiveNet, contrastive_loss, retrieval_accuracy


def tiny_net(**config) -> ContrastiveNet:
    torch.manual_seed(0)
    settings = {"sample_size": 8, "channels": (8, 16), "feature_dim": 6, "text_dim": 4, "projection_dim": 5}
    return ContrastiveNet(**{**settings, **config}).eval()


def test_shapes_and_unit_length():
    net = tiny_net()
    images = torch.randn(3, 3, 8, 8)
    assert net.image_features(images).shape == (3, 6)
    for embeds in (net.embed_images(images), net.embed_texts(torch.randn(3, 4))):
        assert embeds.shape == (3, 5)
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(3))


def test_temperature_starts_at_clips_and_has_its_bound():
    net = tiny_net()
    assert net.temperature.item() == pytest.approx(0.07)
    net.log_temperature.data.fill_(-20)
    assert net.temperature.item() == pytest.approx(0.01)


def test_save_and_load(tmp_path):
    net = tiny_net(accuracy={"top_1": 0.5})
    net.save_pretrained(tmp_path)
    loaded = load_model(ContrastiveNet, tmp_path, "contrastive")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.embed_images(images), net.embed_images(images))
    assert loaded.config.accuracy == {"top_1": 0.5}


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 16, 16), (3, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="^images: "):
        tiny_net().image_features(torch.zeros(shape))


@pytest.mark.parametrize(
    "config, named",
    [({"sample_size": 6}, "sample_size"), ({"channels": (12,)}, "channels"), ({"channels": ()}, "channels")],
)
def test_sizes_that_do_not_fit_are_refused(config, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        tiny_net(**config)


def test_contrastive_loss_of_orthogonal_pairs_has_a_closed_form():
    # Own cosine 1, all others 0: -log(e^(1/T) / (e^(1/T) + B - 1)), in both directions.
    embeds, temperature = torch.eye(4, dtype=torch.float64), 0.5
    expected = math.log(1 + 3 * math.exp(-1 / temperature))
    loss = contrastive_loss(embeds, embeds, temperature)
    torch.testing.assert_close(loss, torch.full((4,), expected, dtype=torch.float64))


def test_contrastive_loss_takes_both_directions():
    # Two images that look the same, two captions that differ: rows know nothing, columns are told apart by nothing.
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    texts = torch.eye(2, dtype=torch.float64)
    by_image = torch.tensor([math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))], dtype=torch.float64)
    by_text = torch.full((2,), math.log(2), dtype=torch.float64)
    torch.testing.assert_close(contrastive_loss(images, texts, 1.0), (by_image + by_text) / 2)
    torch.testing.assert_close(contrastive_loss(texts, images, 1.0), (by_image + by_text) / 2 + 0 * by_text)


def test_gradient_reaches_every_parameter():
    net = tiny_net()
    loss = contrastive_loss(
        net.embed_images(torch.randn(4, 3, 8, 8)), net.embed_texts(torch.randn(4, 4)), net.temperature
    )
    assert loss.shape == (4,)
    loss.mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())


# ------------------------------------------------------------------ retrieval

TEXTS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])


def test_retrieval_on_a_case_worked_out_by_hand():
    # The nearest captions of each image in order: 0 3 1 2; 1 3 0 2; 3 1 0 2; 2 1 3 0.
    images = torch.tensor([[2.0, 0.2], [0.1, 1.0], [1.0, 1.5], [-1.0, 0.1]])
    rows = torch.tensor([0, 3, 0, 0])
    assert retrieval_accuracy(images, rows, TEXTS, top=(1, 2, 3, 4)) == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}


def test_the_length_of_vectors_does_not_count_and_blocks_do_not_either():
    images, texts = torch.randn(40, 5), torch.randn(30, 5)
    rows = torch.randint(30, (40,))
    expected = retrieval_accuracy(images, rows, texts)
    assert retrieval_accuracy(images, rows, texts * torch.rand(30, 1).add(0.1), block=7) == expected
    assert 0 < expected[5] < 1


def test_embeddings_that_say_nothing_score_nothing():
    same = torch.ones(6, 3)
    assert retrieval_accuracy(same, torch.arange(6), same) == {1: 0.0, 5: 0.0}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"image_embeds": torch.zeros(0, 2)}, "image_embeds"),
        ({"image_embeds": torch.full((4, 2), float("nan"))}, "image_embeds"),
        ({"text_embeds": torch.zeros(4)}, "text_embeds"),
        ({"text_embeds": torch.zeros(4, 3)}, "text_embeds"),
        ({"caption_rows": torch.arange(3)}, "caption_rows"),
        ({"caption_rows": torch.arange(4.0)}, "caption_rows"),
        ({"caption_rows": torch.arange(1, 5)}, "caption_rows"),
        ({"caption_rows": torch.arange(4) - 1}, "caption_rows"),
        ({"top": (0,)}, "top"),
        ({"top": (1, 5)}, "top"),
        ({"top": ()}, "top"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {"image_embeds": TEXTS, "caption_rows": torch.arange(4), "text_embeds": TEXTS, "top": (1,)}
    with pytest.raises(ValueError, match=f"^{named}: "):
        retrieval_accuracy(**{**arguments, **change})
