# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What a wrong route costs: students of the digits answer for classes that are not theirs.

    python benchmarks/routing_errors.py --output_dir runs/experiments --workers 2

Nothing is trained but the students of `k_ablation.py` (K = 2 and K = 5), if they are not there. Three kinds of error:

    requests   each request goes to the next student with probability p
    classes    whole classes are moved to the next student, those nearest to it first
    boundary   the same classes, but half of their requests stay: a soft boundary between the parts

A class is near to the next student if its mean feature is near to those of that student's classes. Both students draw
every image once from the same noise, so all rows are about the same requests.
"""

from statistics import mean

import torch
from experiment import DIGITS, FEATURES, Experiment, ExperimentConfig, run_main
from partitions import class_features
from pipeline import table
from verdict import mean_and_error

from diffusers_msd import ClassRouter, MultiStudentPipeline
from diffusers_msd.config import parse_config
from diffusers_msd.data import DataConfig, load_images
from diffusers_msd.denoiser import sample_shape
from diffusers_msd.evaluation import dataset_features, generate, open_feature_net
from diffusers_msd.feature_net import extract_features
from diffusers_msd.files import atomic_write, write_json
from diffusers_msd.metrics import frechet_distance, precision_recall
from diffusers_msd.pairs import pair_noise, pair_seeds
from diffusers_msd.plots import subplots


VARIANTS = {f"K{k}": [*DIGITS, "--num_students", k] for k in (2, 5)}
SHARES = (0.0, 0.1, 0.2, 0.5, 1.0)
METRICS = ("fd", "class_accuracy", "precision", "recall")


def moved_first(table: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The classes in the order in which they are moved: nearest to the next student's classes first."""
    num_students = int(table.max()) + 1
    centres = torch.stack([features[table == k].mean(dim=0) for k in range(num_students)])
    return (features - centres[(table + 1) % num_students]).norm(dim=1).argsort()


def misrouted(kind: str, share: float, labels: torch.Tensor, order: torch.Tensor, seed: int) -> torch.Tensor:
    """Which requests the next student answers: boolean [N], about `share` of them (half as many for a boundary)."""
    random = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    if kind == "requests":
        return random < share
    moved = torch.isin(labels, order[: round(share * len(order))])
    return moved & (random < 0.5) if kind == "boundary" else moved


class Answers:
    """Features of every request's image, by the right student and by the next one."""

    def __init__(self, folder, num_images: int, net):
        pipe = MultiStudentPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        right = pipe.router
        self.table, k = right.class_to_student, right.num_students
        self.labels = torch.arange(num_images) % len(self.table)
        z = pair_noise(pair_seeds(1_000_000, range(num_images)), sample_shape(pipe.students[0]))
        self.features, self.correct = {}, {}
        for name, router in (("right", right), ("next", ClassRouter(k, (self.table + 1) % k))):
            pipe.router = router
            images, _ = generate(
                lambda z, c: pipe(class_labels=c, latents=z, output_type="latent").images, z, self.labels, 250, "cpu"
            )
            self.features[name], logits = extract_features(net, images)
            self.correct[name] = logits.argmax(dim=1) == self.labels

    def quality(self, wrong: torch.Tensor, real: torch.Tensor) -> dict:
        """The metrics if the next student answers the requests in `wrong`."""
        features = torch.where(wrong[:, None], self.features["next"], self.features["right"])
        correct = torch.where(wrong, self.correct["next"], self.correct["right"])
        precision, recall = precision_recall(real, features)
        return {
            "share": wrong.double().mean().item(),
            "fd": frechet_distance(real, features),
            "class_accuracy": correct.double().mean().item(),
            "precision": precision,
            "recall": recall,
        }


def measure(experiment: Experiment) -> list[dict]:
    """One entry per K, kind, share and seed."""
    net, _ = open_feature_net(str(FEATURES), "cpu")
    dataset = load_images(DataConfig(dataset_name="digits"), 1, 8)
    real, centres, entries = torch.cat(list(dataset_features(net, dataset))), class_features(), []
    for variant in experiment.variants:
        for seed in experiment.config.seeds:
            answers = Answers(experiment.folder(seed, variant), experiment.config.num_images, net)
            order = moved_first(answers.table, centres)
            for kind in ("requests", "classes", "boundary"):
                for share in SHARES:
                    wrong = misrouted(kind, share, answers.labels, order, seed)
                    quality = answers.quality(wrong, real)
                    entries.append({"students": variant, "kind": kind, "asked": share, "seed": seed, **quality})
    return entries


def grouped(entries: list[dict]) -> dict[tuple, list[dict]]:
    """Entries of all seeds by (students, kind, share asked for)."""
    groups = {}
    for entry in entries:
        groups.setdefault((entry["students"], entry["kind"], entry["asked"]), []).append(entry)
    return groups


def summary(entries: list[dict]) -> str:
    lines = []
    for (students, kind, _), rows in grouped(entries).items():
        fd, accuracy, precision, recall = ([row[name] for row in rows] for name in METRICS)
        lines.append([students, kind, f"{100 * mean(row['share'] for row in rows):.0f} %"])
        lines[-1] += [f"**{mean_and_error(fd, 2)}**", mean_and_error([100 * value for value in accuracy], 2)]
        lines[-1] += [mean_and_error(precision), mean_and_error(recall)]
    return table(["students", "wrong are", "wrong requests", "FD", "class accuracy, %", "precision", "recall"], lines)


def plot(entries: list[dict], path):
    figure, axes = subplots(1, 2, (9, 3.5))
    curves = {}
    for (students, kind, _), rows in grouped(entries).items():
        curves.setdefault((students, kind), []).append([mean(row[n] for row in rows) for n in ("share", *METRICS)])
    for (students, kind), points in curves.items():
        share, fd, accuracy, *_ = zip(*points)
        axes[0].plot(share, fd, marker=".", label=f"{students}, {kind}")
        axes[1].plot(share, accuracy, marker=".")
    for axis, name in zip(axes, ("Fréchet distance", "class accuracy")):
        axis.set_xlabel("share of requests that the wrong student answers")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main():
    (config,) = parse_config([ExperimentConfig], __doc__)
    experiment = Experiment("routing_errors", config, VARIANTS, {})
    experiment.train()
    entries = measure(experiment)
    folder = experiment.root / experiment.name
    folder.mkdir(exist_ok=True)
    write_json(folder / "results.json", entries)
    atomic_write(folder / "results.md", summary(entries) + "\n")
    plot(entries, folder / "results.png")
    print(summary(entries))


if __name__ == "__main__":
    run_main(main)
