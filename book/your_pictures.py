"""How well a detector learns a few hundred photographs: blood cells, fine-tuned and from nothing, with all pictures and fewer.

    python book/your_pictures.py DATA FOLDER    about 10 minutes a run on one free CPU core; writes annotated_detr/your_pictures.json

DATA is the folder that `annotated-detr download bccd DATA` makes. A run that is done is not repeated and one that was stopped
goes on, so the script can be killed and started again; `--only NAME` makes one run. The file holds the runs that are done.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from annotated_detr import pretrained, training
from annotated_detr.data import CocoDetection
from annotated_detr.evaluation import evaluate
from annotated_detr.inference import weights_file

FINE_TUNED = training.TrainConfig(
    num_queries=40, size=128, batch_size=8, lr=5e-4, lr_backbone=5e-4, warmup_steps=0, ramp_steps=100, epochs=80, eval_every=10,
    color_jitter=0.3, vertical_flip=True, class_weight=1.0, device="cpu",
)
SCRATCH = replace(FINE_TUNED, warmup_steps=520, epochs=60)  # of the same 2,080 steps a quarter is the warm-up
EPOCHS = {20: 347, 50: 149, 100: 80, 205: 40}  # number of pictures → epochs, for 1,040 steps in batches of 8


def some(count: int, seed: int) -> tuple[training.TrainConfig, str, int | None]:
    """A fine-tuned run of half the steps on some of the pictures."""
    recipe = replace(FINE_TUNED, epochs=EPOCHS[count], eval_every=EPOCHS[count] // 4, seed=seed)
    return recipe, "tiny-scenes", count if count < 205 else None


# The most valuable first. A run's name → recipe, where it starts, how many of the pictures it has.
RUNS = {
    "fine-tuned": (FINE_TUNED, "tiny-scenes", None),
    "205 pictures": some(205, 0),
    "from random weights": (SCRATCH, None, None),
    "50 pictures": some(50, 0),
    "20 pictures": some(20, 0),
    "100 pictures": some(100, 0),
}
RUNS["fine-tuned, random scales"] = (replace(FINE_TUNED, multi_scale=True), "tiny-scenes", None)
RUNS |= {f"{n} pictures, seed {seed}": some(n, seed) for seed in (1, 2) for n in (50, 20, 100, 205)}


def choose(data: Path, count: int | None, seed: int, folder: Path) -> Path:
    """The annotation file of `count` pictures of the training split, drawn by the seed."""
    if count is None:
        return data / "train.json"
    content = json.loads((data / "train.json").read_text(encoding="utf8"))
    kept = random.Random(seed).sample(sorted(image["id"] for image in content["images"]), count)
    content["images"] = [image for image in content["images"] if image["id"] in kept]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"train-{count}-seed-{seed}.json"
    path.write_text(json.dumps(content), encoding="utf8")
    return path


def open_run(data: Path, folder: Path, config: training.TrainConfig, source: str | None, count: int | None) -> training.Trainer:
    """The run where it was stopped, or a new one that starts from `source`."""
    if training.RunFolder(folder).states:
        return training.resume(folder)
    shutil.rmtree(folder, ignore_errors=True)
    train = choose(data, count, config.seed, folder.parent)
    config = replace(config, images=data / "images", annotations=train, val_annotations=data / "val.json")
    trainer = training.start(config, folder)
    if source is not None:
        spec = trainer.spec
        loaded = pretrained.load(source, spec.num_classes, spec.num_queries, class_names=spec.class_names, aux_loss=True)
        trainer.learner.model.load_state_dict(loaded.model.state_dict())
    return trainer


def test_scores(trainer: training.Trainer, data: Path) -> dict[str, Any]:
    """The scores on the test pictures of the weights that were the best on the validation pictures."""
    model, _ = training.load_model(trainer.folder.best)
    pictures = CocoDetection(data / "images", data / "test.json", transforms=trainer.val_pictures.transforms)
    scores = evaluate(model, trainer.loader(pictures, batch_size=8), pictures.coco, progress=False)
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    by_class = {row.name: {"AP": round(row.AP, 3), "AP50": round(row.AP50, 3)} for row in scores.by_class}
    return {name: round(scores[name], 3) if scores[name] is not None else None for name in names} | {
        "by_class": by_class, "pictures": scores.pictures, "boxes": scores.boxes, "batch_size": 8,
    }


def study(data: Path, folder: Path, name: str) -> dict[str, Any]:
    """Trains one of RUNS to its end and returns what is worth keeping."""
    config, source, count = RUNS[name]
    trainer = open_run(data, folder, config, source, count)
    training.fit(trainer)
    changed = {key: value for key, value in asdict(config).items() if value != asdict(training.TrainConfig())[key]}
    return {
        "start": source, "start_sha256": source and hashlib.sha256(weights_file(source).read_bytes()).hexdigest(),
        "pictures": len(trainer.pictures), "seed": config.seed, "steps": trainer.learner.steps,
        "settings": changed, "minutes": round(trainer.progress["seconds"] / 60, 1), "test": test_scores(trainer, data),
        "validation": [
            {key: round(line[key], 4) for key in ("step", "AP", "AP50")} for line in trainer.folder.read_metrics("validation")
        ],
        "said": [line["warning"] for line in trainer.folder.read_metrics("warning") if line["about"] != "always_hardest"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=RUNS, nargs="*", default=list(RUNS))
    arguments = parser.parse_args()
    findings = {name: arguments.folder / name.replace(", ", "-").replace(" ", "-") / "findings.json" for name in RUNS}
    for name in arguments.only:
        if not findings[name].exists():
            findings[name].parent.parent.mkdir(parents=True, exist_ok=True)
            found = study(arguments.data, findings[name].parent, name)
            findings[name].write_text(json.dumps(found), encoding="utf8")
            print(name, found["test"]["AP"], found["test"]["AP50"], flush=True)
    results = {
        "command": "python book/your_pictures.py $ANNOTATED_DETR_BCCD runs/cells",
        "data": "BCCD (MIT licence): 205 training, 87 validation, 72 test photographs",
        "hardware": f"one thread of {os.cpu_count()} shared CPU cores ({platform.machine()}), other work beside it: minutes are no measure of speed",
        "runs": {name: json.loads(path.read_text(encoding="utf8")) for name, path in findings.items() if path.exists()},
    }
    before = json.loads((Path(__file__).parent / "results" / "bccd-tiny.json").read_text(encoding="utf8"))
    results["longer, from random weights"] = {key: before[key] for key in ("command", "test")}
    path = Path(training.__file__).with_name("your_pictures.json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
