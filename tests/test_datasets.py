"""Data sets that are fetched or converted: every interruption is taken up, every byte is checked, no fault is guessed away."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from annotated_detr import datasets
from annotated_detr.data import CocoDetection, check_dataset
from annotated_detr.datasets import Archive, Source, convert_voc, download, fetch


# --- a server of our own ----------------------------------------------------------------------------------------------


class Server:
    """Serves `files` (path → bytes) and misbehaves as told."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.asked: list[str | None] = []
        self.patience = None  # bytes after which it hangs up
        self.ranges = True  # understands Range
        self.sized = True  # says how long the content is
        self.failures = []  # status codes to answer first
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.headers.get("Range"))
                if server.failures:
                    return self.send_error(server.failures.pop(0))
                content = server.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
                start = int(wanted[1]) if wanted and server.ranges else 0
                if start and start >= len(content):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                if server.sized:
                    self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start:][: server.patience])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between two tries
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


BYTES = np.random.default_rng(0).bytes(200_000)


def test_a_file_is_fetched_whole(server, tmp_path, capfd):
    server.files["/a"] = BYTES
    fetch(f"{server.url}/a", tmp_path / "a", progress=True)
    assert (tmp_path / "a").read_bytes() == BYTES and os.listdir(tmp_path) == ["a"]
    assert "200k" in capfd.readouterr().err, "a bar in bytes"


@pytest.mark.parametrize("size", [None, len(BYTES)])
def test_a_server_that_hangs_up_is_asked_for_the_rest(server, tmp_path, size):
    server.files["/a"], server.patience = BYTES, 60_000
    fetch(f"{server.url}/a", tmp_path / "a", size, progress=False)
    assert (tmp_path / "a").read_bytes() == BYTES
    assert server.asked == [None, "bytes=60000-", "bytes=120000-", "bytes=180000-"]


def test_what_an_earlier_call_left_is_not_fetched_again(server, tmp_path):
    server.files["/a"] = BYTES
    (tmp_path / "a.part").write_bytes(BYTES[:150_000])
    fetch(f"{server.url}/a", tmp_path / "a", progress=False)
    assert (tmp_path / "a").read_bytes() == BYTES and server.asked == ["bytes=150000-"]


def test_a_server_without_ranges_sends_everything_again_and_nothing_is_there_twice(server, tmp_path):
    server.files["/a"], server.ranges = BYTES, False
    (tmp_path / "a.part").write_bytes(BYTES[:150_000])
    fetch(f"{server.url}/a", tmp_path / "a", progress=False)
    assert (tmp_path / "a").read_bytes() == BYTES


def test_a_server_that_does_not_say_how_long_the_file_is(server, tmp_path):
    server.files["/a"], server.sized = BYTES, False
    fetch(f"{server.url}/a", tmp_path / "a", progress=False)
    assert (tmp_path / "a").read_bytes() == BYTES


def test_a_part_that_is_too_long_is_fetched_anew(server, tmp_path):
    server.files["/a"] = BYTES
    (tmp_path / "a.part").write_bytes(BYTES + b"more")
    fetch(f"{server.url}/a", tmp_path / "a", progress=False)
    assert (tmp_path / "a").read_bytes() == BYTES and server.asked == ["bytes=200004-", None]


def test_a_complete_part_needs_no_request(server, tmp_path):
    (tmp_path / "a.part").write_bytes(BYTES)
    fetch(f"{server.url}/a", tmp_path / "a", len(BYTES), progress=False)
    assert (tmp_path / "a").read_bytes() == BYTES and server.asked == []


def test_a_server_in_trouble_is_asked_again_once_something_has_come(server, tmp_path):
    server.files["/a"], server.patience = BYTES, 150_000
    url = f"{server.url}/a"
    with pytest.raises(ConnectionError, match="503"):
        server.failures = [503]
        fetch(url, tmp_path / "a", progress=False)
    part = tmp_path / "a.part"
    with pytest.MonkeyPatch.context() as patch:  # the server fails between the first bytes and the rest
        real = datasets._fetch_rest

        def fail_later(*arguments):
            done = real(*arguments)
            if len(server.asked) == 2:
                server.failures = [500, 503, 502]
            return done

        patch.setattr(datasets, "_fetch_rest", fail_later)
        fetch(url, tmp_path / "a", progress=False)
    assert (tmp_path / "a").read_bytes() == BYTES and not part.exists() and len(server.asked) == 6


