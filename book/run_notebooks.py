"""Run every notebook as Colab would: in an empty folder, where only the built wheel with its extras is installed.

    python book/run_notebooks.py [NAME ...]    all notebooks, or those whose file name starts with a NAME
    python book/run_notebooks.py --here        in the environment of this Python, where the package is installed already
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-wheel"
PYTHON = VENV / "bin" / "python"


def shell(*command, **options) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


def install_wheel() -> None:
    """Build the wheel and install it, with its extras for notebooks, into an environment that holds nothing else."""
    uv = Path(sys.executable).parent / "uv"
    with tempfile.TemporaryDirectory() as place:
        shell(uv, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--quiet", "-o", place)
        (wheel,) = Path(place).glob("*.whl")
        digest = hashlib.sha256((ROOT / "book" / "lock.txt").read_bytes()).hexdigest()
        stamp = VENV / f".ready-{digest[:16]}"
        if not stamp.exists():
            print("Setting up .venv-wheel: the wheel, its extras, and nothing else.", flush=True)
            shell(uv, "venv", "--quiet", "--clear", "--python", sys.executable, VENV)
            requirements = Path(place) / "constraints.txt"
            requirements.write_text(constraints(), encoding="utf8")
            shell(uv, "pip", "install", "--quiet", "--python", PYTHON, "-c", requirements, f"annotated-detr[notebooks,tensorboard] @ {wheel.as_uri()}")
            stamp.touch()
        else:
            shell(uv, "pip", "install", "--quiet", "--python", PYTHON, "--no-deps", "--reinstall", wheel)


def constraints() -> str:
    """The lock file's versions, without its hashes."""
    text = (ROOT / "book" / "lock.txt").read_text(encoding="utf8")
    lines = [line.rstrip(" \\") for line in text.splitlines() if "==" in line and not line.startswith((" ", "#"))]
    return "\n".join(lines) + "\n"


def run(path: Path, python: Path) -> str | None:
    """Run one notebook in an empty folder with the given interpreter; what went wrong, or None."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "#| eval: false" in cell.source:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "skip-execution"]
    with tempfile.TemporaryDirectory() as empty:
        manager = AsyncKernelManager()
        manager.kernel_spec.argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        client = NotebookClient(notebook, km=manager, timeout=None, resources={"metadata": {"path": empty}})
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}", "TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        with tempfile.TemporaryFile("w+") as said:  # what the kernel itself says, as against the cells
            try:
                client.execute(env=environment, stderr=said)
            except CellExecutionError as error:
                return str(error)
            except DeadKernelError as error:
                said.seek(0)
                return f"{error}\n{said.read()}"
    return None


def main() -> int:
    here = "--here" in sys.argv
    names = [name for name in sys.argv[1:] if name != "--here"]
    paths = [path for path in sorted((ROOT / "nbs").glob("*.ipynb")) if not names or path.name.startswith(tuple(names))]
    if not here:
        install_wheel()
    failed = 0
    for path in paths:
        started = time.monotonic()
        problem = run(path, Path(sys.executable) if here else PYTHON)
        print(f"  {path.stem:<28} {'FAILED' if problem else 'ok':<7} {time.monotonic() - started:6.1f} s", flush=True)
        if problem:
            failed += 1
            print(problem[-4000:])
    print(f"{len(paths) - failed} of {len(paths)} notebooks ran where {'this Python finds the package' if here else 'only the wheel is installed'}.")
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
