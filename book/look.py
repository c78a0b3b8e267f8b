"""Look at every page of the built book in a browser, from the folder on the disk: wide and narrow, light and dark.

    python book/look.py [NAME ...]    all pages, or those whose address contains a NAME

A page passes if it never scrolls sideways, reports no error, asks no other host for anything, weighs less than 1.5 MB
(compressed, without MathJax, which all pages share), shows every figure large enough and in ink that stands out from its
ground, sets every formula, opens every fold, can be copied, downloaded, run and complained about, and if axe finds nothing
serious in it. Pictures of the pages are left in _build/screenshots.
"""

import argparse
import gzip
import importlib.util
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

import check_book
from browser import open_browser

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
PICTURES = ROOT / "_build" / "screenshots"
WIDTHS = {1280: 900, 390: 844}  # a laptop's window and a telephone's
SLICE = 8000  # pixels: a browser draws no picture that is much higher
SLICES = 4  # the longest pages, such as the API, are ten times as high on a telephone
HEAVIEST = 1_500_000  # bytes
SIDEWAYS = """() => {
  const root = document.documentElement, out = [];
  if (root.scrollWidth <= root.clientWidth) return out;
  for (const e of document.querySelectorAll("main *"))
    if (e.getBoundingClientRect().right > root.clientWidth + 1 && out.length < 3) out.push(e.tagName.toLowerCase() + "." + e.className);
  return [`scrolls sideways (${root.scrollWidth} pixels), because of ${out.join(", ") || "something outside the text"}`];
}"""
FIGURES = """() => {
  const out = [];
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = parts(color).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (color !== "transparent" && (parts(color)[3] ?? 1) > 0.5) return color;
    }
    return "rgb(255, 255, 255)";
  };
  for (const figure of document.querySelectorAll("figure.annotated-figure")) {
    const svg = figure.querySelector("svg"), name = "#" + figure.id;
    if (!svg) { out.push(`${name} has no picture`); continue; }
    const box = svg.getBoundingClientRect(), drawn = svg.viewBox.baseVal.width;
    if (box.width < 40 || box.height < 10) out.push(`${name} cannot be seen`);
    else if (box.width / drawn < 0.75) out.push(`${name} is shrunk to ${(box.width / drawn).toFixed(2)} pixels a point: nobody can read it`);
    const scrolls = svg.closest(".output.text_html");
    if (!scrolls && box.right > document.documentElement.clientWidth + 1) out.push(`${name} is cut off`);
    const [one, other] = [light(getComputedStyle(svg).color), light(ground(svg))].sort((a, b) => b - a);
    if ((one + 0.05) / (other + 0.05) < 4.5) out.push(`${name}'s ink does not stand out from its ground`);
    if (!(figure.querySelector("figcaption")?.innerText || "").trim()) out.push(`${name} has no caption`);
  }
  for (const image of document.images) if (image.complete && !image.naturalWidth) out.push(`the picture ${image.src.slice(0, 80)} is broken`);
  return out;
}"""
FOLDS = """() => {
  const out = [];
  for (const fold of document.querySelectorAll("main details")) {
    const summary = fold.querySelector("summary"), name = summary?.innerText.trim().slice(0, 40);
    if (!fold.open) summary?.click();
    const shown = [...fold.children].some((e) => e !== summary && e.getBoundingClientRect().height > 5);
    if (!fold.open || !shown) out.push(`the fold "${name}" does not open`);
  }
  return out;
}"""
SHELL = """(notebook) => {
  const out = [];
  const need = (selector, what) => document.querySelector(selector) || out.push(`has no ${what}`);
  if (document.querySelector("mjx-merror, [data-mjx-error]")) out.push("has a formula that MathJax does not understand");
  const raw = [...document.querySelectorAll("span.math, div.math")].filter((e) => !e.querySelector("mjx-container")).length;
  if (raw) out.push(`has ${raw} formulas that were not set`);
  const codes = document.querySelectorAll("div.cell_input div.highlight"), copies = document.querySelectorAll("div.cell_input .copybtn");
  if (codes.length !== copies.length) out.push(`has ${codes.length} code cells, but ${copies.length} buttons to copy them`);
  for (const title of document.querySelectorAll("main section > h2")) if (!title.querySelector("a.headerlink")) out.push(`"${title.innerText}" cannot be linked to`);
  need('meta[name="description"]', "description");
  need('link[rel="canonical"]', "address of its own");
  need('meta[property="og:image"]', "card");
  need(".search-button, .search-button-field", "search");
  need(".theme-switch-button, .theme-switch", "switch between light and dark");
  need(".prev-next-area a", "link to the next or the last page");
  need('.page-tools a[href*="/issues/new"]', "link to report a mistake");
  need(".page-tools a[download]", "link to download it");
  if (notebook) need('a[href*="colab.research.google.com"]', "button for Colab");
  return out;
}"""
AXE = """(rules) => axe.run(document, { preload: false, resultTypes: ["violations"], ...(rules && { runOnly: rules }) }).then((result) => result.violations
  .filter((found) => ["serious", "critical"].includes(found.impact))
  .map((found) => `axe: ${found.help} (${found.id}), for example ${found.nodes[0].html.slice(0, 120)}`))"""

