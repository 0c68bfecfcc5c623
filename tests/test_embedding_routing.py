# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_msd.embedding_routing import EmbeddingRouter
from diffusers_msd.routing import ConditionRouter


FITS = {
    "kmeans": EmbeddingRouter.fit_kmeans,
    "quadrants": EmbeddingRouter.fit_quadrants,
    "random": EmbeddingRouter.fit_random,
}


def cloud(n=2000, d=12, seed=0):
    """Uneven clusters with a few strong axes, as prompt embeddings have; [n, d] float32."""
    generator = torch.Generator().manual_seed(seed)
    scale = 3.0 * 0.7 ** torch.arange(d)
    centers = torch.randn(7, d, generator=generator) * scale
    cluster = (torch.rand(n, generator=generator) ** 3 * 7).long()
    return centers[cluster] + 0.4 * torch.randn(n, d, generator=generator)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["kmeans", "quadrants"])
def test_parts_are_equal_on_uneven_clusters(kind, k):
    router = FITS[kind](cloud(), k)
    assert sum(router.part_sizes) == 2000 and len(router.part_sizes) == router.num_students == k
    assert max(router.part_sizes) - min(router.part_sizes) <= 2
    assert router.imbalance < 1.01
    assert torch.bincount(router(embeddings=cloud()), minlength=k).tolist() == router.part_sizes


def test_unbalanced_kmeans_gives_the_nearest_centre_and_uneven_parts():
    x = cloud()
    router = EmbeddingRouter.fit_kmeans(x, 4, balanced=False)
    nearest = torch.cdist(x.double(), router.directions.double()).argmin(dim=1)
    assert torch.equal(router(embeddings=x), nearest)
    assert router.imbalance > 1.3


def test_balanced_parts_hold_for_embeddings_it_was_not_fitted_on():
    router = EmbeddingRouter.fit_kmeans(cloud(8000)[:4000], 4)
    sizes = torch.bincount(router(embeddings=cloud(8000)[4000:]), minlength=4)
    assert sizes.max() < 1.12 * 1000


def test_similar_embeddings_share_a_part_with_kmeans_and_quadrants_but_not_at_random():
    x = cloud()
    near = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    agreement = {k: (fit(x, 4)(embeddings=near) == fit(x, 4)(embeddings=x)).float().mean() for k, fit in FITS.items()}
    assert agreement["kmeans"] > 0.97 and agreement["quadrants"] > 0.97
    assert agreement["random"] < 0.8


def test_random_parts_are_nearly_equal_and_depend_on_the_seed():
    x = cloud()
    router, other = (EmbeddingRouter.fit_random(x, 4, seed=seed) for seed in (0, 1))
    assert router.imbalance < 1.1
    assert (router(embeddings=x) != other(embeddings=x)).float().mean() > 0.6


def test_the_first_quadrant_cut_is_the_median_along_the_leading_principal_axis():
    x = cloud()
    router = EmbeddingRouter.fit_quadrants(x, 4)
    centered = (x - x.mean(dim=0)).double()
    axis = torch.linalg.svd(centered, full_matrices=False).Vh[0]
    assert abs(axis @ router.directions[0].double()) > 0.9999
    projection = x.double() @ router.directions[0].double()
    assert torch.equal(router(embeddings=x) >= 2, projection > router.offsets[0])
    assert router.offsets[0].item() == pytest.approx(projection.quantile(0.5).item(), abs=1e-3)


