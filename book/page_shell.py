"""What stands around the text of a page: its head, the links below it, and the files that a web site needs beside its pages.

`setup` is called by the extension `annotated_book`. Names, version and address come from settings.ini. Nothing is fetched
from another host, and every page works from a folder on a disk.
"""

import configparser
import html
import importlib.metadata
import re
import shutil
from pathlib import Path
from urllib.parse import quote

from docutils import nodes

ROOT = Path(__file__).resolve().parent.parent
MATHJAX = "vendor/mathjax/tex-svg.js"
PDF = "the-annotated-detr.pdf"
CARD = "_static/card.png"
SYSTEM_THEME = 'matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"'
# What the theme writes that a listener to the page, a checker or a reader in the dark would stumble over.
MENDED = [
    # Parts that are not used, or that are there twice: live code, and 1.4 MB of icons that the theme's fonts have as well.
    (r"\s*<(?:script|link)\b[^>]*fontawesome\.js[^>]*>(?:\s*</script>)?", ""),
    (r"\s*<(?:link|script)\b[^>]*thebe[^>]*>(?:[^<]*</script>)?", ""),
    # Scripts do not hold up the page. (What they set up is done when it has been read; their order stays.)
    (r'<script((?: data-sd-[\w-]+="[^"]*")?) src="([^"]*(?:doctools|sphinx_highlight|clipboard\.min|copybutton|sphinx-book-theme|togglebutton|design-tabs|searchtools|language_data|searchindex)\.js)', r'<script\1 defer src="\2'),
    # The page's own colours from the first moment, where nobody has chosen any.
    (r'localStorage\.getItem\("mode"\) \|\| ""', 'localStorage.getItem("mode") || "auto"'),
    (r'localStorage\.getItem\("theme"\) \|\| ""', f'localStorage.getItem("theme") || ({SYSTEM_THEME})'),
    (r'data-default-mode=""', 'data-default-mode="auto"'),
    # A label that is read out must hold the words that are seen: the words alone do.
    (r'(<summary) aria-label="Toggle hidden content"', r"\1"),
    (r'(<button class="btn search-button-field[^>]*?) aria-label="Search"', r"\1"),
    # The side bar is a landmark, as are the head and the foot.
    (r'<div id="pst-primary-sidebar" class=', '<div id="pst-primary-sidebar" role="region" aria-label="The book" class='),
]


def settings() -> dict[str, str]:
    """What settings.ini says, and what follows from it: `site`, `source` (addresses without a last slash) and `tag`."""
    file = configparser.ConfigParser()
    file.read(ROOT / "settings.ini", encoding="utf8")
    own = dict(file["DEFAULT"])
    own["site"] = own["doc_host"] + own["doc_baseurl"]
    own["source"] = f"https://github.com/{own['user']}/{own['repo']}"
    own["tag"] = f"v{own['version']}"
    return own


def configure(app, config):
    """The address of the site; notebooks open on Colab as they were when this version was tagged."""
    own = settings()
    config.html_baseurl = f"{own['site']}/"
    config.html_theme_options["repository_branch"] = own["tag"]


# --- a page -----------------------------------------------------------------------------------------------------------


def summary(text: str, limit: int = 200) -> str:
    """The first whole sentences of a text that fit into `limit` characters or, if there are none, its first words."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    ends = [match.end() for match in re.finditer(r"[.?!](?=\s)", text[: limit + 1])]
    return text[: ends[-1]] if ends and ends[-1] > limit // 3 else text[:limit].rsplit(" ", 1)[0].rstrip(",;:") + " …"


def dress_head(app, pagename, templatename, context, doctree):
    """The first paragraph as the page's description, for search engines, and a card for those who pass its address on."""
    own = settings()
    paragraph = next((node for node in doctree.findall(nodes.paragraph)), None) if doctree else None
    described = summary(paragraph.astext() if paragraph is not None else own["description"])
    title = re.sub(r"<[^>]+>", "", context.get("title") or "") or own["title"]
    values = {
        "description": described,
        "og:type": "article",
        "og:site_name": own["title"],
        "og:title": html.unescape(title),
        "og:description": described,
        "og:url": f"{own['site']}/{pagename}.html",
        "og:image": f"{own['site']}/{CARD}",
        "og:image:alt": "Pictures of scenes with the boxes, classes and scores that the book's own detector found in them.",
        "twitter:card": "summary_large_image",
    }
    tags = [
        f'<meta {"property" if name.startswith("og:") else "name"}="{name}" content="{html.escape(value)}" />'
        for name, value in values.items()
    ]
    context["metatags"] = context.get("metatags", "") + "\n".join(tags)


