# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch

from diffusers_msd.routing import ClassRouter, ConditionRouter


class NearestRouter(ConditionRouter):
    """The extension point: a router that keeps a tensor is one subclass."""

    tensor_arguments = ("centroids",)

    def __init__(self, num_students, centroids):
        self.centroids = centroids
        self.register_to_config(num_students=num_students)

    def __call__(self, class_labels=None, embeddings=None):
        return torch.cdist(embeddings, self.centroids).argmin(dim=1)


def clusters(sizes, seed=0):
    """Rows around far-apart centres, in mixed order, and the cluster of each row."""
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    cluster = cluster[torch.randperm(len(cluster), generator=generator)]
    centers = 10 * torch.eye(len(sizes), 5)
    return centers[cluster] + 0.1 * torch.randn(len(cluster), 5, generator=generator), cluster


@pytest.mark.parametrize("num_classes, k", [(10, 1), (10, 2), (10, 3), (10, 10), (1000, 4), (7, 5)])
def test_consecutive_parts_are_runs_of_sizes_within_one(num_classes, k):
    router = ClassRouter.consecutive(num_classes, k)
    assert (router.class_to_student.diff() >= 0).all()
    assert sum(router.part_sizes) == num_classes and len(router.part_sizes) == router.num_students == k
    assert max(router.part_sizes) - min(router.part_sizes) <= 1


def test_consecutive_partition_of_imagenet_is_the_paper_s():
    router = ClassRouter.consecutive(1000, 4)
    assert [router.classes(k).tolist() for k in range(4)] == [list(range(250 * k, 250 * k + 250)) for k in range(4)]