def test_a_server_that_brings_nothing_new_is_given_up_and_what_came_is_kept(server, tmp_path, monkeypatch):
    server.files["/a"], server.patience = BYTES, 0
    with pytest.raises(ConnectionError, match="127.0.0.1.* cannot be reached .it hung up."):
        fetch(f"{server.url}/a", tmp_path / "a", progress=False)
    assert len(server.asked) == 1
    server.patience = 1000
    real = datasets._fetch_rest

    def stop_sending(*arguments):
        done = real(*arguments)
        server.patience = 0
        return done

    monkeypatch.setattr(datasets, "_fetch_rest", stop_sending)
    with pytest.raises(ConnectionError):
        fetch(f"{server.url}/a", tmp_path / "a", progress=False)
    assert len(server.asked) == 1 + 5 and (tmp_path / "a.part").read_bytes() == BYTES[:1000]


def test_refusals_and_other_files_are_named(server, tmp_path):
    server.files["/a"] = BYTES
    with pytest.raises(FileNotFoundError, match="/b answers 404"):
        fetch(f"{server.url}/b", tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="has 200,000 bytes, and the data set's archive 200,001"):
        fetch(f"{server.url}/a", tmp_path / "a", 200_001, progress=False)
    assert not (tmp_path / "a").exists()


def test_no_network_is_one_sentence_at_once(tmp_path):
    with socket.socket() as free:  # a port on which nobody listens
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} cannot be reached .*refused"):
        fetch(f"http://127.0.0.1:{port}/a", tmp_path / "a", progress=False)
    assert time.monotonic() - began < 2


# --- download ---------------------------------------------------------------------------------------------------------


