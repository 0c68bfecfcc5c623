# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Distils a class-conditional teacher into K one-step students: TSM, DM and ADM stages of multi-student distillation.

    accelerate launch training_scripts/train_msd.py --config training_scripts/configs/digits_msd.yaml \
        --pretrained_teacher_model runs/digits_teacher --pairs_dir runs/digits_pairs \
        --num_students 2 --output_dir runs/digits_k2

When every student is there, `--output_dir` is a `MultiStudentPipeline`. Students share only the teacher, the pairs and
the router: K jobs with `--student_index 0 ... K-1` and the same output folder give the same weights as one job of all.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import ModelMixin
from filelock import FileLock

from diffusers_msd import ClassRouter, MultiStudentPipeline
from diffusers_msd.config import for_stage, parse_config, run_script
from diffusers_msd.data import DataConfig, load_images
from diffusers_msd.denoiser import Denoiser, denoiser_for, sample_shape
from diffusers_msd.draws import derive_seed
from diffusers_msd.files import check_writable, load_model, model_fingerprint
from diffusers_msd.grids import save_grid
from diffusers_msd.metrics import FeatureNet, extract_features, frechet_distance
from diffusers_msd.pairs import PairDataset, pair_noise
from diffusers_msd.pipeline_msd import SLOTS
from diffusers_msd.runs import claim_run
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import STAGES, build_stage
from diffusers_msd.students import StudentConfig, check_student, create_student, is_same_architecture
from diffusers_msd.teachers import load_teacher
from diffusers_msd.training import Trainer
from diffusers_msd.training_config import TrainingConfig, autocast_dtype, create_accelerator


