# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The HTTP side of serving: what a body may hold, and what an answer and a refusal look like. It knows nothing of Ray."""

import base64
import io
import secrets
from dataclasses import dataclass
from typing import Protocol

import PIL.Image
from fastapi import Depends, FastAPI, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field

from .image_requests import Accepted, ImageRequest


class ImagesIn(BaseModel):
    """One condition, of which some images are wanted; image i is made from `seed` + i."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str | None = Field(None, description="What to show, for a pipeline that goes by prompts.")
    class_label: int | None = Field(None, description="Which class to show, for a pipeline that goes by labels.")
    seed: int = Field(0, description="Of the first image, in [0, 2^53).")
    num_images: int = Field(1, description="How many.")
    student: int | None = Field(None, description="The student that shall make them, instead of the router's choice.")


class Timings(BaseModel):
    """Seconds on the server."""

    routing: float = Field(description="Text encoder and router.")
    network: float = Field(description="The call of student and VAE that made the images.")
    total: float = Field(description="From the accepted request to the answer, so with all waiting.")


class ImagesOut(BaseModel):
    """The images, in the order of their seeds."""

    images: list[str] = Field(description="PNG files in base64.")
    seeds: list[int] = Field(description="Of each image.")
    student_indices: list[int] = Field(description="The student that made each image.")
    images_in_call: int = Field(description="How many images, also of other requests, the network made at once.")
    timings: Timings


class Refusal(BaseModel):
    """Why there is no image."""

    detail: str = Field(description="One line; it begins with the field, if a field was wrong.")


class Readiness(BaseModel):
    """Whether every student can answer."""

    ready: bool
    students: dict[int, int] = Field(description="Running replicas of each student.")


REFUSALS = {
    401: "The API key is missing or wrong.",
    415: "The body's content type is not application/json.",
    422: "The body is not what is expected.",
    429: "The student's queue is full; `Retry-After` says when to try again, in seconds.",
    503: "The server is being shut down, or the student was lost several times.",
    504: "No image before the deadline.",
}


@dataclass(frozen=True)
class Made:
    """What a service gives back: PNG files of one student, and what is reported of them."""

    pngs: list[bytes]
    student: int
    images_in_call: int
    timings: Timings


class Service(Protocol):
    """What `http_app` is the door of.

    `make` raises fastapi's `HTTPException` for what it cannot do. `ready` gives the running replicas of each student,
    and nothing when no new requests are taken.
    """

    accepted: Accepted

    async def make(self, request: ImageRequest) -> Made: ...

    async def ready(self) -> dict[int, int]: ...


def http_app(service: Service, max_body_size: int = 16384, api_key: str | None = None) -> FastAPI:
    """The web application: POST /v1/images, GET /healthz, /readyz, /docs and /openapi.json.

    Args:
        service: makes the images.
        max_body_size: bytes of a request's body.
        api_key: asked for as `Authorization: Bearer KEY` where images are made; None asks for none.
    """
    app = FastAPI(title="diffusers_msd", max_body_size=max_body_size)
    bearer = HTTPBearer(auto_error=False)

    # Both are `async` because FastAPI sends other functions to a thread.
    async def check_key(given: HTTPAuthorizationCredentials | None = Security(bearer)) -> None:
        # In constant time, and over bytes, because a header may hold anything.
        credentials = "" if given is None else given.credentials
        if not secrets.compare_digest(credentials.encode(), api_key.encode()):
            raise HTTPException(401, "authorization: a valid API key expected", {"WWW-Authenticate": "Bearer"})

    async def check_content_type(request: Request) -> None:
        given = request.headers.get("content-type", "")
        if given.partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "content-type: application/json expected")

    @app.post(
        "/v1/images",
        dependencies=[*([] if api_key is None else [Security(check_key)]), Depends(check_content_type)],
        responses={
            413: {"description": "The body is too large."},
            **{status: {"model": Refusal, "description": text} for status, text in REFUSALS.items()},
        },
    )
    async def images(body: ImagesIn) -> ImagesOut:
        try:
            request = service.accepted.read(**body.model_dump())
        except (TypeError, ValueError) as error:
            raise HTTPException(422, str(error)) from error
        made = await service.make(request)
        return ImagesOut(
            images=[base64.b64encode(png).decode() for png in made.pngs],
            seeds=list(request.seeds),
            student_indices=[made.student] * len(made.pngs),
            images_in_call=made.images_in_call,
            timings=made.timings,
        )

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answers as long as the process lives."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        """200 if every student has a replica that runs, else 503."""
        students = await service.ready()
        ready = bool(students) and all(students.values())
        response.status_code = 200 if ready else 503
        return Readiness(ready=ready, students=students)

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": one_line(error)}, 422)

    return app


def one_line(error: RequestValidationError) -> str:
    """The first thing that is wrong, beginning with the field's name. What was sent is not repeated: it may be NaN."""
    first = error.errors()[0]
    name = first["loc"][1] if len(first["loc"]) > 1 else None
    if name in ImagesIn.model_fields:
        return f"{name}: {first['msg']}"
    known = ", ".join(ImagesIn.model_fields)
    return f"body: a JSON object with some of {known} expected; {first['msg']}"


def png(image: PIL.Image.Image) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
