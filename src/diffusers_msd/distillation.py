# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""One run of multi-student distillation: what K students share, and the stages of each."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from diffusers import ModelMixin
from filelock import FileLock, Timeout

from .adapters import AdapterConfig, LoraStudent, lora_network
from .checkpoint import load_weights
from .conditions import ConditionConfig, conditions_for, fit_router
from .config import for_stage
from .data import DataConfig
from .denoiser import Denoiser, denoiser_for
from .draws import derive_seed
from .feature_net import FeatureNet
from .files import check_writable, fingerprint, load_model, model_fingerprint, public_name, write_json
from .objectives import PERCEPTUAL
from .pairs import PairDataset, pairs_account
from .pipeline_msd import SLOTS, MultiStudentPipeline
from .run_report import run_sections
from .runs import PAIRS_FILE, claim_run
from .schedule import NoiseSchedule
from .stage_config import StageConfig
from .stages import STAGES, build_stage
from .students import StudentConfig, check_preset, check_student, create_student, is_same_architecture
from .teachers import load_teacher
from .training import Trainer
from .training_config import TrainingConfig, autocast_dtype, create_accelerator
from .validation import Validation


# Seconds to wait for a job that trains the same student: one that was stopped may still write its checkpoint.
STOPPING = 180


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
    filter_pairs: bool = field(
        default=False,
        metadata={"help": "Regress on the pairs of the student's own part only; an ablation, it costs modes."},
    )
    allow_random_student: bool = field(
        default=False, metadata={"help": "Start a student of random weights without the TSM stage."}
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
    hub_license: str | None = field(
        default=None, metadata={"help": "Its licence, an identifier of the Hub such as apache-2.0; needed to push."}
    )
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
    random_weights = other_size and student.student_init == "random"
    if random_weights and config.stages[0] != "tsm" and not config.allow_random_student:
        raise ValueError(
            "stages: a student of random weights is no denoiser yet and needs the tsm stage first: --stages tsm dm adm; "
            "--student_init inherit starts it from the teacher's weights, --allow_random_student as it is"
        )


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
        count = len(config.stages)
        stages = [(name, for_stage(stage, i, count)) for i, name in enumerate(config.stages)]
        for i in range(count):
            for_stage(training, i, count)
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
        for name, settings in stages:
            build_stage(name, probe, probe, probe, self.conditions.part(self.parts[0]), settings)
        claim_run(self.output_dir, self._shared_settings(assigned), self._about(data))

        self.accelerator = create_accelerator(training, self.output_dir)
        if self.accelerator.is_main_process:
            self.conditions.report(self.router, self.output_dir)
            if "pairs" in self.datasets:
                # The pairs may be gone or moved when somebody asks what the run cost.
                write_json(self.output_dir / PAIRS_FILE, pairs_account(config.pairs_dir))
        self.dtype = autocast_dtype(training)
        self.teacher_model = teacher
        # The one that is asked for predictions is only read, so it may live in the lower precision.
        self.teacher = self._denoiser(teacher if self.dtype is None else create_student(teacher)).to(self.dtype)
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
            if self.config.filter_pairs:
                for rows in self.parts:
                    datasets["pairs"].part(rows)  # Refuses a part without pairs.
        return datasets

    def _datasets_of(self, rows: torch.Tensor) -> dict:
        """Those of the student whose conditions are `rows`."""
        filtered = {"images", "pairs"} if self.config.filter_pairs else {"images"}
        return {name: data.part(rows) if name in filtered else data for name, data in self.datasets.items()}

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
        """Runs the stages of student k, each from the weights of the one before.

        Raises:
            ValueError: another process trains this student in the same folder, for `STOPPING` seconds more.
        """
        path = self.output_dir / f"student_{k}.lock"
        alone = FileLock(path, timeout=STOPPING) if self.accelerator.is_main_process else nullcontext()
        try:
            with alone:
                self._run_stages(k)
        except Timeout as error:
            raise ValueError(
                f"output_dir: another process trains student {k} in {self.output_dir}; wait for its end, or use "
                "another folder"
            ) from error

    def _run_stages(self, k: int):
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
                datasets = self._datasets_of(rows)
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
            pipe.model_card_details = run_sections(self.output_dir)
            pipe.save_pretrained(self.output_dir)
            return pipe

    def _about(self, data: DataConfig) -> dict:
        """What the model card says besides; folders by their names alone, it may become public."""
        images = self.condition.captions_dir or data.dataset_name or data.train_data_dir
        if self.condition.router is not None:
            partition = f"the router {public_name(self.condition.router)}"
        else:
            partition = self.condition.partition or self.conditions.default_partition
        return {
            "teacher": public_name(self.config.pretrained_teacher_model),
            "data": public_name(images) if "images" in self.datasets else None,
            "partition": partition,
        }
