# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Command lines of the scripts: dataclasses become flags, a YAML file gives defaults, flags win."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Sequence

import yaml
from transformers import HfArgumentParser


def parse_config(dataclass_types: Sequence[type], description: str, argv: list[str] | None = None) -> tuple:
    """Reads flags, and the YAML file given by `--config`, whose keys are the flags' names.

    Args:
        dataclass_types: the script's concerns; each field is a flag with the field's help text.
        description: shown by `--help`.
        argv: the arguments, `sys.argv[1:]` if None.

    Returns:
        One instance per dataclass.

    Raises:
        ValueError: an unknown name, with the closest known one, or a value a dataclass refuses.
        FileNotFoundError: the config file is missing.
    """
    argv = sys.argv[1:] if argv is None else argv
    # Alone first: what the flags lack may be in the file.
    config_parser = _Parser([], allow_abbrev=False, add_help=False)
    config_parser.add_argument("--config", help="YAML file with any of these settings by name; flags given here win.")
    config = config_parser.parse_known_args(argv)[0].config
    parser = _Parser(dataclass_types, description=description, allow_abbrev=False, parents=[config_parser])
    fields = {field.name: field for cls in dataclass_types for field in dataclasses.fields(cls)}
    known = set(fields)
    from_file = _file_arguments(config, fields) if config else []
    *parsed, unknown = parser.parse_args_into_dataclasses(from_file + argv, return_remaining_strings=True)
    for argument in unknown:
        name = argument.split("=")[0].lstrip("-").replace("-", "_")
        raise ValueError(f"{argument}: unknown argument{_closest(name, known, '--')}")
    # With --config, HfArgumentParser adds a namespace of what belongs to no dataclass.
    return tuple(parsed[: len(dataclass_types)])


def parse_own(dataclass_type: type, description: str, argv: list[str] | None = None) -> tuple:
    """Reads the flags of one dataclass, for a script that hands all others on to another script.

    Args:
        dataclass_type, description, argv: as for `parse_config`.

    Returns:
        An instance, and the other arguments in their order.

    Raises:
        ValueError: a value the dataclass refuses.
    """
    parser = _Parser([dataclass_type], description=description, allow_abbrev=False)
    return parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        """Instead of argparse's pages of usage."""
        raise ValueError(message)


def _file_arguments(path: str, fields: dict[str, dataclasses.Field]) -> list[str]:
    """The settings of a YAML file as command-line arguments, so that both are checked the same way."""
    try:
        with open(path) as file:
            # Every value as it is written: a plain no stays the word, as on the command line.
            settings = yaml.load(file, Loader=yaml.BaseLoader) or {}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config: {path} does not exist") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config: {path} must hold `name: value` lines, got a {type(settings).__name__}")
    arguments = []
    for name, value in settings.items():
        if name not in fields:
            raise ValueError(f"config: {path}: unknown setting {name!r}{_closest(name, set(fields))}")
        if value in ("", "~", "null"):
            if fields[name].default is not None:
                raise ValueError(f"config: {path}: {name} has no value; leave the line out for the default")
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(str(v) for v in values)]
    return arguments


def _closest(name: str, known: set[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {prefix}{matches[0]}?" if matches else f"; known are {', '.join(sorted(known))}"


def for_stage(config, index: int, count: int):
    """A copy of a config dataclass whose lists of one value per stage are cut to that of stage `index` of `count`.

    Raises:
        ValueError: a list with neither one value nor one per stage.
    """
    changes = {}
    for field in dataclasses.fields(config):
        values = config.__dict__[field.name]
        if isinstance(values, list):
            if len(values) not in (1, count):
                raise ValueError(f"{field.name}: 1 value or {count} (one per stage) expected, got {values}")
            changes[field.name] = [values[index if len(values) > 1 else 0]]
    return dataclasses.replace(config, **changes)


def run_script(main: Callable[[], None]):
    """Runs a script: bad input is one line on stderr and exit status 2, an interrupt is status 130.

    Set DIFFUSERS_MSD_TRACEBACK=1 to see where an error came from.
    """
    try:
        main()
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("DIFFUSERS_MSD_TRACEBACK"):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
