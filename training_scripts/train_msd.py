# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Distils a teacher into K one-step students: TSM, DM and ADM stages of multi-student distillation.

    accelerate launch training_scripts/train_msd.py --config training_scripts/configs/digits_msd.yaml \
        --pretrained_teacher_model runs/digits_teacher --pairs_dir runs/digits_pairs \
        --num_students 2 --output_dir runs/digits_k2

Text-conditional teachers (Stable Diffusion) take `--captions_dir` in place of a data set; see cache_captions.py.

When every student is there, `--output_dir` is a `MultiStudentPipeline`. Students share only the teacher, the pairs and
the router: K jobs with `--student_index 0 ... K-1` and the same output folder give the same weights as one job of all.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from diffusers import ModelMixin
from filelock import FileLock

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.adapters import AdapterConfig, LoraStudent, lora_network
from diffusers_msd.checkpoint import load_weights
from diffusers_msd.conditions import CONDITIONS, ConditionConfig, conditions_for, fit_router
from diffusers_msd.config import for_stage, parse_config, run_script
from diffusers_msd.data import DataConfig
from diffusers_msd.denoiser import Denoiser, denoiser_for, sample_shape
from diffusers_msd.draws import derive_seed
from diffusers_msd.files import check_writable, fingerprint, load_model, model_fingerprint
from diffusers_msd.grids import save_grid
from diffusers_msd.memory import cache_bytes, estimate_memory, format_estimate, without_data
from diffusers_msd.metrics import FeatureNet, extract_features, frechet_distance
from diffusers_msd.objectives import PERCEPTUAL
from diffusers_msd.pairs import PairDataset, pair_noise
from diffusers_msd.pipeline_msd import SLOTS
from diffusers_msd.runs import claim_run
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import STAGES, build_stage
from diffusers_msd.students import (
    StudentConfig,
    check_preset,
    check_student,
    create_student,
    is_same_architecture,
)
from diffusers_msd.teachers import load_teacher, load_teacher_shape
from diffusers_msd.training import Trainer
from diffusers_msd.training_config import TrainingConfig, autocast_dtype, create_accelerator


