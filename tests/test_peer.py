"""An independent DETR: transformers' `DetrForObjectDetection` with the same weights gives the same numbers.

The conversion is ours (`save_for_transformers`), the reading theirs. Theirs is asked layer by layer, because with
`auxiliary_loss=True` it feeds each layer the normed output of the one before, which the paper's code does not.
"""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from annotated_detr.backbone import FrozenBatchNorm2d
from annotated_detr.detr import PRESETS
from annotated_detr.loss import build_criterion
from annotated_detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from annotated_detr.pretrained import from_hugging_face, load, save_for_transformers
from annotated_detr.training import ModelSpec

if not all(map(importlib.util.find_spec, ("transformers", "timm"))):
    pytest.skip("transformers and timm are not installed", allow_module_level=True)

K, N = 7, 20
PADDED, EVEN = [(128, 192), (160, 128)], [(128, 192), (128, 192)]


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def measure(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
    """Gives a frozen norm the statistics of what it sees; without that all tokens of a random network look alike."""
    norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
    norm.running_var.copy_(inputs[0].var((0, 2, 3)))


@pytest.fixture(scope="module", params=["detr_resnet50", "detr_resnet50_dc5"])
def pair(request, transformers, recipe, tmp_path_factory) -> tuple[nn.Module, nn.Module]:
    """Our model, and theirs with the same weights, under which the queries disagree."""
    spec = ModelSpec(request.param, K, N, 800, {str(i): f"thing {i}" for i in range(1, K)})
    ours = recipe.fill(PRESETS[spec.model](num_classes=K, num_queries=N, aux_loss=True)).eval()
    with torch.no_grad():
        ours.query_embed.weight.mul_(10)
        norms = [module for module in ours.modules() if isinstance(module, FrozenBatchNorm2d)]
        hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
        ours(batch_of(recipe, *EVEN))
    for hook in hooks:
        hook.remove()
    folder = save_for_transformers(ours, tmp_path_factory.mktemp("peer") / "detr", spec)
    theirs, report = transformers.DetrForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return ours, theirs.eval()


def batch_of(recipe, *sizes: tuple[int, int]) -> NestedTensor:
    return nested_tensor_from_tensor_list(recipe.images("peer", sizes))


def layers_of(peer: nn.Module, batch: NestedTensor) -> tuple[Tensor, Tensor]:
    """Logits and boxes of all its decoder layers."""
    states = []

    def keep(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in peer.model.decoder.layers]
    last = peer(batch.tensors, pixel_mask=(~batch.mask).long())
    for hook in hooks:
        hook.remove()
    hs = peer.model.decoder.layernorm(torch.stack(states))
    logits, boxes = peer.class_labels_classifier(hs), peer.bbox_predictor(hs).sigmoid()
    assert torch.equal(logits[-1], last.logits) and torch.equal(boxes[-1], last.pred_boxes)
    return logits, boxes


@pytest.mark.parametrize("sizes", [PADDED, EVEN], ids=["padded", "unpadded"])
def test_logits_and_boxes_of_every_layer_agree(pair, recipe, sizes):
    ours, theirs = pair
    batch = batch_of(recipe, *sizes)
    assert batch.mask.any() == (sizes is PADDED)
    with torch.no_grad():
        outputs, (logits, boxes) = ours(batch), layers_of(theirs, batch)
    layers = [*outputs["aux_outputs"], outputs]
    assert boxes[-1].std(1).mean() > 1e-3  # queries that all say the same would prove little
    torch.testing.assert_close(torch.stack([layer["pred_logits"] for layer in layers]), logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack([layer["pred_boxes"] for layer in layers]), boxes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [PADDED, EVEN], ids=["padded", "unpadded"])
def test_every_loss_of_every_layer_agrees(pair, recipe, sizes):
    ours, theirs = pair
    batch, targets = batch_of(recipe, *sizes), recipe.targets("peer", [5, 2], K)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    with torch.no_grad():
        criterion = build_criterion(K)
        losses = criterion(ours(batch), targets)
        logits, boxes = layers_of(theirs, batch)
        theirs.config.auxiliary_loss = True
        total, expected, _ = theirs.loss_function(logits[-1], labels, "cpu", boxes[-1], theirs.config, logits, boxes)
        theirs.config.auxiliary_loss = False
    assert set(expected) == set(losses) - {"class_error"}
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), abs=1e-4), key
    assert criterion.total(losses).item() == pytest.approx(total.item(), abs=1e-4)


def test_a_wrong_conversion_does_not_pass(pair, recipe):
    """The comparison bites: query and key exchanged, or padding unmasked, are far outside the tolerance."""
    ours, theirs = pair
    batch = batch_of(recipe, *PADDED)
    with torch.no_grad():
        right = theirs(batch.tensors, pixel_mask=(~batch.mask).long()).pred_boxes
        unmasked = theirs(batch.tensors).pred_boxes
        attention = theirs.model.decoder.layers[0].encoder_attn
        attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj
        exchanged = theirs(batch.tensors, pixel_mask=(~batch.mask).long()).pred_boxes
        attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj
    assert (right - unmasked).abs().max() > 1e-3
    assert (right - exchanged).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", ["timm", "its own"])
@pytest.mark.parametrize("positions", ["sine", "learned"])
def test_a_folder_that_transformers_wrote_loads(transformers, recipe, tmp_path, capsys, backbone, positions):
    options = {
        "id2label": {0: "N/A", 1: "cat", 2: "LABEL_2", 3: "dog"},
        "num_queries": 6,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "d_model": 64,
        "position_embedding_type": positions,
    }
    if backbone == "timm":
        options |= {"backbone": "resnet50", "use_timm_backbone": True, "use_pretrained_backbone": False, "dilation": True}
    else:
        resnet = transformers.ResNetConfig(out_features=["stage4"])
        options |= {"backbone_config": resnet, "backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
    theirs = recipe.fill(transformers.DetrForObjectDetection(transformers.DetrConfig(**options)).eval())
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 480, "longest_edge": 800}}')
    assert (tmp_path / "model.safetensors").is_file()

    ours, spec, report = load(tmp_path)
    assert spec.class_names == {"1": "cat", "3": "dog"}
    assert spec.model == ("detr_resnet50_dc5" if backbone == "timm" else "detr_resnet50")
    assert (spec.num_classes, spec.num_queries, spec.size) == (4, 6, 480)
    assert len(report.kept) == len(ours.state_dict()) and not report.resized and not report.reset
    batch = batch_of(recipe, (96, 128), (128, 64))
    with torch.no_grad():
        expected = theirs(batch.tensors, pixel_mask=(~batch.mask).long())
        outputs = ours(batch)
    torch.testing.assert_close(outputs["pred_logits"], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs["pred_boxes"], expected.pred_boxes, rtol=0, atol=1e-4)

    in_memory = from_hugging_face(theirs.state_dict())  # version 5 spells these differently from its files
    assert in_memory.keys() == ours.state_dict().keys()
    assert all(torch.equal(in_memory[key], tensor) for key, tensor in ours.state_dict().items())
