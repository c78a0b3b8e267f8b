"""The whole detector against the golden arrays and the published checkpoints' keys, then what its users rely on."""

import json
import os
import urllib.error
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from annotated_detr.backbone import Backbone
from annotated_detr.detr import (
    DETR,
    MLP,
    PRESETS,
    PostProcess,
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_tiny,
)
from annotated_detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from annotated_detr.positional_encoding import Joiner, PositionEmbeddingSine
from annotated_detr.transformer import Transformer, record_attention

GOLDEN = Path(__file__).parent / "golden"


def small_detr() -> DETR:
    backbone = Joiner(Backbone("resnet18", True, False, False), PositionEmbeddingSine(32, normalize=True))
    return DETR(backbone, Transformer(64, 4, 2, 3, 128, return_intermediate_dec=True), 7, 12, aux_loss=True)


def tiny(**options) -> DETR:
    torch.manual_seed(0)
    return detr_tiny(6, num_queries=5, **options).eval()


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, h, w, generator=generator) for h, w in sizes]


MODELS = {
    "r18_small": small_detr,
    "r50": lambda: detr_resnet50(aux_loss=True),
    "r50_dc5": lambda: detr_resnet50_dc5(aux_loss=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_of_every_layer_equals_the_golden_arrays(name, golden, recipe):
    arrays = {key: torch.from_numpy(array) for key, array in golden(name).items() if array.dtype.kind in "fib"}
    model = recipe.fill(MODELS[name]()).eval()
    middle = {}
    model.transformer.register_forward_hook(lambda module, args, output: middle.update(hs=output[0], memory=output[1]))
    with torch.no_grad():
        outputs = model(recipe.images("image", [(160, 224), (128, 256)]))

    torch.testing.assert_close(middle["memory"][:, ::8], arrays["mid/memory"], rtol=0, atol=1e-5)
    torch.testing.assert_close(middle["hs"][-1, ..., ::8], arrays["mid/hs_last"], rtol=0, atol=1e-5)
    layers = [*outputs["aux_outputs"], outputs]
    logits = torch.stack([layer["pred_logits"] for layer in layers])
    boxes = torch.stack([layer["pred_boxes"] for layer in layers])
    torch.testing.assert_close(logits, arrays["pred_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(boxes, arrays["pred_boxes"], rtol=0, atol=1e-5)

    sizes = torch.tensor([[480, 640], [375, 500]])
    for image, result in enumerate(PostProcess()(outputs, sizes)):
        assert (result["labels"] == arrays[f"post/image{image}/labels"]).all()
        torch.testing.assert_close(result["scores"], arrays[f"post/image{image}/scores"], rtol=0, atol=1e-5)
        torch.testing.assert_close(result["boxes"], arrays[f"post/image{image}/boxes"], rtol=0, atol=640 * 1e-5)


@pytest.mark.parametrize(
    "build, name, trainable, total",
    [
        (detr_resnet50, "detr_resnet50", 41_302_368, 41_524_768),
        (detr_resnet50_dc5, "detr_resnet50", 41_302_368, 41_524_768),
        (detr_resnet101, "detr_resnet101", 60_242_272, 60_464_672),
        (detr_resnet101_dc5, "detr_resnet101", 60_242_272, 60_464_672),
    ],
)
def test_keys_and_parameters_are_those_of_the_published_models(build, name, trainable, total):
    with torch.device("meta"):  # shapes without memory
        model = build()
    published = json.loads((GOLDEN / f"state_dict_{name}.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == published
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == total
    assert sum(p.numel() for p in parameters if p.requires_grad) == trainable


def test_constructing_never_touches_the_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a constructor asked for a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    for name, build in PRESETS.items():
        with torch.device("meta"):  # shapes without memory
            model = build(num_classes=3, num_queries=7, dropout=0.0, aux_loss=True)
        assert model.class_embed.out_features == 4 and model.query_embed.num_embeddings == 7, name


def test_published_weights_load_from_the_hub_folder(monkeypatch, tmp_path, recipe):
    """A file in torch.hub's folder is used as it is, so no network is needed once it lies there."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    published = recipe.fill(detr_resnet50()).state_dict()
    published["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(0)  # some published files carry it
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "detr-r50-e632da11.pth"
    torch.save({"model": published}, file)
    model, postprocessor = detr_resnet50(pretrained=True, return_postprocessor=True)
    assert isinstance(postprocessor, PostProcess)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, published[key]), key

    del published["class_embed.bias"]
    torch.save({"model": published}, file)
    with pytest.raises(RuntimeError, match="class_embed.bias"):
        detr_resnet50(pretrained=True)


def test_published_weights_offline_say_which_file_goes_where(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=r"detr/detr-r101-dc5-a2e86def\.pth .*put the file into") as caught:
        detr_resnet101_dc5(pretrained=True)
    assert os.fspath(tmp_path / "checkpoints") in str(caught.value)


@pytest.mark.parametrize("setting", [{"num_classes": 7}, {"num_queries": 50}, {"weights": "IMAGENET1K_V1"}])
def test_published_weights_refuse_settings_they_do_not_have(setting):
    with pytest.raises(ValueError, match="91 classes, 100 queries"):
        detr_resnet50(pretrained=True, **setting)


def test_list_and_padded_batch_give_the_same_output():
    model, batch = tiny(), pictures((40, 64), (56, 48))
    with torch.no_grad():
        from_list, from_batch = model(batch), model(nested_tensor_from_tensor_list(batch))
    assert set(from_list) == {"pred_logits", "pred_boxes", "aux_outputs"}
    assert from_list["pred_logits"].shape == (2, 5, 7)
    assert from_list["pred_boxes"].shape == (2, 5, 4)
    assert [set(layer) for layer in from_list["aux_outputs"]] == [{"pred_logits", "pred_boxes"}] * 2
    for key in ("pred_logits", "pred_boxes"):
        assert torch.equal(from_list[key], from_batch[key])
    assert from_list["pred_boxes"].min() > 0 and from_list["pred_boxes"].max() < 1


def test_auxiliary_outputs_are_optional_and_leave_the_last_layer_alone():
    with_others, alone = tiny(), tiny(aux_loss=False)
    batch = pictures((40, 64))
    with torch.no_grad():
        expected, outputs = with_others(batch), alone(batch)
    assert set(outputs) == {"pred_logits", "pred_boxes"}
    for key in outputs:
        torch.testing.assert_close(outputs[key], expected[key], rtol=0, atol=1e-6)
    assert not torch.allclose(expected["aux_outputs"][-1]["pred_boxes"], expected["pred_boxes"])
    with pytest.raises(ValueError, match="return_intermediate_dec=True"):
        DETR(with_others.backbone, Transformer(96, 4, 1, 1, 8), 6, 5, aux_loss=True)


@pytest.mark.parametrize("learned_content", [False, True])
@pytest.mark.parametrize("normalize_before", [False, True])
@settings(deadline=None, max_examples=8)
@given(order=st.permutations(range(5)))
def test_predictions_permute_with_the_queries(normalize_before, learned_content, order):
    model = tiny(normalize_before=normalize_before, learned_content=learned_content)
    batch = pictures((40, 64), (56, 48))
    with torch.no_grad():
        outputs = model(batch)
        for table in (model.query_embed, model.query_content):
            if table is not None:
                table.weight.copy_(table.weight[list(order)])
        permuted = model(batch)
    for layer, expected in zip([permuted, *permuted["aux_outputs"]], [outputs, *outputs["aux_outputs"]], strict=True):
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(layer[key], expected[key][:, list(order)], rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.tuples(st.integers(9, 40), st.integers(9, 40)), min_size=2, max_size=3), seed=st.integers(0, 999))
def test_what_padding_may_and_may_not_do(sizes, seed):
    """At equal padding, and given that padding is zero, a picture's answers do not depend on its neighbours' pixels.

    Padding that is not zero does change them, and so does more of it: convolutions know no mask. Behind the backbone
    nothing leaks at all (test_transformer.py).
    """
    model = tiny()
    generator = torch.Generator().manual_seed(seed)
    batch = nested_tensor_from_tensor_list([torch.randn(3, h, w, generator=generator) for h, w in sizes])
    others = batch.tensors.clone()
    others[1:] = torch.where(batch.mask[1:, None], 0.0, torch.randn(others[1:].shape, generator=generator))
    with torch.no_grad():
        expected, found = model(batch), model(NestedTensor(others, batch.mask))
        features, _ = model.backbone(batch)
        src, mask = features[-1].decompose()
        noise = 10 * torch.randn(src.shape, generator=generator)
        handle = model.backbone[0].register_forward_hook(
            lambda module, args, output: {"0": NestedTensor(torch.where(mask[:, None], noise, src), mask)}
        )
        behind = model(batch)
        handle.remove()
    for key in ("pred_boxes", "pred_logits"):
        torch.testing.assert_close(found[key][0], expected[key][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(behind[key], expected[key], rtol=0, atol=1e-4)


def test_a_batch_equals_its_pictures_one_by_one_at_equal_padding():
    model, batch = tiny(), nested_tensor_from_tensor_list(pictures((40, 64), (56, 48)))
    with torch.no_grad():
        together = model(batch)
        for i in range(2):
            alone = model(NestedTensor(batch.tensors[i : i + 1], batch.mask[i : i + 1]))
            torch.testing.assert_close(alone["pred_boxes"][0], together["pred_boxes"][i], rtol=0, atol=1e-5)
            torch.testing.assert_close(alone["pred_logits"][0], together["pred_logits"][i], rtol=0, atol=1e-4)


def test_no_query_attends_to_padding():
    model, batch = tiny(), nested_tensor_from_tensor_list(pictures((40, 64), (56, 24)))
    with torch.no_grad(), record_attention(model) as weights:
        model(batch)
    padding = batch.mask[1, ::8, ::8].flatten()
    assert 0 < padding.sum() < padding.numel()
    for name in ("transformer.encoder.layers.1.self_attn", "transformer.decoder.layers.2.multihead_attn"):
        assert (weights[name][1, ..., padding] == 0).all()
        assert (weights[name][1, ..., ~padding] > 0).all()


def test_a_picture_that_is_all_padding_is_named():
    batch = nested_tensor_from_tensor_list(pictures((40, 64), (56, 48), (56, 64)))
    batch.mask[1] = True
    with pytest.raises(ValueError, match="picture 1 of the batch is all padding on the 7×8 feature map"):
        tiny().eval()(batch)


def test_gradients_reach_every_trainable_parameter():
    model = small_detr()
    outputs = model(pictures((64, 96)))
    sum(layer[key].square().sum() for layer in [outputs, *outputs["aux_outputs"]] for key in ("pred_logits", "pred_boxes")).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_mlp_counts_its_layers_and_ends_without_relu():
    mlp = MLP(8, 16, 4, num_layers=3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(16, 8), (16, 16), (4, 16)]
    x = torch.randn(2, 5, 8)
    by_hand = mlp.layers[2](mlp.layers[1](mlp.layers[0](x).clamp(min=0)).clamp(min=0))
    torch.testing.assert_close(mlp(x), by_hand)
    assert mlp(x).shape == (2, 5, 4) and mlp(x).min() < 0
    assert len(MLP(8, 16, 4, num_layers=1).layers) == 1


def test_boxes_come_out_in_pixels_of_each_pictures_own_size():
    outputs = {"pred_logits": torch.zeros(2, 1, 3), "pred_boxes": torch.tensor([[[0.5, 0.5, 0.5, 1.0]]] * 2)}
    first, second = PostProcess()(outputs, torch.tensor([[100, 400], [300, 200]]))
    assert first["boxes"].tolist() == [[100.0, 0.0, 300.0, 100.0]]
    assert second["boxes"].tolist() == [[50.0, 0.0, 150.0, 300.0]]


def test_no_object_never_wins_but_keeps_its_share():
    outputs = {"pred_logits": torch.tensor([[[0.0, 1.0, 5.0]]]), "pred_boxes": torch.full((1, 1, 4), 0.5)}
    (result,) = PostProcess()(outputs, torch.tensor([[10, 10]]))
    assert result["labels"].tolist() == [1]
    assert result["scores"].item() == pytest.approx(torch.tensor([0.0, 1.0, 5.0]).softmax(0)[1].item())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), N=st.integers(1, 30), B=st.integers(1, 3))
def test_every_query_comes_out_and_box_corners_are_ordered(seed, N, B):
    generator = torch.Generator().manual_seed(seed)
    outputs = {
        "pred_logits": torch.randn(B, N, 5, generator=generator),
        "pred_boxes": torch.rand(B, N, 4, generator=generator),
    }
    sizes = torch.randint(1, 2000, (B, 2), generator=generator)
    results = PostProcess()(outputs, sizes)
    assert len(results) == B
    for result, boxes, (height, width) in zip(results, outputs["pred_boxes"], sizes):
        assert result["scores"].shape == result["labels"].shape == (N,)
        assert (result["labels"] < 4).all() and (result["scores"] > 0).all() and (result["scores"] < 1).all()
        x0, y0, x1, y1 = result["boxes"].unbind(1)
        torch.testing.assert_close((x0 + x1) / 2, boxes[:, 0] * width, rtol=0, atol=2e-3)
        torch.testing.assert_close(y1 - y0, boxes[:, 3] * height, rtol=0, atol=2e-3)


def test_sizes_have_to_match_the_pictures():
    outputs = {"pred_logits": torch.zeros(2, 1, 3), "pred_boxes": torch.zeros(2, 1, 4)}
    with pytest.raises(ValueError, match="2 pictures need one"):
        PostProcess()(outputs, torch.tensor([[100, 400]]))


def test_tiny_takes_its_options():
    model = detr_tiny(3, d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=2, channels=[8, 16], temperature=100.0)
    outputs = model.eval()(pictures((32, 48)))
    assert outputs["pred_logits"].shape == (1, 16, 4)
    assert len(outputs["aux_outputs"]) == 1
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(TypeError, match="weights"):
        detr_tiny(3, weights="IMAGENET1K_V1")
