# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""`ServeConfig`: replicas, batches, limits of a server, and what they are to Ray Serve."""

import math
from dataclasses import dataclass, field

import torch


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ServeConfig:
    """How a pipeline is served."""

    replicas: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Replicas of each student: one number for all, or one each."}
    )
    max_replicas: list[int] | None = field(
        default=None,
        metadata={"help": "Up to how many replicas are added when requests wait: one number for all, or one each."},
    )
    ingress_replicas: int = field(default=1, metadata={"help": "Replicas of what reads, embeds and routes."})
    num_cpus: float = field(default=1.0, metadata={"help": "Cores that a student's replica reserves."})
    num_gpus: float = field(
        default=0.0, metadata={"help": "GPUs of a student's replica, 0.5 for two on one; 0 runs it on the CPU."}
    )
    ingress_num_cpus: float = field(default=1.0, metadata={"help": "Cores that a replica of the ingress reserves."})
    ingress_num_gpus: float = field(default=0.0, metadata={"help": "GPUs of the text encoder; 0 runs it on the CPU."})
    dtype: str = field(default="float32", metadata={"help": f"Of the weights: {', '.join(DTYPES)}."})
    max_batch_size: int = field(
        default=8,
        metadata={
            "help": "Images of several requests that the network makes at once. 1 joins no requests, and images are "
            "then those of the local pipeline to the last bit."
        },
    )
    batch_wait: float = field(
        default=0.0, metadata={"help": "Seconds that an incomplete batch waits for more requests."}
    )
    max_queue: int = field(
        default=64, metadata={"help": "Requests that may wait for a student; one more is refused (429)."}
    )
    retry_after: int = field(default=1, metadata={"help": "Seconds after which a refused request may come again."})
    deadline: float = field(default=30.0, metadata={"help": "Seconds after which a request is given up (504)."})
    retries: int = field(
        default=2, metadata={"help": "How often a request is made again when the replica that had it is lost."}
    )
    max_images: int = field(default=16, metadata={"help": "Images of one request."})
    max_prompt_length: int = field(default=1000, metadata={"help": "Characters of a prompt."})
    max_body_size: int = field(default=16384, metadata={"help": "Bytes of a request's body; more is refused (413)."})
    api_key_variable: str | None = field(
        default=None,
        metadata={
            "help": "Environment variable that holds the key which requests must bring (401); None lets all in. It is "
            "read where the ingress runs, and neither saved nor logged."
        },
    )

    def __post_init__(self):
        for name in (
            "ingress_replicas",
            "max_batch_size",
            "max_queue",
            "max_images",
            "max_prompt_length",
            "max_body_size",
        ):
            self._at_least(name, 1)
        for name in ("num_cpus", "num_gpus", "ingress_num_cpus", "ingress_num_gpus", "batch_wait"):
            self._at_least(name, 0)
        for name in ("retry_after", "retries"):
            self._at_least(name, 0)
        if not self.deadline > 0:
            raise ValueError(f"deadline: seconds above 0 expected, got {self.deadline}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: one of {', '.join(DTYPES)} expected, got {self.dtype!r}")
        if min(self.replicas, default=0) < 1:
            raise ValueError(f"replicas: numbers >= 1 expected, got {self.replicas}")

    def _at_least(self, name: str, least: int) -> None:
        value = self.__dict__[name]
        if not value >= least:
            raise ValueError(f"{name}: a number >= {least} expected, got {value}")

    def replicas_of(self, students: list[int]) -> dict[int, tuple[int, int]]:
        """The least and the most replicas of each student.

        Raises:
            ValueError: neither one number nor one per student, or fewer at most than at least.
        """
        least = per_student("replicas", self.replicas, students)
        if self.max_replicas is None:
            return {k: (least[k], least[k]) for k in students}
        most = per_student("max_replicas", self.max_replicas, students)
        for k in students:
            if most[k] < least[k]:
                raise ValueError(f"max_replicas: student {k} has {least[k]} at least, but {most[k]} at most")
        return {k: (least[k], most[k]) for k in students}

    def _most_replicas(self, students: list[int]) -> int:
        return sum(most for _, most in self.replicas_of(students).values())

    def cpus(self, students: list[int]) -> int:
        """The cores that all replicas reserve together, when there are most of them, rounded up."""
        return math.ceil(self._most_replicas(students) * self.num_cpus + self.ingress_replicas * self.ingress_num_cpus)

    def student_options(self, least: int, most: int) -> dict:
        """What Ray Serve is told of the deployment of a student."""
        # A replica takes a batch and the next one; the rest waits where any replica can get it.
        options = {
            "max_ongoing_requests": 2 * self.max_batch_size,
            "max_queued_requests": self.max_queue,
            "graceful_shutdown_timeout_s": self.deadline,
            "health_check_period_s": 2.0,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
        }
        if most == least:
            return {**options, "num_replicas": least}
        scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": self.max_batch_size}
        return {**options, "autoscaling_config": scaling}

    def capacity(self, students: list[int]) -> int:
        """Requests that the queues and the replicas of all students can hold."""
        return len(students) * self.max_queue + self._most_replicas(students) * 2 * self.max_batch_size

    def ingress_options(self, students: list[int]) -> dict:
        """What Ray Serve is told of the deployment of the ingress."""
        # What is more than students can hold is refused by the proxy, which costs least.
        return {
            "num_replicas": self.ingress_replicas,
            "max_ongoing_requests": self.capacity(students),
            "max_queued_requests": self.max_queue,
            "backpressure_config": {"status_code": 429, "retry_after_s": self.retry_after},
            "graceful_shutdown_timeout_s": self.deadline,
            "ray_actor_options": {"num_cpus": self.ingress_num_cpus, "num_gpus": self.ingress_num_gpus},
        }


def per_student(name: str, values: list[int], students: list[int]) -> dict[int, int]:
    """One value for all students or one each, by student; ValueError with `name` for another number of values."""
    if len(values) not in (1, len(students)):
        raise ValueError(f"{name}: one number, or {len(students)} (one per student), expected, got {values}")
    return dict(zip(students, values * len(students) if len(values) == 1 else values))
