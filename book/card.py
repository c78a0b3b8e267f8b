"""The picture that the README shows and that travels with a link to the book: scenes, and what the book's detector found in them.

    python book/card.py FOLDER    writes card.png (1200 × 630) and found.png (the scenes alone) into FOLDER
"""

import argparse
import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from annotated_detr import figures, scenes
from annotated_detr.inference import load_detector, predict

THINGS = 5  # the first scenes of the test split with so many things: none that the detector has learned from
SIDE = 360
INK, GROUND, QUIET, ACCENT = "#1d2330", "#ffffff", "#59606e", "#d0632b"


def found(count: int = 4) -> list[Image.Image]:
    """Scenes of the test split with the boxes, names and scores that `tiny-scenes` gives them."""
    pictures, index = [], 0
    while len(pictures) < count:
        pixels, _, annotations = scenes.draw(scenes.make_scene("test", index), SIDE, SIDE)
        if len(annotations) == THINGS:
            pictures.append(Image.fromarray(pixels))
        index += 1
    return [answer.draw(picture) for answer, picture in zip(predict(load_detector("tiny-scenes"), pictures), pictures)]


def strip(pictures: list[Image.Image], side: int, gap: int) -> Image.Image:
    """Square pictures beside each other."""
    row = Image.new("RGB", (len(pictures) * (side + gap) - gap, side), GROUND)
    for i, picture in enumerate(pictures):
        row.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (i * (side + gap), 0))
    return row


@figures.styled
def card(row: Image.Image) -> Image.Image:
    """The row of pictures under the book's name, 1200 × 630."""
    fig = Figure(figsize=(12, 6.3), dpi=100, facecolor=GROUND)
    fig.text(0.05, 0.83, "The Annotated DETR", fontsize=52, weight="bold", color=INK)
    fig.text(0.05, 0.73, "Object detection with a transformer, explained by running it", fontsize=25, color=QUIET)
    fig.text(0.05, 0.08, "A book of notebooks, and the package that they export", fontsize=20, color=ACCENT)
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", facecolor=GROUND)
    canvas = Image.open(drawn).convert("RGB")
    canvas.paste(row, ((1200 - row.width) // 2, 215))
    return canvas


def draw(folder: Path) -> None:
    """Write both pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = found()
    strip(pictures, 320, 12).save(folder / "found.png", optimize=True)
    card(strip(pictures, 266, 12)).save(folder / "card.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    draw(parser.parse_args().folder)
