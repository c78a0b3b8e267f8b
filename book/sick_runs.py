"""Runs that are ill on purpose, and a healthy one beside them, for the chapter "Is it learning?".

    python book/sick_runs.py FOLDER    one to two minutes a run on one free CPU core; writes annotated_detr/sick_runs.json

A run that is done is not repeated, so the script can be stopped and started again.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from annotated_detr import pretrained, training
from annotated_detr.detr import PostProcess
from annotated_detr.inference import weights_file
from annotated_detr.nested_tensor import nested_tensor_from_tensor_list

RECIPE = training.TrainConfig(
    scenes=500, val_scenes=40, size=64, batch_size=4, epochs=9, lr=5e-4, lr_backbone=5e-4, warmup_steps=0, ramp_steps=100, class_weight=1.0,
    eval_every=3, save_every=2_000, device="cpu",
)
START = "tiny-scenes"  # with a fresh class head, as for classes that it does not know
SHOWN = 3  # validation pictures whose answers are kept
Target = dict[str, Tensor]


def ids_off_by_one(target: Target) -> Target:
    return target | {"labels": target["labels"] - 1}


def boxes_in_pixels(target: Target) -> Target:
    height, width = target["size"].tolist()
    return target | {"boxes": target["boxes"] * torch.tensor([width, height, width, height])}


def corner_for_centre(target: Target) -> Target:
    centre, size = target["boxes"].split(2, dim=1)
    return target | {"boxes": torch.cat([(centre - size / 2).clamp(min=0), size], 1)}


def some_labels_wrong(target: Target) -> Target:
    """Every tenth picture has another class in each box."""
    wrong = int(target["image_id"]) % 10 == 0
    return target | {"labels": target["labels"] % 6 + 1} if wrong else target


def invert_the_mask(model: nn.Module) -> None:
    def invert(module: nn.Module, inputs: tuple) -> tuple:
        return tuple(~value if isinstance(value, Tensor) and value.dtype == torch.bool else value for value in inputs)

    model.transformer.encoder.register_forward_pre_hook(invert)
    model.transformer.decoder.register_forward_pre_hook(invert)


class Alike(nn.Module):
    """All rows of a table of queries are their mean."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.mean(0, keepdim=True).expand_as(weight)


def randomise_the_backbone(model: nn.Module) -> None:
    fresh = training.ModelSpec("tiny", 7, 16, 64).build()
    model.backbone.load_state_dict(fresh.backbone.state_dict())


def share_one_query(model: nn.Module) -> None:
    for table in (model.query_embed, model.query_content):
        parametrize.register_parametrization(table, "weight", Alike())


@dataclass
class Patient:
    """One run: what is changed of the recipe, of the targets, of the model."""

    recipe: dict[str, Any] = field(default_factory=dict)
    targets: Callable[[Target], Target] | None = None
    model: Callable[[nn.Module], None] | None = None
    start: str | None = START


PATIENTS = {
    "healthy": Patient(),
    "category ids off by one": Patient(targets=ids_off_by_one),
    "corner for centre": Patient(targets=corner_for_centre),
    "every query alike": Patient(model=share_one_query),
    "mask inverted": Patient(model=invert_the_mask),
    "rate too high": Patient({"lr": 0.05, "lr_backbone": 0.05}),
    "frozen random backbone": Patient({"dense_weight": 0.0, "lr_backbone": 0.0}, model=randomise_the_backbone),
    "far too few steps": Patient({"scenes": 50, "epochs": 10, "eval_every": 5}, start=None),
    "boxes in pixels": Patient(targets=boxes_in_pixels),
    "some labels wrong": Patient({"scenes": 80, "epochs": 30, "log_every": 5, "eval_every": 15}, targets=some_labels_wrong),
}


class Damaged(torch.utils.data.Dataset):
    """Training pictures whose targets go through `damage`."""

    def __init__(self, pictures: training.AugmentedPictures, damage: Callable[[Target], Target]):
        self.pictures, self.damage = pictures, damage

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        image, target = self.pictures[key]
        return image, self.damage(target)


