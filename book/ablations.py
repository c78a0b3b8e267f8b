"""The paper's ablations on scenes: one part of DETR changed at a time, three seeds each.

    python book/ablations.py FOLDER    about 2 minutes a run on one CPU core; writes annotated_detr/ablations.json

What is compared is the transformer, its queries and its loss, so every run starts behind the same eyes: the backbone of the detector
that comes with the package, frozen, as the paper's runs all start behind an ImageNet backbone. Its features are computed once and kept
in FOLDER. Everything else starts at random and learns by DETR's loss alone: no warm-up, no dense lesson. A run that is done is not
repeated; several scripts may share a folder and the work, and each writes what all have finished.
"""

import argparse
import hashlib
import json
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert
from tqdm import tqdm

from annotated_detr import scenes, training
from annotated_detr.detr import DETR
from annotated_detr.evaluation import evaluate
from annotated_detr.inference import weights_file
from annotated_detr.loss import build_criterion
from annotated_detr.nested_tensor import NestedTensor
from annotated_detr.positional_encoding import Joiner, PositionEmbeddingLearned

RECIPE = training.TrainConfig(
    scenes=8_000, val_scenes=500, epochs=2, batch_size=8, warmup_steps=0, dense_weight=0.0, class_weight=1.0, device="cpu",
)
TRIAL = replace(RECIPE, dense_weight=1.0, class_weight=2.0)  # what `--try` changes
LAYERS = {"num_encoder_layers": 2, "num_decoder_layers": 3}
# Study → name of the variant → what is changed. The recipe itself is the first of every study.
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "encoder layers": {"0": {"num_encoder_layers": 0}, "1": {"num_encoder_layers": 1}, "4": {"num_encoder_layers": 4}},
    "decoder layers": {"1": {"num_decoder_layers": 1}, "6": {"num_decoder_layers": 6}},
    "positions": {"learned": {"positions": "learned"}, "none": {"positions": "none"}},
    "auxiliary losses": {"the last layer alone": {"auxiliary": False}},
    "loss terms": {"class and L1": {"giou": 0}, "class and GIoU": {"bbox": 0}, "class twice": {"class": 2}},
    "queries": {"11": {"queries": 11}, "32": {"queries": 32}, "64": {"queries": 64}},
    "norm": {"after each branch": {"normalize_before": False}},
}
SEEDS = (0, 1, 2)


class Features(nn.Module):
    """Stands where the backbone stood: what comes in are its features already."""

    num_channels = 96

    def forward(self, batch: NestedTensor) -> dict[str, NestedTensor]:
        return {"0": batch}


class NoPositions(nn.Module):
    """Tells no cell where it is."""

    def forward(self, batch: NestedTensor) -> Tensor:
        return torch.zeros_like(batch.tensors)


@torch.no_grad()
def keep_features(folder: Path) -> dict[str, Any]:
    """The frozen backbone's features of every training scene and its mirror image, and of the validation scenes."""
    path = folder / "features.pt"
    if path.exists():
        return torch.load(path, weights_only=False, mmap=True)
    detector, _ = training.load_model(weights_file("tiny-scenes"))
    backbone = detector.backbone[0].eval()
    pictures, val = training.open_datasets(RECIPE)
    pictures.transforms = val.transforms
    kept: dict[str, Any] = {}
    for name, dataset, sides in (("train", pictures, (False, True)), ("val", val, (False,))):
        kept[name] = torch.empty(len(dataset), len(sides), 96, 12, 12, dtype=torch.float16)
        kept[f"{name}_targets"] = []
        for i in tqdm(range(len(dataset)), desc=f"features of {name}"):
            picture, target = dataset[i]
            views = torch.stack([picture.flip(-1) if mirror else picture for mirror in sides])
            mask = torch.zeros(len(views), *views.shape[-2:], dtype=torch.bool)
            kept[name][i] = backbone(NestedTensor(views, mask))["0"].tensors
            kept[f"{name}_targets"].append(target)
    kept["sha256"] = hashlib.sha256(weights_file("tiny-scenes").read_bytes()).hexdigest()
    part = path.with_suffix(f".{os.getpid()}")
    torch.save(kept, part)
    part.rename(path)
    return keep_features(folder)


