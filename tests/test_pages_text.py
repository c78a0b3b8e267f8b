"""The pages around the chapters: every letter, term, part of the paper, name and number on them leads to a place that exists."""

import ast
import fnmatch
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))

import around  # noqa: E402

PAGES = ROOT / "book" / "pages"
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
EVERY_PAGE = [*NOTEBOOKS, *sorted(PAGES.glob("*.md"))]


def tables(path: Path) -> dict[str, list[list[str]]]:
    """Heading → the rows of the section's table, without its head."""
    return {section.title: around.rows(section.text)[1:] for section in around.sections(path) if around.rows(section.text)}


def section_of(path: Path, target: str) -> around.Section | None:
    """The section that a relative link on a page leads to."""
    name, _, anchor = target.partition("#")
    place = (path.parent / name).resolve() if name else path
    return around.section_at(place, anchor) if place.exists() else None


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EVERY_PAGE, ids=lambda path: path.stem)
def test_every_link_leads_to_a_page_and_a_heading(path):
    for text, place, anchor in around.links(path):
        assert place.exists(), f"[{text}] leads to {place.name}, which does not exist"
        if place.suffix not in (".ipynb", ".md"):
            continue
        if anchor.startswith("fig-"):
            sources = [source for kind, source in around.cells(place) if kind == "code"]
            assert any(re.search(rf'label="{anchor[4:]}"', source) for source in sources), f"[{text}]: no figure {anchor} in {place.name}"
        elif anchor and not (place.name == "api.md" and "." in anchor):
            assert around.section_at(place, anchor), f"[{text}]: no heading #{anchor} in {place.name}"


@pytest.mark.parametrize("path", EVERY_PAGE, ids=lambda path: path.stem)
def test_a_heading_is_there_once(path):
    """Two equal headings on a page get anchors that change when the page does; only chapters' titles may come back."""
    anchors = [section.anchor for section in around.sections(path)[1:]]
    assert len(anchors) == len(set(anchors)) and not [anchor for anchor in anchors if re.search(r"-\d$", anchor) and anchor[:-2] in anchors]


def test_anchors_are_those_of_the_book():
    myst = pytest.importorskip("myst_parser.mdit_to_docutils.base")
    titles = {section.title for path in EVERY_PAGE for section in around.sections(path)}
    assert len(titles) > 100
    for title in titles:
        assert around.slug(title) == myst.default_slugify(title)


def test_every_page_is_in_the_book_and_found_from_the_landing_page():
    contents = (ROOT / "_toc.yml").read_text(encoding="utf8")
    linked = {place for _, place, _ in around.links(ROOT / "nbs" / "index.ipynb")}
    for path in PAGES.glob("*.md"):
        assert f"book/pages/{path.stem}\n" in contents
        assert path in linked, f"the landing page does not lead to {path.stem}"


# --- letters and words ------------------------------------------------------------------------------------------------


def test_every_letter_is_in_the_table_and_where_it_leads():
    rows = tables(PAGES / "glossary.md")["Letters"]
    letters = [letter for row in rows for letter in row[0].split(", ")]
    assert sorted(letters) == sorted("B H0 W0 H W C S n d M L N K h w".split())
    for letter_cell, _, _, link in rows:
        section = section_of(PAGES / "glossary.md", re.search(r"\]\((.*?)\)", link)[1])
        for letter in letter_cell.split(", "):
            assert re.search(rf"(?<![\w]){letter}(?![\w])", section.text), f"{letter} is not in {section.link()}"


def test_every_term_is_in_the_text_that_it_leads_to():
    text = around.cells(PAGES / "glossary.md")[0][1]
    entries = re.findall(r"^- \*\*(.+?)\.\*\* (.+) \[[^\]]+\]\((\S+?)\)$", text, flags=re.M)
    assert len(entries) == text.count("\n- **") > 50
    names = [name.strip("`").lower() for name, _, _ in entries]
    assert names == sorted(names), "terms stand in the order of the alphabet"
    for name, definition, target in entries:
        section = section_of(PAGES / "glossary.md", target)
        words = (section.title + " " + section.text).lower().replace("`", "").replace("*", "")
        for term in re.sub(r"[`()]", " ", name).lower().replace(",", "  ").split("  "):
            assert term.strip() in words, f"{term.strip()!r} is not in {section.link()}"
        assert definition.rstrip().endswith(".")


# --- the paper --------------------------------------------------------------------------------------------------------

