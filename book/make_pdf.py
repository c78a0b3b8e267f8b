"""The whole book as one PDF, printed from the rendered pages by a browser: with an outline, page numbers and links that work on paper.

    python book/make_pdf.py [FILE]    _build/html/the-annotated-detr.pdf if no file is named
"""

import argparse
import html
import io
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import page_shell
from browser import open_browser
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, DecodedStreamObject, DictionaryObject, NameObject, TextStringObject

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
PAPER = {"prefer_css_page_size": True, "print_background": True}
FRONT = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
@page {{ size: A4; margin: 22mm 20mm }} body {{ font: 11pt/1.5 system-ui, sans-serif; color: #1d2330; margin: 0 }}
.cover {{ break-after: page; padding-top: 55mm }} h1 {{ font-size: 34pt; line-height: 1.1; margin: 0 0 4mm }} h2 {{ font-size: 18pt }}
img {{ width: 100%; margin: 14mm 0 }} .quiet {{ color: #59606e }} h3 {{ margin: 5mm 0 1mm; font-size: 11pt }}
ol {{ list-style: none; margin: 0; padding: 0 }} li {{ display: flex; gap: 2mm }} li i {{ flex: 1; border-bottom: 1px dotted #9aa1ae; margin-bottom: 4px }}
</style><body><section class="cover"><h1>{title}</h1><p class="quiet">Object detection with a transformer, explained by running it</p>
<img src="{picture}" alt="Scenes with the boxes that the book's detector found in them"><p>Version {version}</p>
<p class="quiet">The book on the web, with its notebooks: {site}<br>The prose and the figures are under CC BY 4.0, the code under the Apache License 2.0.</p></section>
<section><h2>Contents</h2>{contents}</section></body></html>"""


def parts_of(contents: Path) -> list[tuple[str, list[str]]]:
    """The parts of the book and the addresses of their pages, in the order of the side bar."""
    text = contents.read_text(encoding="utf8")
    parts = [("", re.findall(r"^root: (\S+)", text, flags=re.M))]
    for match in re.finditer(r"caption: (.+)|file: (\S+)", text):
        if match[1]:
            parts.append((match[1].strip(), []))
        else:
            parts[-1][1].append(match[2])
    return parts


def print_page(browser, address: str) -> tuple[str, bytes]:
    """Title and PDF of one page of the book, every fold open and every formula set."""
    context = browser.new_context(color_scheme="light", reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(600_000)
    page.goto((HTML / f"{address}.html").as_uri())
    page.evaluate("annotated.unfold(), annotated.ready()")
    title = page.evaluate("document.querySelector('.bd-article h1').innerText.replace(/#$/, '').trim()")
    printed = page.pdf(**PAPER, outline=True, tagged=True)
    context.close()
    return title, printed


def print_front(browser, parts: list, pages: dict) -> bytes:
    """Cover and contents, with the number of every chapter's first page (the front's own pages are not yet counted in `pages`)."""
    own = page_shell.settings()

    def front(shift: int) -> bytes:
        contents = ""
        for caption, addresses in parts:
            lines = "".join(f"<li>{html.escape(pages[a][0])}<i></i>{pages[a][1] + shift + 1}</li>" for a in addresses)
            contents += (f"<h3>{caption}</h3>" if caption else "") + f"<ol>{lines}</ol>"
        path = HTML / ".front.html"
        path.write_text(FRONT.format_map({**own, "picture": "_static/found.png", "contents": contents}), encoding="utf8")
        page = browser.new_page()
        page.goto(path.as_uri())
        printed = page.pdf(**PAPER)
        page.close()
        path.unlink()
        return printed

    length = len(PdfReader(io.BytesIO(front(0))).pages)
    return front(length)


def mend_links(writer: PdfWriter, first: dict[str, int]) -> None:
    """Links to files on this machine lead to the chapter's first page in the PDF or, if it is not in it, to the web site."""
    site = page_shell.settings()["site"]
    for page in writer.pages:
        for reference in page.get("/Annots") or []:
            note = reference.get_object()
            action = note.get("/A", {}).get_object() if "/A" in note else {}
            address = str(action.get("/URI", ""))
            if not address.startswith("file:"):
                continue
            parts = urlsplit(address)
            inside = Path(unquote(parts.path)).resolve().relative_to(HTML.resolve()).as_posix()
            target = first.get(inside.removesuffix(".html"))
            if target is None:
                action[NameObject("/URI")] = TextStringObject(f"{site}/{inside}" + (f"#{parts.fragment}" if parts.fragment else ""))
            else:
                del note["/A"]
                note[NameObject("/Dest")] = ArrayObject([writer.pages[target].indirect_reference, NameObject("/Fit")])


def number(writer: PdfWriter, start: int) -> None:
    """A number at the foot of every page from `start` on, in a font that every reader of PDFs has."""
    font = writer._add_object(DictionaryObject({
        NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"), NameObject("/BaseFont"): NameObject("/Helvetica"),
    }))
    for i, page in enumerate(writer.pages):
        if i < start:
            continue
        x = float(page.mediabox.width) / 2 - 2.5 * len(str(i + 1))
        foot = f"q 0.35 g BT /FolioFont 9 Tf {x:.1f} 28 Td ({i + 1}) Tj ET Q"
        fonts = page["/Resources"].get_object().setdefault(NameObject("/Font"), DictionaryObject()).get_object()
        fonts[NameObject("/FolioFont")] = font
        content = DecodedStreamObject()
        content.set_data(b"q\n" + page.get_contents().get_data() + b"\nQ\n" + foot.encode())
        page[NameObject("/Contents")] = writer._add_object(content.flate_encode())


def make(file: Path) -> int:
    """Print the book into `file`; its number of pages."""
    parts, own = parts_of(ROOT / "_toc.yml"), page_shell.settings()
    addresses = [address for _, found in parts for address in found]
    with open_browser() as browser:
        printed = {}
        for address in addresses:
            printed[address] = print_page(browser, address)
            print(f"  {address}", flush=True)
        pages, count = {}, 0
        for address, (title, data) in printed.items():
            pages[address] = (title, count)
            count += len(PdfReader(io.BytesIO(data)).pages)
        front = print_front(browser, parts, pages)
    writer = PdfWriter()
    writer.append(io.BytesIO(front), import_outline=False)
    shift = len(writer.pages)
    for address, (title, data) in printed.items():
        writer.append(io.BytesIO(data))  # with the outline of its headings
    mend_links(writer, {address: first + shift for address, (_, first) in pages.items()})
    number(writer, 1)
    writer.compress_identical_objects()
    writer.add_metadata({"/Title": own["title"], "/Author": own["author"], "/Subject": own["description"]})
    file.parent.mkdir(parents=True, exist_ok=True)
    writer.write(file)
    return len(writer.pages)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=HTML / page_shell.PDF)
    arguments = parser.parse_args()
    if not (HTML / "index.html").exists():
        print("There is no book to print: `make book` builds it.", file=sys.stderr)
        return 1
    count = make(arguments.file)
    print(f"{count} pages, {arguments.file.stat().st_size / 1e6:.1f} MB: {arguments.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
