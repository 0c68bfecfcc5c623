# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Takes a picture of the demo of a pipeline, with its teacher beside it.

    python tests/screenshots.py runs/emoji/K4 docs/images/demo.png --teacher runs/emoji/teacher --prompts prompts.txt \
        --condition rocket
    python tests/screenshots.py runs/quickstart/K2 docs/images/demo_phone.png \
        --teacher training_scripts/assets/digits-teacher --condition 7 --width 390
"""

import argparse
import io

from PIL import Image
from playwright.sync_api import expect
from test_demo_browser import choose, headless_chromium, make, open_page

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.app import launch, read_prompts
from diffusers_msd.many_steps import ManyStepTeacher


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("output")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--prompts", help="text file for the map, of a pipeline that takes prompts")
    parser.add_argument("--condition", required=True, help="prompt or class label")
    parser.add_argument("--width", type=int, default=1280, help="of the page, in pixels")
    arguments = parser.parse_args()
    pipe = MultiStudentPipeline.from_pretrained(arguments.pipeline)
    prompts = None if arguments.prompts is None else read_prompts(arguments.prompts)
    demo = launch(pipe, prompts=prompts, teacher=ManyStepTeacher(arguments.teacher, pipe), block=False)
    with headless_chromium() as browser:
        page = open_page(browser, demo.local_url, arguments.width)
        if pipe.takes_prompts:
            page.get_by_label("Prompt").fill(arguments.condition)
        else:
            choose(page, "Class", arguments.condition)
        choose(page, "Compare with", "teacher")
        # The first call of a network is slower than all others.
        for _ in range(2):
            make(page)
            expect(page.get_by_role("cell", name="teacher")).to_be_hidden()
            expect(page.get_by_role("cell", name="teacher")).to_be_visible()
        expect(page.locator("#compared .thumbnail-item img")).to_have_count(4)
        page.mouse.move(0, 0)
        page.wait_for_load_state("networkidle")
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True, animations="disabled")))
    demo.close()
    # A page has few colours; all of them take three times the place.
    picture.convert("RGB").quantize(256).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
