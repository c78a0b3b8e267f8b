"""Does annotated_detr hold exactly what the notebooks export, and are the notebooks clean?

    python book/check_drift.py          works on a copy, so a tree with changes in it is fine; exit code 1 and a list if not
    python book/check_drift.py --write  writes the modules from the notebooks and cleans the notebooks, here
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(tool: str, folder: Path) -> None:
    """Run one of nbdev's console commands in `folder`, whose settings.ini it reads."""
    done = subprocess.run([Path(sys.executable).parent / tool], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stdout}{done.stderr}")


def export(folder: Path) -> None:
    """Notebooks → modules, then notebooks without outputs and editor metadata."""
    run("nbdev_export", folder)
    run("nbdev_clean", folder)


def exported_modules(folder: Path) -> set[str]:
    """The modules that the notebooks name in `#| default_exp`."""
    names = set()
    for path in (folder / "nbs").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            match = re.match(r"\s*#\|\s*default_exp\s+(\S+)", "".join(cell["source"])) if cell["cell_type"] == "code" else None
            if match:
                names.add(match[1])
    return names


def orphans(folder: Path) -> list[Path]:
    """Modules that no notebook exports any more."""
    wanted = exported_modules(folder)
    return [path for path in sorted((folder / "annotated_detr").glob("*.py")) if not path.stem.startswith("_") and path.stem not in wanted]


def drift(root: Path = ROOT) -> list[str]:
    """Every file that an export and a clean would change, create or leave orphaned, one sentence each."""
    problems = [f"annotated_detr/{path.name} comes from no notebook: delete it, or name it in `#| default_exp`." for path in orphans(root)]
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        for folder in ("nbs", "annotated_detr"):
            shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(root / name, copy / name)
        export(copy)
        for folder, patterns in (("nbs", ("*.ipynb",)), ("annotated_detr", ("*.py",))):
            for pattern in patterns:
                for path in sorted((copy / folder).glob(pattern)):
                    here = root / folder / path.name
                    if not here.exists():
                        problems.append(f"{folder}/{path.name} is missing: run `make export`.")
                    elif here.read_bytes() != path.read_bytes():
                        what = "differs from what its notebook exports" if folder == "annotated_detr" else "holds outputs or metadata"
                        problems.append(f"{folder}/{path.name} {what}: run `make export`.")
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="export and clean in place")
    if parser.parse_args().write:
        export(ROOT)
        for path in orphans(ROOT):
            print(f"annotated_detr/{path.name} comes from no notebook; delete it if it is not needed.")
        sys.exit(0)
    found = drift()
    print("\n".join(found) or "The notebooks and the package agree.")
    sys.exit(bool(found))
