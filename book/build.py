"""Build the book: run every notebook whose code, or the code that it imports, has changed; render; check the pages.

    python book/build.py            strict: a warning fails the build
    python book/build.py --lenient  warnings are shown and forgiven (while writing)
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lenient", action="store_true", help="show warnings, but do not fail")
    arguments = parser.parse_args()
    started = time.monotonic()
    stamp, inputs = HTML / ".inputs", digest_of_inputs()
    if stamp.exists() and stamp.read_text(encoding="utf8") == inputs:
        print(f"The book is up to date. Open it in a browser:\n  {(HTML / 'index.html').as_uri()}")
        return 0
    shutil.rmtree(HTML, ignore_errors=True)
    shutil.rmtree(ROOT / "_build" / "jupyter_execute", ignore_errors=True)
    (ROOT / ".cache" / "jupyter").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", ".", "--all", "-q", "-n", "--keep-going"]
    command += [] if arguments.lenient else ["-W"]
    print("Building the book. The first time every notebook runs, training included; later only what has changed.", flush=True)
    # The kernels and every tool they call come from this environment, whatever the PATH of the caller.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    status = run(command, environment)
    if status:
        print("The book was not built: see the messages above.", file=sys.stderr)
        return status
    import check_book

    problems = check_book.check(HTML, ROOT)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and not arguments.lenient:
        print(f"{len(problems)} problems on the pages of the book.", file=sys.stderr)
        return 1
    if not arguments.lenient:
        stamp.write_text(inputs, encoding="utf8")
    print(f"The book is built ({time.monotonic() - started:.0f} s). Open it in a browser:\n  {(HTML / 'index.html').as_uri()}")
    return 0


def digest_of_inputs() -> str:
    """A digest of everything that the pages are made from; when it is that of the last build, the pages are, too."""
    digest = hashlib.sha256(f"{sys.version} {os.environ.get('ANNOTATED_DETR_BCCD', '')}".encode())
    files = [ROOT / name for name in ("_config.yml", "_toc.yml", "settings.ini")]
    for folder in ("nbs", "annotated_detr", "book"):
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)]
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def run(command: list[str], environment: dict[str, str]) -> int:
    """Run the build; pass on what it says, but for two kinds of noise: the line with which every kernel announces how it is spoken
    to and, when a notebook fails, the builder's own traceback behind the notebook's.
    """
    quiet, held = False, []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("[IPKernelApp]"):
                continue
            held.append(line)
            if "above exception was the direct cause" in held[0] and len(held) < 4:
                continue  # whose traceback follows? the builder's own is of no use to a reader
            quiet = quiet or (len(held) == 4 and "jupyter_book/sphinx.py" in line)
            if not quiet:
                print("".join(held), end="", file=sys.stderr, flush=True)
            elif "ExecutionError: " in line:
                print(f"\nA notebook stopped with an error: {line.split('ExecutionError: ')[1]}", end="", file=sys.stderr, flush=True)
            held = []
        if not quiet:
            print("".join(held), end="", file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
