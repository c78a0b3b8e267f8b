"""Weights from anywhere: what is read, what is refused, what a new head keeps, and what is written."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from annotated_detr import pretrained, scenes, training
from annotated_detr.detr import PAPER_MODELS, PRESETS, detr_resnet50, detr_tiny
from annotated_detr.inference import predict
from annotated_detr.pretrained import (
    from_hugging_face,
    from_pretrained,
    load,
    pretrained_detector,
    push_to_hub,
    save_for_transformers,
    save_pretrained,
    to_hugging_face,
)
from annotated_detr.training import ModelSpec, save_model

ROOT = Path(__file__).parent.parent
NAMES = {"1": "cat", "2": "dog", "3": "owl"}
SMALL = {"num_encoder_layers": 1, "num_decoder_layers": 2, "d_model": 32, "dim_feedforward": 48, "nhead": 4}
SPEC = ModelSpec("tiny", 4, 5, 96, NAMES)


def tiny(spec: ModelSpec = SPEC, seed: int = 0):
    torch.manual_seed(seed)
    return spec.build().eval()


@pytest.fixture(scope="module")
def small() -> tuple:
    """A DETR on a ResNet-50 with a small transformer, and what it is."""
    torch.manual_seed(0)
    spec = ModelSpec("detr_resnet50", 4, 5, 800, NAMES, SMALL)
    return spec.build().eval(), spec


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- the sources ------------------------------------------------------------------------------------------------------


def test_a_saved_folder_a_file_and_a_run_load_alike(tmp_path, capsys):
    model = tiny()
    save_model(tmp_path / "model.safetensors", model, SPEC)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")  # the training configuration, which is not ours to read
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "run" / "checkpoints" / "best.safetensors")
    folder = save_pretrained(model, tmp_path / "saved", SPEC)
    for source in (tmp_path / "model.safetensors", tmp_path / "run", folder, folder / "model.safetensors", str(folder)):
        loaded, spec = from_pretrained(source)
        assert spec == SPEC and not loaded.training
        assert same(loaded.state_dict(), model.state_dict())
    assert capsys.readouterr().out == ""  # nothing was replaced, so nothing is said


def test_a_config_that_somebody_edited_counts(tmp_path):
    folder = save_pretrained(tiny(), tmp_path / "saved", SPEC)
    config = json.loads((folder / "config.json").read_text())
    config["annotated_detr"]["class_names"]["3"] = "barn owl"
    (folder / "config.json").write_text(json.dumps(config))
    assert from_pretrained(folder)[1].class_names["3"] == "barn owl"


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_published_weights_load_by_name_and_by_file(name, monkeypatch, tmp_path):
    """A stand-in with the published name: by name from torch.hub's folder, by path from wherever it was put."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    build = PRESETS[name]
    file = tmp_path / "checkpoints" / PAPER_MODELS[name][-1]
    file.parent.mkdir()
    state = build().state_dict()
    torch.save({"model": state | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(0)}}, file)
    model, spec = from_pretrained(name)
    assert same(model.state_dict(), state)
    assert (spec.model, spec.num_classes, spec.num_queries, spec.size) == (name, 91, 100, 800)
    assert len(spec.class_names) == 80 and spec.class_names["17"] == "cat" and spec.class_names["90"] == "toothbrush"
    loaded = load(file)
    assert loaded.spec == spec and loaded.report.notes == []


