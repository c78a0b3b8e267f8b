"""Check the rendered pages: nothing that only a machine should see, no broken link or anchor, no request to another host.

    python book/check_book.py [_build/html]
"""

import html.parser
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What must not be read on any page. Code blocks may name a warning class; outputs and prose may not show one.
FORBIDDEN = {
    r"#\|\s*\w": "a notebook directive",
    r"Traceback \(most recent call last\)": "a traceback",
    r"\b\w*Warning: ": "a warning",
    r"\{(?:doc|ref|cite|numref|eq|func|class|term|math|py:\w+)[\w:]*\}`": "a MyST role",
    r"^\s*:::+\s*\{?|^```\{": "a MyST directive",
    r"/tmp/\w|/var/folders/|site-packages/|ipykernel_\d+": "a path of the build machine",
    r"^\s*> ?\[!\w+\]|\[!(?:NOTE|TIP|WARNING|IMPORTANT|CAUTION)\]": "a call-out that was not converted",
}
FETCHING = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("use", "href")}
PASSIVE_LINKS = {"canonical", "next", "prev", "index", "search", "author", "license", "alternate"}


class Page(html.parser.HTMLParser):
    """What a page says, links to, fetches and can be linked at."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.links, self.fetched, self.anchors, self.text, self.code = [], [], [], [], []
        self.images_without_text, self.skipping, self.in_code = 0, 0, 0
        self.feed(path.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if values.get("id"):
            self.anchors.append(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img" and not (values.get("alt") or values.get("aria-hidden")):
            self.images_without_text += 1
        for attribute in ("src", "href"):
            if (tag, attribute) in FETCHING and values.get(attribute):
                if not (tag == "link" and set((values.get("rel") or "").split()) & PASSIVE_LINKS):
                    self.fetched.append(values[attribute])
        if tag in ("script", "style"):
            self.skipping += 1
        if tag == "div" and "highlight" in (values.get("class") or "").split():
            self.in_code = 1
        elif self.in_code and tag == "div":
            self.in_code += 1

    def handle_endtag(self, tag):
        if tag in ("script", "style") and self.skipping:
            self.skipping -= 1
        if tag == "div" and self.in_code:
            self.in_code -= 1

    def handle_data(self, data):
        if not self.skipping:
            (self.code if self.in_code else self.text).append(data)


def check(folder: Path, root: Path) -> list[str]:
    """Everything that is wrong with the pages in `folder`, one sentence each."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html")) if "_static" not in path.relative_to(folder).parts}
    if not pages:
        return [f"There are no pages in {folder}: build the book first."]
    problems = []
    for path, page in pages.items():
        name = path.relative_to(folder).as_posix()
        if name.startswith("_modules/") or name in ("genindex.html", "py-modindex.html", "search.html"):
            words = ""
        else:
            words = "".join(page.text)
        everything = words + "".join(page.code)
        for pattern, what in FORBIDDEN.items():
            for match in list(re.finditer(pattern, words, flags=re.M))[:3]:
                around = " ".join(words[max(0, match.start() - 40) : match.end() + 40].split())
                problems.append(f"{name}: {what} is on the page: …{around}…")
        if re.search(r"^\s*#\s?\|", everything, flags=re.M):
            problems.append(f"{name}: a notebook directive is in a code block")
        raw = path.read_text(encoding="utf8")
        for place in {str(root), str(Path.home())} - {"/", "/root"}:
            if place in raw:
                problems.append(f"{name}: names the folder {place} of the machine that built it")
        if re.search(r"(?<![\w/])/root/\w|/home/\w+/", words):
            problems.append(f"{name}: names a home folder of the machine that built it")
        problems += [f"{name}: fetches {url} from another host" for url in page.fetched if urlsplit(url).netloc]
        problems += [f"{name}: fetches {url}, which is not there" for url in page.fetched if not resolves(url, path)]
        doubled = sorted({anchor for anchor in page.anchors if page.anchors.count(anchor) > 1})
        problems += [f"{name}: the anchor #{anchor} is there twice" for anchor in doubled if anchor.startswith("fig-")]
        if page.images_without_text:
            problems.append(f"{name}: {page.images_without_text} pictures without alternative text")
        for link in page.links:
            problems += broken(link, path, name, pages)
    return list(dict.fromkeys(problems))


def resolves(url: str, page: Path) -> bool:
    """Is the file that a tag fetches there?"""
    parts = urlsplit(url)
    return bool(parts.scheme or parts.netloc or not parts.path or (page.parent / unquote(parts.path)).exists())


def broken(link: str, page: Path, name: str, pages: dict) -> list[str]:
    """A sentence if an internal link leads nowhere."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or link in ("#", ""):
        return []
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.exists():
        return [f"{name}: the link {link} leads to no file"]
    known = {path.resolve(): page for path, page in pages.items()}.get(target.resolve())
    if parts.fragment and known and unquote(parts.fragment) not in known.anchors:
        return [f"{name}: the link {link} leads to no place on that page"]
    return []


if __name__ == "__main__":
    repository = Path(__file__).resolve().parent.parent
    found = check(Path(sys.argv[1] if len(sys.argv) > 1 else repository / "_build" / "html").resolve(), repository)
    print("\n".join(found) or "Every page is clean, and every link leads somewhere.")
    sys.exit(bool(found))
