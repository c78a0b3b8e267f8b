"""Measure the chapters: how long they are, and how often something is seen in them. To be looked at, not to be written for.

    python book/report.py

Words are those of the prose, code lines those of visible cells without blank lines and directives. A figure is a cell that
shows one; a check is a visible cell that asserts something or stands under a heading "Check it". The longest way without a figure or a live value is given in
words. Seconds and bytes are those of the last build; without one the columns stay empty.
"""

import re
import statistics
import sys
from pathlib import Path

import around
from annotated_book import split_directives

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = "words, lines, words/line, median, longest, cells, figures, exercises, checks, way, seconds, kB".split(", ")


def words_of(text: str) -> int:
    """Words of Markdown, without code blocks, tables and addresses."""
    text = re.sub(r"\]\([^)]*\)|<[^>]+>|^\|.*$", " ", around.without_fences(text), flags=re.M)
    return len(re.findall(r"[^\W_][\w'’.,-]*", text))


def shows_a_value(source: str) -> bool:
    """Does the cell end in an expression, print, or show a figure?"""
    last = source.strip().splitlines()[-1] if source.strip() else ""
    return bool(re.search(r"\bprint\(|\bshow\(", source)) or not re.match(r"\s|@|def |class |import |from |assert |[\w., ]+ =|for |with |#|\)|$", last)


def measure(path: Path, seconds: float | None) -> dict[str, float | None]:
    """The numbers of one chapter."""
    words = way = longest_way = figures = checks = 0
    lengths, text, checking = [], "", False
    for kind, source in around.cells(path):
        if kind == "markdown":
            for heading in re.findall(r"^#{1,4} (.*)", around.without_fences(source), flags=re.M):
                checking = heading.startswith("Check it")
            text += source + "\n"
            words += words_of(source)
            way += words_of(source)
        else:
            directives, code = split_directives(source)
            if "hide" in directives or "default_exp" in directives:
                continue
            shown = bool(re.search(r"\bshow\(", code))
            figures += shown
            if directives.get("echo") != "false":
                lengths.append(sum(bool(line.strip()) for line in code.splitlines()))
                checks += checking or bool(re.search(r"^\s*assert\b", code, flags=re.M))
            if (shown or shows_a_value(code)) and directives.get("output") != "false":
                longest_way, way = max(longest_way, way), 0
    page = ROOT / "_build" / "html" / "nbs" / f"{path.stem}.html"
    return {
        "words": words,
        "lines": sum(lengths),
        "words/line": words / max(sum(lengths), 1),
        "median": statistics.median(lengths or [0]),
        "longest": max(lengths, default=0),
        "cells": len(lengths),
        "figures": figures,
        "exercises": len(re.findall(r"^\*\*Exercise \d", text, flags=re.M)),
        "checks": checks,
        "way": max(longest_way, way),
        "seconds": seconds,
        "kB": page.stat().st_size / 1000 if page.exists() else None,
    }


def seconds_of_the_last_build(folder: Path = ROOT / ".cache" / "jupyter") -> dict[str, float]:
    """Name of a notebook → the seconds that its cells took when they ran last, from the build's cache."""
    if not (folder / "global.db").exists():
        return {}
    from jupyter_cache import get_cache

    records = sorted(get_cache(folder).list_cache_records(), key=lambda record: record.created)
    return {Path(record.uri).stem: record.data["execution_seconds"] for record in records if "execution_seconds" in record.data}


def report() -> str:
    """The table, a line for each chapter."""
    seconds = seconds_of_the_last_build()
    stems = re.findall(r"nbs/(\w+)", (ROOT / "_toc.yml").read_text(encoding="utf8"))
    lines = [f"{'':24}" + "".join(f"{name:>11}" for name in COLUMNS)]
    for stem in stems:
        numbers = measure(ROOT / "nbs" / f"{stem}.ipynb", seconds.get(stem))
        shown = ("" if numbers[name] is None else f"{numbers[name]:,.1f}" if name == "words/line" else f"{numbers[name]:,.0f}" for name in COLUMNS)
        lines.append(f"{stem:24}" + "".join(f"{value:>11}" for value in shown))
    return "\n".join([*lines, "", "median, longest: lines of a visible cell; way: the most words without a figure or a live value"])


if __name__ == "__main__":
    print(report())
    sys.exit(0)