def test_a_file_of_the_papers_training_script_says_what_it_is(small, tmp_path, capsys):
    model, spec = small
    args = argparse.Namespace(backbone="resnet50", dilation=True, nheads=4, dropout=0.0, enc_layers=1, device="cuda", lr=1e-4)
    torch.save({"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 3, "args": args}, tmp_path / "checkpoint.pth")
    loaded = load(tmp_path / "checkpoint.pth", aux_loss=True)
    assert loaded.spec.model == "detr_resnet50_dc5"
    assert loaded.spec.model_options == SMALL | {"dropout": 0.0, "aux_loss": True}
    assert same(loaded.model.state_dict(), model.state_dict())
    assert loaded.model.transformer.encoder.layers[0].self_attn.nhead == 4
    assert len(loaded.model([torch.zeros(3, 64, 64)])["aux_outputs"]) == 1
    assert capsys.readouterr().out == ""


def test_what_a_bare_state_dict_does_not_say_is_said_to_be_assumed(small, tmp_path, capsys):
    model, _ = small
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = load(tmp_path / "weights.pth")
    assert loaded.spec.model == "detr_resnet50" and loaded.spec.class_names == {}
    printed = capsys.readouterr().out
    assert "does not say whether layer4 is dilated" in printed and "attention heads: taken as 8" in printed
    assert "how large its pictures were: taken as 800" in printed
    loaded = load(tmp_path / "weights.pth", model="detr_resnet50_dc5", nhead=4)
    assert loaded.spec.model == "detr_resnet50_dc5" and "dilated" not in capsys.readouterr().out


def test_learned_positions_and_pre_norm_are_read_off_the_tensors(tmp_path):
    options = SMALL | {"position_embedding": "learned", "normalize_before": True}
    model = detr_resnet50(num_classes=4, num_queries=5, **options)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    loaded = load(tmp_path / "model.pth", nhead=4)
    assert loaded.spec.model_options == options
    assert same(loaded.model.state_dict(), model.state_dict())


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Code()}, "detr.pth")
    with pytest.raises(ValueError, match=r"detr\.pth holds \w+\.mkdir, and rebuilding that could run code"):
        load("detr.pth")
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    shutil.copy("detr.pth", tmp_path / "checkpoints" / "detr-r50-e632da11.pth")
    with pytest.raises(ValueError, match="could run code"):
        detr_resnet50(pretrained=True)
    torch.save({"model": {}, "args": SimpleNamespace()}, "detr.pth")  # harmless, but not on the list
    with pytest.raises(ValueError, match="types.SimpleNamespace"):
        load("detr.pth")
    assert not Path("ran").exists()