@dataclass
class MSDConfig:
    """What is distilled into what."""

    pretrained_teacher_model: str = field(metadata={"help": "Folder or Hub id of the teacher (unet/, scheduler/)."})
    output_dir: str = field(metadata={"help": "Folder of the run; becomes the pipeline."})
    num_students: int = field(default=1, metadata={"help": "K, the number of students and parts of the classes."})
    student_index: int | None = field(default=None, metadata={"help": "Train only this one of 0 ... K-1."})
    stages: list[str] = field(
        default_factory=lambda: ["dm", "adm"],
        metadata={"help": "Stages to run, in the order tsm, dm, adm.", "choices": list(STAGES)},
    )
    pairs_dir: str | None = field(default=None, metadata={"help": "Pairs of generate_pairs.py, for the DM stage."})
    partition: str = field(
        default="consecutive",
        metadata={
            "help": "How classes are split: consecutive, random (seeded by --seed), or kmeans on the teacher's class "
            "embeddings, balanced.",
            "choices": ["consecutive", "random", "kmeans"],
        },
    )
    allow_random_student: bool = field(
        default=False, metadata={"help": "Start a smaller student without the TSM stage, from random weights."}
    )
    validation_feature_net: str | None = field(
        default=None, metadata={"help": "Feature network whose Fréchet distance is logged at each validation."}
    )
    num_validation_images: int = field(default=512, metadata={"help": "Images per validation distance."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push the finished pipeline to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Its repository; default: the folder's name."})
    hub_token: str | None = field(default=None, metadata={"help": "Token to push with; default: the saved login."})


PARTITIONS = {
    "consecutive": lambda teacher, k, seed: ClassRouter.consecutive(teacher.config.num_class_embeds, k),
    "random": lambda teacher, k, seed: ClassRouter.random(teacher.config.num_class_embeds, k, seed),
    "kmeans": lambda teacher, k, seed: ClassRouter.from_embeddings(teacher.class_embedding.weight, k),
}


def check_config(config: MSDConfig, teacher: ModelMixin, student: StudentConfig, stage_config: StageConfig):
    """Refuses what cannot work before anything is loaded or trained."""
    classes = teacher.config.num_class_embeds
    most = min(classes, len(SLOTS))
    if not 1 <= config.num_students <= most:
        raise ValueError(
            f"num_students: 1 to {most} (the {classes} classes, at most {len(SLOTS)}) expected, "
            f"got {config.num_students}"
        )
    if config.student_index is not None and not 0 <= config.student_index < config.num_students:
        raise ValueError(f"student_index: 0 to {config.num_students - 1} expected, got {config.student_index}")
    if config.stages != [s for s in STAGES if s in config.stages]:
        raise ValueError(f"stages: a selection of {' '.join(STAGES)} in this order expected, got {config.stages}")
    if "dm" in config.stages and stage_config.regression_weight > 0 and config.pairs_dir is None:
        raise ValueError(
            "pairs_dir: the DM stage regresses on the teacher's pairs; make them with generate_pairs.py, "
            "or pass --regression_weight 0"
        )
    if stage_config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale: class-conditional teachers have no null condition, leave it out; "
            f"got {stage_config.guidance_scale}"
        )
    try:
        candidate = create_student(teacher, student.student_channels, student.student_blocks)
    except ValueError as error:
        # It speaks of its own arguments, channels and blocks.
        raise ValueError(f"student_{error}") from error
    check_student(candidate, teacher)
    random_start = not is_same_architecture(candidate, teacher)
    if random_start and config.stages[0] != "tsm" and not config.allow_random_student:
        raise ValueError(
            "stages: a student of another size than the teacher starts from random weights and needs the tsm stage "
            "first: --stages tsm dm adm; --allow_random_student starts it without"
        )


class Validation:
    """Draws a grid (a row per class of the part, fixed seeds) and measures the part's Fréchet distance."""

    columns = 8

    def __init__(self, student: Denoiser, classes: torch.Tensor, folder: Path, feature_net, real, num_images: int):
        self.student, self.classes, self.folder = student, classes, folder
        self.feature_net, self.num_images = feature_net, num_images
        if feature_net is not None:
            # Ten thousand real images settle the distance well below its differences between students.
            batch = real.__getitems__(range(0, len(real), -(-len(real) // 10_000)))
            self.real_features = extract_features(feature_net, batch["images"])[0]

    def generate(self, labels: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        device = self.student.model.device
        z = pair_noise(seeds, sample_shape(self.student.model))
        batches = [self.student.generate(a.to(device), b.to(device)) for a, b in zip(z.split(256), labels.split(256))]
        return torch.cat(batches).cpu()

    def __call__(self, step: int, model: ModelMixin) -> dict[str, float]:
        labels = self.classes.repeat_interleave(self.columns)
        images = self.generate(labels, torch.arange(self.columns).repeat(len(self.classes)))
        save_grid(images, self.columns, self.folder / f"samples-{step:07d}.png")
        if self.feature_net is None:
            return {}
        seeds = torch.arange(self.num_images)
        images = self.generate(self.classes[seeds % len(self.classes)], seeds)
        return {"fd": frechet_distance(self.real_features, extract_features(self.feature_net, images)[0])}


class Run:
    """One run: everything the students share, and the training of each."""

    def __init__(self, config: MSDConfig, student: StudentConfig, data: DataConfig, stage: StageConfig, training):
        self.config, self.student, self.stage, self.training = config, student, stage, training
        teacher, self.scheduler = load_teacher(config.pretrained_teacher_model)
        check_config(config, teacher, student, stage)
        for i in range(len(config.stages)):
            for_stage(training, i, len(config.stages)), for_stage(stage, i, len(config.stages))
        self.output_dir = check_writable(config.output_dir, "output_dir")
        self.router = PARTITIONS[config.partition](teacher, config.num_students, training.seed)
        self.fingerprint = model_fingerprint(teacher, self.scheduler)
        self.datasets = self._open_data(teacher, data)
        self.feature_net = None
        if config.validation_feature_net is not None:
            self.feature_net = load_model(FeatureNet, config.validation_feature_net, "validation_feature_net")
        # A stage that cannot be built (its networks, an extra that is missing) says so before another is trained.
        self.schedule = NoiseSchedule.from_scheduler(self.scheduler)
        probe = denoiser_for(teacher, self.schedule)
        for i, name in enumerate(config.stages):
            settings = for_stage(stage, i, len(config.stages))
            build_stage(name, probe, probe, probe, self.router.classes(0), settings)
        claim_run(self.output_dir, self._shared_settings())

        self.accelerator = create_accelerator(training, self.output_dir)
        self.dtype = autocast_dtype(training)
        self.teacher_model = teacher
        # The one that is asked for predictions is only read, so it may live in the lower precision.
        self.teacher = self._denoiser(teacher if self.dtype is None else create_student(teacher).to(self.dtype))
        self.teacher.requires_grad_(False)

    def _open_data(self, teacher: ModelMixin, data: DataConfig) -> dict:
        datasets = {}
        if {"tsm", "adm"} & set(self.config.stages) or self.config.validation_feature_net:
            channels, size, _ = sample_shape(teacher)
            images = load_images(data, channels, size)
            if images.num_classes != teacher.config.num_class_embeds:
                raise ValueError(
                    f"dataset_name: the images have {images.num_classes} classes, "
                    f"the teacher {teacher.config.num_class_embeds}"
                )
            for k in range(self.config.num_students):
                images.part(self.router.classes(k))  # Refuses a part without images.
            datasets["images"] = images
        if "dm" in self.config.stages and self.stage.regression_weight > 0:
            # All parts, the same for every student: filtering the pairs by part costs modes.
            datasets["pairs"] = PairDataset(self.config.pairs_dir, self.fingerprint)
        return datasets

    def _shared_settings(self) -> dict:
        """What all jobs of a run, and a resumed one, must have in common."""
        return {
            "teacher": self.fingerprint,
            "num_students": self.config.num_students,
            "class_to_student": self.router.class_to_student.tolist(),
            "stages": self.config.stages,
            "student_channels": self.student.student_channels,
            "student_blocks": self.student.student_blocks,
            "seed": self.training.seed,
        }

    def _denoiser(self, model: ModelMixin) -> Denoiser:
        # eval(): distillation runs without dropout, whatever the teacher was trained with.
        return denoiser_for(model, self.schedule, autocast_dtype=self.dtype).eval()

    def train_student(self, k: int):
        """Runs the stages of student k, each from the weights of the one before."""
        count = len(self.config.stages)
        seed = self.training.seed
        previous: Path | None = None
        for i, stage in enumerate(self.config.stages):
            folder = self.output_dir / f"student_{k}" / stage
            if not (folder / "final" / "summary.json").is_file():
                student, fake_score = self._start(previous, k)
                classes = self.router.classes(k).to(self.accelerator.device)
                # Seeds the discriminator's initial weights.
                torch.manual_seed(derive_seed(seed, k, stage))
                turns = build_stage(stage, student, self.teacher, fake_score, classes, for_stage(self.stage, i, count))
                datasets = dict(self.datasets)
                if "images" in datasets:
                    datasets["images"] = datasets["images"].part(classes.cpu())
                validation = Validation(
                    student,
                    classes.cpu(),
                    folder,
                    self.feature_net,
                    datasets.get("images"),
                    self.config.num_validation_images,
                )
                Trainer(
                    self.accelerator,
                    turns,
                    datasets,
                    for_stage(self.training, i, count),
                    folder,
                    name=f"student_{k}/{stage}",
                    validate=validation,
                ).fit()
                if self.training.resume_from_checkpoint is not None:
                    # A checkpoint given by name is of the stage that was interrupted, not of later ones.
                    self.training = replace(self.training, resume_from_checkpoint="latest")
            previous = folder / "final"

    def _start(self, previous: Path | None, k: int) -> tuple[Denoiser, Denoiser]:
        """Student and fake score at the start of a stage: from the one before, else from the teacher."""
        family = type(self.teacher_model)
        if previous is None:
            seed = derive_seed(self.training.seed, "student", k)
            model = create_student(
                self.teacher_model, self.student.student_channels, self.student.student_blocks, seed
            )
        else:
            model = load_model(family, previous / "student", "output_dir")
        if previous is None or not (previous / "fake_score").is_dir():
            fake_model = create_student(self.teacher_model)
        else:
            fake_model = load_model(family, previous / "fake_score", "output_dir")
        device = self.accelerator.device
        return self._denoiser(model).to(device), self._denoiser(fake_model).to(device)

    def finals(self) -> dict[int, Path]:
        """The finished students."""
        last = self.config.stages[-1]
        folders = {k: self.output_dir / f"student_{k}" / last / "final" for k in range(self.config.num_students)}
        return {k: folder for k, folder in folders.items() if (folder / "summary.json").is_file()}

    def assemble(self) -> MultiStudentPipeline | None:
        """Saves the pipeline in the output folder once every student is there; None before."""
        # Of jobs that end together, one at a time.
        with FileLock(self.output_dir / ".assemble.lock"):
            finals = self.finals()
            if len(finals) < self.config.num_students:
                return None
            students = {
                f"unet_{k}": load_model(type(self.teacher_model), folder / "student", "output_dir")
                for k, folder in finals.items()
            }
            pipe = MultiStudentPipeline(scheduler=self.scheduler, router=self.router, **students)
            pipe.model_card_details = self._card()
            pipe.save_pretrained(self.output_dir)
            return pipe

    def _card(self) -> str:
        stages = " -> ".join(self.config.stages).upper()
        return (
            f"## Training\n\nTeacher: `{Path(self.config.pretrained_teacher_model).name}` (fingerprint "
            f"`{self.fingerprint[:12]}`). Stages: {stages}. Partition: {self.config.partition}. "
            f"Seed: {self.training.seed}."
        )


def main():
    config, student, data, stage, training = parse_config(
        [MSDConfig, StudentConfig, DataConfig, StageConfig, TrainingConfig], __doc__
    )
    if config.push_to_hub and training.report_to == "wandb" and config.hub_token:
        raise ValueError("hub_token: with --report_to wandb it would be uploaded; use `hf auth login` instead")
    run = Run(config, student, data, stage, training)
    run.accelerator.init_trackers("train_msd")
    indices = range(config.num_students) if config.student_index is None else [config.student_index]
    for k in indices:
        run.train_student(k)
    if run.accelerator.is_main_process:
        pipe = run.assemble()
        if pipe is None:
            print(f"{len(run.finals())} of {config.num_students} students are finished in {run.output_dir}")
        else:
            print(f"MultiStudentPipeline.from_pretrained({str(run.output_dir)!r}) is ready")
            if config.push_to_hub:
                pipe.push_to_hub(config.hub_model_id or run.output_dir.resolve().name, token=config.hub_token)
    run.accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