def admit(patient: Patient, folder: Path) -> training.Trainer:
    """Opens the run anew and makes it ill."""
    shutil.rmtree(folder, ignore_errors=True)
    trainer = training.start(replace(RECIPE, **patient.recipe), folder)
    model, spec = trainer.learner.model, trainer.spec
    if patient.start is not None:
        others = {number: f"class {number}" for number in range(1, spec.num_classes)}
        loaded = pretrained.load(patient.start, spec.num_classes, spec.num_queries, class_names=others, aux_loss=True)
        model.load_state_dict(loaded.model.state_dict())
    if patient.model is not None:
        patient.model(model)
        trainer.learner.start_phase()
    if patient.targets is not None:
        healthy = trainer.loader

        def loader(dataset, **options):
            ill = isinstance(dataset, training.AugmentedPictures)
            return healthy(Damaged(dataset, patient.targets) if ill else dataset, **options)

        trainer.loader = loader
    return trainer


@torch.inference_mode()
def answers(trainer: training.Trainer) -> list[dict[str, list]]:
    """What the model says of the first validation pictures: the boxes that it believes in, or the surest three."""
    samples = nested_tensor_from_tensor_list([trainer.val_pictures[index][0] for index in range(SHOWN)])
    outputs = trainer.learner.model.eval()(samples)
    found = []
    for result in PostProcess()(outputs, torch.ones(SHOWN, 2, dtype=torch.int64)):
        order = result["scores"].argsort(descending=True)
        keep = order[: max(3, int((result["scores"] > 0.5).sum()))]
        found.append({name: [round_all(value) for value in result[name][keep].tolist()] for name in ("scores", "labels", "boxes")})
    return found


def round_all(value: Any) -> Any:
    if isinstance(value, list):
        return [round_all(part) for part in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def examine(name: str, folder: Path) -> dict[str, Any]:
    """Trains one of the PATIENTS to its end; returns its curves, its answers and what the trainer said."""
    patient = PATIENTS[name]
    trainer = admit(patient, folder)
    learner, stopped = trainer.learner, None
    try:
        training.fit(trainer)
    except (ValueError, FloatingPointError) as error:
        stopped = str(error).replace(str(folder), "RUN")
    lines = trainer.folder.read_metrics("detr")
    lines = lines[:: max(1, len(lines) // 60)]
    signs = ("loss", "foreground_accuracy", "no_object_share", "box_spread", "grad_norm")
    scores = [line for line in trainer.folder.read_metrics("validation")]
    return {
        "changed": {name: value for name, value in patient.recipe.items()},
        "steps": learner.steps - learner.config.warmup_steps,
        "curve": {"step": [line["step"] - learner.config.warmup_steps for line in lines]}
        | {sign: [round_all(line[sign]) for line in lines] for sign in signs},
        "scores": {"step": [line["step"] - learner.config.warmup_steps for line in scores]}
        | {key: [round_all(line[key]) for line in scores] for key in ("AP", "AP50")},
        "answers": [] if stopped else answers(trainer),
        "said": [
            {"step": line["step"] - learner.config.warmup_steps, "about": line["about"], "warning": line["warning"]}
            for line in trainer.folder.read_metrics("warning")
        ],
        "stopped": stopped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=PATIENTS, nargs="*", default=list(PATIENTS))
    arguments = parser.parse_args()
    for name in arguments.only:
        folder = arguments.folder / name.replace(" ", "-")
        findings = folder / "findings.json"
        if not findings.exists():
            findings.write_text(json.dumps(examine(name, folder)), encoding="utf8")
        print(name, "done", flush=True)
    done = {name: arguments.folder / name.replace(" ", "-") / "findings.json" for name in PATIENTS}
    if not all(path.exists() for path in done.values()):
        return  # the call that ends last writes the file
    runs = {name: json.loads(path.read_text(encoding="utf8")) for name, path in done.items()}
    for name, run in runs.items():
        run["said_before"] = training.warn_of_few_steps("tiny", run["steps"], PATIENTS[name].start is not None).strip()
    results = {
        "command": "python book/sick_runs.py runs/sick",
        "seed": RECIPE.seed,
        "recipe": {"start": START, "start_sha256": hashlib.sha256(weights_file(START).read_bytes()).hexdigest()}
        | {name: getattr(RECIPE, name) for name in ("scenes", "size", "batch_size", "lr")},
        "hardware": f"one thread of {os.cpu_count()} shared CPU cores ({platform.machine()})",
        "runs": runs,
    }
    path = Path(training.__file__).with_name("sick_runs.json")
    path.write_text(json.dumps(results) + "\n", encoding="utf8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
