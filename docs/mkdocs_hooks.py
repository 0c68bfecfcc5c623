# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What mkdocs.yml cannot say: the help of the command line, and diffusers' marks in docstrings."""

import os
import re

import griffe

from diffusers_msd.cli import build_parser


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Puts the help of each command under the page of the command line."""
    if page.file.src_uri != "cli.md":
        return markdown
    os.environ["COLUMNS"] = "80"
    parser = build_parser()
    (commands,) = parser._subparsers._group_actions
    sections = [("All commands", parser), *commands.choices.items()]
    return markdown + "".join(f"\n## {name}\n\n```text\n{part.format_help()}```\n" for name, part in sections)


# The type of an argument, "x (`torch.Tensor` of shape `[B]`, *optional*): ...", or of what is returned, "`int`: ...".
TYPE = re.compile(r"^( +\w+ )\((.*`.+)\)(?=: )|(?<=Returns:\n)( +)(`.+)(?=: )", re.M)


class DiffusersMarks(griffe.Extension):
    """Writes docstrings in diffusers' form as griffe reads them: types without marks, links with a target."""

    def on_object(self, *, obj: griffe.Object, **kwargs):
        if obj.docstring:
            text = TYPE.sub(lambda m: f"{m[1] or m[3]}({re.sub('[`*]', '', m[2] or m[4])})", obj.docstring.value)
            obj.docstring.value = re.sub(r"\[`([\w.]+)`\](?![\[(])", r"[`\1`][diffusers_msd.\1]", text)
