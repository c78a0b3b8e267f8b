"""The theme brings 2,000 icons in three fonts (860 kB) and a style for each of them (90 kB); the pages show about thirty."""

import logging
import re
from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

RULE = re.compile(r"(?<=[}/])((?:\.fa-[\w-]+:{1,2}before,?)+)\{content:\"[^\"]*\"\}")
SOURCE = re.compile(r"src:url\((?P<folder>[^)]*/)(?P<name>fa-[\w-]+)\.woff2\) format\(\"woff2\"\),url\([^)]*\.ttf\) format\(\"truetype\"\)")


def keep_what_is_shown(out: Path) -> None:
    """Take out of the built book's styles and fonts every icon that no page, script or style of it names."""
    style = out / "_static" / "styles" / "pydata-sphinx-theme.css"
    fonts = out / "_static" / "vendor" / "fontawesome" / "webfonts"
    if not style.exists() or not any(fonts.glob("*.ttf")):
        return
    named = set()
    for path in [*out.rglob("*.html"), *(out / "_static" / "scripts").glob("*.js")]:
        named |= set(re.findall(r"\bfa-[\w-]+", path.read_text(encoding="utf8")))
    text = RULE.sub(lambda rule: rule[0] if named & set(re.findall(r"fa-[\w-]+", rule[1])) else "", style.read_text(encoding="utf8"))
    text = SOURCE.sub(r'src:url(\g<folder>\g<name>.woff) format("woff")', text)
    style.write_text(text, encoding="utf8")
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells the build of every table
    shown = {ord(letter) for letter in text if 0xE000 <= ord(letter) <= 0xF8FF}
    shown |= {int(code, 16) for code in re.findall(r"\\([ef][0-9a-f]{3})\b", text)}
    for path in fonts.glob("*.ttf"):
        font = TTFont(path)
        options = Options(flavor="woff", notdef_outline=True, layout_features=[], drop_tables=["GSUB", "GPOS", "GDEF"])
        subset = Subsetter(options)
        subset.populate(unicodes=shown)
        subset.subset(font)
        font.flavor = "woff"
        font.save(path.with_suffix(".woff"))
        path.unlink()
        path.with_suffix(".woff2").unlink(missing_ok=True)
