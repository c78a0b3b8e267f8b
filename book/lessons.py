"""What `tiny` owes to small batches, a long warm-up and its lessons: the same short run on scenes, with one thing more left out each time.

    python book/lessons.py FOLDER    about 7 minutes a run on one CPU core; writes annotated_detr/lessons.json

A run that is done is not repeated, so the script can be stopped and started again, and two of them can share the work:
`--only NAME` makes one run, and the last to finish writes the file.
"""

import argparse
import json
import os
import platform
from dataclasses import replace
from pathlib import Path

from annotated_detr import training

RECIPE = training.TrainConfig(scenes=4_000, val_scenes=200, epochs=5)
LARGER = replace(RECIPE, batch_size=16, warmup_steps=800, class_weight=1.0)
RUNS = {
    "the recipe": RECIPE,
    "batches of 16, a short warm-up": LARGER,
    "and no lesson beside DETR": replace(LARGER, dense_weight=0.0),
    "and no warm-up": replace(LARGER, dense_weight=0.0, warmup_steps=0),
    "and queries that start from zeros": replace(LARGER, dense_weight=0.0, warmup_steps=0, model_options={"learned_content": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=RUNS)
    arguments = parser.parse_args()
    folders = {name: arguments.folder / name.replace(" ", "-") for name in RUNS}
    for name in [arguments.only] if arguments.only else RUNS:
        if not (folders[name] / "config.json").exists():
            trainer = training.start(RUNS[name], folders[name])
        else:
            trainer = training.resume(folders[name])
        training.fit(trainer)
    curves = {name: training.RunFolder(folder).read_metrics("validation") for name, folder in folders.items()}
    if any(len(lines) < RECIPE.epochs for lines in curves.values()):
        return  # the run that ends last writes the file
    results = {
        "command": "python book/lessons.py runs/lessons",
        "seed": RECIPE.seed,
        "hardware": f"one thread of {os.cpu_count()} shared CPU cores ({platform.machine()}): seconds are no measure of speed",
        "runs": {
            name: [{key: line[key] for key in ("step", "AP", "AP50")} for line in lines] for name, lines in curves.items()
        },
    }
    path = Path(training.__file__).with_name("lessons.json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
