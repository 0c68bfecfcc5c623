# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The emoji recipe's data and its text parts: captions, tokenizer, and a short run on generated pictures."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL
from fontTools.fontBuilder import FontBuilder
from fontTools.misc.sstruct import getformat
from fontTools.ttLib import newTable
from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_
from fontTools.ttLib.tables._g_l_y_f import Glyph
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from PIL import Image
from test_scripts import SCRIPTS, run
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_msd.files import load_model
from diffusers_msd.prompts import embed_prompts, pool_embeddings
from diffusers_msd.retrieval import ContrastiveNet


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


prepare_emoji = script("prepare_emoji")
train_text_parts = script("train_text_parts")


# ------------------------------------------------------------------ captions


@pytest.mark.parametrize(
    "code_points, text",
    [
        ("1f436", "dog face"),
        ("2764 fe0f", "heavy black heart"),
        ("1f44b 1f3ff", "waving hand sign, dark skin tone"),
        ("1f469 1f3fd 200d 1f3a4", "woman, medium skin tone, microphone"),
        ("1f468 1f3fb 200d 2764 fe0f 200d 1f468 1f3fc",
         "man, light skin tone, heavy black heart, man, medium-light skin tone"),
        ("1f9d1 200d 1f9b0", "adult, red hair"),
        ("1f1e9 1f1ea", "flag: de"),
        ("1f3f4 e0067 e0062 e0073 e0063 e0074 e007f", "flag: gbsct"),
        ("1f3f4", "waving black flag"),
        ("33 20e3", "keycap: 3"),
        ("23 fe0f 20e3", "keycap: #"),
        ("33", "digit three"),
        ("1f436 fe4e5", None),
        ("e007f 1f3f4", None),
    ],
)  # fmt: skip
def test_caption(code_points, text):
    assert prepare_emoji.caption([int(point, 16) for point in code_points.split()]) == text


@pytest.mark.parametrize(
    "forwards, mirrored",
    [
        ("1f469 1f3fd 200d 1f3a4", "1f3a4 200d 1f469 1f3fd"),
        ("1f9d1 200d 1f384", "1f384 200d 1f9d1"),
        ("1f9df 200d 2640", "2640 200d 1f9df"),
        ("1f408 200d 2b1b", "2b1b 200d 1f408"),
        ("2764 200d 1f525", "1f525 200d 2764"),
        ("1f468 200d 1f469 200d 1f466", "1f466 200d 1f469 200d 1f468"),
        ("1faf1 1f3fb 200d 1faf2 1f3fc", "1faf2 200d 1f3fb 1faf1 1f3fc"),
    ],
)
def test_reading_order(forwards, mirrored):
    spellings = [[int(point, 16) for point in text.split()] for text in (forwards, mirrored)]
    assert prepare_emoji.reading_order(spellings) == prepare_emoji.reading_order(spellings[::-1]) == spellings[0]


def test_a_glyph_is_put_over_white_in_a_square_undistorted(tmp_path):
    glyph = Image.new("RGBA", (16, 8), (255, 0, 0, 255))
    glyph.paste((0, 0, 0, 0), (0, 0, 8, 8))
    glyph.save(tmp_path / "glyph.png")
    picture = prepare_emoji.picture((tmp_path / "glyph.png").read_bytes(), 16)
    expected = Image.new("RGB", (16, 16), "white")
    expected.paste((255, 0, 0), (8, 4, 16, 12))
    assert (picture.mode, picture.tobytes()) == ("RGB", expected.tobytes())


def test_a_missing_font_is_one_line_that_says_what_to_install(tmp_path, capsys):
    assert run("prepare_emoji.py", "--output_dir", tmp_path / "out", "--font", tmp_path / "none.ttf") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--font" in error and "fonts-noto-color-emoji" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"no font", b""])
def test_a_file_that_is_no_font_is_refused(content, tmp_path, capsys):
    (tmp_path / "x.ttf").write_bytes(content)
    assert run("prepare_emoji.py", "--output_dir", tmp_path / "out", "--font", tmp_path / "x.ttf") == 2
    assert "font: " in capsys.readouterr().err


