"""Chapter 03: the backbone equals the reference and torchvision's own ResNet, and freezes what it says it freezes."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from annotated_detr.backbone import Backbone, BackboneBase, FoldedConv2d, FrozenBatchNorm2d, TinyBackbone, fold_frozen_norms, has_random_frozen_layers
from annotated_detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

GOLDEN = Path(__file__).parent / "golden"


def named_as_in_detr(backbone: nn.Module) -> nn.Module:
    """The backbone where the whole detector keeps it, so that the recipe sees the names it seeds by."""
    return nn.ModuleDict({"backbone": nn.ModuleList([backbone])})


@pytest.mark.parametrize(
    ("name", "network", "dilation", "every"),
    [("r18_small", "resnet18", False, 1), ("r50", "resnet50", False, 64), ("r50_dc5", "resnet50", True, 64)],
)
def test_features_and_masks_equal_the_reference(golden, recipe, name, network, dilation, every):
    backbone = Backbone(network, True, False, dilation).eval()
    recipe.fill(named_as_in_detr(backbone))
    batch = nested_tensor_from_tensor_list(recipe.images("image", [(160, 224), (128, 256)]))
    with torch.no_grad():
        output = backbone(batch)
    assert list(output) == ["0"]
    features, mask = output["0"].decompose()
    np.testing.assert_allclose(features[:, ::every].numpy(), golden(name)["mid/feature"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(mask.numpy(), golden(name)["mid/feature_mask"])


@pytest.mark.parametrize("network", ["resnet50", "resnet101"])
def test_state_dict_has_the_published_checkpoints_keys_and_shapes(network):
    published = json.loads((GOLDEN / f"state_dict_detr_{network}.json").read_text())
    published = {key: shape for key, shape in published.items() if key.startswith("backbone.")}
    ours = named_as_in_detr(Backbone(network, True, False, False)).state_dict()
    assert {key: list(value.shape) for key, value in ours.items()} == published


@pytest.mark.parametrize("dilation", [False, True])
def test_all_four_maps_equal_torchvisions_resnet_with_ordinary_batch_norm(dilation):
    """An independent path: torchvision's network with nn.BatchNorm2d in eval mode, read by hooks."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, False, dilation])
    network.train()(torch.randn(2, 3, 64, 64))  # running statistics that are not 0 and 1
    network.eval()
    backbone = Backbone("resnet50", False, True, dilation).eval()
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    assert any("num_batches_tracked" in key for key in state)
    backbone.body.load_state_dict(state, strict=True)

    seen = []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    images = torch.randn(2, 3, 96, 128)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    with torch.no_grad():
        network(images)
        output = backbone(NestedTensor(images, mask))
    assert list(output) == ["0", "1", "2", "3"]
    for ours, theirs in zip(output.values(), seen, strict=True):
        torch.testing.assert_close(ours.tensors, theirs, atol=1e-4, rtol=0)


def test_frozen_batch_norm_equals_batch_norm_in_eval_and_ignores_train():
    torch.manual_seed(0)
    ordinary, frozen = nn.BatchNorm2d(7), FrozenBatchNorm2d(7)
    for values in (ordinary.weight.data, ordinary.bias.data, ordinary.running_mean):
        values.normal_()
    ordinary.running_var.uniform_(0.01, 2)
    frozen.load_state_dict(ordinary.state_dict(), strict=True)
    x = 3 * torch.randn(4, 7, 5, 6)
    torch.testing.assert_close(frozen.train()(x), ordinary.eval()(x), atol=1e-5, rtol=1e-5)
    assert list(frozen.parameters()) == [] and len(list(frozen.buffers())) == 4
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    frozen(x)
    assert all(torch.equal(value, frozen.state_dict()[key]) for key, value in before.items())