def zipped(path: Path, files: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as box:
        for name, content in files.items():
            box.writestr(name, content)
    return path.read_bytes()


@pytest.fixture
def coco(server, tmp_path, monkeypatch):
    """A data set like COCO: two archives, on a server of our own. Returns its files, by path."""
    files = {f"train/{i}.png": BYTES[1000 * i :][:900] for i in range(20)}
    notes = {"annotations/train.json": b'{"images": []}', "annotations/.hidden": b"x"}
    archives = []
    for name, content, count in (("annotations", notes, 1), ("train", files, 20)):
        server.files[f"/{name}.zip"] = packed = zipped(tmp_path / "made.zip", content)
        sha256 = hashlib.sha256(packed).hexdigest()
        archives.append(Archive(f"{name}.zip", f"{server.url}/{name}.zip", name, count, 50_000, len(packed), sha256))
    source = Source("Like COCO", "https://example.org", "none", tuple(archives), {"train": ("train", "annotations/train.json")})
    monkeypatch.setitem(datasets.SOURCES, "coco", source)
    return {name: content for name, content in (files | notes).items() if "hidden" not in name}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unpacked(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if not name.startswith("checksums/")}


def test_download_says_what_it_does_lays_out_and_cleans_up(coco, server, tmp_path, capsys):
    folder = tmp_path / "new" / "data"
    splits = download("coco", folder)
    said = capsys.readouterr().out
    for archive in datasets.SOURCES["coco"].archives:
        assert archive.url in said and archive.sha256 in said and f"{archive.size:,} bytes" in said
    assert splits == {"train": (folder / "train", folder / "annotations" / "train.json")}
    assert unpacked(folder) == coco
    receipts = sorted((folder / "checksums").iterdir())
    assert [path.name for path in receipts] == ["annotations.json", "train.json"]
    receipt = json.loads(receipts[1].read_text())
    assert receipt["sha256"] == datasets.SOURCES["coco"].archives[1].sha256 and len(receipt["files"]) == 20


def test_a_second_call_asks_nobody_and_changes_nothing(coco, server, tmp_path, capsys):
    download("coco", tmp_path / "data", progress=False)
    before, asked = tree(tmp_path / "data"), len(server.asked)
    capsys.readouterr()
    download("coco", tmp_path / "data", thorough=True)
    assert tree(tmp_path / "data") == before and len(server.asked) == asked
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("where", ["fetch", "unpack"])
def test_ctrl_c_at_any_moment_is_taken_up_by_the_next_call(coco, server, tmp_path, monkeypatch, where):
    folder, calls = tmp_path / "data", 0
    real = datasets._fetch_rest if where == "fetch" else shutil.copyfileobj
    server.patience = 3_000 if where == "fetch" else None

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(datasets, "_fetch_rest", interrupted) if where == "fetch" else monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    stops = 0
    while True:
        try:
            download("coco", folder, progress=False)
            break
        except KeyboardInterrupt:
            stops += 1
            names = {path.name for path in folder.iterdir()}
            assert "train" not in names, "nothing looks finished that is not"
    assert stops >= 2 and unpacked(folder) == coco


def test_a_kill_is_taken_up_by_the_next_call(server, tmp_path, monkeypatch):
    files = {f"train/{i:04d}.bin": bytes([i % 251]) * 4000 for i in range(1500)}
    server.files["/train.zip"] = packed = zipped(tmp_path / "made.zip", files)
    arguments = ("train.zip", f"{server.url}/train.zip", "train", 1500, 20_000_000, len(packed), hashlib.sha256(packed).hexdigest())
    code = (
        "from annotated_detr import datasets as d; import sys\n"
        f"d.SOURCES['coco'] = d.Source('t', 'h', 'l', (d.Archive(*{arguments!r}),), {{}})\n"
        f"d.download('coco', {str(tmp_path / 'data')!r}, progress=False)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code])
    draft, deadline = tmp_path / "data" / ".train.unpacking", time.monotonic() + 60
    while not draft.is_dir() or len(os.listdir(draft)) < 50:
        assert killed.poll() is None and time.monotonic() < deadline
        os.sched_yield()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "data" / "train").exists() and len(os.listdir(draft)) < 1500
    subprocess.run([sys.executable, "-c", code], check=True)
    assert unpacked(tmp_path / "data") == files


def test_a_wrong_checksum_is_named_and_the_archive_fetched_again_next_time(coco, server, tmp_path):
    good = server.files["/train.zip"]
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    server.files["/train.zip"] = bytes(bad)
    with pytest.raises(ValueError, match=r"train.zip has the SHA-256 \w{64}, and should have \w{64}"):
        download("coco", tmp_path / "data", progress=False)
    assert not (tmp_path / "data" / "train").exists()
    server.files["/train.zip"] = good
    download("coco", tmp_path / "data", progress=False)
    assert unpacked(tmp_path / "data") == coco


def test_an_archive_without_a_published_checksum_is_held_to_its_own(coco, server, tmp_path, monkeypatch):
    source = datasets.SOURCES["coco"]
    loose = [Archive(**{**vars(archive), "sha256": None, "size": None}) for archive in source.archives]
    monkeypatch.setitem(datasets.SOURCES, "coco", Source(source.title, "", "", tuple(loose), source.splits))
    bad = bytearray(server.files["/train.zip"])
    bad[200] ^= 1  # inside the first file's content
    good, server.files["/train.zip"] = server.files["/train.zip"], bytes(bad)
    with pytest.raises(ValueError, match="train.zip is damaged"):
        download("coco", tmp_path / "data", progress=False)
    server.files["/train.zip"] = good
    download("coco", tmp_path / "data", progress=False)
    shutil.rmtree(tmp_path / "data" / "train")
    server.files["/train.zip"] = zipped(tmp_path / "made.zip", {f"train/{i}.png": b"other" for i in range(20)})
    with pytest.raises(ValueError, match="another file"):
        download("coco", tmp_path / "data", progress=False)


def test_offline_it_says_what_to_carry_where_and_takes_it(coco, server, tmp_path):
    packed = dict(server.files)
    server.http.shutdown()
    server.http.server_close()
    folder = tmp_path / "data"
    for name in ("annotations", "train"):
        with pytest.raises(ConnectionError) as stop:
            download("coco", folder, progress=False)
        said = str(stop.value)
        assert f"{server.url}/{name}.zip" in said and f"put it into {folder} as {name}.zip" in said and "\n" not in said
        (folder / f"{name}.zip").write_bytes(packed[f"/{name}.zip"])
    download("coco", folder, progress=False)
    assert coco.items() <= tree(folder).items()
    assert (folder / "train.zip").is_file(), "what somebody brought stays"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "annotations.zip").write_bytes(packed["/annotations.zip"][:-5])
    with pytest.raises(ValueError, match="annotations.zip has the SHA-256"):
        download("coco", tmp_path / "other", progress=False)
    assert (tmp_path / "other" / "annotations.zip").is_file()