def tiny_font(path: Path):
    """A font of three bitmaps: the dog, the woman with a microphone (a ligature, in both orders), a private sign."""
    names = [".notdef", "dog", "woman", "microphone", "joiner", "singer", "private"]
    builder = FontBuilder(64, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(
        {0x1F436: "dog", 0x1F469: "woman", 0x1F3A4: "microphone", 0x200D: "joiner", 0xE000: "private"}
    )
    builder.setupGlyf({name: Glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (64, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    builder.addOpenTypeFeatures(
        "feature ccmp { sub microphone joiner woman by singer; sub woman joiner microphone by singer; } ccmp;"
    )
    pictures = {"dog": "brown", "singer": "blue", "private": "black"}
    table = E_B_L_C_.eblc_index_sub_table_1(b"", builder.font)
    table.names, table.indexFormat, table.imageFormat = list(pictures), 1, 17
    strike = E_B_L_C_.Strike()
    strike.indexSubTables = [table]
    size = strike.bitmapSizeTable
    size.colorRef, size.flags, size.ppemX, size.ppemY, size.bitDepth = 0, 1, 8, 8, 32
    size.hori, size.vert = (E_B_L_C_.SbitLineMetrics() for _ in range(2))
    vars(size.hori).update(dict.fromkeys(getformat(E_B_L_C_.sbitLineMetricsFormat)[1], 0))
    vars(size.vert).update(vars(size.hori))
    cblc, cbdt = builder.font["CBLC"], builder.font["CBDT"] = newTable("CBLC"), newTable("CBDT")
    cblc.version = cbdt.version = 3.0
    cblc.strikes, cbdt.strikeData = [strike], [{name: bitmap(colour) for name, colour in pictures.items()}]
    builder.save(path)


def bitmap(colour: str) -> C_B_D_T_.cbdt_bitmap_format_17:
    """A glyph of 10x8 pixels."""
    buffer = io.BytesIO()
    Image.new("RGBA", (10, 8), colour).save(buffer, format="PNG")
    glyph = C_B_D_T_.cbdt_bitmap_format_17(b"", None)
    glyph.metrics = SmallGlyphMetrics()
    vars(glyph.metrics).update(height=8, width=10, BearingX=0, BearingY=0, Advance=10)
    glyph.imageData = buffer.getvalue()
    return glyph


def test_a_font_becomes_an_imagefolder_with_captions(tmp_path, capsys):
    tiny_font(tmp_path / "tiny.ttf")
    arguments = ["--output_dir", tmp_path / "out", "--font", tmp_path / "tiny.ttf", "--resolution", 10]
    assert run("prepare_emoji.py", *arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 pictures of 10x10") and "1 without a name" in said
    lines = (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": "1f436.png", "text": "dog face"},
        {"file_name": "1f469-200d-1f3a4.png", "text": "woman, microphone"},
    ]
    dataset = load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out" / "train"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert dataset["text"][:] == ["dog face", "woman, microphone"]
    assert [image.getpixel((2, 1)) for image in dataset["image"]] == [(165, 42, 42), (0, 0, 255)]


# ------------------------------------------------------------------ text parts

CAPTIONS = [f"{size} {colour} square" for size in ("small", "large") for colour in "red green blue grey black".split()]


def test_tokenizer_round_trip(tmp_path):
    tokenizer = train_text_parts.train_tokenizer(CAPTIONS, vocab_size=530, max_length=9)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 9 and len(loaded) == 530
    unseen = [*CAPTIONS, "LARGE Green squares", "größer ☃", "12"]
    assert loaded(unseen).input_ids == tokenizer(unseen).input_ids
    for text in unseen:
        ids = loaded(text).input_ids
        assert loaded.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")
    tokens = loaded.convert_ids_to_tokens(loaded("large square", padding="max_length").input_ids)
    assert tokens == ["<|startoftext|>", "large</w>", "square</w>", *["<|endoftext|>"] * 6]


def test_coverage_is_the_share_of_captions_that_fit():
    tokenizer = train_text_parts.train_tokenizer(CAPTIONS, vocab_size=530, max_length=4)
    # "square" is one token; with start and end, two words fit.
    assert train_text_parts.coverage(tokenizer, ["square", "square square", "square square square"]) == 2 / 3


def test_augmentation_moves_and_does_not_mirror():
    images = torch.full((64, 3, 8, 8), -1.0)
    images[..., :4] = 1
    moved = train_text_parts.augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    widths = (moved[:, 0, 4] > 0).sum(dim=-1)
    assert set(widths.tolist()) == {2, 3, 4, 5, 6}
    assert (moved[..., 0] > 0).all() and (moved[..., -1] < 0).all()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten squares and their captions, as an imagefolder."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i, text in enumerate(CAPTIONS):
        size, colour, _ = text.split()
        picture, side = Image.new("RGB", (16, 16), "white"), {"small": 4, "large": 12}[size]
        picture.paste(colour, (2, 2, 2 + side, 2 + side))
        picture.save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


SMALL = [
    "--vae_channels",
    8,
    8,
    "--text_hidden_size",
    16,
    "--text_layers",
    1,
    "--text_heads",
    2,
    "--image_channels",
    8,
]
SMALL += ["--feature_dim", 6, "--projection_dim", 5, "--max_length", 9, "--vocab_size", 530, "--contrastive_steps", 2]
SMALL += ["--train_batch_size", 4, "--max_train_steps", 2, "--report_to", "none", "--caption_column", "text"]


@pytest.fixture(scope="module")
def text_parts(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_parts")
    cache = folder / "cache"
    arguments = ["--train_data_dir", pictures, "--output_dir", folder / "out", "--cache_dir", cache, *SMALL]
    assert run("train_text_parts.py", *arguments) == 0
    return folder / "out"


def test_a_run_leaves_parts_that_load_and_fit_together(text_parts):
    tokenizer = CLIPTokenizer.from_pretrained(text_parts / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(text_parts / "text_encoder").eval()
    net = load_model(ContrastiveNet, text_parts / "contrastive", "contrastive")
    vae = load_model(AutoencoderKL, text_parts / "vae", "vae")
    embeddings, mask = embed_prompts(tokenizer, text_encoder, CAPTIONS)
    assert embeddings.shape == (10, 9, 16)
    assert net.embed_texts(pool_embeddings(embeddings, mask, "eos")).shape == (10, 5)
    assert text_encoder.config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 529
    assert vae.config.scaling_factor > 0


def test_latents_have_unit_variance_and_the_record_says_what_was_measured(text_parts, pictures):
    vae = load_model(AutoencoderKL, text_parts / "vae", "vae")
    array = [
        torch.frombuffer(bytearray(Image.open(pictures / f"{i}.png").tobytes()), dtype=torch.uint8) for i in range(10)
    ]
    images = torch.stack(array).view(10, 16, 16, 3).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        means = vae.encode(images).latent_dist.mean
        error = (vae.decode(means).sample.clamp(-1, 1) - images).square().mean()
    assert (means * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-3)
    record = json.loads((text_parts / "text_parts.json").read_text())
    assert record["psnr"] == pytest.approx(10 * torch.log10(4 / error).item(), abs=1e-3)
    assert record["images"] == 10 and record["captions_read_whole"] == 1
    assert set(record["retrieval"]) == {"top_1", "top_5"} and set(record["seconds"]) == {"vae", "encoders"}
    assert record["settings"]["vocab_size"] == 530


def test_contrastive_training_learns_the_captions(pictures, tmp_path):
    config = train_text_parts.TextPartsConfig(
        output_dir="", vocab_size=530, max_length=9, text_hidden_size=16, text_layers=1, text_heads=2,
        contrastive_steps=120, contrastive_learning_rate=1e-2,
    )  # fmt: skip
    data = train_text_parts.DataConfig(train_data_dir=str(pictures), cache_dir=str(tmp_path))
    dataset, captions = train_text_parts.load_pairs(data)
    tokenizer = train_text_parts.train_tokenizer(captions, 530, 9)
    torch.manual_seed(0)
    text_encoder = train_text_parts.build_text_encoder(config, tokenizer)
    net = ContrastiveNet(sample_size=16, channels=(8, 16), feature_dim=16, text_dim=16, projection_dim=16)
    train_text_parts.train_contrastive(text_encoder, net, tokenizer, dataset, captions, config, seed=0)
    accuracy = train_text_parts.measure_retrieval(text_encoder, net, tokenizer, dataset, captions)
    assert accuracy == {"top_1": 1.0, "top_5": 1.0}


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--vocab_size", 300], "vocab_size"),
        (["--max_length", 2], "max_length"),
        (["--contrastive_steps", 0], "contrastive_steps"),
        (["--mixed_precision", "bf16"], "mixed_precision"),
        (["--caption_column", "name"], "caption_column"),
        (["--resolution", 8], "resolution"),
        (["--vae_channels", *[8] * 6], "vae_channels"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, named, pictures, tmp_path, capsys):
    settings = [
        "--train_data_dir",
        pictures,
        "--output_dir",
        tmp_path / "out",
        "--cache_dir",
        tmp_path / "cache",
        *SMALL,
    ]
    assert run("train_text_parts.py", *settings, *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {named}: ")
