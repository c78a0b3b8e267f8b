"""The fast forms: what answers, learns and counts sooner must answer, learn and count the same."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from annotated_detr import for_inference, inference, training
from annotated_detr.backbone import Backbone, FrozenBatchNorm2d
from annotated_detr.detr import DETR, PRESETS, detr_tiny
from annotated_detr.inference import Detector, attention_maps, predict
from annotated_detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from annotated_detr.positional_encoding import Joiner, PositionEmbeddingLearned, PositionEmbeddingSine
from annotated_detr.matcher import HungarianMatcher
from annotated_detr.transformer import Transformer

K, N = 6, 11


def breathe(model: nn.Module) -> nn.Module:
    """Gives every norm numbers of its own, such as a trained network has, and the queries voices that differ."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            module.running_mean.normal_(generator=generator).mul_(0.1)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.2, generator=generator)
            module.bias.data.normal_(generator=generator).mul_(0.1)
    model.query_embed.weight.data.mul_(5)
    return model.eval()


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


PADDED, EVEN = ((64, 96), (96, 70)), ((64, 96), (64, 96))


def assert_alike(fast: nn.Module, model: DETR, batch, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        expected, found = model(batch), fast(batch)
    assert set(found) == {"pred_logits", "pred_boxes"}
    assert (found["pred_boxes"] - expected["pred_boxes"]).abs().max() <= tolerance
    scale = max(1.0, float(expected["pred_logits"].abs().max()))
    assert (found["pred_logits"] - expected["pred_logits"]).abs().max() <= 10 * tolerance * scale
    assert expected["pred_boxes"].std(1).max() > 1e-3, "all queries answer alike, so nothing is tested"


@pytest.mark.parametrize("name", PRESETS)
def test_the_twin_answers_as_the_model_does(name):
    torch.manual_seed(0)
    model = breathe(PRESETS[name](num_classes=K, num_queries=N, aux_loss=True))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = for_inference(model)
    for sizes in (PADDED, EVEN, EVEN[:1]):
        assert_alike(fast, model, pictures(*sizes))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(type(module).__module__ != "annotated_detr.inference" for module in model.modules())
    own = {p.data_ptr() for p in fast.parameters()}
    assert not own & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("learned_content", [False, True])
@pytest.mark.parametrize("learned_positions", [False, True])
def test_the_twin_of_every_kind_of_transformer(pre_norm, learned_content, learned_positions):
    torch.manual_seed(0)
    positions = PositionEmbeddingLearned(16) if learned_positions else PositionEmbeddingSine(16, normalize=True)
    transformer = Transformer(32, 4, 2, 2, 64, activation="gelu", normalize_before=pre_norm, return_intermediate_dec=True)
    joiner = Joiner(Backbone("resnet18", True, True, False), positions)
    model = breathe(DETR(joiner, transformer, K, N, aux_loss=True, learned_content=learned_content))
    for sizes in (PADDED, EVEN):
        assert_alike(for_inference(model), model, pictures(*sizes))


def test_positions_are_kept_by_size_and_not_for_ever():
    fast = for_inference(detr_tiny(K, N).eval())
    first = fast(pictures((64, 64)))["pred_boxes"]
    kept = next(iter(fast.known.values()))
    fast(pictures((64, 64), (64, 64)))
    assert list(fast.known.values()) == [kept]
    for width in range(8, 8 * 25, 8):
        fast(pictures((64, width)))
    assert len(fast.known) == 16
    torch.testing.assert_close(fast(pictures((64, 64)))["pred_boxes"], first)


def test_a_padded_picture_is_not_taken_for_an_unpadded_one_of_its_size():
    model = breathe(detr_tiny(K, N))
    fast = for_inference(model)
    batch = nested_tensor_from_tensor_list(pictures(*PADDED))
    alone = NestedTensor(batch.tensors[:1], batch.mask[:1])
    bare = NestedTensor(batch.tensors[:1], torch.zeros_like(batch.mask[:1]))
    for samples in (bare, alone, bare, batch):
        assert_alike(fast, model, samples)


def test_the_twin_moves_to_bfloat16_and_answers_under_autocast():
    model = breathe(detr_tiny(K, N))
    batch = nested_tensor_from_tensor_list(pictures(*PADDED))
    half = NestedTensor(batch.tensors.bfloat16(), batch.mask)
    for fast in (for_inference(model).bfloat16(), for_inference(copy.deepcopy(model).bfloat16())):
        boxes = fast(half)["pred_boxes"]
        assert boxes.dtype == torch.bfloat16
        assert (boxes.float() - model(batch)["pred_boxes"]).abs().max() < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        boxes = for_inference(model)(batch)["pred_boxes"]
        expected = model(batch)["pred_boxes"]
    assert boxes.dtype == expected.dtype == torch.float32
    assert (boxes - expected).abs().max() < 0.05


def test_without_onednn_the_answers_are_the_same(monkeypatch):
    monkeypatch.setattr(inference, "_by_onednn", lambda x: False)
    model = breathe(detr_tiny(K, N))
    fast = for_inference(model)
    assert_alike(fast, model, pictures(*PADDED))


def test_the_twin_keeps_no_graph_and_its_own_weights():
    model = breathe(detr_tiny(K, N))
    fast = for_inference(model)
    before = fast(pictures(*EVEN))["pred_boxes"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    after = fast(pictures(*EVEN))["pred_boxes"]
    assert torch.equal(before, after) and not after.requires_grad


def test_a_blank_picture_is_named():
    batch = nested_tensor_from_tensor_list(pictures(*PADDED))
    batch.mask[1] = True
    with pytest.raises(ValueError, match="picture 1 of the batch is all padding"):
        for_inference(detr_tiny(K, N).eval())(batch)


def test_what_has_no_twin_is_told_so():
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\) first"):
        for_inference(detr_tiny(K, N))
    with pytest.raises(TypeError, match="takes a DETR, and this is a Linear|Expected type: .*DETR"):
        for_inference(nn.Linear(2, 2))
    other = detr_tiny(K, N).eval()
    other.backbone[0].__class__ = type("Custom", (nn.Module,), {})
    with pytest.raises(TypeError, match="knows ResNets and TinyBackbone, and no Custom"):
        for_inference(other)


def test_predict_uses_the_twin_and_follows_the_models_weights():
    from PIL import Image

    torch.manual_seed(0)
    model = breathe(detr_tiny(K, N))
    detector = Detector(model, size=64)
    picture = Image.effect_noise((96, 64), 80).convert("RGB")
    assert detector.fast is detector.fast is not model
    before = detector.outputs([picture])["pred_boxes"]
    assert (before - detector.outputs([picture], plain=True)["pred_boxes"]).abs().max() < 1e-5
    model.train()
    with torch.no_grad():
        model.bbox_embed.layers[-1].bias.add_(1)
    after = detector.outputs([picture])["pred_boxes"]
    assert model.training and (after - before).abs().max() > 0.05, "the twin answers with weights that are gone"
    assert attention_maps(detector, picture).shape == (N, 8, 12)
    assert len(predict(detector, picture, threshold=0.0)[0]) == N


# What a step waits for. A device works through a queue; the host runs ahead of it until it asks for a value.


class Waits(TorchDispatchMode):
    """Notes every operation that would make the host wait for a GPU: whatever needs a value, or a size that depends on one."""

    VALUES = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::unique_consecutive"}

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen, self.on_host = [], False
        copy_to_host, match_layers = torch.Tensor.cpu, HungarianMatcher.match_layers

        def cpu(tensor):
            self.seen.append("cpu")
            self.on_host = True  # what the matcher does with its copy no longer concerns the device
            return copy_to_host(tensor)

        def match(*arguments):
            try:
                return match_layers(*arguments)
            finally:
                self.on_host = False

        monkeypatch.setattr(torch.Tensor, "cpu", cpu)
        monkeypatch.setattr(HungarianMatcher, "match_layers", match)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        chosen = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in chosen)
        if (name in self.VALUES or by_mask) and not self.on_host:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_training_step_waits_for_the_device_once(monkeypatch, warmup_steps):
    config = training.TrainConfig(warmup_steps=warmup_steps, epochs=1, device="cpu", ramp_steps=0)
    spec = training.ModelSpec("tiny", K, N, 64, {}, {"aux_loss": True})
    learner = training.Learner(config, spec, steps_per_epoch=10)
    targets = [
        {"labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.5, 0.3]]), "image_id": torch.tensor([7])},
        {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4), "image_id": torch.tensor([8])},
    ]
    batch = nested_tensor_from_tensor_list(pictures(*PADDED))
    training.train_step(copy.deepcopy(learner), (batch, targets))  # whatever a first step looks up
    with Waits(monkeypatch) as waits:
        training.train_step(learner, (batch, targets))
    assert waits.seen == (["aten::_local_scalar_dense"] if warmup_steps else ["cpu"])


def test_the_counter_of_waits_counts(monkeypatch):
    with Waits(monkeypatch) as waits:
        values = torch.arange(4)
        bool((values > 2).any()), values[values > 2], values.cpu()
    assert "aten::_local_scalar_dense" in waits.seen and "aten::index" in waits.seen and waits.seen[-1] == "cpu"


def test_the_package_is_imported_without_torch():
    code = "import sys, annotated_detr; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
