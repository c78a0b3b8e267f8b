"""For torch.hub: `torch.hub.load("annotated-detr/annotated-detr", "detr_resnet50", pretrained=True)`."""

dependencies = ["torch", "torchvision", "jaxtyping", "safetensors"]

from annotated_detr.detr import (  # noqa: E402
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet101,
    detr_resnet101_dc5,
)

__all__ = ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5"]
