"""One model, many ways to run it: bfloat16 autocast, torch.compile, torch.export, CUDA and MPS give the same boxes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from annotated_detr.detr import DETR, PostProcess, detr_resnet50, detr_tiny
from annotated_detr.loss import build_criterion
from annotated_detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_mps = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs Apple's MPS device")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")),
    reason="torch.compile on a CPU needs a C++ compiler, and neither g++ nor clang++ is installed",
)


def smallest(**options) -> DETR:
    """A DETR with every kind of layer and few numbers, so that compiling it is quick."""
    torch.manual_seed(0)
    sizes = dict(d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=64, channels=(8, 16))
    return detr_tiny(6, num_queries=5, **sizes, **options).eval()


def tiny(**options) -> DETR:
    torch.manual_seed(0)
    return detr_tiny(6, num_queries=8, **options).eval()


def paper(recipe, **options) -> DETR:
    return recipe.fill(detr_resnet50(num_classes=6, num_queries=8, **options)).eval()


def batch_of(*sizes: tuple[int, int]) -> NestedTensor:
    generator = torch.Generator().manual_seed(0)
    return nested_tensor_from_tensor_list([torch.randn(3, h, w, generator=generator) for h, w in sizes])


def targets_for(counts: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    targets = []
    for n in counts:
        sizes = 0.1 + 0.3 * torch.rand(n, 2, generator=generator)
        centres = sizes / 2 + (1 - sizes) * torch.rand(n, 2, generator=generator)
        targets.append({"labels": torch.randint(6, (n,), generator=generator), "boxes": torch.cat([centres, sizes], 1)})
    return targets


def compare(outputs: dict, expected: dict, boxes: float, logits: float) -> None:
    torch.testing.assert_close(outputs["pred_boxes"].float().cpu(), expected["pred_boxes"], rtol=0, atol=boxes)
    torch.testing.assert_close(outputs["pred_logits"].float().cpu(), expected["pred_logits"], rtol=0, atol=logits)


# --- bfloat16 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "resnet50"])
def test_under_bfloat16_autocast_positions_boxes_and_losses_are_float32(name, recipe):
    model = tiny() if name == "tiny" else paper(recipe, aux_loss=True)
    batch, targets = batch_of((96, 128), (128, 72)), targets_for([3, 1])
    criterion = build_criterion(6, len(model.transformer.decoder.layers))
    seen = {}
    model.backbone.register_forward_hook(lambda module, args, output: seen.update(positions=output[1][0]))
    model.transformer.register_forward_hook(lambda module, args, output: seen.update(hs=output[0]))
    with torch.no_grad():
        expected = model(batch)
        positions = seen["positions"]
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch)
            losses = criterion(outputs, targets)
    assert outputs["pred_logits"].dtype == torch.bfloat16, "the large layers did not run in bfloat16, so nothing is tested"
    assert seen["positions"].dtype == torch.float32 and torch.equal(seen["positions"], positions)
    layers = [*outputs["aux_outputs"], outputs]
    with torch.no_grad():  # the box head's own arithmetic, bit for bit, is that of float32
        boxes = model.bbox_embed(seen["hs"].float()).sigmoid()
    for layer, own in zip(layers, boxes):
        assert layer["pred_boxes"].dtype == torch.float32 and torch.equal(layer["pred_boxes"], own)
    in_float = [{key: value.float() for key, value in layer.items() if key != "aux_outputs"} for layer in layers]
    again = criterion(in_float[-1] | {"aux_outputs": in_float[:-1]}, targets)
    for key, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, again[key], rtol=0, atol=0)
    compare(outputs, expected, boxes=0.02, logits=0.1)


def test_gradients_under_bfloat16_autocast_point_where_float32s_do():
    model, batch, targets = smallest(), batch_of((48, 64), (64, 40)), targets_for([2, 1])
    criterion = build_criterion(6, 2)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model(batch)
        criterion.total(criterion(outputs, targets)).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert found[-1].dtype == torch.float32 and found[-1].isfinite().all()
    assert torch.cosine_similarity(*found, dim=0) > 0.98


def test_a_model_that_is_bfloat16_as_a_whole_answers_and_is_scored_in_float32():
    model, batch = smallest(), batch_of((48, 64), (64, 40))
    with torch.no_grad():
        expected = model(batch)
        half = model.bfloat16()(NestedTensor(batch.tensors.bfloat16(), batch.mask))
    assert half["pred_boxes"].dtype == torch.bfloat16
    compare(half, expected, boxes=0.05, logits=0.2)
    (first, _) = PostProcess()(half, torch.tensor([[480, 640], [640, 400]]))
    assert first["scores"].dtype == torch.float32, "bfloat16 scores would be equal by the dozen"
    torch.testing.assert_close(first["scores"], half["pred_logits"][0].float().softmax(-1)[:, :-1].max(-1).values)


# --- compiled and exported ------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked():
    """Annotations switched off, as in a user's process."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def compiled(case: str, device: str = "cpu") -> dict[str, dict[str, float]]:
    """The differences that tests/scripts/compiled.py measures, in a process whose annotations are not checked."""
    script = Path(__file__).parent / "scripts" / "compiled.py"
    one_process = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), case, device], capture_output=True, text=True, env=one_process)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_compiler
def test_generated_code_gives_the_same_boxes_in_every_layer():
    found = compiled("generated")["smallest"]
    assert found["pred_boxes"] <= 1e-5 and found["pred_logits"] <= 1e-4