def test_a_damaged_or_foreign_file_gets_a_sentence(tmp_path, recipe):
    path = tmp_path / "model.pth"
    torch.save({"model": {"a": torch.zeros(100)}}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="is damaged, or no file of weights"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        load(path)
    torch.save({"model": {"fc.weight": torch.zeros(3, 3)}}, path)
    with pytest.raises(ValueError, match="does not hold a DETR on a ResNet-50"):
        load(path)
    torch.save({"epoch": 3, "model": 4}, path)
    with pytest.raises(ValueError, match="has no state dict"):
        load(path)
    torch.save({"model": {"detr.class_embed.weight": torch.zeros(3, 3), "mask_head.lay1.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="panoptic"):
        load(path)
    (tmp_path / "config.json").write_text('{"model_type": "yolos"}')
    with pytest.raises(ValueError, match="holds a 'yolos' model, not a 'detr'"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file or folder .* detr_resnet50, .* tiny-scenes"):
        load(tmp_path / "nowhere.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load(tmp_path / "empty")


def test_a_missing_or_misshapen_tensor_is_named(small, tmp_path):
    model, _ = small
    state = model.state_dict()
    torch.save({"model": state | {"bbox_embed.layers.0.bias": torch.zeros(31)}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"bbox_embed\.layers\.0\.bias is \[31\] in the source and \[32\] in the model"):
        load(tmp_path / "model.pth", nhead=4)
    del state["bbox_embed.layers.0.bias"]
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"bbox_embed\.layers\.0\.bias is absent"):
        load(tmp_path / "model.pth", nhead=4)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def test_conversion_there_and_back_is_the_identity_for_every_published_key():
    with torch.device("meta"):
        for name in ("detr_resnet50", "detr_resnet101"):
            for positions in ("sine", "learned"):
                state = PRESETS[name](num_classes=91, position_embedding=positions).state_dict()
                back = from_hugging_face(to_hugging_face(state))
                assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in state.items()}


def test_conversion_refuses_other_models():
    with pytest.raises(ValueError, match="is no tensor of this DETR"):
        to_hugging_face(detr_tiny(3).state_dict())
    with pytest.raises(ValueError, match="'vit.cls_token' is no tensor"):
        from_hugging_face({"vit.cls_token": torch.zeros(1)})


def test_a_folder_for_transformers_reads_back(small, tmp_path, capsys):
    model, spec = small
    folder = save_for_transformers(model, tmp_path / "hf", spec)
    loaded = load(folder)
    assert loaded.spec == spec
    assert same(loaded.model.state_dict(), model.state_dict())
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "N/A", "1": "cat", "2": "dog", "3": "owl"}
    assert capsys.readouterr().out == ""

    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 400, "longest_edge": 900}, "image_mean": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    loaded = load(folder)
    assert loaded.spec.size == 400
    assert "at most 900 long" in capsys.readouterr().out and "image_mean" in loaded.report.notes[1]

    torch.save(to_hugging_face(model.state_dict()), folder / "pytorch_model.bin")  # how older folders keep weights
    (folder / "model.safetensors").unlink()
    assert same(load(folder).model.state_dict(), model.state_dict())
    with pytest.raises(FileExistsError, match="is not empty"):
        save_for_transformers(model, folder, spec)
    with pytest.raises(ValueError, match="only the paper's models"):
        save_for_transformers(tiny(), tmp_path / "tiny", SPEC)


def test_a_name_on_the_hub_is_fetched(small, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    model, spec = small
    there = save_for_transformers(model, tmp_path / "there", spec)
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, tuple(allow_patterns)))
        return str(there)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded, found = from_pretrained("somebody/detr-resnet-50", revision="v1")
    assert found == spec and same(loaded.state_dict(), model.state_dict())
    assert asked == [("somebody/detr-resnet-50", "v1", ("config.json", "preprocessor_config.json", "model.safetensors"))]


@pytest.mark.parametrize("name", ["runs/typo", "./typo", "/typo/run", "here/typo", "here/typo.safetensors"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    monkeypatch.setattr("annotated_detr.pretrained._download", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(FileNotFoundError, match="typo.* is no file or folder here, and no model with published weights"):
        load(name)


def test_offline_a_name_on_the_hub_gets_a_sentence(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="somebody/detr is no file or folder here, and the Hugging Face hub did not give it"):
        load("somebody/detr")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'annotated-detr\[hub\]'"):
        load("somebody/detr")
    with pytest.raises(ImportError, match=r"pip install 'annotated-detr\[hub\]'"):
        push_to_hub(tiny(), "somebody/detr", SPEC)


# --- a new head -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path) -> Path:
    save_model(tmp_path / "model.safetensors", tiny(), SPEC)
    return tmp_path / "model.safetensors"


def test_other_classes_reset_the_class_head_and_nothing_else(source, capsys):
    torch.manual_seed(1)
    loaded = load(source, num_classes=8)
    old, new = tiny().state_dict(), loaded.model.state_dict()
    changed = {"class_embed.weight", "class_embed.bias"}
    assert {key for key in old if not (old[key].shape == new[key].shape and torch.equal(old[key], new[key]))} == changed
    assert set(loaded.report.reset) == changed and not loaded.report.resized
    assert set(loaded.report.kept) == old.keys() - changed
    assert new["class_embed.weight"].shape == (9, 96) and new["class_embed.weight"].std() > 0
    assert loaded.spec.class_names == {} and loaded.spec.num_classes == 8
    printed = capsys.readouterr().out
    assert "reset    class_embed.weight [5, 96] → [9, 96]: fresh" in printed
    assert f"{len(old) - 2} tensors kept, 0 resized, 2 reset" in printed


def test_classes_of_the_same_name_keep_their_rows_wherever_they_are(source, capsys):
    loaded = load(source, class_names={1: "owl", 2: "mouse", 6: "cat"})
    old, new = tiny().state_dict(), loaded.model.state_dict()
    assert loaded.spec.num_classes == 7 and loaded.spec.class_names == {"1": "owl", "2": "mouse", "6": "cat"}
    for key in ("class_embed.weight", "class_embed.bias"):
        assert torch.equal(new[key][[1, 6, 7]], old[key][[3, 1, 4]])  # owl, cat, no-object
        assert not any(torch.equal(row, other) for row in new[key][[0, 2, 3, 4, 5]] for other in old[key])
    assert "kept owl, cat and no-object; 5 rows fresh" in capsys.readouterr().out


def test_classes_of_other_names_reset_even_when_there_are_as_many(source, capsys):
    loaded = load(source, class_names={1: "ape", 2: "bee", 3: "cow"})
    assert set(loaded.report.reset) == {"class_embed.weight", "class_embed.bias"}
    assert "the classes are other ones" in capsys.readouterr().out
    same_names = load(source, class_names={1: "cat", 2: "dog", 3: "owl"})
    assert not same_names.report.reset and not same_names.report.resized


def test_names_for_a_source_without_names_label_its_classes(tmp_path):
    spec = ModelSpec("tiny", 4, 5, 96)
    save_model(tmp_path / "model.safetensors", tiny(spec), spec)
    loaded = load(tmp_path / "model.safetensors", class_names={1: "cat", 3: "owl"})
    assert not loaded.report.reset and loaded.spec.class_names == {"1": "cat", "3": "owl"}


def test_a_class_outside_the_range_is_named(source):
    with pytest.raises(ValueError, match=r"class 7 \(ape\) does not fit num_classes=4"):
        load(source, num_classes=4, class_names={7: "ape"})


@settings(deadline=None, max_examples=8)
@given(N=st.integers(1, 12))
def test_the_first_queries_are_kept(tmp_path_factory, N):
    folder = tmp_path_factory.mktemp("queries")
    save_model(folder / "model.safetensors", tiny(), SPEC)
    loaded = load(folder / "model.safetensors", num_queries=N)
    kept = min(N, 5)
    old, new = tiny().state_dict(), loaded.model.state_dict()
    for key in (key for key in new if key.startswith("query_")):
        assert len(new[key]) == N and torch.equal(new[key][:kept], old[key][:kept])
        assert (key in loaded.report.resized) == (N != 5)
        assert N <= 5 or new[key][5:].std() > 0.1
    assert loaded.model([torch.zeros(3, 64, 64)])["pred_boxes"].shape == (1, N, 4)


# --- handing on -------------------------------------------------------------------------------------------------------


def test_a_saved_folder_has_a_card_and_can_be_saved_again(tmp_path):
    folder = save_pretrained(tiny(), tmp_path / "saved", SPEC, scores={"AP": 0.4213})
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (folder / "README.md").read_text(encoding="utf8")
    assert "| AP | 0.421 |" in card and "1 cat, 2 dog, 3 owl" in card and card.startswith("---\nlibrary_name: annotated-detr\n")
    other = tiny(seed=1)
    save_pretrained(other, folder, SPEC)
    assert same(load(folder).model.state_dict(), other.state_dict())
    assert "AP" not in (folder / "README.md").read_text(encoding="utf8")
    (folder / "README.md").write_text("# What I know about owls\n")
    save_pretrained(other, folder, SPEC)
    assert (folder / "README.md").read_text() == "# What I know about owls\n"


@pytest.mark.parametrize("name, content", [("config.json", '{"model_type": "bert"}'), ("config.json", "[]"), ("config.json", "not JSON"), ("model.safetensors", "x")])
def test_a_folder_with_another_model_is_left_alone(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(FileExistsError, match=f"has a {name} that save_pretrained did not write"):
        save_pretrained(tiny(), tmp_path, SPEC)
    assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == content


def test_a_specification_of_another_model_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"class_embed\.bias should be \[9\] and is \[5\]"):
        save_pretrained(tiny(), tmp_path / "saved", ModelSpec("tiny", 8, 5, 96))
    assert not (tmp_path / "saved").exists()


def test_pushing_uploads_the_three_files_and_spares_foreign_repositories(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    there, calls = tmp_path / "there", []

    def upload_folder(repo_id, folder_path, token, allow_patterns):
        shutil.copytree(folder_path, there, dirs_exist_ok=True, ignore=lambda _, names: set(names) - set(allow_patterns))
        return f"https://huggingface.co/{repo_id}/commit/1"

    def download(repo_id, name, token, local_dir):
        return shutil.copy(there / name, local_dir)

    monkeypatch.setattr(hub, "create_repo", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(hub, "file_exists", lambda repo_id, name, token: (there / name).is_file())
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    for seed in (0, 1):  # the second time it replaces what it wrote itself
        assert push_to_hub(tiny(seed=seed), "me/owls", SPEC, private=True) == "https://huggingface.co/me/owls/commit/1"
        assert same(load(there).model.state_dict(), tiny(seed=seed).state_dict())
    assert sorted(file.name for file in there.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert calls[0] == (("me/owls",), {"private": True, "token": None, "exist_ok": True})
    (there / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(FileExistsError, match="did not write"):
        push_to_hub(tiny(), "me/owls", SPEC)
    assert (there / "config.json").read_text() == '{"model_type": "detr"}'


def test_the_calls_to_the_hub_fit_its_client():
    """The fakes above take what the real functions take."""
    import inspect

    hub = pytest.importorskip("huggingface_hub")
    wanted = {
        "snapshot_download": ["revision", "allow_patterns"],
        "create_repo": ["private", "token", "exist_ok"],
        "file_exists": ["token"],
        "hf_hub_download": ["token", "local_dir"],
        "upload_folder": ["repo_id", "folder_path", "token", "allow_patterns"],
    }
    for name, keywords in wanted.items():
        assert set(keywords) <= set(inspect.signature(getattr(hub, name)).parameters), name


def test_a_pretrained_detector_predicts(tmp_path):
    folder = save_pretrained(tiny(), tmp_path / "saved", SPEC)
    detector = pretrained_detector(folder)
    assert detector.class_names == {1: "cat", 2: "dog", 3: "owl"} and detector.size == 96
    image = scenes.running_batch_pil()[0][0]
    (found,) = predict(detector, [image], threshold=0.0)
    assert len(found) == 5 and set(found.names) <= {"cat", "dog", "owl", "class 0"}


def test_torch_hub_serves_the_papers_models():
    model, postprocessor = torch.hub.load(
        str(ROOT), "detr_resnet50", source="local", num_classes=3, num_queries=4, return_postprocessor=True
    )
    assert model.class_embed.out_features == 4 and model.query_embed.num_embeddings == 4
    assert type(postprocessor).__name__ == "PostProcess"


# Fine-tuning


def test_finetuning_starts_from_the_weights_and_a_fresh_optimiser(tmp_path):
    images, annotations = scenes.coco_folder(None, "train", 8)
    content = json.loads(Path(annotations).read_text())
    content["categories"] = [{"id": 2, "name": "moon"}, {"id": 3, "name": "triangle"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 2 + (annotation["category_id"] == 3)
    (tmp_path / "mine.json").write_text(json.dumps(content))
    recipe = training.FINETUNE_RECIPES["tiny"]
    config = replace(recipe, images=images, annotations=tmp_path / "mine.json", epochs=1, batch_size=4, num_queries=20, device="cpu")
    trainer = pretrained.finetune(config, tmp_path / "run")
    assert trainer.learner.steps == 2 and not trainer.learner.optimizer.state
    shipped, _ = pretrained.from_pretrained("tiny-scenes")
    theirs, ours = shipped.state_dict(), trainer.learner.model.state_dict()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs if not key.startswith(("class_embed", "query_")))
    assert torch.equal(ours["query_embed.weight"][:16], theirs["query_embed.weight"])
    assert torch.equal(ours["class_embed.weight"][3], theirs["class_embed.weight"][3]), "a class of the same name keeps its weights"
    training.fit(trainer, progress=False)
    resumed = training.resume(tmp_path / "run")
    assert resumed.config == trainer.config and resumed.learner.step == 2
    again = pretrained.finetune(replace(config, weights=str(tmp_path / "run")), tmp_path / "again")
    assert torch.equal(again.learner.model.state_dict()["bbox_embed.layers.0.weight"], trainer.learner.model.state_dict()["bbox_embed.layers.0.weight"])


def test_finetuning_with_another_models_recipe_says_which(tmp_path):
    config = replace(training.FINETUNE_RECIPES["detr_resnet50"], weights="tiny-scenes", scenes=8, val_scenes=8, size=64)
    with pytest.raises(ValueError, match="tiny-scenes is a tiny: fine-tune it with that recipe"):
        pretrained.finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
