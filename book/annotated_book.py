"""The Sphinx extension of The Annotated DETR: it turns the notebooks, which are plain Markdown and `#|` directives, into pages.

Reading a notebook (`read_notebook`, the reader that `_config.yml` cannot name by itself, so `setup` does):
- the leading `#|` lines of a code cell become cell tags and are taken away;
- GitHub call-outs (`> [!NOTE]`) become admonitions, `<details>` become folds whose content is parsed;
- the first code cell gets a digest of everything the notebook imports from the package, so that jupyter-cache re-runs a
  chapter exactly when its cells, or the code and data that they import, have changed.

Writing pages: tables and signatures as they are read here; what stands around the text is page_shell's.
"""

import ast
import hashlib
import inspect
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import around
import page_shell
from docutils import nodes

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "annotated_detr"
CALL_OUTS = {"NOTE": "note", "TIP": "tip", "IMPORTANT": "important", "WARNING": "warning", "CAUTION": "caution"}

# --- reading notebooks ------------------------------------------------------------------------------------------------

DIRECTIVE = re.compile(r"\s*#\s?\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")


def split_directives(source: str) -> tuple[dict[str, str], str]:
    """The `#|` lines at the head of a cell as a dictionary, and the rest of the cell."""
    lines, directives = source.splitlines(), {}
    while lines and (not lines[0].strip() or DIRECTIVE.match(lines[0])):
        match = DIRECTIVE.match(lines.pop(0))
        if match:
            directives[match[1]] = match[2].strip("\"'")
    return directives, "\n".join(lines)


def cell_tags(directives: dict[str, str]) -> tuple[list[str], dict]:
    """The tags, and the settings of myst-nb, that directives stand for."""
    tags, settings = [], {}
    if "hide" in directives or "default_exp" in directives:
        tags.append("remove-cell")
    if directives.get("echo") == "false":
        tags.append("remove-input")
    if directives.get("output") == "false":
        tags.append("remove-output")
    if directives.get("eval") == "false":
        tags.append("skip-execution")
    if directives.get("code-fold") in ("true", "show"):
        summary = directives.get("code-summary", "Code")
        # A solution keeps its output folded away, too: the reader thinks first.
        tags.append("hide-cell" if summary.startswith("Solution") else "hide-input")
        settings = {"code_prompt_show": summary, "code_prompt_hide": summary}
    return tags, settings


def to_myst(text: str) -> str:
    """Plain Markdown as GitHub shows it → the MyST that renders the same: call-outs, folds and links to figures."""
    out, fence, lines = [], None, text.splitlines()
    i = 0
    while i < len(lines):
        line = lines[i]
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and fence is None:
            fence = mark[1]
        elif mark and fence and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = None
        elif fence is None:
            call_out = re.match(r">\s*\[!(\w+)\]\s*$", line)
            if call_out and call_out[1].upper() in CALL_OUTS:
                body = []
                while i + 1 < len(lines) and lines[i + 1].startswith(">"):
                    i += 1
                    body.append(re.sub(r"^> ?", "", lines[i]))
                out += ["", f"::::{{{CALL_OUTS[call_out[1].upper()]}}}", to_myst("\n".join(body)), "::::", ""]
                i += 1
                continue
            if re.match(r"\s*<details\b", line):
                block = [line]
                while "</details>" not in block[-1] and i + 1 < len(lines):
                    i += 1
                    block.append(lines[i])
                out += fold("\n".join(block))
                i += 1
                continue
            line = link_figures(line)
        out.append(line)
        i += 1
    return "\n".join(out)


def fold(block: str) -> list[str]:
    """One `<details>` block as a fold whose content is Markdown."""
    match = re.fullmatch(r"\s*<details[^>]*>\s*<summary>(.*?)</summary>(.*)</details>\s*", block, flags=re.S)
    if match is None:
        raise ValueError(f"A <details> block needs a <summary> and its </details> in the same cell: {block[:80]!r}")
    summary = re.sub(r"<[^>]+>", "", match[1]).strip()
    return ["", f"::::::{{dropdown}} {summary}", "", to_myst(match[2].strip("\n")), "", "::::::", ""]


def link_figures(line: str) -> str:
    """A link to a figure, whose anchor is in a cell's output where MyST cannot see it, becomes an HTML link (checked afterwards)."""
    def anchor(match: re.Match) -> str:
        page = re.sub(r"\.ipynb$", ".html", match[2])
        return f'<a class="reference internal" href="{page}#fig-{match[3]}">{match[1]}</a>'

    return re.sub(r"\[([^\]\[]+)\]\(([\w./-]*)#fig-([\w-]+)\)", anchor, line)


def read_notebook(text: str) -> nbformat.NotebookNode:
    """Read an .ipynb file for the book: directives become tags, Markdown becomes MyST, the first code cell carries the digest."""
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    digest = digest_of_imports("\n".join(cell.source for cell in code))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = to_myst(cell.source)
    add_api_lines(notebook)
    for cell in code:
        directives, cell.source = split_directives(cell.source)
        tags, settings = cell_tags(directives)
        if tags:
            cell.metadata["tags"] = sorted({*cell.metadata.get("tags", []), *tags})
        if settings:
            cell.metadata["mystnb"] = settings
        if "skip-execution" in tags and cell.outputs:
            outputs = nbformat.v4.writes(nbformat.v4.new_notebook(cells=[cell]))
            cell.metadata["outputs_digest"] = hashlib.sha256(outputs.encode()).hexdigest()
    if code:
        code[0].metadata["annotated_detr"] = {"digest": digest}
    return notebook


