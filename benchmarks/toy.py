# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The paper's 2-D toy: do K students come nearer to their teacher than one, at the same budget each, and in total?

    python benchmarks/toy.py

8 clusters of 8 Gaussians; the condition is the cluster, and each of K = 1, 2, 4, 8 students gets 8 / K consecutive ones.
Teachers: "exact", the mixture's own score, and "mlp", a network trained on its samples. Students and fake scores start
from the weights of "mlp" and go through DM and ADM, with the package's losses, turns and trainer. The 15 students of the
four K are trained as one stack; those of the control at equal *total* budget (1 / K of the iterations each), as one
stack per K. A seed changes every draw of the distillation; teachers, pairs and evaluation are the same for all.

Writes results.json, toy.md and toy.png. What is finished is not run again.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from toy_models import (
    CLUSTERS,
    Mixture,
    MixtureDenoiser,
    StackedDenoiser,
    StackedHead,
    StackedMLP,
    StackedParts,
    toy_schedule,
)
from toy_report import energy_distance, histogram_l1, plot_students, report

from diffusers_msd.checkpoint import load_weights
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.draws import derive_seed
from diffusers_msd.files import atomic_write, check_writable, write_json
from diffusers_msd.runs import claim_run
from diffusers_msd.sampling import sample_heun
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import CriticTurn, DenoisingTurn, StudentTurn, Turn
from diffusers_msd.training import Trainer
from diffusers_msd.training_config import TrainingConfig, create_accelerator


NUM_STUDENTS = (1, 2, 4, 8)
STAGES = ("dm", "adm")
TEACHERS = ("exact", "mlp")
RATES = {"dm": 1e-3, "adm": 5e-4}
STAGE_CONFIGS = {
    "dm": StageConfig(student_update_interval=[2], regression_weight=1.0),
    "adm": StageConfig(student_update_interval=[2], gan_generator_weight=0.1, gan_critic_weight=0.1),
}