def dress_foot(app, pagename, templatename, context, doctree):
    """Below the text: where to run the page, its source, where to report a mistake, and the whole book as one file."""
    if doctree is None:
        return
    own = settings()
    links = []
    up = "../" * pagename.count("/")
    if pagename.startswith("nbs/"):
        notebook = f"{own['user']}/{own['repo']}/blob/{own['tag']}/{pagename}.ipynb"
        links.append((f"https://colab.research.google.com/github/{notebook}", "Run this page on Colab", ""))
    if context.get("sourcename"):
        kind = "notebook" if context["sourcename"].endswith(".ipynb") else "page's source"
        links.append((f"{up}_sources/{context['sourcename']}", f"Download the {kind}", " download"))
    words = f"Page: {own['site']}/{pagename}.html\n\nWhat is wrong:\n\n\nIf you ran it, what `annotated_detr.versions()` says:\n"
    mistake = f"{own['source']}/issues/new?title={quote('Mistake in ' + pagename)}&body={quote(words)}"
    links.append((mistake, "Report a mistake", ""))
    links.append((f"{own['site']}/{PDF}", "The whole book as a PDF", ""))
    items = "".join(f'<li><a href="{html.escape(url)}"{more}>{text}</a></li>' for url, text, more in links)
    context["body"] = context["body"] + f'<ul class="page-tools d-print-none" aria-label="This page">{items}</ul>'


def take_scripts_away(app, pagename, templatename, context, doctree):
    """Live code is not used, and names another host; MathJax is fetched by annotated.js when a formula comes near."""
    def wanted(script) -> bool:
        said = str(getattr(script, "filename", "")) + str(script.attributes.get("body", ""))
        return "thebe" not in said and MATHJAX not in said

    context["script_files"] = [script for script in context["script_files"] if wanted(script)]


def mend(text: str) -> str:
    """A page as the theme wrote it → the page as it is published."""
    for pattern, replacement in MENDED:
        text = re.sub(pattern, replacement, text)
    return text


# --- the files beside the pages ---------------------------------------------------------------------------------------


def copy_vendored(app):
    """Put MathJax (Apache 2.0) into the output, where every page finds it without a network."""
    files = importlib.metadata.distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")
    target = Path(app.outdir) / "_static" / MATHJAX
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(str(files)) / target.name, target)


def finish(app, exception):
    """Mend every page; write the first page, the page for addresses that are not there, the map of the site and its card."""
    if exception or app.builder.format != "html":
        return
    finish_folder(Path(app.outdir))
    import card
    import icons

    icons.keep_what_is_shown(Path(app.outdir))
    card.draw(Path(app.outdir) / "_static")


def finish_folder(out: Path) -> None:
    """Everything that `finish` does to a folder of pages, but for the pictures."""
    for pattern in ("scripts/fontawesome.js*", "sphinx-thebe.*", "scripts/*.map", "styles/*.map"):
        for path in (out / "_static").glob(pattern):
            path.unlink()
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf8")
        mended = mend(text)
        if mended != text:
            page.write_text(mended, encoding="utf8")
    own = settings()
    (out / "index.html").write_text(first_page(own), encoding="utf8")
    (out / "404.html").write_text(missing_page(own), encoding="utf8")
    (out / "sitemap.xml").write_text(site_map(own, out), encoding="utf8")
    (out / ".nojekyll").touch()  # GitHub's pages would otherwise leave out every folder that begins with an underscore


def first_page(own: dict[str, str]) -> str:
    """The address of the site itself leads to the book's first page."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{own["title"]}</title><meta name="description" content="{own["description"]}">
<link rel="canonical" href="{own["site"]}/nbs/index.html"><link rel="icon" href="_static/favicon.svg">
<meta property="og:title" content="{own["title"]}"><meta property="og:image" content="{own["site"]}/{CARD}">
<meta http-equiv="refresh" content="0; url=nbs/index.html"></head>
<body><main><h1>{own["title"]}</h1><p><a href="nbs/index.html">The book begins here.</a></p></main></body></html>
"""


def missing_page(own: dict[str, str]) -> str:
    """What a server shows for an address that is not there; it may be deep, so links begin at the site's own address."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>No such page · {own["title"]}</title><meta name="robots" content="noindex"><base href="{own["site"]}/">
<link rel="icon" href="_static/favicon.svg"><style>
:root {{ color-scheme: light dark }} body {{ font: 1.1rem/1.6 system-ui, sans-serif; max-width: 34rem; margin: 15vh auto; padding: 0 1.5rem }}
</style></head><body><main><h1>No such page</h1>
<p>No query found anything at this address. Perhaps a chapter was renamed.</p>
<p><a href="nbs/index.html">The book's first page</a> · <a href="search.html">Search</a> ·
<a href="{own["source"]}/issues/new?title={quote("A link leads nowhere")}">Report the link that led here</a></p></main></body></html>
"""


def site_map(own: dict[str, str], out: Path) -> str:
    """The addresses that search engines should know."""
    pages = sorted([*(out / "nbs").glob("*.html"), *(out / "book").rglob("*.html")])
    places = "".join(f"<url><loc>{own['site']}/{page.relative_to(out).as_posix()}</loc></url>\n" for page in pages)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{places}</urlset>\n'


def setup(app):
    app.connect("config-inited", configure)
    app.connect("builder-inited", copy_vendored)
    app.connect("html-page-context", take_scripts_away, priority=900)
    app.connect("html-page-context", dress_head)
    app.connect("html-page-context", dress_foot)
    app.connect("build-finished", finish, priority=900)
