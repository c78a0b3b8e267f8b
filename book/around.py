"""What the pages around the chapters are made of, read from the notebooks, so that no page says anything else than a chapter:
headings and their anchors, the section that teaches each public name, the rows of the ledger, links.
"""

import ast
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEDGER = "What changed against the paper"
COLLECTED = re.compile(r"<!-- collected -->.*?<!-- /collected -->", flags=re.S)


@dataclass(frozen=True)
class Section:
    """A heading of a page and the text up to the next heading of any level."""

    path: Path
    title: str
    anchor: str
    level: int
    text: str

    def link(self, base: str = "", suffix: str = "") -> str:
        """The section's address; `base` leads to the folder of its page, `suffix` replaces that of the file."""
        return f"{base}{self.path.stem}{suffix or self.path.suffix}#{self.anchor}"


def slug(title: str) -> str:
    """The anchor that GitHub and the book give to a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@lru_cache(maxsize=None)
def cells(path: Path) -> tuple[tuple[str, str], ...]:
    """Kind and source of every cell; a Markdown file is one cell."""
    if path.suffix == ".md":
        return (("markdown", path.read_text(encoding="utf8")),)
    notebook = json.loads(path.read_text(encoding="utf8"))
    return tuple((cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"])


def without_fences(text: str) -> str:
    """Markdown without its fenced blocks, which may hold lines that look like headings or links."""
    return re.sub(r"^(```|~~~).*?^\1[^\n]*$", "", text, flags=re.M | re.S)


@lru_cache(maxsize=None)
def sections(path: Path) -> tuple[Section, ...]:
    """The sections of a notebook or of a Markdown file, in order; the code of a section is part of its text."""
    found, count = [], {}
    for kind, source in cells(path):
        lines = without_fences(source).splitlines() if kind == "markdown" else []
        for line in lines or source.splitlines():
            heading = re.match(r"(#{1,4}) +(.*?)\s*$", line) if lines else None
            if heading:
                anchor = slug(heading[2])
                number = count[anchor] = count.get(anchor, -1) + 1
                found.append([path, heading[2].replace("`", ""), f"{anchor}-{number}" if number else anchor, len(heading[1]), []])
            elif found:
                found[-1][-1].append(line)
    return tuple(Section(*rest, "\n".join(text)) for *rest, text in found)


def title(path: Path) -> str:
    """The title of a page."""
    return sections(path)[0].title


def section_at(path: Path, anchor: str) -> Section | None:
    """The section of a page that an anchor leads to; the first one when there is no anchor."""
    return next((section for section in sections(path) if not anchor or section.anchor == anchor), None)


def links(path: Path) -> list[tuple[str, Path, str]]:
    """Text, file and anchor of every link of a page to another place of the book."""
    found = []
    for kind, source in cells(path):
        if kind == "markdown":
            for text, target in re.findall(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", without_fences(source)):
                if not re.match(r"\w+:", target):
                    name, _, anchor = target.partition("#")
                    found.append((text, (path.parent / name).resolve() if name else path, anchor))
    return found


# --- public names -----------------------------------------------------------------------------------------------------


def module_of(path: Path) -> str | None:
    """The module that a notebook exports."""
    names = [match[1] for kind, source in cells(path) if kind == "code" and (match := re.match(r"\s*#\|\s*default_exp\s+(\S+)", source))]
    return names[0] if names else None


def defined(source: str) -> list[str]:
    """The public classes and functions that an exported cell defines."""
    if not re.search(r"^#\|\s*export\s*$", source, flags=re.M):
        return []
    nodes = ast.parse(source).body
    return [node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")]


@lru_cache(maxsize=None)
def taught(root: Path = ROOT) -> dict[str, Section]:
    """Full public name → the section whose cell defines it."""
    found = {}
    for path in sorted((root / "nbs").glob("*.ipynb")):
        module, heading = module_of(path), 0
        for kind, source in cells(path):
            if kind == "markdown":
                heading += len(re.findall(r"^#{1,4} ", without_fences(source), flags=re.M))
            else:
                for name in defined(source):
                    found[f"annotated_detr.{module}.{name}"] = sections(path)[heading - 1]
    return found


def api_line(module: str, source: str) -> str:
    """Below a cell that defines public names: the way to their places in the API reference."""
    anchors = [(f"annotated_detr.{module}.{name}", name) for name in defined(source)]
    names = ", ".join(f'<a class="reference internal" href="../book/pages/api.html#{anchor}"><code>{name}</code></a>' for anchor, name in anchors)
    return f'<p class="api-links">API: {names}</p>' if names else ""


def add_teaching(app, what, name, obj, options, lines):
    """In the API reference, after the first paragraph of a name: the section that teaches it."""
    section = taught().get(name)
    if section:
        first = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
        chapter = title(section.path)
        where = chapter if section.title == chapter else f"{chapter}: {section.title}"
        lines[first:first] = ["", f"Taught in `{where} <{section.link('../../nbs/', '.html')}>`__."]


# --- the ledger -------------------------------------------------------------------------------------------------------


def rows(table: str) -> list[list[str]]:
    """The rows of a Markdown table, its head first."""
    lines = [line.strip() for line in table.splitlines() if line.strip().startswith("|")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in split if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]


def ledger(root: Path = ROOT) -> list[tuple[Section, list[list[str]]]]:
    """For each chapter, and each appendix, its section with the deviations and the rows of its table, the head first."""
    contents = (root / "_toc.yml").read_text(encoding="utf8")
    paths = [root / "nbs" / f"{stem}.ipynb" for stem in re.findall(r"nbs/(\w+)", contents)]
    found = [section for path in paths for section in sections(path) if section.title == LEDGER]
    return [(section, rows(section.text)) for section in found]


def fill_ledger(app, docname, source):
    """Put the rows of all chapters in the place of the list that the page of the ledger shows on GitHub."""
    if not docname.endswith("pages/deviations"):
        return
    parts = []
    for section, (head, *body) in ledger():
        name = re.sub(r"\.ipynb$", "", section.path.name)
        lines = [f"## {title(section.path)}", "", f"From [the end of the chapter](../../nbs/{section.link()}).", ""]
        lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        lines += [f"| {' | '.join(row)} |" for row in body]
        parts.append(re.sub(r"\]\((#|\w+\.ipynb)", lambda match: f"](../../nbs/{name}.ipynb#" if match[1] == "#" else f"](../../nbs/{match[1]}", "\n".join(lines)))
    source[0] = COLLECTED.sub(lambda _: "\n\n".join(parts), source[0])