@dataclass
class ExperimentConfig:
    """What is run."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of networks and results; default: runs/experiments/toy (..._smoke/toy)."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the distillation, each."})
    workers: int = field(default=1, metadata={"help": "Processes; each distils one teacher with one seed at a time."})
    smoke: bool = field(default=False, metadata={"help": "Everything once at 1 % of the iterations, to see it run."})
    scale: float = field(default=1.0, metadata={"help": "Factor on the iterations of all stages."})
    width: int = field(default=64, metadata={"help": "Of the hidden layers of all networks."})

    def __post_init__(self):
        self.output_dir = self.output_dir or f"runs/experiments{'_smoke' if self.smoke else ''}/toy"
        if not self.scale > 0:
            raise ValueError(f"scale: a number > 0 expected, got {self.scale}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: each once, got {self.seeds}")
        if self.width < 1:
            raise ValueError(f"width: at least 1 expected, got {self.width}")


@dataclass(frozen=True)
class Budget:
    """How much of everything. `dm`, `adm`: iterations of a student at the full budget; batches are per network."""

    teacher: int = 8000
    dm: int = 3000
    adm: int = 1500
    teacher_batch: int = 1024
    batch: int = 128
    pairs_per_cluster: int = 1024
    real_per_cluster: int = 1024
    evaluated_per_cluster: int = 2048
    heun_steps: int = 32

    @classmethod
    def of(cls, config: ExperimentConfig) -> "Budget":
        scale = config.scale * (0.01 if config.smoke else 1)
        steps = {name: max(round(scale * vars(cls())[name]), 8) for name in ("teacher", "dm", "adm")}
        return cls(**steps, evaluated_per_cluster=128) if config.smoke else cls(**steps)


# K's students are trained in stacks: all of them with the whole budget, and those of K with 1 / K of it.
STACKS = {1: NUM_STUDENTS, **{k: (k,) for k in NUM_STUDENTS if k > 1}}


class Rows(torch.utils.data.Dataset):
    """Tensors with a common first axis; a batch comes whole."""

    def __init__(self, **tensors: torch.Tensor):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors["cond"])

    def __getitems__(self, indices):
        return {name: tensor[indices] for name, tensor in self.tensors.items()}


class RealSamples(torch.utils.data.Dataset):
    """Samples of the mixture for a stack of students, each from its own part.

    Args:
        parts: of the students.
        per_cluster: how many samples there are of each.
    """

    def __init__(self, parts: StackedParts, per_cluster: int):
        self.parts = parts
        clusters = torch.arange(CLUSTERS).repeat_interleave(per_cluster)
        samples = Mixture().sample(clusters, torch.Generator().manual_seed(derive_seed("real")))
        self.samples = samples.view(CLUSTERS, per_cluster, *samples.shape[1:])

    def __len__(self):
        return CLUSTERS * self.samples.shape[1]

    def __getitems__(self, indices):
        indices = torch.tensor(indices)
        cond = self.parts[indices % CLUSTERS]
        return {"images": self.samples[cond, indices // CLUSTERS], "cond": cond}


class Experiment:
    """What all students share: the teachers, their pairs, and the samples that students are compared with."""

    def __init__(self, config: ExperimentConfig):
        self.config = config
        self.output_dir = check_writable(config.output_dir, "output_dir")
        self.budget = Budget.of(config)
        claim_run(self.output_dir, {"width": config.width, **asdict(self.budget)})
        self.schedule = toy_schedule()
        self.accelerator = create_accelerator(TrainingConfig(report_to="none"), self.output_dir)
        torch.manual_seed(derive_seed("teacher"))
        self.network = StackedMLP(1, config.width)
        self._train_teacher()
        self.teachers = {
            "exact": MixtureDenoiser(Mixture(), self.schedule),
            "mlp": StackedDenoiser(self.network, self.schedule),
        }
        self.noise = self.make_noise("evaluation", self.budget.evaluated_per_cluster)
        self.pairs, self.targets, self.references = {}, {}, {}
        for name in TEACHERS:
            noise = self.make_noise("pairs", self.budget.pairs_per_cluster)
            cond, images = clusters_of(noise), self.sample(name, noise)
            self.pairs[name] = Rows(noise=noise.flatten(0, 1), cond=cond, images=images.flatten(0, 1))
            self.targets[name] = self.sample(name, self.noise)
            # From other noise: only between independent samples is the energy distance unbiased.
            self.references[name] = self.sample(name, self.make_noise("reference", self.noise.shape[1]))

    def make_noise(self, purpose: str, per_cluster: int) -> torch.Tensor:
        """[clusters, n, 2, 1, 1]."""
        generator = torch.Generator().manual_seed(derive_seed(purpose))
        return torch.randn(CLUSTERS, per_cluster, 2, 1, 1, generator=generator)

    def sample(self, teacher: str, noise: torch.Tensor) -> torch.Tensor:
        """The end of the teacher's ODE from `noise` [clusters, n, 2, 1, 1]."""
        x = sample_heun(self.teachers[teacher], noise.flatten(0, 1), clusters_of(noise), self.budget.heun_steps)
        return x.view(noise.shape)

    def fit(
        self, turns: list[Turn], datasets: dict, name: str, seed: int, batch: int, steps: int, rate: float
    ) -> Path:
        """Runs the trainer in the folder `name`, unless it has; returns the folder of the networks."""
        folder = self.output_dir / name
        if not (folder / "final" / "summary.json").is_file():
            training = TrainingConfig(
                seed=seed,
                train_batch_size=batch,
                max_train_steps=[steps],
                learning_rate=[rate],
                lr_scheduler="cosine",
                ema_decay=0.99,
                # A norm over the whole stack: clipping would tie independent students to each other.
                max_grad_norm=float("inf"),
                checkpointing_steps=steps,
                logging_steps=max(steps // 20, 1),
                resume_from_checkpoint="latest",
                report_to="none",
            )
            Trainer(self.accelerator, turns, datasets, training, folder, name).fit()
        return folder / "final"

    def _train_teacher(self):
        turn = DenoisingTurn(StackedDenoiser(self.network, self.schedule), log_sigma=None)
        images = RealSamples(StackedParts((1,)), 8 * self.budget.real_per_cluster)
        batch, steps = self.budget.teacher_batch, self.budget.teacher
        final = self.fit([turn], {"images": images}, "teacher", 0, batch, steps, rate=2e-3)
        load_weights(self.network, final / "unet", "output_dir")

    def distil(self, teacher: str, seed: int, divisor: int) -> dict[str, StackedDenoiser]:
        """The students of a stack after DM, and after ADM, which starts from there."""
        parts = StackedParts(STACKS[divisor])
        size = len(parts.sizes)
        student, fake_score = (StackedDenoiser(self.network.stacked(size), self.schedule) for _ in range(2))
        datasets = {"pairs": self.pairs[teacher], "images": RealSamples(parts, self.budget.real_per_cluster)}
        students = {}
        for stage in STAGES:
            name = f"{stack_folder(teacher, seed, divisor)}/{stage}"
            torch.manual_seed(derive_seed(seed, name))
            head = StackedHead(size, self.config.width) if stage == "adm" else None
            shared = {"conditions": parts, "config": STAGE_CONFIGS[stage], "discriminator": head}
            turns = [
                StudentTurn(student, self.teachers[teacher], fake_score, **shared),
                CriticTurn(student, fake_score, **shared),
            ]
            steps = max(vars(self.budget)[stage] // divisor, 1)
            final = self.fit(turns, datasets, name, seed, size * self.budget.batch, steps, RATES[stage])
            load_weights(student.model, final / "student", "output_dir")
            load_weights(fake_score.model, final / "fake_score", "output_dir")
            students[stage] = deepcopy(student)
        return students

    @torch.no_grad()
    def generate(self, students: StackedDenoiser, divisor: int) -> dict[int, torch.Tensor]:
        """By K the samples of its students from the evaluation's noise, [clusters, n, 2, 1, 1]: each serves its part."""
        size = students.model.config.stack
        # Simplest for a stack: all of its students draw every cluster, of which one is kept.
        everything = []
        for cluster, noise in enumerate(self.noise):
            z = noise.repeat_interleave(size, dim=0)
            x = students.generate(z, torch.full((len(z),), cluster))
            everything.append(x.view(-1, size, *noise.shape[1:]))
        samples, first = {}, 0
        for k in STACKS[divisor]:
            samples[k] = torch.stack([everything[c][:, first + c * k // CLUSTERS] for c in range(CLUSTERS)])
            first += k
        return samples

    def measure(self, teacher: str, x: torch.Tensor) -> dict[str, float]:
        """Distances to the teacher of samples x [clusters, n, 2, 1, 1] made from the evaluation's noise."""
        x, target, reference = (v.flatten(2).double() for v in (x, self.targets[teacher], self.references[teacher]))
        return {
            "l1": (x - target).abs().sum(dim=2).mean().item(),
            "histogram_l1": histogram_l1(x.flatten(0, 1), reference.flatten(0, 1)),
            "energy": sum(energy_distance(a, b) for a, b in zip(x, reference)) / CLUSTERS,
        }

    def rows(self, teacher: str, seed: int, divisor: int) -> list[dict]:
        """The results of one stack's students, one row per stage and K, measured unless they have been."""
        path = self.output_dir / stack_folder(teacher, seed, divisor) / "rows.json"
        if not path.exists():
            rows = []
            for stage, students in self.distil(teacher, seed, divisor).items():
                for k, x in self.generate(students, divisor).items():
                    row = {"teacher": teacher, "stage": stage, "K": k, "divisor": divisor, "seed": seed}
                    rows.append({**row, **self.measure(teacher, x)})
            write_json(path, rows)
        return json.loads(path.read_text())

    def panels(self, seed: int) -> dict[str, dict[str, torch.Tensor]]:
        """What the picture shows: samples [clusters, n, 2] by row and column, at the whole budget."""
        panels = {}
        for teacher in TEACHERS:
            for stage, students in self.distil(teacher, seed, 1).items():
                samples = {f"K = {k}": x.flatten(2) for k, x in self.generate(students, 1).items()}
                target = self.targets[teacher].flatten(2)
                panels[f"{teacher} teacher, {stage.upper()}"] = {"teacher": target, **samples}
        return panels


def stack_folder(teacher: str, seed: int, divisor: int) -> str:
    return f"{teacher}/seed_{seed}/stack_{divisor}"


def clusters_of(noise: torch.Tensor) -> torch.Tensor:
    """The condition of each row of `noise` [clusters, n, ...], LongTensor [clusters n]."""
    return torch.arange(CLUSTERS).repeat_interleave(noise.shape[1])


def measure_all(config: ExperimentConfig, teacher: str, seed: int) -> list[dict]:
    """The results of all stacks of one teacher and one seed."""
    experiment = Experiment(config)
    rows = [row for divisor in STACKS for row in experiment.rows(teacher, seed, divisor)]
    print(f"measured: {teacher} teacher, seed {seed}", flush=True)
    return rows


def main():
    (config,) = parse_config([ExperimentConfig], __doc__)
    experiment = Experiment(config)
    floors = {name: experiment.measure(name, experiment.targets[name]) for name in TEACHERS}
    # Spawned, not forked: threads of torch do not survive a fork.
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(measure_all, config, teacher, seed) for teacher in TEACHERS for seed in config.seeds]
        rows = [row for job in jobs for row in job.result()]
    text = report(rows, floors)
    plot_students(experiment.panels(config.seeds[0]), experiment.output_dir / "toy.png")
    write_json(
        experiment.output_dir / "results.json",
        {"config": asdict(config), "budget": asdict(experiment.budget), "floors": floors, "rows": rows},
    )
    atomic_write(experiment.output_dir / "toy.md", text)
    print(text)


if __name__ == "__main__":
    run_script(main)
