"""The browser that looks at the pages (look.py) and prints them (make_pdf.py)."""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
# Quiet, and without a request of the browser's own.
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
HOW_TO_GET_ONE = (
    "This needs Chromium or Chrome. On Debian or Ubuntu: apt-get install chromium (or chromium-browser); anywhere: "
    f"{sys.executable} -m playwright install chromium. One in another place is named by the variable BROWSER_PATH."
)


def find_browser(playwright) -> str:
    """The path of a browser: the one that BROWSER_PATH names, one on the PATH, or playwright's own."""
    named = os.environ.get("BROWSER_PATH")
    found = [named] if named else [*filter(None, map(shutil.which, NAMES)), str(MAC), playwright.chromium.executable_path]
    for path in found:
        if Path(path).is_file():
            return path
    raise SystemExit(f"BROWSER_PATH names {named}, which is not there. {HOW_TO_GET_ONE}" if named else HOW_TO_GET_ONE)


@contextmanager
def open_browser():
    """A headless browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as missing:
        raise SystemExit(f"{missing}: `make setup` installs what the pages are looked at with.") from missing
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(playwright), args=FLAGS.split())
        try:
            yield browser
        finally:
            browser.close()
