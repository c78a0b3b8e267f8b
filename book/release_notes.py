"""What a release says of itself: the part of CHANGELOG.md for its tag, if the tag is that of the version in settings.ini.

    python book/release_notes.py v0.1.0
"""

import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf8")
    version = settings["DEFAULT"]["version"]
    if sys.argv[1] != f"v{version}":
        print(f"The tag is {sys.argv[1]}, but settings.ini has version {version}: tag v{version}, or change the version first.", file=sys.stderr)
        return 1
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    part = re.search(rf"^## {re.escape(version)}\b[^\n]*\n(.*?)(?=^## |\Z)", changes, flags=re.M | re.S)
    if part is None:
        print(f"CHANGELOG.md has no part for {version}.", file=sys.stderr)
        return 1
    print(part[1].strip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