PARTS = {
    "Sections": "§1 §2 §2.1 §2.2 §2.3 §3 §3.1 §3.2 §4 §4.1 §4.2 §4.3 §4.4 §5 A.1 A.2 A.3 A.4 A.5 A.6".split(),
    "Equations": [f"Equation {number}" for number in range(1, 12)],
    "Figures": [f"Figure {number}" for number in range(1, 13)],
    "Tables": [*(f"Table {number}" for number in range(1, 6)), "Listing 1"],
}


@pytest.mark.parametrize("kind", PARTS)
def test_every_part_of_the_paper_has_a_place(kind):
    path = PAGES / "paper_map.md"
    rows = tables(path)[kind]
    for part in PARTS[kind]:
        found = [row for row in rows if re.match(rf"{re.escape(part)}(?![\d.])", row[0])]
        assert found, f"{part} is missing"
    for part, _, places in rows:
        targets = re.findall(r"\]\((\S+?)\)", places)
        assert targets, f"{part} points nowhere"
        for target in targets:
            assert section_of(path, target), f"{part} points to {target}, which is not there"
    if kind != "Sections":
        assert [row[0] for row in rows] == PARTS[kind]


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_the_ledger_has_the_rows_of_every_chapter():
    collected = around.ledger()
    chapters = {section.path.stem for section, _ in collected}
    assert {path.stem for path in NOTEBOOKS if re.match(r"\d", path.stem)} <= chapters, "a chapter has no rows"
    for section, rows in collected:
        assert len(rows) > 1, f"{section.path.stem}: the section has no table"
        assert len({len(row) for row in rows}) == 1 and len(rows[0]) in (4, 5), f"{section.path.stem}: a row has too many or too few cells"
        assert rows[0][-4:] == ["The paper says", "The published code does", "We do", "Why"], section.path.stem
    page = around.cells(PAGES / "deviations.md")[0][1]
    listed = re.findall(r"nbs/(\w+)\.ipynb", around.COLLECTED.search(page)[0])
    assert listed == [section.path.stem for section, _ in collected], "the list for GitHub has every chapter, in the book's order"


def test_the_ledger_is_filled_when_the_book_is_built():
    source = [around.cells(PAGES / "deviations.md")[0][1]]
    around.fill_ledger(None, "book/pages/deviations", source)
    for section, rows in around.ledger():
        assert f"## {around.title(section.path)}\n" in source[0]
        assert rows[1][-3].split("](")[0] in source[0]
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", source[0]):
        assert section_of(PAGES / "deviations.md", target), target
    untouched = ["<!-- collected -->x<!-- /collected -->"]
    around.fill_ledger(None, "book/pages/api", untouched)
    assert untouched == ["<!-- collected -->x<!-- /collected -->"]


# --- names ------------------------------------------------------------------------------------------------------------


