"""Which recipe does `tiny` learn with soonest? One short run on scenes for each question.

    python book/experiments.py NAME [--batch-size 8] [--warmup-steps 3000] …    writes book/results/recipe/NAME.json

Every run has the same 4,000 scenes, in memory, so that a step costs the model alone, and is scored on 300 validation scenes.
Seconds are those of the steps, without loading and scoring. A run can be stopped when it has lost: its file holds the curve so far.
"""

import argparse
import copy
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ablations import mirrored
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from annotated_detr import scenes, training
from annotated_detr.data import make_coco_transforms
from annotated_detr.evaluation import evaluate
from annotated_detr.nested_tensor import collate_fn

ROOT = Path(__file__).resolve().parent.parent


class AdamWAndMuon:
    """Muon for the transformer's matrices, AdamW for everything else."""

    def __init__(self, learner: training.Learner, lr: float, muon_lr: float) -> None:
        names = {id(parameter): name for name, parameter in learner.model.named_parameters()}
        matrices = [p for p in learner.parameters if p.ndim == 2 and "transformer" in names.get(id(p), "")]
        rest = [p for p in learner.parameters if not any(p is matrix for matrix in matrices)]
        decay = learner.config.weight_decay
        self.both = torch.optim.AdamW(rest, lr, weight_decay=decay, fused=True), torch.optim.Muon(matrices, muon_lr, weight_decay=decay)
        self.param_groups = [group for one in self.both for group in one.param_groups]

    def zero_grad(self) -> None:
        for one in self.both:
            one.zero_grad()

    def step(self) -> None:
        for one in self.both:
            one.step()


def read(pictures: Any, size: int) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """All pictures in memory, in half precision, neither flipped nor cropped."""
    pictures.transforms = make_coco_transforms("val", size=size)
    loaded = (pictures[i] for i in tqdm(range(len(pictures)), desc="reading"))
    return [(picture.half(), target) for picture, target in loaded]


def batch_of(kept: list[tuple[torch.Tensor, dict[str, Any]]], rows: list[int], generator: torch.Generator) -> Any:
    """A batch of these pictures, each mirrored or not."""
    batch = []
    for row in rows:
        picture, target = kept[row]
        picture = picture.float()
        if torch.rand((), generator=generator) < 0.5:
            picture, target = picture.flip(-1), mirrored(target)
        batch.append((picture, target))
    return collate_fn(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--warmup-steps", type=int, default=3_000)
    parser.add_argument("--class-weight", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decoder-layers", type=int, default=3)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--muon", type=float, default=0.0, help="learning rate of Muon for the transformer's matrices")
    parser.add_argument("--ema", type=float, default=0.0, help="also score a moving average of the weights with this decay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scorings", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = training.TrainConfig(
        scenes=4_000, val_scenes=300, epochs=asked.epochs, batch_size=asked.batch_size, warmup_steps=asked.warmup_steps, lr=asked.lr,
        lr_backbone=asked.lr, class_weight=asked.class_weight, num_queries=asked.queries, seed=asked.seed,
        model_options={"num_decoder_layers": asked.decoder_layers}, device="cpu",
    )
    pictures, val = training.open_datasets(config)
    per_epoch = math.ceil(len(pictures) / config.batch_size)
    learner = training.Learner(config, training.spec_for(config, pictures), per_epoch)
    loader = DataLoader(val, batch_size=16, collate_fn=collate_fn)
    kept = read(pictures, config.size)
    flips = torch.Generator().manual_seed(config.seed)

    def score(model: nn.Module) -> dict[str, Any]:
        thresholds = scenes.SMALL_AREA, scenes.MEDIUM_AREA
        found = evaluate(model, loader, val.coco, progress=False, size_thresholds=thresholds)
        return {name: round(found[name] or 0.0, 4) for name in ("AP", "AP50", "AP_small", "AP_medium", "AP_large")}

    path = ROOT / "book" / "results" / "recipe" / f"{asked.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {
        "command": f"python book/experiments.py {' '.join(sys.argv[1:])}", "seed": config.seed, "commit": commit,
        "hardware": f"one of {os.cpu_count()} CPU cores ({platform.machine()})", "steps": learner.steps, "curve": [],
    }
    average, seconds = None, 0.0
    every = math.ceil((learner.steps - config.warmup_steps) / asked.scorings)
    order = training.TrainingOrder(len(kept), config.batch_size, learner.steps, config.seed)
    for picked in tqdm(order, unit="step"):
        batch = batch_of(kept, [row for _, row in picked], flips)
        begun, warming_up = time.perf_counter(), learner.warming_up
        training.train_step(learner, batch)
        seconds += time.perf_counter() - begun
        if asked.muon and (learner.step == 1 or warming_up != learner.warming_up):
            learner.optimizer = AdamWAndMuon(learner, asked.lr, asked.muon)
            learner.rates = [group["lr"] for group in learner.optimizer.param_groups]
        done = learner.step - config.warmup_steps
        if asked.ema and done >= 0:
            average = average or copy.deepcopy(learner.model)
            decay = min(asked.ema, (done + 1) / (done + 10))
            for mean, value in zip(average.state_dict().values(), learner.model.state_dict().values()):
                mean.lerp_(value, 1 - decay) if mean.is_floating_point() else mean.copy_(value)
        if done > 0 and (done % every == 0 or learner.step == learner.steps):
            line = {"step": learner.step, "seconds": round(seconds)} | score(learner.model)
            if average is not None:
                line["average"] = score(average)
            result["curve"].append(line)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
            print(line, flush=True)


if __name__ == "__main__":
    main()