def test_random_parts_are_balanced_depend_on_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    router, same, other = (ClassRouter.random(100, 7, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert max(router.part_sizes) - min(router.part_sizes) == 1 and sum(router.part_sizes) == 100
    assert torch.equal(router.class_to_student, same.class_to_student)
    assert not torch.equal(router.class_to_student, other.class_to_student)
    assert (router.class_to_student.diff() < 0).any()


def test_parts_are_disjoint_and_cover_every_class():
    router = ClassRouter.random(30, 4)
    parts = [router.classes(k) for k in range(4)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(30))
    for k, part in enumerate(parts):
        assert router(class_labels=part).tolist() == [k] * len(part)


def test_labels_are_routed_by_the_table_in_input_order():
    router = ClassRouter(3, [2, 0, 1, 0])
    served = router(class_labels=torch.tensor([3, 0, 0, 2, 1]))
    assert served.dtype == torch.int64 and served.tolist() == [0, 2, 2, 1, 0]
    assert router(class_labels=[1, 2]).tolist() == router(class_labels=np.array([1, 2])).tolist() == [0, 1]
    assert router(class_labels=torch.tensor([], dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("balanced", [True, False])
def test_from_embeddings_finds_equal_clusters(balanced):
    embeddings, cluster = clusters([8, 8, 8])
    router = ClassRouter.from_embeddings(embeddings, 3, balanced=balanced)
    assert router.part_sizes == [8, 8, 8] and router.imbalance == 1.0
    for k in range(3):
        assert len(cluster[router.classes(k)].unique()) == 1


def test_from_embeddings_balances_where_plain_k_means_does_not():
    embeddings, _ = clusters([20, 2, 1])
    plain = ClassRouter.from_embeddings(embeddings, 3, balanced=False)
    balanced = ClassRouter.from_embeddings(embeddings, 3, balanced=True)
    assert sorted(plain.part_sizes) == [1, 2, 20] and plain.imbalance == pytest.approx(20 / (23 / 3))
    assert sorted(balanced.part_sizes) == [7, 8, 8]


def test_balanced_parts_are_closer_together_than_random_ones():
    embeddings, _ = clusters([9, 6, 4, 3])

    def spread(router):
        parts = [embeddings[router.classes(k)] for k in range(router.num_students)]
        return sum((part - part.mean(dim=0)).square().sum().item() for part in parts)

    fitted = spread(ClassRouter.from_embeddings(embeddings, 4))
    assert fitted < 0.6 * min(spread(ClassRouter.random(22, 4, seed=seed)) for seed in range(20))


def test_from_embeddings_takes_any_float_type_and_numbers_parts_by_their_first_class():
    embeddings, _ = clusters([5, 5])
    table = ClassRouter.from_embeddings(embeddings, 2).class_to_student
    assert table[0] == 0
    for same in (embeddings.numpy(), embeddings.half(), torch.nn.Parameter(embeddings)):
        assert torch.equal(ClassRouter.from_embeddings(same, 2, seed=3).class_to_student, table)


def test_from_embeddings_with_as_many_parts_as_classes_gives_each_class_its_own():
    assert ClassRouter.from_embeddings(torch.randn(6, 2), 6).class_to_student.tolist() == list(range(6))


def test_report_names_every_part_with_its_size_and_classes():
    lines = ClassRouter(2, [0, 0, 0, 1, 1, 0, 1]).report().splitlines()
    assert lines == [
        "7 classes, 2 students, imbalance 1.14",
        "student 0: 4 classes: 0-2, 5",
        "student 1: 3 classes: 3-4, 6",
    ]


def test_a_saved_router_loads_as_its_own_class_with_the_same_table(tmp_path):
    router = ClassRouter.random(100, 7)
    router.save_pretrained(tmp_path / "router", variant="fp16", safe_serialization=True)
    assert [file.name for file in (tmp_path / "router").iterdir()] == ["config.json"]
    for loaded in (
        ConditionRouter.from_pretrained(tmp_path / "router", variant="fp16", dtype=torch.float16),
        ConditionRouter.from_pretrained(tmp_path, subfolder="router"),
        ClassRouter.from_pretrained(str(tmp_path / "router")),
    ):
        assert type(loaded) is ClassRouter and loaded.num_students == 7
        assert loaded.class_to_student.dtype == torch.int64
        assert torch.equal(loaded.class_to_student, router.class_to_student)


def test_a_router_s_tensors_survive_saving_bit_for_bit_under_the_names_diffusers_needs(tmp_path):
    router = NearestRouter(3, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    router.save_pretrained(tmp_path, variant="fp16")
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert "centroids" not in json.loads((tmp_path / "config.json").read_text())
    loaded = ConditionRouter.from_pretrained(tmp_path, dtype=torch.float16)
    assert type(loaded) is NearestRouter and loaded.centroids.dtype == torch.float32
    assert torch.equal(loaded.centroids, router.centroids)
    embeddings = torch.randn(64, 4)
    assert torch.equal(loaded(embeddings=embeddings), router(embeddings=embeddings))


def test_a_router_has_no_tensor_that_a_cast_of_the_pipeline_reaches():
    assert not isinstance(ClassRouter.consecutive(4, 2), torch.nn.Module)


def test_saving_leaves_other_files_alone_and_keeps_no_temporary_one(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ClassRouter.consecutive(4, 2).save_pretrained(tmp_path)
    ClassRouter.consecutive(9, 3).save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    assert ConditionRouter.from_pretrained(tmp_path).num_students == 3


@pytest.mark.parametrize(
    "labels, error, text",
    [
        (torch.tensor([0, 10]), ValueError, r"class_labels: 10 is out of range; .* 0 \.\.\. 9"),
        (torch.tensor([-1]), ValueError, r"class_labels: -1 is out"),
        (torch.tensor([1.0]), TypeError, r"class_labels: got torch.float32"),
        (torch.tensor([True]), TypeError, r"class_labels: got torch.bool"),
        (["cat"], TypeError, r"class_labels: got \['cat'\]"),
        (torch.tensor([[1]]), ValueError, r"class_labels: got shape \[1, 1\]"),
        (3, ValueError, r"class_labels: got shape \[\]"),
    ],
)
def test_bad_labels_are_refused(labels, error, text):
    with pytest.raises(error, match=text):
        ClassRouter.consecutive(10, 2)(class_labels=labels)


def test_a_class_router_refuses_embeddings_and_the_absence_of_labels():
    router = ClassRouter.consecutive(10, 2)
    with pytest.raises(ValueError, match="class_labels: a ClassRouter goes by them alone"):
        router()
    with pytest.raises(ValueError, match="class_labels: a ClassRouter goes by them alone"):
        router(class_labels=torch.tensor([1]), embeddings=torch.zeros(1, 3))


@pytest.mark.parametrize("k, error", [(0, ValueError), (-1, ValueError), (11, ValueError), (2.0, TypeError)])
def test_a_number_of_parts_that_does_not_fit_the_classes_is_refused(k, error):
    for make in (
        lambda: ClassRouter.consecutive(10, k),
        lambda: ClassRouter.random(10, k),
        lambda: ClassRouter.from_embeddings(torch.zeros(10, 2), k),
    ):
        with pytest.raises(error, match=f"k: got {k}"):
            make()
    with pytest.raises(error, match=f"num_students: got {k}"):
        ClassRouter(k, [0] * 10)


@pytest.mark.parametrize(
    "table, error, text",
    [
        ([0, 1, 0, 2], ValueError, r"class_to_student: it holds student 2; .* 0 \.\.\. 1"),
        ([0, -1, 1], ValueError, r"class_to_student: it holds student -1"),
        ([0, 0, 0], ValueError, r"gives no class to students \[1\]"),
        ([0.0, 1.0], TypeError, r"class_to_student: got torch.float32"),
        ([[0, 1]], ValueError, r"class_to_student: got shape \[1, 2\]"),
    ],
)
def test_bad_tables_are_refused(table, error, text):
    with pytest.raises(error, match=text):
        ClassRouter(2, table)


@pytest.mark.parametrize("embeddings", [torch.zeros(4), torch.full((4, 2), float("nan"))])
def test_bad_embeddings_are_refused(embeddings):
    with pytest.raises(ValueError, match="embeddings: got shape"):
        ClassRouter.from_embeddings(embeddings, 2)


def test_identical_embeddings_cannot_be_cut_by_plain_k_means_but_can_be_balanced():
    with pytest.warns(match="distinct clusters"), pytest.raises(ValueError, match="gives no class"):
        ClassRouter.from_embeddings(torch.ones(5, 2), 2, balanced=False)
    with pytest.warns(match="distinct clusters"):
        assert sorted(ClassRouter.from_embeddings(torch.ones(5, 2), 2).part_sizes) == [2, 3]


def test_a_part_that_does_not_exist_is_refused():
    for k in (-1, 2):
        with pytest.raises(ValueError, match=f"k: got {k}"):
            ClassRouter.consecutive(10, 2).classes(k)


def test_missing_damaged_and_foreign_routers_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrained_model_name_or_path: .*nowhere.*neither a folder"):
        ConditionRouter.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        ConditionRouter.from_pretrained(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json is no config of a ConditionRouter"):
            ConditionRouter.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(ValueError, match="holds a 'DDIMScheduler'; ClassRouter.from_pretrained loads"):
        ClassRouter.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory: cannot write"):
        ClassRouter.consecutive(4, 2).save_pretrained(tmp_path / "file")


def test_truncated_and_missing_router_tensors_are_refused(tmp_path):
    NearestRouter(2, torch.zeros(2, 4)).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is truncated"):
        ConditionRouter.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.safetensors is missing"):
        ConditionRouter.from_pretrained(tmp_path)
