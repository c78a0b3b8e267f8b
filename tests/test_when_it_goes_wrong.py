"""The page "When it goes wrong": every recurring question has a row, and every row leads to an answer."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))

import around  # noqa: E402

PAGE = ROOT / "book" / "pages" / "when_it_goes_wrong.md"

# What people fail at with DETR: threads of the published code's repository, or words where a question has no thread.
PAINS = {
    "num_classes": "23 32 108 164 491",
    "ids": "190 550",
    "class_error": "41 527 550",
    "few pictures": "22 84 125 435",
    "heads": "126 205 536",
    "predicted boxes": "28 101 509",
    "target boxes": "459",
    "invalid numeric entries": "",
    "every query": "179 202 367 375",
    "stuck near 26": "169 311 387 527",
    "Small batches": "314 505",
    "depend on the batch": "191 217 239",
    "padding": "70 286",
    "More than 100 objects": "166 570",
    "filtering by score": "319",
    "Out of memory": "150",
    "Half precision": "127",
    "rotated photographs": "405",
    "Resuming": "301 582",
    "ONNX": "211 556",
    "NMS": "34 72",
    "attention": "47 275 593",
    "CPU": "288",
}


def table_rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf8").splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("| you see")]


@pytest.mark.parametrize("word", PAINS)
def test_every_question_has_a_row(word):
    threads = {f"#{number}" for number in PAINS[word].split()}
    found = [row for row in table_rows() if threads <= set(re.findall(r"#\d+", row[0])) and (threads or word in row[0])]
    assert found, f"no row for {word} ({PAINS[word]})"


def test_every_row_leads_to_a_section():
    assert len(table_rows()) >= len(PAINS)
    for row in table_rows():
        assert len(row) == 4, row
        targets = re.findall(r"\]\(([^)]+)\)", row[3])
        assert targets, f"{row[0]}: no link"
        for target in targets:
            name, _, anchor = target.partition("#")
            place = (PAGE.parent / name).resolve() if name else PAGE
            assert anchor and around.section_at(place, anchor), f"{row[0]}: {target} leads nowhere"
