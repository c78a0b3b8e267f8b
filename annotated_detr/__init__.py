"""DETR, explained by running it: the package that the book *The Annotated DETR* exports from its chapters.

Every public name can be taken from here (`from annotated_detr import DETR, HungarianMatcher`) or from the module of its
chapter (`from annotated_detr.matcher import HungarianMatcher`). A module is imported when one of its names is first used.
"""

import importlib

__version__ = "0.1.0"

# Module → public names, in the order of the chapters. The names that everyone who has read the paper's code knows come
# first in each row; public arguments never move (tests/test_house.py holds the table of them).
_EXPORTS = {
    "data": ["CocoDetection", "ConvertCocoPolysToMask", "make_coco_transforms", "check_dataset"],
    "nested_tensor": ["NestedTensor", "nested_tensor_from_tensor_list", "collate_fn"],
    "backbone": ["FrozenBatchNorm2d", "BackboneBase", "Backbone", "TinyBackbone"],
    "positional_encoding": ["PositionEmbeddingSine", "PositionEmbeddingLearned", "Joiner"],
    "transformer": [
        "Transformer",
        "TransformerEncoder",
        "TransformerEncoderLayer",
        "TransformerDecoder",
        "TransformerDecoderLayer",
    ],
    "detr": [
        "MLP",
        "DETR",
        "PostProcess",
        "detr_resnet50",
        "detr_resnet50_dc5",
        "detr_resnet101",
        "detr_resnet101_dc5",
        "detr_tiny",
    ],
    "matcher": ["HungarianMatcher"],
    "loss": ["SetCriterion", "build_criterion"],
    "evaluation": ["evaluate", "Scores"],
    "training": ["TrainConfig", "Trainer", "ModelSpec", "save_model", "load_model"],
    "inference": ["predict", "load_detector", "for_inference"],
    "pretrained": ["from_pretrained", "save_pretrained", "push_to_hub"],
    "your_pictures": ["choose_settings", "worst_mistakes"],
    "is_it_learning": ["rank_by_loss"],
    "scenes": ["running_batch", "running_batch_pil", "coco_folder"],
    "datasets": ["download", "convert_voc"],
    "figures": [],
    "cli": [],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", "versions", *_MODULE_OF]


def versions() -> str:
    """What runs here, in one line: the first that a report of a mistake should say."""
    import platform

    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = "Apple's GPU" if torch.backends.mps.is_available() else "the CPU"
    return f"{__name__} {__version__}, torch {torch.__version__}, Python {platform.python_version()}, on {device}"


def __getattr__(name: str):
    """Imports a module when one of its names, or the module itself, is first asked for."""
    if name in _EXPORTS:
        return importlib.import_module(f".{name}", __name__)
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value  # the next time Python finds it without asking
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *__all__})