@dataclass
class MSDConfig:
    """What is distilled into what."""

    pretrained_teacher_model: str = field(
        metadata={"help": "Folder or Hub id of the teacher: unet/, scheduler/, and for Stable Diffusion the rest."}
    )
    output_dir: str = field(metadata={"help": "Folder of the run; becomes the pipeline."})
    num_students: int = field(default=1, metadata={"help": "K, the number of students and parts of the conditions."})
    student_index: int | None = field(default=None, metadata={"help": "Train only this one of 0 ... K-1."})
    stages: list[str] = field(
        default_factory=lambda: ["dm", "adm"],
        metadata={"help": "Stages to run, in the order tsm, dm, adm.", "choices": list(STAGES)},
    )
    pairs_dir: str | None = field(default=None, metadata={"help": "Pairs of generate_pairs.py, for the DM stage."})
    allow_random_student: bool = field(
        default=False, metadata={"help": "Start a smaller student without the TSM stage."}
    )
    validation_feature_net: str | None = field(
        default=None, metadata={"help": "Feature network whose Fréchet distance is logged at each validation."}
    )
    num_validation_images: int = field(default=512, metadata={"help": "Images per validation distance."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print parameters, memory, disk and hours of each stage, and train nothing. Needs the "
            "teacher's config files alone."
        },
    )
    dry_run_tflops: float = field(
        default=60.0, metadata={"help": "Sustained TFLOP/s of one device that the hours of a dry run assume."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push the finished pipeline to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Its repository; default: the folder's name."})
    hub_token: str | None = field(default=None, metadata={"help": "Token to push with; default: the saved login."})


def check_config(
    config: MSDConfig,
    conditions,
    teacher: ModelMixin,
    student: StudentConfig,
    adapter: AdapterConfig,
    stage_config: StageConfig,
):
    """Refuses what cannot work before anything is trained."""
    adapter.lora(teacher)
    most = min(len(conditions.values), len(SLOTS))
    if not 1 <= config.num_students <= most:
        raise ValueError(
            f"num_students: 1 to {most} (the {len(conditions.values)} conditions, at most {len(SLOTS)}) expected, "
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
    if stage_config.guidance_scale not in (None, 1) and conditions.null is None:
        raise ValueError(
            f"guidance_scale: this teacher has no null condition (a class that stands for none), leave it out; "
            f"got {stage_config.guidance_scale}"
        )
    if student.student_preset is not None:
        check_preset(student.student_preset, teacher)
    try:
        candidate = create_student(
            teacher, student.student_channels, student.student_blocks, init=student.student_init
        )
    except ValueError as error:
        # It speaks of its own arguments, channels and blocks.
        raise ValueError(f"student_{error}") from error
    check_student(candidate, teacher)
    other_size = not is_same_architecture(candidate, teacher)
    if adapter.student_type == "lora" and other_size:
        raise ValueError("student_type: lora students have the teacher's size, leave student_channels and _blocks out")
    if other_size and config.stages[0] != "tsm" and not config.allow_random_student:
        raise ValueError(
            "stages: a student of another size than the teacher is no denoiser yet, even with inherited weights, and "
            "needs the tsm stage first: --stages tsm dm adm; --allow_random_student starts it without"
        )


class Validation:
    """Draws a grid (a row per condition shown, fixed seeds) and measures the part's Fréchet distance.

    Args:
        student: the student in training.
        part: the conditions of its part [n, ...].
        shown: those of the grid [m, ...].
        make_decoder: called with the device, gives the map from samples to images; what it holds lives no longer than
            one validation.
        folder: of the grids.
        feature_net: of the distance, None for no distance.
        real: the part's data.
        num_images: per distance.
    """

    columns = 8

    def __init__(self, student: Denoiser, part, shown, make_decoder, folder: Path, feature_net, real, num_images: int):
        self.student, self.part, self.shown, self.make_decoder = student, part, shown, make_decoder
        self.folder, self.feature_net, self.num_images = folder, feature_net, num_images
        if feature_net is not None:
            # Ten thousand real images settle the distance well below its differences between students.
            samples = real.__getitems__(range(0, len(real), -(-len(real) // 10_000)))["images"]
            with torch.no_grad():
                self.real_features = extract_features(feature_net, self.decode(samples))[0]

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        decoder = self.make_decoder(self.student.model.device)
        return torch.cat([decoder(batch).cpu() for batch in samples.split(64)])

    def generate(self, cond: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        device = self.student.model.device
        z = pair_noise(seeds, sample_shape(self.student.model))
        batches = [self.student.generate(a.to(device), b.to(device)) for a, b in zip(z.split(256), cond.split(256))]
        return self.decode(torch.cat(batches))

    def __call__(self, step: int, model: ModelMixin) -> dict[str, float]:
        cond = self.shown.repeat_interleave(self.columns, dim=0)
        images = self.generate(cond, torch.arange(self.columns).repeat(len(self.shown)))
        save_grid(images, self.columns, self.folder / f"samples-{step:07d}.png")
        if self.feature_net is None:
            return {}
        seeds = torch.arange(self.num_images)
        images = self.generate(self.part[seeds % len(self.part)], seeds)
        return {"fd": frechet_distance(self.real_features, extract_features(self.feature_net, images)[0])}


class Run:
    """One run: everything the students share, and the training of each."""

    def __init__(
        self,
        config: MSDConfig,
        condition: ConditionConfig,
        student: StudentConfig,
        adapter: AdapterConfig,
        data: DataConfig,
        stage: StageConfig,
        training: TrainingConfig,
    ):
        self.config, self.condition, self.student, self.adapter = config, condition, student, adapter
        self.stage, self.training = stage, training
        teacher, self.scheduler = load_teacher(config.pretrained_teacher_model)
        self.conditions = conditions_for(
            teacher,
            config.pretrained_teacher_model,
            condition.captions_dir,
            condition.pooling,
            condition.validation_prompts,
        )
        check_config(config, self.conditions, teacher, student, adapter, stage)
        for i in range(len(config.stages)):
            for_stage(training, i, len(config.stages)), for_stage(stage, i, len(config.stages))
        self.output_dir = check_writable(config.output_dir, "output_dir")
        self.router = fit_router(self.conditions, condition, config.num_students, training.seed)
        assigned = self.conditions.assign(self.router)
        self.parts = [torch.nonzero(assigned == k).flatten() for k in range(config.num_students)]
        self.fingerprint = model_fingerprint(teacher, self.scheduler)
        self.datasets = self._open_data(data)
        self.feature_net = None
        if config.validation_feature_net is not None:
            self.feature_net = load_model(FeatureNet, config.validation_feature_net, "validation_feature_net")
        # A stage that cannot be built (its networks, an extra that is missing) says so before another is trained.
        self.schedule = NoiseSchedule.from_scheduler(self.scheduler)
        probe = denoiser_for(teacher, self.schedule)
        for i, name in enumerate(config.stages):
            settings = for_stage(stage, i, len(config.stages))
            build_stage(name, probe, probe, probe, self.conditions.part(self.parts[0]), settings)
        claim_run(self.output_dir, self._shared_settings(assigned))

        self.accelerator = create_accelerator(training, self.output_dir)
        if self.accelerator.is_main_process:
            self.conditions.report(self.router, self.output_dir)
        self.dtype = autocast_dtype(training)
        self.teacher_model = teacher
        # The one that is asked for predictions is only read, so it may live in the lower precision.
        self.teacher = self._denoiser(teacher if self.dtype is None else create_student(teacher).to(self.dtype))
        self.teacher.requires_grad_(False)

    def _open_data(self, data: DataConfig) -> dict:
        datasets = {}
        if {"tsm", "adm"} & set(self.config.stages) or self.config.validation_feature_net:
            datasets["images"] = self.conditions.images(data)
            for rows in self.parts:
                datasets["images"].part(rows)  # Refuses a part without images.
        if "dm" in self.config.stages and self.stage.regression_weight > 0:
            # All parts, the same for every student: filtering the pairs by part costs modes.
            datasets["pairs"] = PairDataset(
                self.config.pairs_dir, self.fingerprint, self.conditions.values, self.conditions.identity
            )
        return datasets

    def _shared_settings(self, assigned: torch.Tensor) -> dict:
        """What all jobs of a run, and a resumed one, must have in common."""
        return {
            "teacher": self.fingerprint,
            "num_students": self.config.num_students,
            "partition": fingerprint(
                {"student_of_each_condition": assigned}, {"conditions": self.conditions.identity}
            ),
            "stages": self.config.stages,
            "student_channels": self.student.student_channels,
            "student_blocks": self.student.student_blocks,
            **asdict(self.adapter),
            "student_init": self.student.student_init,
            "seed": self.training.seed,
        }

    def _denoiser(self, model: ModelMixin) -> Denoiser:
        # eval(): distillation runs without dropout, whatever the teacher was trained with.
        return denoiser_for(model, self.schedule, null_cond=self.conditions.null, autocast_dtype=self.dtype).eval()

    def train_student(self, k: int):
        """Runs the stages of student k, each from the weights of the one before."""
        count = len(self.config.stages)
        seed = self.training.seed
        previous: Path | None = None
        for i, stage in enumerate(self.config.stages):
            folder = self.output_dir / f"student_{k}" / stage
            if not (folder / "final" / "summary.json").is_file():
                student, fake_score = self._start(previous, k)
                part, rows = self.conditions.part(self.parts[k]), self.parts[k]
                settings = for_stage(self.stage, i, count)
                # Seeds the discriminator's initial weights.
                torch.manual_seed(derive_seed(seed, k, stage))
                turns = build_stage(stage, student, self.teacher, fake_score, part, settings, self._decode(settings))
                datasets = dict(self.datasets)
                if "images" in datasets:
                    datasets["images"] = datasets["images"].part(rows)
                validation = Validation(
                    student,
                    part,
                    self.conditions.shown(self.router, k, rows),
                    self.conditions.decoder,
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

    def _decode(self, settings: StageConfig):
        """Samples to images with gradient, for distances that are defined on images; None for the others."""
        if settings.regression_weight > 0 and settings.regression_distance in PERCEPTUAL:
            return self.conditions.decoder(self.accelerator.device)
        return None

    def _start(self, previous: Path | None, k: int) -> tuple[Denoiser, Denoiser]:
        """Student and fake score at the start of a stage: from the one before, else from the teacher."""
        seed, adapter = self.training.seed, self.adapter
        lora, base = adapter.lora(self.teacher_model), self.teacher.model
        if adapter.student_type == "lora":
            student = lora_network(base, lora, derive_seed(seed, "student", k))
        else:
            size = self.student.student_channels, self.student.student_blocks
            seed_k = derive_seed(seed, "student", k)
            student = create_student(self.teacher_model, *size, seed_k, self.student.student_init)
        if adapter.fake_score_type == "lora":
            fake_score = lora_network(base, lora, derive_seed(seed, "fake_score", k))
        else:
            fake_score = create_student(self.teacher_model)
        if previous is not None:
            load_weights(student, previous / "student", "output_dir")
            if (previous / "fake_score").is_dir():
                load_weights(fake_score, previous / "fake_score", "output_dir")
        device = self.accelerator.device
        return self._denoiser(student).to(device), self._denoiser(fake_score).to(device)

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
            lora = self.adapter.student_type == "lora"
            students = {
                f"unet_{k}": LoraStudent.from_pretrained(folder / "student")
                if lora
                else load_model(type(self.teacher_model), folder / "student", "output_dir")
                for k, folder in finals.items()
            }
            if lora:
                students["unet"] = self.teacher_model
            pipe = MultiStudentPipeline(
                scheduler=self.scheduler, router=self.router, **self.conditions.components(), **students
            )
            pipe.model_card_details = self._card()
            pipe.save_pretrained(self.output_dir)
            return pipe

    def _card(self) -> str:
        stages = " -> ".join(self.config.stages).upper()
        partition = self.condition.router or self.condition.partition or self.conditions.default_partition
        return (
            f"## Training\n\nTeacher: `{Path(self.config.pretrained_teacher_model).name}` (fingerprint "
            f"`{self.fingerprint[:12]}`). Stages: {stages}. Partition: {partition}. Seed: {self.training.seed}."
        )


def dry_run(
    config: MSDConfig, student: StudentConfig, adapter: AdapterConfig, stage: StageConfig, training: TrainingConfig
):
    """Prints what each stage of one student will need, on networks without weights."""
    path = config.pretrained_teacher_model
    teacher, scheduler = load_teacher_shape(path)
    if student.student_preset is not None:
        check_preset(student.student_preset, teacher)
    cond = CONDITIONS[type(teacher)].example(teacher, path)
    schedule, dtype = NoiseSchedule.from_scheduler(scheduler), autocast_dtype(training)

    def denoiser(kind="full", channels=None, blocks=None, weight_dtype=None) -> Denoiser:
        with torch.device("meta"):
            if kind == "lora":
                model = lora_network(frozen.model, adapter.lora(teacher)).eval()
            else:
                model = create_student(teacher, channels, blocks).to(weight_dtype or torch.float32).eval()
        return denoiser_for(without_data(model), schedule, null_cond=cond[0], autocast_dtype=dtype)

    frozen = denoiser(weight_dtype=dtype)

    print(
        f"one sample: {'x'.join(map(str, sample_shape(teacher)))}; one condition: {list(cond.shape[1:]) or 'a class'}"
    )
    for i, name in enumerate(config.stages):
        settings, run = for_stage(stage, i, len(config.stages)), for_stage(training, i, len(config.stages))
        # A perceptual distance brings a network with weights, which a dry run does without.
        uncounted = settings.regression_distance if settings.regression_distance in PERCEPTUAL else None
        settings = settings if uncounted is None else replace(settings, regression_distance="l2")
        nets = (
            denoiser(adapter.student_type, student.student_channels, student.student_blocks),
            frozen,
            denoiser(adapter.fake_score_type),
        )
        estimate = estimate_memory(build_stage(name, *nets, cond, settings), run, cond)
        print(f"\n--- {name} ---\n{format_estimate(estimate, run.max_train_steps[0], config.dry_run_tflops)}")
        if name == "dm" and uncounted is not None and settings.regression_weight > 0:
            print(f"not counted: the network of the {uncounted} distance (and of latents, the VAE before it)")
    if cond.ndim > 1:
        disk = cache_bytes(sample_shape(teacher), cond, 1_000_000)
        print("\ncache of a million captions: " + ", ".join(f"{k} {v / 1e9:.0f} GB" for k, v in disk.items()))


def main():
    config, condition, student, adapter, data, stage, training = parse_config(
        [MSDConfig, ConditionConfig, StudentConfig, AdapterConfig, DataConfig, StageConfig, TrainingConfig], __doc__
    )
    if config.push_to_hub and training.report_to == "wandb" and config.hub_token:
        raise ValueError("hub_token: with --report_to wandb it would be uploaded; use `hf auth login` instead")
    if config.dry_run:
        dry_run(config, student, adapter, stage, training)
        return
    run = Run(config, condition, student, adapter, data, stage, training)
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
