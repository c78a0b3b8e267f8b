"""Runs torch.compile in a process of its own, without the test run's annotation checks, which no compiler can follow.

python compiled.py CASE [DEVICE] prints one JSON object: by how much each output differs from eager execution.
"""

import json
import sys
import warnings

import torch

from annotated_detr.detr import detr_resnet50, detr_tiny
from annotated_detr.loss import build_criterion
from annotated_detr.nested_tensor import nested_tensor_from_tensor_list


def smallest():
    """A DETR with every kind of layer and few numbers, so that compiling it is quick."""
    torch.manual_seed(0)
    sizes = dict(d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=64, channels=(8,))
    return detr_tiny(6, num_queries=5, **sizes).eval()


def differences(found, expected):
    """The largest difference of every tensor, auxiliary outputs included."""
    layers = zip([found, *found.get("aux_outputs", [])], [expected, *expected.get("aux_outputs", [])], strict=True)
    worst = {"pred_logits": 0.0, "pred_boxes": 0.0}
    for ours, theirs in layers:
        for key in worst:
            worst[key] = max(worst[key], (ours[key] - theirs[key]).abs().max().item())
    return worst


case, device = sys.argv[1], (sys.argv[2:] or ["cpu"])[0]
torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
batch = nested_tensor_from_tensor_list([torch.randn(3, 40, 64), torch.randn(3, 56, 48)]).to(device)
result = {}

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", module="torch")  # what the compiler says about the machine
    if case == "generated":  # with the code that inductor generates
        model = smallest().to(device)
        with torch.no_grad():
            result["smallest"] = differences(torch.compile(model, fullgraph=True)(batch), model(batch))
    if case == "captured":  # the same graphs, run by PyTorch's own kernels: generating code for ResNet-50 takes minutes
        model = detr_resnet50(aux_loss=True).eval().to(device)
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            result["resnet50"] = differences(compiled(batch), model(batch))
        generator = torch.Generator().manual_seed(1)
        targets = [
            {"labels": torch.randint(6, (n,), generator=generator), "boxes": 0.2 + 0.5 * torch.rand(n, 4, generator=generator)}
            for n in (2, 1)
        ]
        criterion, gradients = build_criterion(6, 2), []
        for forward in (lambda m: m, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")):
            model = smallest()
            criterion.total(criterion(forward(model)(batch), targets)).backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        result["gradients"] = {"relative": ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()}
print(json.dumps(result))