# The inside of a drawing has nothing for axe but thousands of lines to go through; the drawing itself stays, with its name.
STRIP = """() => document.querySelectorAll("figure.annotated-figure svg, mjx-container svg").forEach((drawing) =>
  drawing.replaceChildren(...drawing.querySelectorAll(":scope > title, :scope > desc")))"""
COLOURS = ["color-contrast", "link-in-text-block"]  # what the dark theme can have wrong that the light one has not


def pages(names: list[str]) -> list[str]:
    """The addresses of the book's pages, as parts of the folder of the book."""
    paths = sorted(path for folder in ("nbs", "book") for path in (HTML / folder).rglob("*.html"))
    addresses = [path.relative_to(HTML).as_posix() for path in paths] + ["search.html"]
    return [address for address in addresses if not names or any(name in address for name in names)]


def axe_script() -> str | None:
    """The text of axe-core, which comes with a package for playwright."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None:
        return None
    (script,) = Path(found.origin).parent.rglob("axe.min.js")
    return script.read_text(encoding="utf8")


def weight(urls: set[str]) -> int:
    """The bytes that a visitor's browser gets for these files, compressed as web hosts do."""
    paths = {Path(unquote(urlsplit(url).path)) for url in urls if url.startswith("file:") and "mathjax" not in url}
    return sum(len(path.read_bytes() if path.suffix == ".woff" else gzip.compress(path.read_bytes(), 6)) for path in paths if path.is_file())


def look(address: str) -> tuple[str, list[str], float]:
    """Everything that is wrong with one page, at every width, light and dark."""
    started, problems = time.monotonic(), []
    with open_browser() as browser:
        for width, height in WIDTHS.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light", reduced_motion="reduce")
            page, urls, said = context.new_page(), set(), []
            page.set_default_timeout(300_000)
            page.on("request", lambda request: urls.add(request.url))
            page.on("console", lambda message: said.append(f"the console says: {message.text}") if message.type == "error" else None)
            page.on("pageerror", lambda error: said.append(f"a script fails: {error}"))
            # "Aborted" is a load that a step to the next page cut off; a file that is not there fails in other words.
            page.on("requestfailed", lambda request: said.append(f"{request.url[:120]} was not loaded") if request.failure != "net::ERR_ABORTED" else None)
            page.goto((HTML / address).as_uri())
            if "search.html" in address:
                said += [] if found_something(page) else ["a search for “matcher” finds nothing"]
            else:
                page.evaluate("annotated.ready()")
                said += page.evaluate(SHELL, address.startswith("nbs/")) + page.evaluate(SIDEWAYS) + page.evaluate(FOLDS)
            for theme in ("light", "dark"):
                page.emulate_media(color_scheme=theme)
                page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
                said += page.evaluate(SIDEWAYS) + page.evaluate(FIGURES)
                photograph(page, PICTURES / f"{Path(address).stem}-{width}-{theme}", width)
            if width == max(WIDTHS) and (script := axe_script()):
                page.evaluate(script)
                page.evaluate(STRIP)
                said += page.evaluate(AXE, COLOURS)
                page.emulate_media(color_scheme="light")
                said += page.evaluate(AXE)
            said += [f"asks another host: {url}" for url in urls if not url.startswith(("file:", "data:", "blob:"))]
            if (heavy := weight(urls)) > HEAVIEST:
                said.append(f"weighs {heavy:,} bytes")
            problems += [f"{address} at {width} pixels {sentence}" for sentence in said]
            context.close()
    return address, list(dict.fromkeys(problems)), time.monotonic() - started


def found_something(page) -> bool:
    """Does a search, from the folder on the disk, find a word that is in the book?"""
    page.goto(page.url + "?q=matcher")
    page.wait_for_selector("#search-results li a")
    return page.locator("#search-results li a").count() > 0


def photograph(page, stem: Path, width: int) -> None:
    """The page from its top as pictures below each other."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    height = page.evaluate("document.documentElement.scrollHeight")
    for i, top in enumerate(range(0, min(height, SLICES * SLICE), SLICE)):
        clip = {"x": 0, "y": top, "width": width, "height": min(SLICE, height - top)}
        page.screenshot(path=f"{stem}-{i}.jpg", type="jpeg", quality=60, full_page=True, clip=clip, animations="disabled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    if not (HTML / "index.html").exists():
        print("There is no book to look at: `make book` builds it.", file=sys.stderr)
        return 1
    with open_browser():
        pass  # no browser is said once, and not by every worker
    found = [] if arguments.names else check_book.check(HTML, ROOT)
    addresses = pages(arguments.names)
    started = time.monotonic()
    with ProcessPoolExecutor(2) as workers:
        for address, problems, seconds in workers.map(look, addresses):
            print(f"  {address:<36} {'ok' if not problems else f'{len(problems)} problems':<12} {seconds:5.1f} s", flush=True)
            found += problems
    print("\n".join(found))
    print(f"{len(addresses)} pages, {len(found)} problems ({time.monotonic() - started:.0f} s); pictures of the pages: {PICTURES}")
    return 1 if found or not addresses else 0


if __name__ == "__main__":
    sys.exit(main())
