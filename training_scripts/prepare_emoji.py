# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes a data set of captioned pictures from the colour emoji of a font, a folder that HF `datasets` reads.

    python training_scripts/prepare_emoji.py --output_dir runs/emoji

It reads the bitmaps of Debian's `fonts-noto-color-emoji` (`apt install fonts-noto-color-emoji`; Noto's emoji are under
the OFL, SIL Open Font License 1.1) with fontTools, which comes with matplotlib. Captions are the Unicode names, in
lower case: "dog face", "woman, medium skin tone, microphone", "flag: de". Nothing is downloaded.
"""

import io
import json
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from diffusers_msd.config import parse_config, run_script
from diffusers_msd.files import atomic_directory, check_writable


ZWJ, KEYCAP, BLACK_FLAG, CANCEL_TAG = 0x200D, 0x20E3, 0x1F3F4, 0xE007F
VARIATION_SELECTORS = (0xFE0E, 0xFE0F)
SKIN_TONES = {
    0x1F3FB: "light skin tone",
    0x1F3FC: "medium-light skin tone",
    0x1F3FD: "medium skin tone",
    0x1F3FE: "medium-dark skin tone",
    0x1F3FF: "dark skin tone",
}
REGIONAL_A, REGIONAL_Z = 0x1F1E6, 0x1F1FF
TAG_BASE = 0xE0000
ADULTS = (0x1F468, 0x1F469, 0x1F9D1)
# What says something about the emoji before it: signs of sex, arrows, squares of a colour, fire, fog, a vest, ...
COMPANIONS = {
    *(0x2640, 0x2642, 0x26A7, 0x2620, 0x2744, 0x2194, 0x2195, 0x2B1B, 0x1F308, 0x1F32B, 0x1F4A5, 0x1F4A8, 0x1F4AB),
    *(0x1F525, 0x1F5E8, 0x1F7E9, 0x1F7EB, 0x1F9BA, 0x1FA79),
}


@dataclass
class EmojiConfig:
    """The font and the pictures made from it."""

    output_dir: str = field(metadata={"help": "The pictures go to its folder train/, with metadata.jsonl."})
    font: str = field(
        default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
        metadata={"help": "A colour font with bitmaps (tables CBDT and CBLC)."},
    )
    resolution: int = field(default=32, metadata={"help": "Side of the pictures in pixels."})

    def __post_init__(self):
        if self.resolution < 1:
            raise ValueError(f"resolution: at least 1 pixel expected, got {self.resolution}")


def caption(code_points: list[int]) -> str | None:
    """The words for an emoji given by its code points.

    None if Python's Unicode data has no name for one of them, or if it is what fonts show for an unknown flag.

    Sequences are read part by part, separated by commas; joiners and variation selectors are left out. Flags are
    "flag: " and the region's letters, keycaps "keycap: " and the key.

    Example:
        >>> caption([0x1F469, 0x1F3FD, 0x200D, 0x1F3A4])
        'woman, medium skin tone, microphone'
    """
    points = [p for p in code_points if p != ZWJ and p not in VARIATION_SELECTORS]
    if len(points) == 2 and all(REGIONAL_A <= p <= REGIONAL_Z for p in points):
        return "flag: " + "".join(chr(p - REGIONAL_A + ord("a")) for p in points)
    if len(points) > 2 and points[0] == BLACK_FLAG and points[-1] == CANCEL_TAG:
        return "flag: " + "".join(chr(p - TAG_BASE) for p in points[1:-1])
    if len(points) == 2 and points[1] == KEYCAP:
        return "keycap: " + chr(points[0])
    if CANCEL_TAG in points:
        return None
    names = [SKIN_TONES.get(p) or unicodedata.name(chr(p), "").lower() for p in points]
    return ", ".join(name.removeprefix("emoji component ") for name in names) if all(names) else None


def reading_order(spellings: list[list[int]]) -> list[int]:
    """The spelling that reads from left to right.

    Noto's ligatures hold every joined emoji forwards and mirrored. Forwards, a person or a thing comes first, adults
    before children, and no skin tone follows a joiner.
    """
    toned = {a for spelling in spellings for a, b in zip(spelling, spelling[1:]) if b in SKIN_TONES}

    def oddness(spelling: list[int]):
        first = spelling[0]
        mirrored = any(a == ZWJ and b in SKIN_TONES for a, b in zip(spelling, spelling[1:]))
        return mirrored, first in COMPANIONS, first not in ADULTS, first not in toned, [-p for p in spelling]

    return min(spellings, key=oddness)


def open_font(path: str):
    """The font at `path`, by fontTools.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no font, or has no colour bitmaps or no ligatures.
    """
    from fontTools.ttLib import TTFont, TTLibError

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"font: {path} does not exist; give another --font, or install it: apt install fonts-noto-color-emoji"
        )
    try:
        font = TTFont(path)
    except TTLibError as error:
        raise ValueError(f"font: {path} is no font ({error})") from error
    for table in ("CBDT", "GSUB"):
        if table not in font:
            raise ValueError(f"font: {path} has no table {table} (colour bitmaps: CBDT, sequences: GSUB); Noto's has")
    return font


def sequences(font) -> dict[str, list[int]]:
    """The code points of each glyph: through a ligature if there is one, else its own."""
    own = {glyph: point for point, glyph in font.getBestCmap().items()}
    spellings = defaultdict(list)
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable if lookup.LookupType == 4 else ():
            for first, ligatures in table.ligatures.items():
                for ligature in ligatures:
                    glyphs = (first, *ligature.Component)
                    # What a font makes of its own helper glyphs stands for no text.
                    if own.keys() >= set(glyphs):
                        spellings[ligature.LigGlyph].append([own[glyph] for glyph in glyphs])
    return {glyph: [point] for glyph, point in own.items()} | {g: reading_order(s) for g, s in spellings.items()}


def picture(png: bytes, resolution: int) -> Image.Image:
    """A glyph's bitmap over white, centred in a square, RGB."""
    with Image.open(io.BytesIO(png)) as image:
        glyph = image.convert("RGBA")
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS)


def main():
    (config,) = parse_config([EmojiConfig], __doc__)
    font = open_font(config.font)
    output_dir = check_writable(config.output_dir, "output_dir")
    bitmaps, points = font["CBDT"].strikeData[-1], sequences(font)
    found = sorted((points[glyph], glyph) for glyph in bitmaps if glyph in points)
    rows, nameless, repeated = {}, 0, 0
    for code_points, glyph in found:
        text = caption(code_points)
        nameless += text is None
        repeated += text in rows
        if text is not None:
            rows.setdefault(text, (code_points, glyph))
    with atomic_directory(output_dir / "train") as folder:
        lines = []
        for text, (code_points, glyph) in tqdm(rows.items(), desc="emoji", unit="picture"):
            name = "-".join(f"{point:x}" for point in code_points) + ".png"
            picture(bitmaps[glyph].imageData, config.resolution).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": text}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))
    print(
        f"{len(rows)} pictures of {config.resolution}x{config.resolution} with captions in {output_dir / 'train'}; left "
        f"out: {len(bitmaps) - len(found)} glyphs of no text, {nameless} without a name, {repeated} repeated captions"
    )


if __name__ == "__main__":
    run_script(main)