def test_a_full_disk_is_noticed_before_anything_is_fetched(coco, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 90_000, 90_000))
    with pytest.raises(OSError, match="90 kB free, and 1.. kB are needed"):
        download("coco", tmp_path / "data", progress=False)
    assert server.asked == []


def test_a_folder_that_is_not_whole_is_named_and_left_alone(coco, server, tmp_path):
    folder = tmp_path / "data"
    download("coco", folder, progress=False)
    (folder / "train" / "3.png").unlink()
    (folder / "train" / "4.png").write_bytes(b"short")
    before = tree(folder)
    with pytest.raises(ValueError, match=r"train is not whole: missing or changed: 3.png and 1 more files"):
        download("coco", folder, progress=False)
    assert tree(folder) == before
    shutil.rmtree(folder / "checksums")  # somebody else laid it out
    with pytest.raises(ValueError, match="there are 19 files, not 20"):
        download("coco", folder, progress=False)
    (folder / "train" / "3.png").write_bytes(b"")
    assert download("coco", folder, progress=False)


def test_only_a_thorough_call_reads_the_files(coco, server, tmp_path):
    download("coco", tmp_path / "data", progress=False)
    victim = tmp_path / "data" / "train" / "7.png"
    victim.write_bytes(b"x" * victim.stat().st_size)
    download("coco", tmp_path / "data", progress=False)
    with pytest.raises(ValueError, match="7.png"):
        download("coco", tmp_path / "data", progress=False, thorough=True)


@pytest.mark.parametrize(
    "files, words",
    [
        ({"elsewhere/1.png": b""}, "holds 0 files"),
        ({f"train/{i}.png": b"\0" * 5_000 for i in range(20)}, "20 files with 100 kB in train, not 20 with at most 50 kB"),
    ],
)
def test_another_archive_is_refused(coco, server, tmp_path, monkeypatch, files, words):
    source = datasets.SOURCES["coco"]
    loose = tuple(Archive(**{**vars(archive), "sha256": None, "size": None}) for archive in source.archives)
    monkeypatch.setitem(datasets.SOURCES, "coco", Source("", "", "", loose, {}))
    server.files["/train.zip"] = zipped(tmp_path / "made.zip", files)
    with pytest.raises(ValueError, match=words):
        download("coco", tmp_path / "data", progress=False)


def test_no_entry_of_an_archive_leaves_its_folder(coco, server, tmp_path, monkeypatch):
    source = datasets.SOURCES["coco"]
    loose = tuple(Archive(**{**vars(archive), "sha256": None, "size": None, "files": 1}) for archive in source.archives)
    monkeypatch.setitem(datasets.SOURCES, "coco", Source("", "", "", loose, {}))
    server.files["/train.zip"] = zipped(tmp_path / "made.zip", {"train/../../../evil.txt": b"x", "train/good.txt": b"y", "/etc/train/e": b"z"})
    download("coco", tmp_path / "a" / "b" / "data", progress=False)
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["good.txt"]


def test_what_the_package_knows_about_the_real_archives():
    coco = datasets.SOURCES["coco"]
    assert {archive.folder for archive in coco.archives} == {"train2017", "val2017", "annotations"}
    assert sum(archive.size for archive in coco.archives) == 20_405_354_669
    assert all(re.fullmatch(r"[0-9a-f]{64}", archive.sha256) for archive in coco.archives)
    text = datasets.plan("coco")
    assert "19,336,861,798 bytes" in text and all(archive.sha256 in text for archive in coco.archives)
    assert "none published" in datasets.plan("bccd")
    with pytest.raises(ValueError, match="'imagenet' to fetch: choose coco or bccd"):
        download("imagenet", "x")


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def thing(name="cup", box=(1, 1, 10, 10), difficult=0, more="") -> str:
    corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult>{more}<bndbox>{corners}</bndbox></object>"


