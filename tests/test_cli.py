"""The command line: what it prints, what it writes, and that mistakes end in one sentence and an exit code."""

import json
import re
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO

from annotated_detr import cli, datasets, scenes
from annotated_detr.training import RunFolder

TINY = ["tiny", "--epochs", "2", "--batch-size", "8", "--warmup-steps", "2", "--size", "64", "--save-every", "1", "--log-every", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return scenes.coco_folder(tmp_path_factory.mktemp("photos"), "train", 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    """A short run on a folder in COCO's format, trained through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    images, annotations = photos
    data = ["--images", str(images), "--annotations", str(annotations), "--val-annotations", str(annotations)]
    cli.main(["train", str(folder), *TINY, *data])
    return folder


def sentence(capsys, *arguments: str) -> str:
    """The error message of a command that fails with exit code 1, if it is one sentence without a traceback."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    message = str(stop.value.code)
    assert message.startswith("annotated-detr: ") and "Traceback" not in message
    return message


@pytest.mark.parametrize("command", [[], ["train"], ["finetune"], ["resume"], ["eval"], ["predict"], ["check"], ["scenes"], ["download"], ["convert-voc"], ["overfit"], ["plot"]])
def test_help_ends_well(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code in (0, None)
    assert "usage: annotated-detr" in capsys.readouterr().out


def test_help_teaches_and_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert "annotated-detr train runs/first tiny" in text and "130 stopped with Ctrl-C" in text


def test_the_version_says_what_runs_here(capsys):
    from annotated_detr import versions

    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == versions()


def test_a_shell_gets_its_completion(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["completion", "bash"])
    script = capsys.readouterr().out
    assert stop.value.code in (0, None) and "complete" in script and "convert-voc" in script


@pytest.mark.parametrize("line", ["fly", "predict", "eval tiny-scenes --batch-size many"])
def test_a_command_line_that_cannot_be_understood_has_exit_code_2(line, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_help_of_a_recipe_shows_its_own_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "run", "detr_resnet50", "--help"])
    text = capsys.readouterr().out
    assert "IMAGENET1K_V1" in text and "0.0001" in text and "(default: 500)" in text


def test_a_run_scores_predicts_and_draws(run, photos, tmp_path, capsys):
    images, annotations = photos
    cli.main(["eval", str(run), "--images", str(images), "--annotations", str(annotations), "--out", str(tmp_path / "scores.json")])
    assert "AP50" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert 0 <= scores["AP"] <= scores["AP50"] <= 1
    cli.main(["eval", str(run), "--images", str(images), "--annotations", str(annotations), "--out", str(tmp_path / "scored")])
    assert {path.name for path in (tmp_path / "scored").iterdir()} >= {"scores.json", "confusion.png"}
    assert json.loads((tmp_path / "scored" / "scores.json").read_text()) == scores
    capsys.readouterr()

    cli.main(["predict", str(run), str(images), "--out", str(tmp_path / "found"), "--threshold", "0"])
    assert "16 pictures done" in capsys.readouterr().out
    rows = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert len(rows) == 16 * 16
    names = {Path(row["file_name"]).name for row in rows}
    assert names == {path.name for path in images.iterdir()}
    drawn = [path for path in (tmp_path / "found").rglob("*") if path.suffix in (".png", ".jpg")]
    assert len(drawn) == 16
    with Image.open(drawn[0]) as picture:
        assert picture.size == (128, 128)


def test_a_name_on_the_hub_without_its_client_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match=r"annotated-detr: someone/a-model is no file or folder .* pip install"):
        cli.main(["eval", "someone/a-model"])


def test_a_run_is_plotted(run, tmp_path, capsys):
    cli.main(["plot", str(run), "--out", str(tmp_path / "curves.png")])
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500
    with pytest.raises(SystemExit) as stop:
        cli.main(["plot", str(run), "--out", str(tmp_path / "curves.png")])
    assert "exists already" in str(stop.value.code)


def test_a_batch_is_learned_by_heart(photos, capsys):
    images, annotations = photos
    options = ["--images", str(images), "--annotations", str(annotations), "--size", "64", "--batch-size", "2", "--ramp-steps", "5", "--device", "cpu"]
    cli.main(["overfit", "--steps", "60", "tiny", *options])
    first, last = re.search(r"loss ([\d.]+) at first, ([\d.]+) after 60 steps", capsys.readouterr().out).groups()
    assert float(last) < 0.7 * float(first)


def test_files_that_are_there_already_are_not_overwritten(run, photos, tmp_path, capsys):
    kept = tmp_path / "scores.json"
    kept.write_text("mine")
    images, annotations = photos
    message = sentence(capsys, "eval", str(run), "--images", str(images), "--annotations", str(annotations), "--out", str(kept))
    assert "exists already" in message and kept.read_text() == "mine"
    assert "is not empty" in sentence(capsys, "train", str(run), *TINY)


def test_mistakes_end_in_a_sentence(run, tmp_path, capsys):
    assert "nowhere" in sentence(capsys, "eval", str(tmp_path / "nowhere"))
    assert "go together" in sentence(capsys, "eval", str(run), "--images", str(tmp_path))
    assert "no config.json" in sentence(capsys, "resume", str(tmp_path))
    assert "never train" in sentence(capsys, "train", str(tmp_path / "new"), "detr_resnet50", "--backbone-weights", "None", "--scenes", "8", "--val-scenes", "8")


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(run, photos, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = next(photos[0].iterdir())
    (folder / good.name).write_bytes(good.read_bytes())
    (folder / "cut.png").write_bytes(good.read_bytes()[:300])
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", str(run), str(folder), "--out", str(tmp_path / "found")])
    assert "cut.png" in str(stop.value.code)
    assert "1 pictures done, 0 were done before, 1 failed" in capsys.readouterr().out


def test_check_has_an_exit_code_a_json_report_and_a_repair(photos, tmp_path, capsys):
    images, annotations = photos
    cli.main(["check", str(images), str(annotations)])
    capsys.readouterr()
    content = json.loads(annotations.read_text())
    content["annotations"][0]["category_id"] = "1"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", str(images), str(bad), "--json", "--repair", str(tmp_path / "mended")])
    assert stop.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and report["findings"]
    assert json.loads(bad.read_text()) == content, "the original stays as it is"
    cli.main(["check", str(images), str(tmp_path / "mended" / "bad.json")])


def test_scenes_are_written_in_cocos_format(tmp_path, capsys):
    cli.main(["scenes", str(tmp_path / "drawn"), "--split", "val", "--count", "3"])
    assert "3 scenes" in capsys.readouterr().out
    assert len(COCO(tmp_path / "drawn" / "val-3.json").getImgIds()) == 3


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A data set of two files, whose archive nobody serves."""
    with zipfile.ZipFile(tmp_path / "small.zip", "w") as box:
        box.writestr("small/1.txt", "one")
        box.writestr("small/2.txt", "two")
    archive = datasets.Archive("small.zip", "http://127.0.0.1:9/small.zip", "small", 2, 1000)
    source = datasets.Source("Two files", "https://example.org", "none", (archive,), {"train": ("small", "small/1.txt")})
    monkeypatch.setitem(datasets.SOURCES, "bccd", source)
    return tmp_path / "small.zip"


def test_download_says_what_it_wants_and_takes_what_was_carried_there(small_source, tmp_path, capsys):
    folder = tmp_path / "data"
    message = sentence(capsys, "download", "bccd", str(folder))
    assert "127.0.0.1:9 cannot be reached" in message and f"put it into {folder} as small.zip" in message and "\n" not in message
    (folder / "small.zip").write_bytes(small_source.read_bytes())
    cli.main(["download", "bccd", str(folder)])
    said = capsys.readouterr().out
    assert "http://127.0.0.1:9/small.zip" in said and f"train: pictures in {folder / 'small'}" in said
    cli.main(["download", "bccd", str(folder), "--thorough"])
    (folder / "small" / "1.txt").write_text("owt")
    assert "1.txt" in sentence(capsys, "download", "bccd", str(folder), "--thorough")


def test_download_stopped_by_ctrl_c_says_how_to_go_on(small_source, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "fetch", stop)
    with pytest.raises(SystemExit) as ended:
        cli.main(["download", "bccd", str(tmp_path / "data")])
    assert ended.value.code == 130 and "the same command goes on" in capsys.readouterr().err


def test_a_pascal_voc_folder_is_converted_and_can_be_checked(photos, tmp_path, capsys):
    folder = tmp_path / "voc"
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    picture = next(photos[0].iterdir())
    (folder / "JPEGImages" / "a.png").write_bytes(picture.read_bytes())
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    thing = f"<object><name>cup</name><difficult>1</difficult>{box}</object><object><name>cup</name>{box}</object>"
    xml = f"<annotation><size><width>128</width><height>128</height></size>{thing}</annotation>"
    (folder / "Annotations" / "a.xml").write_text(xml)
    cli.main(["convert-voc", str(folder), str(tmp_path / "out"), "--classes", "saucer", "cup", "--difficult", "drop", "--no-inclusive"])
    assert "all: 1 pictures, 1 boxes in all.json" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "all.json").read_text())
    assert [(a["category_id"], a["bbox"]) for a in content["annotations"]] == [(2, [1, 2, 29, 38])]
    cli.main(["check", str(folder / "JPEGImages"), str(tmp_path / "out" / "all.json")])
    assert "exists already" in sentence(capsys, "convert-voc", str(folder), str(tmp_path / "out"))
    assert "'cup'" in sentence(capsys, "convert-voc", str(folder), str(tmp_path / "other"), "--classes", "saucer")
    assert "no such folder" in sentence(capsys, "convert-voc", str(tmp_path / "nowhere"), str(tmp_path / "other"))


@pytest.fixture
def long_run(tmp_path, photos):
    """A run in a process of its own that would take long, once it has written its first checkpoint."""
    images, annotations = photos
    run = tmp_path / "long"
    arguments = ["train", str(run), *TINY, "--epochs", "500", "--images", str(images), "--annotations", str(annotations)]
    command = [sys.executable, "-c", "from annotated_detr.cli import main; main()", *arguments]
    # A background job of a script inherits "ignore Ctrl-C", and would hand it on.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    folder = RunFolder(run)
    deadline = time.monotonic() + 120
    while not folder.states and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert folder.states and process.poll() is None
    yield run, process
    process.kill()
    process.communicate()


def test_ctrl_c_says_how_to_go_on(long_run):
    run, process = long_run
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"annotated-detr resume {run}" in errors and "Traceback" not in errors


def test_resume_after_a_kill_trains_to_the_end(long_run, capsys):
    run, process = long_run
    process.kill()
    process.communicate()
    config = json.loads((run / "config.json").read_text())
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    config["epochs"] = logged[-1] // 2 + 2  # two steps an epoch: a short rest, so that the test ends
    (run / "config.json").write_text(json.dumps(config))
    cli.main(["resume", str(run)])
    assert "done" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 2 + 2 * config["epochs"] + 1)), "every step is logged once"