def add_api_lines(notebook: nbformat.NotebookNode) -> None:
    """Below each cell that defines public names, a line that leads to them in the API reference."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    module = next((match[1] for source in sources if (match := re.match(r"\s*#\|\s*default_exp\s+(\S+)", source))), None)
    with_lines = []
    for cell in notebook.cells:
        with_lines.append(cell)
        line = around.api_line(module, cell.source) if module and cell.cell_type == "code" else ""
        if line:
            with_lines.append(nbformat.v4.new_markdown_cell(line))
    notebook.cells = with_lines


# --- what a notebook depends on ---------------------------------------------------------------------------------------


def public_names() -> dict[str, str]:
    """Public name → module, from the table in annotated_detr/__init__.py."""
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_EXPORTS":
            return {name: module for module, names in ast.literal_eval(node.value).items() for name in names}
    return {}


def modules() -> set[str]:
    """The names of the package's modules."""
    return {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}


def named_modules(source: str) -> set[str]:
    """The modules of the package that source text imports or runs, as far as text can tell; all of them when in doubt."""
    found, known, public = set(), modules(), public_names()
    for match in re.finditer(r"^\s*from\s+(?:annotated_detr)?\.(\w+)\s+import", source, flags=re.M):
        found.add(match[1])
    for match in re.finditer(r"^\s*import\s+annotated_detr\.(\w+)", source, flags=re.M):
        found.add(match[1])
    for match in re.finditer(r"^\s*from\s+(?:annotated_detr|\.)\s+import\s+(\([^)]*\)|[^\n#]+)", source, flags=re.M):
        for name in re.findall(r"(\w+)(?:\s+as\s+\w+)?", match[1]):
            if name not in ("versions", "__version__"):  # those of __init__.py itself
                found |= {name} if name in known else {public[name]} if name in public else known
    if re.search(r"^\s*import\s+annotated_detr(\s|$)", source, flags=re.M):
        found |= known
    if re.search(r"annotated-detr\s+\w|-m\s+annotated_detr", source):
        found.add("cli")
    return found & known


def digest_of_imports(source: str) -> str:
    """A digest of the modules that the source imports, transitively, of the data files that they name, and of the locked versions."""
    wanted, texts = named_modules(source), {}
    while wanted:
        name = wanted.pop()
        texts[name] = (PACKAGE / f"{name}.py").read_text(encoding="utf8")
        wanted |= named_modules(texts[name]) - texts.keys()
    digest = hashlib.sha256(sys.version.encode())
    for name in sorted(texts):
        digest.update(f"{name}\0{texts[name]}\0".encode())
    everything = source + "".join(texts.values())
    for path in sorted(path for pattern in ("*.json", "*.jsonl", "*.safetensors") for path in PACKAGE.rglob(pattern)):
        if path.stem in everything or path.parent != PACKAGE:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update((ROOT / "book" / "lock.txt").read_bytes())
    if "ANNOTATED_DETR_BCCD" in everything:
        folder = os.environ.get("ANNOTATED_DETR_BCCD", "")
        for path in sorted(Path(folder).glob("*.json")) if folder else []:
            digest.update(path.read_bytes())
    return digest.hexdigest()


# --- writing pages ----------------------------------------------------------------------------------------------------


def use_our_reader(app, config):
    """Notebooks are read by `read_notebook`; the mathematics is drawn by the MathJax that lies beside the pages."""
    config.nb_custom_formats = {**config.nb_custom_formats, ".ipynb": ("annotated_book.read_notebook", {}, False)}
    config.mathjax_path = page_shell.MATHJAX


def start_clock(app, docname, source):
    app.env.annotated_started = time.monotonic()


def say_progress(app, doctree):
    """One line for each page: its name and the seconds it took."""
    seconds = time.monotonic() - getattr(app.env, "annotated_started", time.monotonic())
    print(f"  {app.env.docname:<32} {seconds:6.1f} s", file=sys.stderr, flush=True)


def keep_slugs(app, doctree):
    """The anchor that GitHub gives to a heading leads to it in the book, too, where docutils would spell it otherwise."""
    for section in doctree.findall(nodes.section):
        if section.get("slug") and section["slug"] not in section["ids"]:
            section["ids"].append(section["slug"])


def dress_tables(app, doctree, docname):
    """A wide table scrolls inside itself, never the page; a head without words goes; the table that opens a chapter is a card."""
    if app.builder.format != "html":
        return
    for table in list(doctree.findall(nodes.table)):
        card = table.astext().lstrip().lower().startswith("you need")
        for head in list(table.findall(nodes.thead)):
            if card and head.astext().strip():
                body = next(head.parent.findall(nodes.tbody))
                body.insert(0, head.children)
            if card or not head.astext().strip():
                head.parent.remove(head)
        box = nodes.container(classes=["table-scroll", "card-table"] if card else ["table-scroll"])
        table.replace_self(box)
        box += table


def source_signature(app, what, name, obj, options, signature, return_annotation):
    """Signatures as their source spells them: `Float[Tensor, "B N 4"]`, not the repr of a jaxtyping class."""
    target = obj.__init__ if isinstance(obj, type) else getattr(obj, "__wrapped__", obj)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(target))).body[0]
    except (TypeError, OSError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    arguments = tree.args
    if what in ("class", "method") and arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    returns = None if isinstance(obj, type) or tree.returns is None else ast.unparse(tree.returns)
    return (f"({ast.unparse(arguments)})".replace("'", '"'), returns and returns.replace("'", '"'))


def setup(app):
    app.connect("config-inited", use_our_reader, priority=900)
    app.connect("source-read", start_clock)
    app.connect("source-read", around.fill_ledger)
    app.connect("doctree-read", keep_slugs)
    app.connect("doctree-read", say_progress)
    app.connect("doctree-resolved", dress_tables)
    page_shell.setup(app)
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-signature", source_signature)
    app.connect("autodoc-process-docstring", around.add_teaching, priority=900)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
