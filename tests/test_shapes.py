"""Shapes are checked: everything public is annotated, in the book's letters, and the annotations catch what they should."""

import importlib
import importlib.util
import inspect
import re
import sys
import types
import typing
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

import annotated_detr
from annotated_detr import transformer
from annotated_detr.nested_tensor import NestedTensor

PACKAGE = Path(annotated_detr.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("[!_]*.py"))
CORE = ["nested_tensor", "backbone", "positional_encoding", "transformer", "detr", "matcher", "loss"]
LETTERS = set("B H0 W0 H W C S d M L N K n h w".split())


# --- everything is annotated ----------------------------------------------------------------------------------------


def functions_of(module: types.ModuleType):
    """Public functions, public methods of public classes, constructors, and every `forward`, with their names."""
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) and not name.startswith("_"):
            yield name, inspect.unwrap(thing)
        if inspect.isclass(thing):
            for attribute, value in vars(thing).items():
                value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                value = value.fget if isinstance(value, property) else value
                public = not name.startswith("_") and (attribute == "__init__" or not attribute.startswith("_"))
                forward = attribute == "forward" and issubclass(thing, nn.Module)
                if inspect.isfunction(inspect.unwrap(value)) and (public or forward):
                    function = inspect.unwrap(value)
                    if function.__module__ == module.__name__:
                        yield f"{name}.{attribute}", function


def annotations_of(function) -> dict[str, typing.Any]:
    """Every parameter but `self` or `cls`, and "return", with its annotation or `inspect.Parameter.empty`."""
    signature = inspect.signature(function)
    found = {name: p.annotation for name, p in signature.parameters.items() if name not in ("self", "cls")}
    return found | {"return": signature.return_annotation}


def parts_of(annotation) -> list:
    """An annotation and everything inside its brackets."""
    return [annotation, *(part for inner in typing.get_args(annotation) for part in parts_of(inner))]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_every_forward_is_annotated(name):
    module = importlib.import_module(f"annotated_detr.{name}")
    functions = dict(functions_of(module))
    assert functions, "this test sees no function, so it tests nothing"
    missing = [
        f"{name}.{function_name}: {parameter}"
        for function_name, function in functions.items()
        for parameter, annotation in annotations_of(function).items()
        if annotation is inspect.Parameter.empty and not (function_name.endswith("__init__") and parameter == "return")
    ]
    assert missing == []


@pytest.mark.parametrize("name", CORE)
def test_tensors_have_shapes_in_their_annotations(name):
    """A plain `Tensor` says nothing; inside a dictionary, whose tensors differ, it is all that can be said."""
    module = importlib.import_module(f"annotated_detr.{name}")
    bare = []
    for function_name, function in functions_of(module):
        for parameter, annotation in annotations_of(function).items():
            outside = [part for part in parts_of(annotation) if typing.get_origin(part) is dict]
            inside_dictionaries = [part for whole in outside for part in parts_of(whole)]
            for part in parts_of(annotation):
                if part is Tensor and part not in inside_dictionaries:
                    bare.append(f"{name}.{function_name}: {parameter}")
    assert bare == []


@pytest.mark.parametrize("name", CORE)
def test_annotations_speak_the_books_letters(name):
    """One or two characters stand for an axis only if the book's table has them; other axes have a word."""
    source = (PACKAGE / f"{name}.py").read_text(encoding="utf8")
    shapes = re.findall(r'(?:Float|Bool|Int64|Int|Num)\[Tensor, "([^"]*)"\]', source)
    assert len(shapes) > 3
    for shape in shapes:
        for axis in shape.split():
            axis = axis.lstrip("*")
            assert axis in LETTERS or axis.isdigit() or axis in ("_", "...") or len(axis) > 2, f"{axis!r} in {shape!r}"


# --- and the annotations bite ---------------------------------------------------------------------------------------


def copy_of(name: str, folder: Path, changes: dict[str, str], checked: bool):
    """A module's copy, with changes in its source, imported under a name of its own, with or without the checks."""
    source = (PACKAGE / f"{name}.py").read_text(encoding="utf8")
    source = re.sub(r"^from \.", "from annotated_detr.", source, flags=re.M)
    for old, new in changes.items():
        assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {name}.py: this test has to follow it"
        source = source.replace(old, new)
    copied = f"{name}_{'checked' if checked else 'plain'}_{len(changes)}"
    (folder / f"{copied}.py").write_text(source, encoding="utf8")
    sys.path.insert(0, str(folder))
    try:
        if not checked:
            return importlib.import_module(copied)
        with jaxtyping.install_import_hook(copied, "beartype.beartype"):
            return importlib.import_module(copied)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(copied, None)



def features() -> NestedTensor:
    return NestedTensor(torch.randn(2, 8, 3, 5), torch.zeros(2, 3, 5, dtype=torch.bool))


def use_positions(module, name):
    """Positions meet the features in the transformer: both are flattened there, so wrong ones would still fit."""
    positions = getattr(module, name)(4)(features())
    model, (tensors, mask) = transformer.Transformer(8, 2, 1, 1, 16), features().decompose()
    return model(tensors, mask, torch.randn(4, 8), positions)


def use_sine_positions(module):
    return use_positions(module, "PositionEmbeddingSine")


def use_learned_positions(module):
    return use_positions(module, "PositionEmbeddingLearned")


def use_transformer(module):
    model, (tensors, mask) = module.Transformer(8, 2, 1, 1, 16), features().decompose()
    return model(tensors, mask, torch.randn(4, 8), torch.randn(2, 8, 3, 5))


def use_frozen_norm(module):
    return module.FrozenBatchNorm2d(8)(features().tensors)



SWAPS = {
    "sine positions": ("positional_encoding", ".permute(0, 3, 1, 2)", ".permute(0, 3, 2, 1)", use_sine_positions),
    "learned positions": ("positional_encoding", "expand(B, -1, H, W)", "expand(B, -1, H, W).mT", use_learned_positions),
    "memory": ("transformer", "memory.mT.reshape(src.shape)", "memory.mT.reshape(src.mT.shape)", use_transformer),
    "frozen norm": ("backbone", "return x * scale.to", "return x.mT * scale.to", use_frozen_norm),
}


@pytest.mark.parametrize("module, right, swapped, use", SWAPS.values(), ids=SWAPS)
def test_height_and_width_swapped_in_a_copy_are_caught(module, right, swapped, use, tmp_path):
    """The copy without the swap passes; with it, the checks stop it; and without the checks nobody notices."""
    use(copy_of(module, tmp_path, {}, checked=True))
    swap = {right: swapped}
    with pytest.raises(jaxtyping.TypeCheckError):
        use(copy_of(module, tmp_path, swap, checked=True))
    plain = copy_of(module, tmp_path, swap, checked=False)
    jaxtyping.config.update("jaxtyping_disable", True)  # for the modules that the copy meets
    try:
        use(plain)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_the_checks_are_on_in_this_very_run():
    """What makes every other test a test of the shapes in the book."""
    for name in CORE:
        module = importlib.import_module(f"annotated_detr.{name}")
        checked = [function for function in vars(module).values() if hasattr(function, "__wrapped__")]
        checked += [value for thing in vars(module).values() if inspect.isclass(thing) for value in vars(thing).values() if hasattr(value, "__wrapped__")]
        assert checked, f"nothing in {name} is wrapped by a check"
    with pytest.raises(jaxtyping.TypeCheckError):
        NestedTensor(torch.zeros(1, 3, 4, 5), torch.zeros(1, 5, 4, dtype=torch.bool))