def test_resnet50_is_captured_whole_and_a_captured_model_trains():
    """`fullgraph`: a question about values, such as the one for blank pictures, would break the graph and fail."""
    found = compiled("captured")
    assert found["resnet50"]["pred_boxes"] <= 1e-5 and found["resnet50"]["pred_logits"] <= 1e-4
    assert found["gradients"]["relative"] <= 1e-4


class Plain(nn.Module):
    """A detector whose inputs and outputs are tensors, as exported programs want them."""

    def __init__(self, model: DETR):
        super().__init__()
        self.model = model

    def forward(self, tensors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(NestedTensor(tensors, mask))
        return outputs["pred_logits"], outputs["pred_boxes"]


@pytest.mark.parametrize("name", ["tiny", "resnet50"])
def test_one_exported_program_serves_every_batch_height_and_width(unchecked, name, recipe):
    if name == "resnet50" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
        pytest.skip("torch 2.11 exports a ResNet for odd sizes only; it is tried with 2.15, where the size may stay open")
    model = Plain(tiny(aux_loss=False) if name == "tiny" else paper(recipe))
    batch, height, width = (torch.export.Dim(n, min=low, max=1333) for n, low in (("batch", 1), ("height", 33), ("width", 33)))
    open_axes = ({0: batch, 2: height, 3: width}, {0: batch, 1: height, 2: width})
    with torch.no_grad():
        program = torch.export.export(model, batch_of((64, 96), (80, 72)).decompose(), dynamic_shapes=open_axes)
    assert "autocast" not in str(program.graph), "a region of autocast would be in the way of other formats"
    exported = program.module()
    for sizes in ([(64, 96), (80, 72)], [(97, 40), (33, 130), (64, 64)], [(50, 70)]):
        fresh = batch_of(*sizes).decompose()
        with torch.no_grad():
            for found, expected in zip(exported(*fresh), model(*fresh)):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- other devices --------------------------------------------------------------------------------------------------


class NoDouble(TorchDispatchMode):
    """Fails on the first operation that makes float64, which Apple's devices do not have."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            assert not (isinstance(value, Tensor) and value.dtype in (torch.float64, torch.complex128)), function
        return result


def test_nothing_on_the_device_is_float64():
    model, batch, targets = smallest(), batch_of((40, 64), (56, 48)), targets_for([2, 0])
    criterion = build_criterion(6, 2)
    with NoDouble():
        outputs = model(batch)
        criterion.total(criterion(outputs, targets)).backward()
        PostProcess()(outputs, torch.tensor([[400, 640], [560, 480]]))
    with pytest.raises(AssertionError), NoDouble():
        torch.ones(1).double()


def train_and_compare(device: str, boxes: float, loss_tolerance: float) -> None:
    """Forward, loss and backward on `device` against the CPU, in float32."""
    batch, targets, criterion = batch_of((96, 128), (128, 72)), targets_for([3, 0]), build_criterion(6, 3)
    model = tiny()
    expected = model(batch)
    total = criterion.total(criterion(expected, targets))
    total.backward()
    there = tiny().to(device)
    outputs = there(batch.to(device))
    moved = [{key: value.to(device) for key, value in target.items()} for target in targets]
    on_device = criterion.to(device).total(criterion(outputs, moved))
    on_device.backward()
    compare({k: outputs[k].detach() for k in ("pred_logits", "pred_boxes")}, {k: expected[k].detach() for k in ("pred_logits", "pred_boxes")}, boxes, 10 * boxes)
    assert on_device.item() == pytest.approx(total.item(), abs=loss_tolerance)
    for (name, ours), theirs in zip(model.named_parameters(), there.parameters()):
        norm = ours.grad.norm().item()
        assert (theirs.grad.cpu() - ours.grad).norm().item() <= 1e-2 * max(norm, 1e-3), name


@pytest.fixture
def exact_float32():
    """Convolutions and matrix products in full float32: TF32 keeps ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
@needs_cuda
def test_cuda_equals_the_cpu(exact_float32):
    train_and_compare("cuda", boxes=1e-4, loss_tolerance=1e-2)


@pytest.mark.gpu
@needs_cuda
def test_cuda_bfloat16_autocast_keeps_positions_boxes_and_losses_in_float32():
    model, batch = tiny().cuda(), batch_of((96, 128), (128, 72))
    targets = [{key: value.cuda() for key, value in target.items()} for target in targets_for([3, 1])]
    seen = {}
    model.backbone.register_forward_hook(lambda module, args, output: seen.update(positions=output[1][0]))
    with torch.autocast("cuda", torch.bfloat16):
        outputs = model(batch.to("cuda"))
        losses = build_criterion(6, 3)(outputs, targets)
    assert outputs["pred_logits"].dtype == torch.bfloat16
    assert seen["positions"].dtype == outputs["pred_boxes"].dtype == torch.float32
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        compare({k: outputs[k].detach() for k in ("pred_logits", "pred_boxes")}, tiny()(batch), boxes=0.02, logits=0.1)


@pytest.mark.gpu
@needs_cuda
def test_cuda_generated_code_gives_the_same_boxes():
    found = compiled("generated", "cuda")["smallest"]
    assert found["pred_boxes"] <= 1e-4 and found["pred_logits"] <= 1e-3


@needs_mps
def test_mps_equals_the_cpu():
    train_and_compare("mps", boxes=1e-4, loss_tolerance=1e-2)