def names_of(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_every_public_name_is_taught_in_one_section_and_has_a_line_to_the_api():
    import annotated_detr

    taught = around.taught()
    for name, module in annotated_detr._MODULE_OF.items():
        section = taught.get(f"annotated_detr.{module}.{name}")
        assert section, f"no notebook defines {name}"
        assert section.title != around.LEDGER
    page = around.cells(PAGES / "api.md")[0][1]
    for module in annotated_detr._EXPORTS:
        assert f"automodule:: annotated_detr.{module}\n" in page
    line = around.api_line("detr", "#| export\nclass MLP(Module):\n    ...\n\n\ndef _private(): ...\n")
    assert 'href="../book/pages/api.html#annotated_detr.detr.MLP"' in line and "_private" not in line
    assert around.api_line("detr", "#| exporti\ndef helper(): ...") == around.api_line("detr", "def helper(): ...") == ""


def test_every_name_with_a_line_to_the_api_has_an_entry_there():
    """Sphinx lists what has a docstring; a line to anything else would lead nowhere."""
    assert len(around.taught()) > 150
    for path in NOTEBOOKS:
        for kind, source in around.cells(path):
            names = around.defined(source) if kind == "code" else []
            for node in ast.parse(source).body if names else []:
                assert getattr(node, "name", None) not in names or ast.get_docstring(node), f"{path.stem}: {node.name} has no docstring"


def test_an_entry_of_the_api_leads_to_its_section():
    lines = ["First paragraph.", "", "More."]
    around.add_teaching(None, "class", "annotated_detr.matcher.HungarianMatcher", None, None, lines)
    assert lines[0] == "First paragraph." and lines[-1] == "More."
    assert re.search(r"Taught in `.+ <\.\./\.\./nbs/07_matcher\.html#.+>`__\.", lines[2])
    unknown = ["Text."]
    around.add_teaching(None, "method", "annotated_detr.matcher.HungarianMatcher.forward", None, None, unknown)
    assert unknown == ["Text."]


def test_every_name_of_the_reference_map_exists():
    here = {full.split(".")[-1] for full in around.taught()}
    rows = [row for title, rows in tables(PAGES / "reference_map.md").items() for row in rows]
    names = {name for row in rows for name in names_of(row[0])}
    assert len(names) > 40
    for name in names:
        assert name in here, f"this package has no {name}"
    same = tables(PAGES / "reference_map.md")["Names that are the same"]
    listed = {name for row in same for name in names_of(row[0])}
    from test_house import PUBLIC

    fixed = {name for names in PUBLIC.values() for name in names if "." not in name}
    assert fixed - listed == {"check_dataset"}, "every name that must not move is the reference's, but for the check of the data"


def test_every_key_of_the_reference_map_is_a_key_of_the_models():
    from annotated_detr import detr_resnet50, detr_tiny

    published = set(json.loads((ROOT / "tests" / "golden" / "state_dict_detr_resnet50.json").read_text(encoding="utf8")))
    keys = set(detr_resnet50().state_dict())
    assert keys == published
    text = around.sections(PAGES / "reference_map.md")[-1].text
    own, small = (around.rows(part)[1:] for part in text.split("The small model"))
    covered = set()
    for rows, candidates in ((own, keys), (small, set(detr_tiny(num_classes=7).state_dict()) - keys)):
        for row in rows:
            for pattern in re.findall(r"`([^`]+)`", row[1]):
                found = set(fnmatch.filter(candidates, pattern))
                assert found, f"no key of the model is like {pattern}"
                covered |= found
    assert keys <= covered, f"the map leaves out {sorted(keys - covered)[:3]}"


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_a_reader_meets(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("sphinx")
    import report

    prose, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [
        prose("# A title\n\nFour words stand here. | not a table"),
        code("#| hide\nunseen = 1"),
        code("#| export\ndef f():\n\n    return 1"),
        prose("## Check it\n\n| a table | is no prose |\n| --- | --- |\n\n[One link](https://example.org)\n\n```py\nshown = 1\n```"),
        code("f() == 1"),
        code("#| echo: false\nfigures.show(fig)"),
        prose("**Exercise 1.** Why?"),
    ]
    path = tmp_path / "chapter.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    numbers = report.measure(path, 2.0)
    assert (numbers["lines"], numbers["cells"], numbers["longest"], numbers["median"]) == (3, 2, 2, 1.5)
    assert (numbers["figures"], numbers["checks"], numbers["exercises"], numbers["seconds"]) == (1, 1, 1, 2.0)
    assert numbers["words"] == 2 + 7 + 2 + 2 + 3 and numbers["way"] == 13


# --- sources ----------------------------------------------------------------------------------------------------------


def test_every_paper_that_is_cited_is_in_the_bibliography_and_leads_to_its_place():
    cited, page = set(), PAGES / "bibliography.md"
    for path in EVERY_PAGE:
        for kind, source in around.cells(path):
            if kind == "markdown" and path != page:
                cited |= set(re.findall(r"\]\((https://(?:arxiv\.org/abs|doi\.org|proceedings\.mlr\.press)/[^)#\s]+)\)", source))
    entries = {}
    for section in around.sections(page):
        for title, address, rest in re.findall(r"^- \*\*\[(.+?)\]\((https:\S+?)\)\.\*\* (.*)$", section.text, flags=re.M):
            entries[address] = title
            assert re.search(r"\b(?:19|20)\d\d\b", rest), f"{title}: no year"
            assert address in cited or re.search(r"\]\(\S+#\S+\)", rest), f"{title} is cited nowhere and leads to no section"
    assert cited - set(entries) == set(), "cited, but not in the bibliography"


def test_every_number_of_a_later_model_has_its_source():
    rows = tables(PAGES / "after_detr.md")["The numbers"]
    assert len(rows) >= 10
    for *_, epochs, score in rows:
        assert re.fullmatch(r"\d+", epochs)
        assert re.fullmatch(r"\[\d\d\.\d\]\(https://\S+\)", score)