@pytest.mark.parametrize("kind", FITS)
def test_a_margin_is_the_distance_to_the_nearest_change_of_student(kind):
    x = cloud(300)
    router = FITS[kind](x, 4)
    part, margin = router(embeddings=x), router.margins(x)
    assert (margin >= 0).all()
    steps = torch.randn(300, 50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps /= steps.norm(dim=-1, keepdim=True)
    inside = x.double()[:, None] + 0.999 * margin[:, None, None] * steps
    assert torch.equal(router(embeddings=inside.flatten(0, 1)), part.repeat_interleave(50))
    # One step further in the best of the possible directions another student answers.
    normals = router.directions if kind != "kmeans" else (router.directions[:, None] - router.directions).flatten(0, 1)
    normals = torch.nn.functional.normalize(normals.double(), dim=-1)
    normals = torch.cat([normals, -normals])
    outside = x.double()[:, None] + (1e-6 + 1.001 * margin[:, None, None]) * normals
    changed = router(embeddings=outside.flatten(0, 1)).reshape(300, -1) != part[:, None]
    assert changed.any(dim=1).all()


def test_one_part_has_no_cut():
    for fit in FITS.values():
        router = fit(cloud(50), 1)
        assert router(embeddings=cloud(50)).sum() == 0 and router.margins(cloud(50)).isinf().all()


@pytest.mark.parametrize("kind", FITS)
def test_saved_and_loaded_routes_the_same(kind, tmp_path):
    router = FITS[kind](cloud(), 4, pooling="mean", text_encoder_fingerprint="abc")
    router.save_pretrained(tmp_path)
    loaded = ConditionRouter.from_pretrained(tmp_path)
    assert type(loaded) is EmbeddingRouter and loaded.config.pooling == "mean"
    assert loaded.config.text_encoder_fingerprint == "abc" and loaded.part_sizes == router.part_sizes
    for name in EmbeddingRouter.tensor_arguments:
        assert torch.equal(getattr(loaded, name), getattr(router, name))
    assert torch.equal(loaded(embeddings=cloud()), router(embeddings=cloud()))


@pytest.mark.parametrize("kind", FITS)
def test_shards_and_memory_maps_of_half_precision_fit_as_one_array(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_msd.embedding_rows.CHUNK", 256)
    x = cloud().half()
    np.save(tmp_path / "a.npy", x[:900].numpy())
    shards = [np.load(tmp_path / "a.npy", mmap_mode="r"), x[900:903], x[903:].numpy()]
    whole, sharded = FITS[kind](x, 4), FITS[kind](shards, 4)
    for name in EmbeddingRouter.tensor_arguments:
        assert torch.equal(getattr(whole, name), getattr(sharded, name))


@pytest.mark.parametrize("kind", FITS)
def test_mapped_files_are_fitted_and_routed_in_little_memory(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_msd.embedding_rows.CHUNK", 256)
    monkeypatch.setattr("diffusers_msd.embedding_rows.SAMPLE", 1000)
    x = cloud(40_000, 64).half()
    save_file({"embeddings": x[:15_000].contiguous()}, tmp_path / "a.safetensors")
    np.save(tmp_path / "b.npy", x[15_000:].numpy())
    shards = [load_file(tmp_path / "a.safetensors")["embeddings"], np.load(tmp_path / "b.npy", mmap_mode="r")]
    FITS[kind](x[:500], 4)  # what is imported on the way is not counted
    tracemalloc.start()
    router = FITS[kind](shards, 4)
    router(embeddings=shards[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # As float64 it is 20 MB; a chunk is 0.1 MB, the sample 0.3 MB, and some numbers per point are kept.
    assert peak < 4e6
    assert sum(router.part_sizes) == 40_000 and router.imbalance < 1.15


@pytest.mark.parametrize("kind", FITS)
def test_the_recorded_sizes_are_those_of_a_call(kind, monkeypatch):
    monkeypatch.setattr("diffusers_msd.embedding_rows.CHUNK", 256)
    for x in (cloud().half(), cloud().bfloat16(), cloud().double()):
        router = FITS[kind]([x[:700], x[700:]], 4)
        assert torch.bincount(router(embeddings=x), minlength=4).tolist() == router.part_sizes


@pytest.mark.parametrize("kind", FITS)
def test_no_prompts_go_to_no_student(kind):
    router = FITS[kind](cloud(), 4)
    assert router(embeddings=torch.empty(0, 12)).shape == router.margins(torch.empty(0, 12)).shape == (0,)


def test_double_precision_is_not_rounded():
    router = EmbeddingRouter(2, "quadrants", torch.eye(3)[:1], torch.ones(1), [1, 1])
    x = torch.tensor([[1 + 1e-12, 0, 0], [1 - 1e-12, 0, 0]], dtype=torch.float64)
    assert router(embeddings=x).tolist() == [1, 0]
    assert router.margins(x).tolist() == pytest.approx([1e-12, 1e-12], rel=1e-3)


@pytest.mark.parametrize("kind", ["kmeans", "quadrants"])
def test_sorted_data_is_cut_as_well_as_shuffled_data(kind, monkeypatch):
    monkeypatch.setattr("diffusers_msd.embedding_rows.CHUNK", 256)
    x = cloud(4000)
    x = x[x[:, 0].argsort()]
    router = FITS[kind](x, 4)
    assert router.imbalance < 1.01
    if kind == "quadrants":
        axes = torch.linalg.svd((x - x.mean(dim=0)).double(), full_matrices=False).Vh[:2]
        assert ((axes * router.directions.double()).sum(dim=1).abs() > 0.999).all()
    else:
        # K-means is as good as its sum of squares; on uneven clusters, balanced, the best is not unique.
        shuffled = FITS[kind](x[torch.randperm(4000, generator=torch.Generator().manual_seed(0))], 4)
        squares = [(x - r.directions[r(embeddings=x)]).square().sum() for r in (router, shuffled)]
        assert squares[0] < 1.1 * squares[1]


def test_a_sample_is_enough_to_balance(monkeypatch):
    monkeypatch.setattr("diffusers_msd.embedding_rows.SAMPLE", 1000)
    assert EmbeddingRouter.fit_kmeans(cloud(4000), 4).imbalance < 1.15


def test_the_batch_does_not_change_the_route():
    x = cloud(100)
    router = EmbeddingRouter.fit_kmeans(x, 4)
    assert router(embeddings=x).tolist() == [router(embeddings=row[None]).item() for row in x]


@pytest.mark.parametrize("kind", FITS)
def test_embeddings_too_alike_to_be_parted_are_refused(kind):
    with pytest.raises(ValueError, match="embeddings: they leave students .* without any"):
        FITS[kind](torch.ones(10, 3), 2)


def test_wrong_arguments_are_named():
    x = cloud(20)
    router = EmbeddingRouter.fit_quadrants(x, 4)
    with pytest.raises(ValueError, match="k: got 3; .*power of two"):
        EmbeddingRouter.fit_quadrants(x, 3)
    with pytest.raises(ValueError, match="k: got 21; with 20 embeddings"):
        EmbeddingRouter.fit_kmeans(x, 21)
    with pytest.raises(TypeError, match="k: got 2.0"):
        EmbeddingRouter.fit_kmeans(x, 2.0)
    with pytest.raises(ValueError, match="embeddings: .* not finite"):
        EmbeddingRouter.fit_kmeans(torch.full((4, 3), float("nan")), 2)
    with pytest.raises(ValueError, match=r"embeddings: got torch.float32 \[20, 5\]"):
        router(embeddings=x[:, :5])
    with pytest.raises(ValueError, match="embeddings: got torch.int64"):
        router(embeddings=torch.zeros(2, 12, dtype=torch.long))
    with pytest.raises(TypeError, match="embeddings: got a list"):
        router(embeddings=[[0.0] * 12])
    with pytest.raises(ValueError, match="embeddings: .* goes by them alone"):
        router(class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="kind: got 'cubes'"):
        EmbeddingRouter(1, "cubes", x, x, [20])
    with pytest.raises(ValueError, match="directions, offsets"):
        EmbeddingRouter(2, "kmeans", x, torch.zeros(2), [10, 10])


def line():
    """Twelve prompts at 0 ... 11 along one axis, and the two-part router that cuts between 5 and 6."""
    router = EmbeddingRouter(2, "quadrants", torch.eye(3)[:1], torch.tensor([5.5]), [6, 6])
    x = torch.zeros(12, 3)
    x[:, 0] = torch.arange(12)
    return router, [f"prompt number {i}" for i in range(12)], x


def test_a_report_quotes_the_typical_and_the_most_ambiguous_prompts_of_each_part():
    router, prompts, x = line()
    lines = router.report(prompts, x, examples=2).splitlines()
    assert lines[0] == "12 prompts, 2 students (quadrants), imbalance 1.000"
    assert lines[1].startswith("margins to the nearest cut: ") and "50% 3," in lines[1]
    assert lines[1].endswith("ambiguous (below 0.1 of the median): 0.0%")
    assert lines[2:] == [
        "",
        "student 0: 6 prompts (50.0%)",
        "  typical   5.5  prompt number 0",
        "  typical   4.5  prompt number 1",
        "  ambiguous 0.5  prompt number 5",
        "",
        "student 1: 6 prompts (50.0%)",
        "  typical   5.5  prompt number 11",
        "  typical   4.5  prompt number 10",
        "  ambiguous 0.5  prompt number 6",
    ]


def test_a_report_is_of_the_prompts_given_and_not_of_those_fitted_on():
    router, prompts, x = line()
    report = router.report(prompts[:5] + ["near", "far"], torch.cat([x[:5], x[:1] + 5.5 - 2**-10, x[:1] + 1000]))
    assert "7 prompts, 2 students (quadrants), imbalance 1.714" in report
    assert "student 1: 1 prompts (14.3%)" in report and "far" in report.split("student 1")[1]
    assert "ambiguous 0.0009766  near" in report and "the median): 14.3%" in report


def test_a_report_quotes_a_repeated_prompt_once_and_shortens_a_long_one():
    router, prompts, x = line()
    report = router.report(["first\nline " * 100] * 6 + prompts[6:], x, examples=3)
    first = report.split("student 1")[0].split("student 0")[1]
    assert first.count("typical") == 1 and max(map(len, first.splitlines())) < 120
    assert first.count("ambiguous 5.5  first line first line") == 1
    one = EmbeddingRouter.fit_random(x, 1).report(prompts, x)
    assert "ambiguous" not in one and "margins" not in one and one.count("typical") == 5


def test_a_report_of_the_wrong_size_is_refused():
    router, prompts, x = line()
    with pytest.raises(ValueError, match="prompts: got 11 for 12 embeddings"):
        router.report(prompts[:11], x)
    with pytest.raises(ValueError, match="examples: got 0"):
        router.report(prompts, x, examples=0)
    with pytest.raises(ValueError, match=r"embeddings: got torch.float32 \[12, 2\]"):
        router.report(prompts, x[:, :2])