def test_frozen_batch_norm_keeps_half_precision_half():
    frozen = FrozenBatchNorm2d(3)
    assert frozen(torch.randn(1, 3, 2, 2).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("train", [True, False])
def test_only_layers_two_to_four_train(train):
    backbone = Backbone("resnet18", train, False, False)
    stages = {name.split(".")[1] for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert stages == ({"layer2", "layer3", "layer4"} if train else set())


def test_trainable_parameters_of_the_paper():
    """DETR-R50 has 41,302,368 trainable of 41,524,768 parameters: the difference is the stem and layer 1."""
    parameters = list(Backbone("resnet50", True, False, False).parameters())
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    assert frozen == 41_524_768 - 41_302_368


def test_gradients_stop_where_training_stops():
    backbone = Backbone("resnet18", True, False, False)
    batch = nested_tensor_from_tensor_list([torch.randn(3, 64, 64)])
    backbone(batch)["0"].tensors.sum().backward()
    assert backbone.body.layer2[0].conv1.weight.grad.any()
    assert backbone.body.layer1[0].conv1.weight.grad is None


def test_dilation_doubles_the_resolution_and_keeps_the_parameters():
    plain, dilated = Backbone("resnet50", True, False, False), Backbone("resnet50", True, False, True)
    assert plain.state_dict().keys() == dilated.state_dict().keys()
    assert [block.conv2.dilation[0] for block in dilated.body.layer4] == [1, 2, 2]
    batch = nested_tensor_from_tensor_list([torch.randn(3, 64, 96)])
    with torch.no_grad():
        assert plain(batch)["0"].tensors.shape == (1, 2048, 2, 3)
        assert dilated(batch)["0"].tensors.shape == (1, 2048, 4, 6)


def test_mask_is_sampled_by_nearest_neighbour():
    """Cell (i, j) of the map reads the mask at (floor(i·H0/H), floor(j·W0/W))."""
    batch = nested_tensor_from_tensor_list([torch.randn(3, 50, 131), torch.randn(3, 77, 90)])
    for name, output in Backbone("resnet18", False, True, False)(batch).items():
        H, W = output.tensors.shape[-2:]
        rows = torch.tensor([i * 77 // H for i in range(H)])
        columns = torch.tensor([j * 131 // W for j in range(W)])
        assert torch.equal(output.mask, batch.mask[:, rows][:, :, columns]), name


def test_any_network_with_resnets_names_will_do():
    backbone = BackboneBase(torchvision.models.resnext50_32x4d(weights=None, norm_layer=FrozenBatchNorm2d), True, 2048, False)
    assert backbone.num_channels == 2048
    assert backbone(nested_tensor_from_tensor_list([torch.randn(3, 32, 32)]))["0"].tensors.shape == (1, 2048, 1, 1)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_file_of_torchvisions_network(tmp_path, suffix):
    network = torchvision.models.resnet18(weights=None)
    network.bn1.running_mean.normal_()
    state = network.state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        import safetensors.torch

        safetensors.torch.save_file(state, path)
    body = Backbone("resnet18", True, False, False, weights=str(path)).body.state_dict()
    assert body.keys() <= state.keys() and all(torch.equal(state[key], value) for key, value in body.items())


def test_random_frozen_layers_are_noticed(recipe):
    backbone = Backbone("resnet18", True, False, False)
    assert has_random_frozen_layers(backbone)
    assert not has_random_frozen_layers(recipe.fill(named_as_in_detr(backbone)))
    assert not has_random_frozen_layers(TinyBackbone())


def test_building_without_weights_needs_no_network(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("touched the network"))
    Backbone("resnet18", True, False, False)


def test_weights_that_cannot_be_downloaded_say_where_to_put_the_file(monkeypatch, tmp_path):
    def offline(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"IMAGENET1K_V1 of resnet18 .* could not be downloaded .* fetch https://.*resnet18.* put the file into"):
        Backbone("resnet18", True, False, False, weights="IMAGENET1K_V1")


def test_bad_requests_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no backbone 'vgg16': choose one of resnet18"):
        Backbone("vgg16", True, False, False)
    with pytest.raises(ValueError, match="resnet18 cannot be dilated"):
        Backbone("resnet18", True, False, True)
    with pytest.raises(FileNotFoundError, match="neither a file nor one of torchvision's names for resnet18: IMAGENET1K_V1"):
        Backbone("resnet18", True, False, False, weights="IMAGENET")
    wrong = tmp_path / "wrong.pth"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), wrong)
    with pytest.raises(ValueError, match="does not hold the weights of a resnet18"):
        Backbone("resnet18", True, False, False, weights=str(wrong))
    pickled = tmp_path / "pickled.pth"
    torch.save({"model": nn.Linear(1, 1)}, pickled)
    with pytest.raises(ValueError, match="could run code"):
        Backbone("resnet18", True, False, False, weights=str(pickled))
    torch.save([torch.zeros(3)], pickled)
    with pytest.raises(ValueError, match="holds no state dict"):
        Backbone("resnet18", True, False, False, weights=pickled)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(b"\x10\0\0\0")
    with pytest.raises(ValueError, match="is damaged, or no file of weights"):
        Backbone("resnet18", True, False, False, weights=truncated)
    with pytest.raises(ValueError, match="TinyBackbone needs at least one block"):
        TinyBackbone(())


@pytest.mark.parametrize(("channels", "stride"), [((24, 48, 96), 8), ((8,), 2), ((8, 16, 16, 32), 16)])
def test_tiny_backbone_has_the_stride_its_depth_gives(channels, stride):
    backbone = TinyBackbone(channels)
    batch = nested_tensor_from_tensor_list([torch.randn(3, 64, 48), torch.randn(3, 32, 96)])
    output = backbone(batch)
    assert list(output) == ["0"] and backbone.num_channels == channels[-1]
    assert output["0"].tensors.shape == (2, channels[-1], 64 // stride, 96 // stride)
    assert torch.equal(output["0"].mask, batch.mask[:, ::stride, ::stride])


def test_every_parameter_of_tiny_backbone_trains():
    backbone = TinyBackbone()
    backbone(nested_tensor_from_tensor_list([torch.randn(3, 32, 32)] * 2))["0"].tensors.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in backbone.parameters())
    assert backbone.stem[1].num_batches_tracked == 1, "its norms learn their statistics"


@pytest.mark.parametrize("dilation, network", [(False, "resnet18"), (True, "resnet50")])
def test_folded_norms_change_neither_features_nor_gradients_nor_names(recipe, network, dilation):
    plain = Backbone(network, True, False, dilation)
    recipe.fill(named_as_in_detr(plain))
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    fold_frozen_norms(folded)  # once more changes nothing
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert all(norm.folded for norm in folded.modules() if isinstance(norm, FrozenBatchNorm2d))
    batch = nested_tensor_from_tensor_list(recipe.images("image", [(64, 96), (96, 64)]))
    gradients, features = [], []
    for backbone in (plain, folded):
        features.append(backbone(batch)["0"].tensors)
        features[-1].square().sum().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5 * float(features[0].detach().abs().max()))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_a_copy_of_a_folded_backbone_follows_its_own_norms_and_half_precision_works():
    folded = Backbone("resnet18", True, False, False)
    fold_frozen_norms(folded)
    again = copy.deepcopy(folded).bfloat16()
    convolutions = [layer for layer in again.modules() if isinstance(layer, FoldedConv2d)]
    assert len(convolutions) == 20 and all(layer.norm[0] in list(again.modules()) for layer in convolutions)
    assert all(layer.norm[0].running_mean.dtype == torch.bfloat16 for layer in convolutions)
    assert again(NestedTensor(torch.rand(1, 3, 32, 32).bfloat16(), torch.zeros(1, 32, 32).bool()))["0"].tensors.dtype == torch.bfloat16
