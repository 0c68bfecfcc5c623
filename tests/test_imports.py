# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The rooms: which module may import which, what serving drags in, and that nothing is ever unpickled."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "diffusers_msd"

# Every arrow between modules of the package; docs/architecture.md argues them. A new one is a decision: add it here.
ARROWS: dict[str, set[str]] = {
    "__init__": {
        "adapters",
        "denoiser",
        "embedding_routing",
        "hub",
        "pipeline_msd",
        "routing",
        "sampling",
        "schedule",
        "students",
    },
    # on their own
    "config": set(),
    "inception": set(),
    "zipped_images": set(),
    "discriminator": set(),
    "draws": set(),
    "embedding_rows": set(),
    "files": set(),
    "flops": set(),
    "inheritance": set(),
    "objectives": set(),
    "retrieval": set(),
    "schedule": set(),
    "training_config": set(),
    "untrusted": set(),
    "edm_layouts": set(),
    "lifeline": set(),
    "progress": set(),
    # networks and routing
    "denoiser": {"schedule"},
    "sampling": {"denoiser"},
    "students": {"denoiser", "inheritance"},
    "saved_component": {"files"},
    "adapters": {"saved_component"},
    "routing": {"saved_component"},
    "embedding_routing": {"embedding_rows", "routing"},
    # files of teachers, runs and pictures
    "teachers": {"files"},
    "checkpoint": {"adapters", "files"},
    "convert": {"denoiser", "edm_layouts", "files", "schedule", "teachers", "untrusted"},
    "account": {"flops"},
    "runs": {"account", "files"},
    "grids": {"files"},
    "run_report": {"runs"},
    "plots": {"grids", "runs"},
    "feature_statistics": {"files"},
    "feature_net": {"files"},
    "pfd": {"denoiser", "feature_net", "sampling", "schedule"},
    "metrics": {"feature_statistics", "pfd"},
    # data and conditions
    "shards": {"files"},
    "data": {"shards", "zipped_images"},
    "pairs": {"account", "denoiser", "files", "flops", "sampling", "shards"},
    "captions": {"data", "files", "prompts", "shards"},
    "conditions": {
        "captions",
        "data",
        "denoiser",
        "embedding_routing",
        "files",
        "pairs",
        "plots",
        "prompts",
        "routing",
        "shards",
        "teachers",
    },
    # training
    "batches": {"draws"},
    "stage_config": {"objectives"},
    "stages": {"adapters", "denoiser", "discriminator", "draws", "objectives", "stage_config"},
    "training": {"account", "batches", "checkpoint", "draws", "files", "stages", "training_config"},
    "memory": {"adapters", "denoiser", "draws", "flops", "stages", "training_config"},
    "validation": {"denoiser", "feature_net", "grids", "metrics", "pairs"},
    # results
    "clip_score": {"feature_net"},
    "evaluation": {
        "account",
        "data",
        "feature_net",
        "files",
        "inception",
        "metrics",
        "objectives",
        "pairs",
        "runs",
        "shards",
    },
    "scores": {"feature_net", "files", "metrics"},
    # serving
    "prompts": set(),
    "model_card": {"adapters", "denoiser", "embedding_routing", "routing", "schedule"},
    "hub": {"files", "model_card"},
    "pipeline_inputs": {"adapters", "embedding_routing", "prompts", "routing", "schedule"},
    "assembly": {"adapters", "files", "pipeline_inputs", "routing", "teachers"},
    "residents": {"files", "pipeline_inputs", "teachers"},
    "student_slots": {"adapters", "assembly", "hub", "pipeline_inputs", "residents", "routing"},
    "pipeline_msd": {
        "adapters",
        "denoiser",
        "pipeline_inputs",
        "prompts",
        "routing",
        "schedule",
        "student_slots",
        "teachers",
    },
    # what people see
    "image_requests": {"denoiser", "pipeline_msd", "prompts"},
    "serve_config": set(),
    "serve_http": {"image_requests"},
    "serve_student": {"image_requests", "pipeline_inputs", "pipeline_msd", "serve_config", "serve_http"},
    "serve": {
        "denoiser",
        "image_requests",
        "pipeline_inputs",
        "pipeline_msd",
        "serve_config",
        "serve_http",
        "serve_student",
    },
    "pipeline_info": {"account", "denoiser", "model_card", "pipeline_msd", "run_report", "runs"},
    "cli": {
        "__init__",
        "app",
        "config",
        "files",
        "grids",
        "image_requests",
        "many_steps",
        "pipeline_info",
        "pipeline_msd",
        "publishing",
        "serve",
        "serve_config",
    },
    "publishing": {
        "denoiser",
        "files",
        "grids",
        "hub",
        "image_requests",
        "model_card",
        "pipeline_info",
        "pipeline_msd",
        "prompts",
        "run_report",
        "runs",
    },
    "many_steps": {
        "denoiser",
        "image_requests",
        "pipeline_inputs",
        "pipeline_msd",
        "prompts",
        "sampling",
        "schedule",
        "teachers",
    },
    "routing_map": {"denoiser", "pipeline_msd", "plots"},
    "app": {"image_requests", "many_steps", "pipeline_msd", "prompts", "routing_map"},
    # whole runs
    "distillation": {
        "adapters",
        "checkpoint",
        "conditions",
        "config",
        "data",
        "denoiser",
        "draws",
        "feature_net",
        "files",
        "objectives",
        "pairs",
        "pipeline_msd",
        "run_report",
        "runs",
        "schedule",
        "stage_config",
        "stages",
        "students",
        "teachers",
        "training",
        "training_config",
        "validation",
    },
    "fleet": {"distillation", "files", "lifeline", "progress"},
    "dry_run": {
        "adapters",
        "conditions",
        "config",
        "denoiser",
        "distillation",
        "memory",
        "objectives",
        "schedule",
        "stage_config",
        "stages",
        "students",
        "teachers",
        "training_config",
    },
}
TRAINING = {
    "account",
    "batches",
    "captions",
    "checkpoint",
    "clip_score",
    "conditions",
    "data",
    "discriminator",
    "distillation",
    "draws",
    "dry_run",
    "evaluation",
    "fleet",
    "flops",
    "inception",
    "lifeline",
    "memory",
    "objectives",
    "pairs",
    "progress",
    "retrieval",
    "run_report",
    "runs",
    "shards",
    "stage_config",
    "stages",
    "training",
    "training_config",
    "validation",
    "zipped_images",
}
NUMBERS = {"feature_net", "feature_statistics", "metrics", "scores"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            source = ("diffusers_msd." if node.level else "") + (node.module or "")
            if source.rstrip(".") == "diffusers_msd":
                found |= {a.name if (PACKAGE / f"{a.name}.py").is_file() else "__init__" for a in node.names}
            elif source.startswith("diffusers_msd."):
                found.add(source.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found |= {(name + ["__init__"])[1] for name in names if name[0] == "diffusers_msd"}
    return found


def reached(start: str) -> set[str]:
    """What `start` imports, directly or through others."""
    found, ahead = set(), [start]
    while ahead:
        new = imports(PACKAGE / f"{ahead.pop()}.py") - found
        found |= new
        ahead += new
    return found


def test_every_module_has_its_place_in_the_table():
    assert {path.stem for path in PACKAGE.rglob("*.py")} == set(ARROWS)
    assert TRAINING < set(ARROWS)


@pytest.mark.parametrize("module", ARROWS)
def test_a_module_imports_exactly_what_the_table_says(module):
    assert imports(PACKAGE / f"{module}.py") == ARROWS[module]


def test_the_arrows_have_no_cycle():
    for module in ARROWS:
        assert module not in reached(module)


@pytest.mark.parametrize("module", ["pipeline_msd", "__init__"])
def test_serving_reaches_no_training_module(module):
    assert reached(module).isdisjoint(TRAINING | NUMBERS | {"plots", "convert", "untrusted"})


def test_the_trainer_does_not_know_the_method():
    assert imports(PACKAGE / "training.py").isdisjoint({"objectives", "denoiser", "schedule", "discriminator"})


def test_importing_the_package_loads_neither_training_code_nor_its_libraries():
    unwanted = [
        *(f"diffusers_msd.{name}" for name in sorted(TRAINING | NUMBERS | {"plots", "config"})),
        *("datasets", "sklearn", "torchmetrics", "torchvision", "lpips", "matplotlib", "tensorboard"),
    ]
    code = f"import sys, diffusers_msd; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "[]"


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickling(tree: ast.AST) -> list[str]:
    """What in a file could unpickle: such modules, torch.load and its relatives, np.load unless told not to."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            names = {a.name for a in node.names}
            if (node.module or "").split(".")[0] in UNPICKLERS or (node.module == "torch" and names & {"load", "hub"}):
                found.append(f"from {node.module}")
        elif isinstance(node, ast.Call):
            name, keywords = dotted(node.func), {k.arg: k.value for k in node.keywords}
            if name in {"torch.load", "torch.jit.load", "torch.hub.load", "pd.read_pickle", "pandas.read_pickle"}:
                found.append(name)
            if name in {"np.load", "numpy.load"} and not (
                isinstance(keywords.get("allow_pickle"), ast.Constant) and keywords["allow_pickle"].value is False
            ):
                found.append(name)
            if name.endswith(".load_state") or name.endswith(".load_state_dict_from_url"):
                found.append(name)  # accelerate's and torch's own, which call torch.load
            flags = {"use_safetensors": False, "weights_only": False, "allow_pickle": True}
            found += [
                f"{name}({k}={flag})"
                for k, flag in flags.items()
                if isinstance(keywords.get(k), ast.Constant) and keywords[k].value is flag
            ]
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "accelerator.load_state(path)",
        "UNet2DModel.from_pretrained(path, use_safetensors=False)",
    ],
)
def test_the_check_for_unpickling_sees(code):
    assert unpickling(ast.parse(code))


def test_nothing_is_ever_unpickled():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "training_scripts").rglob("*.py"), ROOT / "setup.py"]
    assert len(files) > len(ARROWS)
    assert {str(path.relative_to(ROOT)): found for path in files if (found := unpickling(parse(path)))} == {}


def test_one_module_reads_pickles_and_it_does_not_run_them():
    """`untrusted` decodes instructions by `pickletools`; it cannot import by name, nor evaluate."""
    trees = {path.stem: parse(path) for path in PACKAGE.rglob("*.py")}
    readers = {
        name
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and "pickletools" in {alias.name for alias in node.names}
    }
    assert readers == {"untrusted"}
    used = {dotted(node) for node in ast.walk(trees["untrusted"]) if isinstance(node, (ast.Name, ast.Attribute))}
    assert used.isdisjoint(
        {"__import__", "importlib", "sys", "eval", "exec", "getattr", "setattr", "globals", "torch.load"}
    )