def annotation(*things: str, size=(64, 48)) -> str:
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{''.join(things)}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Makes a VOC folder from {stem: XML}, each with a picture, and {split: stems}."""

    def make(annotations: dict[str, str], splits: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "voc"
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / name).mkdir(parents=True)
        for stem, text in annotations.items():
            (folder / "Annotations" / f"{stem}.xml").write_text(text, encoding="utf-8")
            Image.new("RGB", (64, 48)).save(folder / "JPEGImages" / f"{stem}.jpg")
        for split, text in (splits or {}).items():
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(text)
        return folder

    return make


def rows(done, split="all") -> list[dict]:
    return json.loads(done.files[split].read_text())["annotations"]


def test_corners_are_pixels_from_one_unless_told_otherwise(voc, tmp_path):
    folder = voc({"a": annotation(thing(box=(1, 1, 64, 48)), thing(box=(5, 6, 5, 6)), thing(box=(4.5, 2, 8.5, 3)))})
    done = convert_voc(folder, tmp_path / "pixels")
    assert [row["bbox"] for row in rows(done)] == [[0, 0, 64, 48], [4, 5, 1, 1], [3.5, 1, 5, 2]] and done.notes == []
    done = convert_voc(folder, tmp_path / "edges", inclusive=False)
    assert [row["bbox"] for row in rows(done)] == [[1, 1, 63, 47], [5, 6, 0, 0], [4.5, 2, 4, 1]]
    assert done.notes == ["a.xml, object 2: its box has no area; training will leave it out"]
    assert (tmp_path / "edges" / "conversion.txt").read_text() == done.notes[0] + "\n"
    assert [row["area"] for row in rows(done)] == [63 * 47, 0, 4]


def test_the_result_is_a_data_set_in_coco_format(voc, tmp_path):
    folder = voc({"b": annotation(thing("spoon"), thing("cup")), "a": annotation(), "c": annotation(thing("fork"))}, {"train": "b\na\n", "val": "c\n"})
    done = convert_voc(folder, tmp_path / "out")
    assert done.pictures == {"train": 2, "val": 1} and done.boxes == {"train": 2, "val": 1} and done.notes == []
    assert done.class_names == {1: "cup", 2: "fork", 3: "spoon"}, "the same ids in every split"
    dataset = CocoDetection(done.img_folder, done.files["train"])
    assert [dataset.coco.imgs[i]["file_name"] for i in dataset.ids] == ["b.jpg", "a.jpg"]
    assert dataset[0][1]["labels"].tolist() == [3, 1] and len(dataset[1][1]["boxes"]) == 0
    assert check_dataset(done.img_folder, done.files["val"], progress=False).findings == []
    assert "train: 2 pictures, 2 boxes in train.json" in str(done)


def test_classes_keep_the_order_that_is_asked_for_and_an_unknown_one_stops_everything(voc, tmp_path):
    folder = voc({"a": annotation(thing("spoon")), "b": annotation(thing("cup"), thing("cup"))})
    done = convert_voc(folder, tmp_path / "out", ["spoon", "knife", "cup"])
    assert done.class_names == {1: "spoon", 2: "knife", 3: "cup"}
    with pytest.raises(ValueError, match="b.xml, object 1 is a 'cup', one of 2, which is not among the classes spoon"):
        convert_voc(folder, tmp_path / "stopped", ["spoon"])
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize("difficult, crowds", [("crowd", [0, 1]), ("keep", [0, 0]), ("drop", [0])])
def test_difficult_objects(voc, tmp_path, difficult, crowds):
    folder = voc({"a": annotation(thing(), thing(difficult=1))})
    assert [row["iscrowd"] for row in rows(convert_voc(folder, tmp_path / "out", difficult=difficult))] == crowds
    with pytest.raises(ValueError, match="'maybe'; choose"):
        convert_voc(folder, tmp_path / "out2", difficult="maybe")


FAULTS = {
    "ends before it begins": (annotation(thing(), thing(box=(10, 5, 9, 8))), "a.xml, object 2: its box ends before it begins", 1),
    "not a number": (annotation(thing(), thing(box=(10, "?", 19, 8))), "a.xml, object 2: its box is .'10', '.', '19', '8'., not four numbers", 1),
    "infinite": (annotation(thing(), thing(box=(10, "1e999", 19, 8))), "object 2: its box is", 1),
    "no box": (annotation(thing(), "<object><name>cup</name></object>"), "object 2: its box is .None, None, None, None.", 1),
    "no name": (annotation(thing(), thing("  ")), "object 2: it has no name", 1),
    "outside": (annotation(thing(), thing(box=(50, 1, 80, 9))), "object 2: its box .* leaves the picture of 64×48", 2),
    "no size": (annotation(thing(), size=("", "")), "a.xml: it gives no size; the picture has 64×48", 1),
    "size zero": (annotation(thing(), size=(0, 0)), "a.xml: it gives no size; the picture has 64×48", 1),
    "cut off": (annotation(thing())[:-20], "a.xml: it is not valid XML .*; the picture was left out", 0),
    "empty": ("", "a.xml: it is not valid XML", 0),
    "entities": ('<!DOCTYPE a [<!ENTITY b "x">]>' + annotation(thing("&b;")), "a.xml: it defines a document type", 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_and_nothing_is_guessed(voc, tmp_path, fault):
    text, words, left = FAULTS[fault]
    folder = voc({"a": text, "b": annotation(thing())})
    before = tree(folder)
    done = convert_voc(folder, tmp_path / "out")
    assert len(done.notes) == 1 and re.search(words, done.notes[0])
    assert done.boxes == {"all": left + 1} and done.pictures["all"] == (1 if left == 0 else 2)
    assert tree(folder) == before


def test_missing_ambiguous_and_unlisted_files_are_reported(voc, tmp_path):
    folder = voc({stem: annotation(thing()) for stem in ("a", "b", "c", "spare")}, {"train": "a\nb\nc\nnowhere\na\n../a\n"})
    (folder / "JPEGImages" / "b.jpg").unlink()
    Image.new("RGB", (64, 48)).save(folder / "JPEGImages" / "c.png")
    done = convert_voc(folder, tmp_path / "out")
    assert done.pictures == {"train": 1}
    text = "\n".join(done.notes)
    assert "b.xml: its picture is missing" in text and "c.xml: its picture may be c.jpg or c.png" in text
    assert "nowhere.xml: there is no such annotation" in text and "1 annotation files are in no list: train" in text


def test_lists_of_one_class_are_read_and_missing_lists_named(voc, tmp_path):
    folder = voc({"a": annotation(thing()), "b 2": annotation(thing())}, {"cup_train": "a  1\nb 2 -1\n"})
    assert convert_voc(folder, tmp_path / "out", splits=["cup_train"]).pictures == {"cup_train": 2}
    with pytest.raises(FileNotFoundError, match="val.txt: there is no such list"):
        convert_voc(folder, tmp_path / "more", splits=["val"])


def test_pictures_and_annotations_may_share_a_folder(voc, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.xml").write_text(annotation(thing()))
    Image.new("L", (64, 48)).save(flat / "a.PNG")
    done = convert_voc(flat, tmp_path / "out")
    assert done.img_folder == flat and len(CocoDetection(flat, done.files["all"])[0][1]["boxes"]) == 1


def test_what_cannot_be_converted_at_all_is_a_sentence(voc, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        convert_voc(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="has no annotations"):
        convert_voc(tmp_path, tmp_path / "out")
    folder = voc({"a": annotation()})
    with pytest.raises(ValueError, match="not one object could be read"):
        convert_voc(folder, tmp_path / "out")
    (folder / "Annotations" / "a.xml").write_text(annotation(thing()))
    convert_voc(folder, tmp_path / "out")
    kept = tree(tmp_path / "out")
    with pytest.raises(FileExistsError, match="all.json exists already"):
        convert_voc(folder, tmp_path / "out")
    assert tree(tmp_path / "out") == kept


def test_a_small_bomb_stays_small(tmp_path):
    """Ten levels of ten would be ten thousand million texts; the parser stops at the first definition."""
    levels = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 11))
    (tmp_path / "bomb.xml").write_text(f'<!DOCTYPE a [<!ENTITY l0 "ha">{levels}]><annotation>&l10;</annotation>')
    (tmp_path / "outside.xml").write_text('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>')
    for name in ("bomb", "outside"):
        began = time.monotonic()
        with pytest.raises(ValueError, match="defines a document type"):
            datasets._read_xml(tmp_path / f"{name}.xml")
        assert time.monotonic() - began < 1


@settings(deadline=None, max_examples=100)
@given(cut=st.integers(0, 400), place=st.integers(0, 400), scribble=st.binary(max_size=6))
def test_every_damaged_annotation_ends_in_a_report(tmp_path_factory, cut, place, scribble):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    if not (folder / "a.png").exists():
        for stem in "ab":
            Image.new("RGB", (64, 48)).save(folder / f"{stem}.png")
        (folder / "b.xml").write_text(annotation(thing()))
    text = annotation(thing(), thing("spoon", difficult=1)).encode()
    text = text[:place] + scribble + text[place + len(scribble) :]
    (folder / "a.xml").write_bytes(text[: max(0, len(text) - cut)])
    out = tmp_path_factory.getbasetemp() / "damaged-out"
    shutil.rmtree(out, ignore_errors=True)
    done = convert_voc(folder, out)
    for row in rows(done):
        assert all(abs(value) < 1e10 for value in row["bbox"]) and min(row["bbox"][2:]) >= 0
    str(done).encode()


# --- blood cells ------------------------------------------------------------------------------------------------------


def test_blood_cells_are_fetched_and_converted(server, tmp_path, monkeypatch):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
    picture = (tmp_path / "a.jpg").read_bytes()
    files = {"BCCD_Dataset-1/README.md": b"about", "BCCD_Dataset-1/BCCD/.DS_Store": b"x"}
    for split, stem in (("train", "a"), ("val", "b"), ("test", "c")):
        files[f"BCCD_Dataset-1/BCCD/JPEGImages/{stem}.jpg"] = picture
        files[f"BCCD_Dataset-1/BCCD/Annotations/{stem}.xml"] = annotation(thing("WBC", (5, 6, 5, 6)), thing("RBC", (1, 2, 64, 48))).encode()
        files[f"BCCD_Dataset-1/BCCD/ImageSets/Main/{split}.txt"] = f"{stem}\n".encode()
    server.files["/x.zip"] = zipped(tmp_path / "made.zip", files)
    real = datasets.SOURCES["bccd"]
    fake = Archive(**{**vars(real.archives[0]), "url": f"{server.url}/x.zip", "files": 9})
    monkeypatch.setitem(datasets.SOURCES, "bccd", Source("", "", "", (fake,), real.splits, real.finish))
    monkeypatch.setattr(datasets, "_BCCD_PICTURES", {"train": 1, "val": 1, "test": 1})
    splits = download("bccd", tmp_path / "data", progress=False)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == \
        ["BCCD", "checksums", "conversion.txt", "images", "test.json", "train.json", "val.json"]
    for images, ann_file in splits.values():
        dataset = CocoDetection(images, ann_file)
        assert dataset.class_names == {1: "RBC", 2: "WBC", 3: "Platelets"} and len(dataset) == 1
        assert [entry["bbox"] for entry in dataset.coco.dataset["annotations"]] == [[5, 6, 0, 0], [1, 2, 63, 46]]
        assert len(dataset[0][1]["boxes"]) == 1
    splits["val"][1].unlink()  # as if the first call had been stopped while it converted
    before = tree(tmp_path / "data")
    download("bccd", tmp_path / "data", progress=False)
    assert before.items() <= tree(tmp_path / "data").items() and splits["val"][1].is_file()


def test_the_converter_makes_the_annotations_that_the_book_was_measured_on(bccd, tmp_path):
    """The photographs' own boxes, written as labelImg writes them and converted again, are unchanged."""
    voc, wanted = tmp_path / "voc", {}
    for name in ("Annotations", "ImageSets/Main"):
        (voc / name).mkdir(parents=True)
    (voc / "JPEGImages").symlink_to(bccd / "images")
    for split in ("train", "val", "test"):
        wanted[split] = json.loads((bccd / f"{split}.json").read_text())
        names = {entry["id"]: entry["name"] for entry in wanted[split]["categories"]}
        things = {image["id"]: [] for image in wanted[split]["images"]}
        for entry in wanted[split]["annotations"]:
            x, y, w, h = map(round, entry["bbox"])
            things[entry["image_id"]].append(thing(names[entry["category_id"]], (x, y, x + w, y + h)))
        stems = [Path(image["file_name"]).stem for image in wanted[split]["images"]]
        for stem, found in zip(stems, things.values(), strict=True):
            (voc / "Annotations" / f"{stem}.xml").write_text(annotation(*found, size=(640, 480)))
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))
    done = convert_voc(voc, tmp_path / "out", datasets.BCCD_CLASSES, inclusive=False)
    assert done.pictures == datasets._BCCD_PICTURES
    for split, content in wanted.items():
        assert json.loads(done.files[split].read_text()) == content
    assert len(done.notes) == 2, "two boxes without area"
