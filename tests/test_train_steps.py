"""Backbone to loss and back again: gradients of the whole detector, and five optimiser steps, against the reference."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from annotated_detr.backbone import Backbone
from annotated_detr.detr import DETR, detr_resnet50, detr_resnet50_dc5
from annotated_detr.loss import build_criterion
from annotated_detr.positional_encoding import Joiner, PositionEmbeddingSine
from annotated_detr.transformer import Transformer

SIZES = [(160, 224), (128, 256)]


def small_detr():
    backbone = Joiner(Backbone("resnet18", True, False, False), PositionEmbeddingSine(32, normalize=True))
    transformer = Transformer(64, 4, 2, 3, 128, dropout=0.0, return_intermediate_dec=True)
    return DETR(backbone, transformer, num_classes=7, num_queries=12, aux_loss=True)


CASES = {
    "r18_small": (small_detr, [4, 3], 7, 3),
    "r50": (lambda: detr_resnet50(aux_loss=True), [5, 0], 91, 6),
    "r50_dc5": (lambda: detr_resnet50_dc5(aux_loss=True), [5, 0], 91, 6),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_of_the_whole_detector(golden, recipe, name):
    build, counts, num_classes, num_decoder_layers = CASES[name]
    arrays, model = golden(name), recipe.fill(build()).eval()
    criterion = build_criterion(num_classes, num_decoder_layers)
    losses = criterion(model(recipe.images("image", SIZES)), recipe.targets("target", counts, num_classes))
    total = criterion.total(losses)
    total.backward()
    assert total.item() == pytest.approx(float(arrays["loss/total"]), abs=1e-4)
    for key, value in losses.items():
        assert value.item() == pytest.approx(float(arrays[f"loss/{key}"]), abs=1e-4), key
    norms = {f"gradnorm/{key}": float(p.grad.double().norm()) for key, p in model.named_parameters() if p.grad is not None}
    expected = {key: float(value) for key, value in arrays.items() if key.startswith("gradnorm/")}
    assert set(norms) == set(expected)
    wrong = {key: (norms[key], value) for key, value in expected.items() if abs(norms[key] - value) > 1e-4 * max(1, abs(value))}
    assert not wrong


def test_five_optimiser_steps(golden, recipe):
    arrays, model = golden("train_steps"), recipe.fill(small_detr()).train()
    criterion = build_criterion(7, 3)
    backbone = [p for name, p in model.named_parameters() if name.startswith("backbone") and p.requires_grad]
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone")]
    groups = [{"params": others}, {"params": backbone, "lr": 1e-5}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)
    for step, (loss, norm) in enumerate(zip(arrays["loss"], arrays["grad_norm"])):
        outputs = model(recipe.images(f"step{step}", SIZES))
        total = criterion.total(criterion(outputs, recipe.targets(f"steptarget{step}", [4, 3], 7)))
        optimizer.zero_grad()
        total.backward()
        norm_before = clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert total.item() == pytest.approx(float(loss), abs=1e-4), f"loss of step {step}"
        assert norm_before.item() == pytest.approx(float(norm), rel=1e-4), f"gradient norm of step {step}"
    for name, parameter in model.named_parameters():
        expected = float(arrays[f"param/{name}"])
        assert float(parameter.detach().double().norm()) == pytest.approx(expected, abs=1e-4 * max(1, expected)), name