def mirrored(target: dict[str, Any]) -> dict[str, Any]:
    """The target of the mirror image; boxes are (cx, cy, w, h) in 0..1."""
    boxes = target["boxes"].clone()
    boxes[:, 0] = 1 - boxes[:, 0]
    return {**target, "boxes": boxes}


class Kept(torch.utils.data.Dataset):
    """Features and targets as the trainer's pictures: (features, target), mirrored if asked."""

    def __init__(self, kept: dict[str, Any], name: str) -> None:
        self.features, self.targets = kept[name], kept[f"{name}_targets"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: int | tuple[int, bool]) -> tuple[Tensor, dict[str, Any]]:
        i, mirror = key if isinstance(key, tuple) else (key, False)
        target = mirrored(self.targets[i]) if mirror else self.targets[i]
        return self.features[i, int(mirror)].float(), target


def collate(pairs: list[tuple[Tensor, dict[str, Any]]]) -> tuple[NestedTensor, tuple[dict[str, Any], ...]]:
    features, targets = zip(*pairs)
    batch = torch.stack(features)
    return NestedTensor(batch, torch.zeros(len(batch), *batch.shape[-2:], dtype=torch.bool)), targets


def build(spec: training.ModelSpec, change: dict[str, Any]) -> DETR:
    """The recipe's model with `change`, reading features."""
    model = spec.build()
    positions: nn.Module = model.backbone[1]
    if change.get("positions") == "learned":
        positions = PositionEmbeddingLearned(Features.num_channels // 2)
    elif change.get("positions") == "none":
        positions = NoPositions()
    model.backbone = Joiner(Features(), positions)
    return model


class Layer(nn.Module):
    """A detector's answer after one of its decoder layers, if asked with duplicates suppressed."""

    def __init__(self, model: DETR, layer: int, suppress: bool) -> None:
        super().__init__()
        self.model, self.layer, self.suppress = model, layer, suppress

    def forward(self, samples: NestedTensor) -> dict[str, Any]:
        answer = self.model(samples)
        answer = [*answer.pop("aux_outputs", []), answer][self.layer]
        if not self.suppress:
            return answer
        logits = answer["pred_logits"].clone()
        for row, boxes in zip(logits, answer["pred_boxes"]):
            scores, labels = row.softmax(-1)[:, :-1].max(-1)
            kept = batched_nms(box_convert(boxes, "cxcywh", "xyxy"), scores, labels, 0.5)
            gone = torch.ones(len(row), dtype=torch.bool)
            gone[kept] = False
            row[gone, :-1] = -1e4
        return {**answer, "pred_logits": logits}


def scores_of(model: nn.Module, val: Kept, truth: Any) -> dict[str, float | None]:
    loader = torch.utils.data.DataLoader(val, batch_size=50, collate_fn=collate)
    thresholds = scenes.SMALL_AREA, scenes.MEDIUM_AREA
    scores = evaluate(model.eval(), loader, truth, progress=False, size_thresholds=thresholds)
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    return {name: None if scores[name] is None else round(scores[name], 4) for name in names}


def study(kept: dict[str, Any], truth: Any, names: dict[str, str], change: dict[str, Any], recipe: training.TrainConfig) -> dict[str, Any]:
    """Trains one variant to its end and scores every decoder layer, with and without suppression."""
    torch.set_num_threads(1)
    sizes = {key: value for key, value in change.items() if key in (*LAYERS, "normalize_before")}
    recipe = replace(recipe, num_queries=change.get("queries", recipe.num_queries))
    spec = training.ModelSpec("tiny", len(names) + 1, recipe.num_queries, recipe.size, names, {"aux_loss": True, **LAYERS, **sizes})
    pictures, val = Kept(kept, "train"), Kept(kept, "val")
    per_epoch = len(pictures) // recipe.batch_size
    learner = training.Learner(recipe, spec, per_epoch, build=lambda spec: build(spec, change))
    layers = len(learner.model.transformer.decoder.layers)
    learner.criterion = build_criterion(
        spec.num_classes, layers, recipe.no_object_weight, change.get("class", recipe.class_weight), change.get("bbox", 5), change.get("giou", 2)
    )
    learner.model.aux_loss = change.get("auxiliary", True)
    order = torch.Generator().manual_seed(recipe.seed)
    curve = []
    with tqdm(total=learner.steps, unit="step", mininterval=20) as bar:
        while learner.step < learner.steps:
            epoch, place = divmod(learner.step, per_epoch)
            if place == 0:
                rows = torch.randperm(len(pictures), generator=order).tolist()
                mirror = (torch.rand(len(pictures), generator=order) < 0.5).tolist()
            batch = rows[place * recipe.batch_size :][: recipe.batch_size]
            training.train_step(learner, collate([pictures[i, mirror[i]] for i in batch]))
            bar.update()
            if learner.step % per_epoch == 0:
                found = scores_of(Layer(learner.model, -1, False), val, truth)
                curve.append({"step": learner.step, "AP": found["AP"], "AP50": found["AP50"]})
                print(curve[-1], flush=True)
    result = {
        "seed": recipe.seed, "steps": learner.steps, "change": change, "parameters": sum(p.numel() for p in learner.model.parameters()),
        "scores": found, "curve": curve,
    }
    if not change or layers > LAYERS["num_decoder_layers"]:
        by_layer = [[scores_of(Layer(learner.model, i, nms), val, truth) for nms in (False, True)] for i in range(layers)]
        result["by_layer"] = [
            {"AP": one["AP"], "AP50": one["AP50"], "AP_nms": two["AP"], "AP50_nms": two["AP50"]} for one, two in by_layer
        ]
    return result


def attempt(changes: list[str], kept: dict[str, Any], truth: Any, names: dict[str, str]) -> None:
    """Trains `TRIAL` with some numbers changed, a field of TrainConfig or bbox or giou, and adds what it scored to the results."""
    numbers = {name: type(getattr(TRIAL, name, 0.0))(float(value)) for name, value in (change.split("=") for change in changes)}
    weights = {name: numbers.pop(name) for name in ("bbox", "giou") if name in numbers}
    found = study(kept, truth, names, weights, replace(TRIAL, **numbers))
    path = Path(__file__).parent / "results" / "recipe" / "frozen-backbone.json"
    results = json.loads(path.read_text(encoding="utf8"))
    results["runs"].append({"tried": " ".join(changes), "AP": found["scores"]["AP"], "AP50": found["scores"]["AP50"], "curve": found["curve"]})
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    print(results["runs"][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--only", nargs="*", help="studies", choices=["the recipe", *STUDIES], default=["the recipe", *STUDIES])
    parser.add_argument(
        "--try", nargs="*", metavar="FIELD=NUMBER", dest="tried",
        help="instead of the studies, one run with other settings, added to book/results/recipe/frozen-backbone.json",
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs = {("the recipe", ""): {}} | {(name, v): change for name, variants in STUDIES.items() for v, change in variants.items()}
    path = {(run, seed): arguments.folder / f"{'-'.join(run).replace(' ', '_')}-{seed}.json" for run in runs for seed in SEEDS}
    kept = keep_features(arguments.folder)
    truth = training.open_datasets(RECIPE)[1].coco
    names = {str(row["id"]): row["name"] for row in truth.dataset["categories"]}
    if arguments.tried is not None:
        attempt(arguments.tried, kept, truth, names)
        return
    for seed in arguments.seeds:
        for run, change in runs.items():
            if run[0] not in arguments.only or path[run, seed].exists():
                continue
            try:
                with FileLock(path[run, seed].with_suffix(".lock"), timeout=0):  # which ends with its process, however that ends
                    found = study(kept, truth, names, change, replace(RECIPE, seed=seed))
                    path[run, seed].write_text(json.dumps(found), encoding="utf8")
            except Timeout:
                continue
            print(run, seed, found["scores"], flush=True)
    results = {
        "command": "python book/ablations.py runs/ablations",
        "backbone": {"of": "tiny_scenes.safetensors", "sha256": kept["sha256"]},
        "data": f"{RECIPE.scenes:,} training scenes, {RECIPE.val_scenes} validation scenes; short side {RECIPE.size} pixels",
        "hardware": f"one thread of {os.cpu_count()} CPU cores ({platform.machine()})",
        "settings": {key: value for key, value in asdict(RECIPE).items() if value != asdict(training.TrainConfig())[key]},
        "runs": [
            {"study": run[0], "variant": run[1], **json.loads(path[run, seed].read_text(encoding="utf8"))}
            for run in runs for seed in SEEDS if path[run, seed].exists()
        ],
    }
    target = Path(training.__file__).with_name("ablations.json")
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
