"""Does annotated_detr hold exactly what the notebooks export, do all notebooks begin alike, and are they clean?

    python book/check_drift.py          works on a copy, so a tree with changes in it is fine; exit code 1 and a list if not
    python book/check_drift.py --write  does it here: the first cells of the notebooks, the modules, and no outputs
"""

import argparse
import configparser
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# How every notebook begins, so that it runs where there is nothing but Python; owner, names and version are settings.ini's.
HEAD = "#| hide\n# On Colab or any bare machine: install the package that this book exports."
INSTALL = HEAD + """ It leaves the torch that is there alone.
import importlib.util
if importlib.util.find_spec("{lib_name}") is None:
    %pip install -q "{package} @ git+https://github.com/{user}/{repo}@v{version}"
from {lib_name} import versions
print(versions())"""


def run(tool: str, folder: Path) -> None:
    """Run one of nbdev's console commands in `folder`, whose settings.ini it reads."""
    done = subprocess.run([Path(sys.executable).parent / tool], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stdout}{done.stderr}")


def install_cell(folder: Path = ROOT) -> str:
    """The cell with which every notebook begins."""
    settings = configparser.ConfigParser()
    settings.read(folder / "settings.ini", encoding="utf8")
    names = settings["DEFAULT"]
    return INSTALL.format_map({**names, "package": names["lib_name"].replace("_", "-")})


def write_install_cells(folder: Path) -> None:
    """Every notebook begins with the cell of `install_cell`."""
    for path in (folder / "nbs").glob("*.ipynb"):
        text = path.read_text(encoding="utf8")
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            if "".join(cell["source"]).startswith(HEAD):
                cell["source"] = install_cell(folder).splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf8")


def export(folder: Path) -> None:
    """The notebooks' first cells, notebooks → modules, then notebooks without outputs and editor metadata."""
    write_install_cells(folder)
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
