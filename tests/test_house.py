"""The house: names, layers, packaging, notebooks and the files around them."""

import ast
import configparser
import importlib
import inspect
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "annotated_detr"
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [
    "00_introduction",
    "01_data",
    "02_nested_tensor",
    "03_backbone",
    "04_positional_encoding",
    "05_transformer",
    "06_detr",
    "07_matcher",
    "08_loss",
    "09_evaluation",
    "10_training",
    "11_inference",
    "12_pretrained",
    "13_your_pictures",
    "14_is_it_learning",
    "15_speed",
    "16_ablations",
]
APPENDICES = ["scenes", "figures", "cli", "datasets"]
GROUND_FLOOR = {"scenes": -3, "figures": -2, "datasets": -1}  # below chapter 01; each may import those before it
sys.path.insert(0, str(ROOT / "book"))

# The names that must not move: argument names, in order, and defaults (... stands for "no default").
PUBLIC = {
    "data": {
        "CocoDetection": "img_folder, ann_file, transforms=None, return_masks=False",
        "ConvertCocoPolysToMask": "return_masks=False",
        "make_coco_transforms": "image_set",
        "check_dataset": "img_folder, ann_file",
    },
    "nested_tensor": {
        "NestedTensor": "tensors, mask",
        "NestedTensor.to": "self, device",
        "NestedTensor.decompose": "self",
        "nested_tensor_from_tensor_list": "tensor_list",
        "collate_fn": "batch",
    },
    "backbone": {
        "FrozenBatchNorm2d": "n",
        "BackboneBase": "backbone, train_backbone, num_channels, return_interm_layers",
        "Backbone": "name, train_backbone, return_interm_layers, dilation, weights=None",
    },
    "positional_encoding": {
        "PositionEmbeddingSine": "num_pos_feats=64, temperature=10000, normalize=False, scale=None",
        "PositionEmbeddingLearned": "num_pos_feats=256",
        "Joiner": "backbone, position_embedding",
    },
    "transformer": {
        "Transformer": "d_model=512, nhead=8, num_encoder_layers=6, num_decoder_layers=6, dim_feedforward=2048, dropout=0.1, "
        'activation="relu", normalize_before=False, return_intermediate_dec=False',
        "Transformer.forward": "self, src, mask, query_embed, pos_embed",
        "TransformerEncoder": None,
        "TransformerEncoderLayer": None,
        "TransformerDecoder": None,
        "TransformerDecoderLayer": None,
    },
    "detr": {
        "MLP": "input_dim, hidden_dim, output_dim, num_layers",
        "DETR": "backbone, transformer, num_classes, num_queries, aux_loss=False",
        "PostProcess": "",
        "PostProcess.forward": "self, outputs, target_sizes",
        "detr_resnet50": "pretrained=False, num_classes=91, return_postprocessor=False",
        "detr_resnet50_dc5": "pretrained=False, num_classes=91, return_postprocessor=False",
        "detr_resnet101": "pretrained=False, num_classes=91, return_postprocessor=False",
        "detr_resnet101_dc5": "pretrained=False, num_classes=91, return_postprocessor=False",
    },
    "matcher": {
        "HungarianMatcher": "cost_class=1, cost_bbox=1, cost_giou=1",
        "HungarianMatcher.forward": "self, outputs, targets",
    },
    "loss": {
        "SetCriterion": "num_classes, matcher, weight_dict, eos_coef, losses",
        "SetCriterion.forward": "self, outputs, targets",
    },
}
ROWS = [(module, name, wanted) for module, names in PUBLIC.items() for name, wanted in names.items()]


def cells(path: Path, kind: str) -> list[str]:
    """The sources of a notebook's cells of one kind."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf8"))["cells"] if cell["cell_type"] == kind]


def tracked() -> list[Path]:
    """The files of the repository: tracked by git or, in a tree without git, all but what is built."""
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this tree is not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> list[tuple[str, str]]:
    """Name and text of every tracked text file."""
    binary = {".npz", ".safetensors", ".png", ".jpg", ".jpeg"}
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf8")) for path in tracked() if path.suffix not in binary]


# --- the public names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, name, wanted", ROWS, ids=[name for _, name, _ in ROWS])
def test_public_names_keep_their_arguments(module, name, wanted):
    import annotated_detr

    first, *rest = name.split(".")
    thing = getattr(annotated_detr, first)
    assert thing is getattr(importlib.import_module(f"annotated_detr.{module}"), first)
    for part in rest:
        thing = getattr(thing, part)
    if wanted is None:
        assert callable(thing)
        return
    reference = {}
    exec(f"def reference({wanted}): pass", reference)
    expected = list(inspect.signature(reference["reference"]).parameters.values())
    found = list(inspect.signature(thing).parameters.values())
    assert [parameter.name for parameter in found[: len(expected)]] == [parameter.name for parameter in expected]
    assert [parameter.default for parameter in found[: len(expected)]] == [parameter.default for parameter in expected]
    positional = {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {parameter.kind for parameter in found[: len(expected)]} <= positional
    for extra in found[len(expected) :]:
        optional = extra.default is not inspect.Parameter.empty or extra.kind in (extra.VAR_KEYWORD, extra.VAR_POSITIONAL)
        assert optional, f"{name} asks for {extra.name}, which callers of the paper's code do not give"


def test_every_lazy_name_exists_and_is_listed():
    import annotated_detr

    for name in annotated_detr.__all__:
        assert getattr(annotated_detr, name) is not None
        assert name in dir(annotated_detr)
    with pytest.raises(AttributeError, match="no attribute 'detr_resnet5000'"):
        annotated_detr.detr_resnet5000


def test_importing_the_package_imports_nothing_but_itself():
    code = "import sys, torch, torchvision; before = set(sys.modules); import annotated_detr; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ast.literal_eval(done.stdout.strip()) == ["annotated_detr"]


def test_versions_names_package_torch_python_and_device():
    import platform

    import torch

    import annotated_detr

    line = annotated_detr.versions()
    assert line.startswith(f"annotated_detr {annotated_detr.__version__}, torch {torch.__version__}, Python {platform.python_version()}, on ")
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        assert line.endswith(", on the CPU")


def test_the_install_cell_takes_the_tagged_version_from_our_repository():
    import annotated_detr
    import check_drift

    assert f"github.com/{repository()}@v{annotated_detr.__version__}\"" in check_drift.install_cell()


# --- layers and drift -------------------------------------------------------------------------------------------------


def floor(module: str) -> int:
    """The chapter number of a module; negative for the ground floor; the command line comes last."""
    if module in GROUND_FLOOR:
        return GROUND_FLOOR[module]
    if module == "cli":
        return 100
    (number,) = [int(chapter[:2]) for chapter in CHAPTERS if chapter[3:] == module]
    return number


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    public = importlib.import_module("annotated_detr")._MODULE_OF
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "annotated_detr"):
            inside = (node.module or "") if node.level else ".".join((node.module or "").split(".")[1:])
            if inside:
                found.add(inside.split(".")[0])
            else:
                found |= {public.get(alias.name, alias.name) for alias in node.names if alias.name not in ("__version__", "versions")}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("annotated_detr.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_module_imports_only_from_chapters_before_it(path):
    for other in imports_of(path):
        assert floor(other) < floor(path.stem), f"{path.stem} imports {other}, which does not come before it"


def test_every_module_is_named_like_its_notebook():
    for path in NOTEBOOKS:
        named = [match[1] for source in cells(path, "code") if (match := re.match(r"#\| default_exp (\S+)", source))]
        if path.stem in ("index", "00_introduction", "15_speed", "16_ablations"):
            assert named == []
        else:
            assert named == [re.sub(r"^\d\d_", "", path.stem)], path.name


def test_the_book_has_every_chapter():
    assert {path.stem for path in NOTEBOOKS} >= {*CHAPTERS, *APPENDICES}
    contents = (ROOT / "_toc.yml").read_text(encoding="utf8")
    assert re.findall(r"nbs/(\w+)", contents) == ["index", *CHAPTERS, *APPENDICES]


def test_the_package_is_what_the_notebooks_export():
    pytest.importorskip("nbdev")
    import check_drift

    assert check_drift.drift(ROOT) == []


def test_the_drift_check_sees_an_edit_a_new_module_and_an_orphan(tmp_path):
    pytest.importorskip("nbdev")
    import shutil

    import check_drift

    for folder in ("nbs", "annotated_detr"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    edited = tmp_path / "annotated_detr" / "nested_tensor.py"
    edited.write_text(edited.read_text(encoding="utf8") + "\nx = 1\n", encoding="utf8")
    (tmp_path / "annotated_detr" / "orphan.py").write_text("x = 1\n", encoding="utf8")
    (tmp_path / "annotated_detr" / "matcher.py").unlink()
    found = " ".join(check_drift.drift(tmp_path))
    assert "nested_tensor.py differs" in found and "orphan.py comes from no notebook" in found and "matcher.py is missing" in found


# --- notebooks --------------------------------------------------------------------------------------------------------

def repository() -> str:
    """OWNER/NAME, as settings.ini has it."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf8")
    return f"{settings['DEFAULT']['user']}/{settings['DEFAULT']['repo']}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_ready_for_colab_github_and_the_book(path):
    import check_drift

    notebook = json.loads(path.read_text(encoding="utf8"))
    code, prose = cells(path, "code"), cells(path, "markdown")
    assert prose[0].startswith("# "), "the first cell has the title"
    assert sum(line.startswith("# ") for text in prose for line in text.splitlines()) >= 1
    assert code[0] == check_drift.install_cell(), "the first code cell installs the package, as in every notebook"
    assert any(re.search(r"\bshow\(", source) for source in code), "a chapter has at least one figure"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "#| eval: false" not in "".join(cell["source"]):
            assert not cell["outputs"] and cell["execution_count"] is None, "outputs are the build's, not the repository's"
    for source in code:
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        limit = 60 if re.search(r"^#\| exporti?\b", source, flags=re.M) else 30
        assert len(lines) <= limit, f"{len(lines)} lines in the cell that begins with {lines[0]!r}"
    for text in prose:
        outside = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
        assert not re.search(r"^\s*(:::|```\{)|\{[\w:-]+\}`", outside, flags=re.M), "MyST is not plain Markdown"
        assert text.count("<details") == text.count("</details>"), "a fold closes in its own cell"


def test_the_reader_of_the_book_understands_directives_and_call_outs():
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    import annotated_book
    import nbformat

    def read(*cells):
        notebook = nbformat.v4.new_notebook(cells=list(cells))
        return annotated_book.read_notebook(nbformat.v4.writes(notebook)).cells

    code = nbformat.v4.new_code_cell
    prose = nbformat.v4.new_markdown_cell
    hidden, quiet, folded, solution, plain = read(
        code("#| hide\nx = 1"),
        code("#| echo: false\nx"),
        code("#| code-fold: true\n#| code-summary: The long way\nx"),
        code("#| code-fold: true\n#| code-summary: Solution 1\nx"),
        code("#| export\ndef f(): ..."),
    )
    assert hidden.metadata.tags == ["remove-cell"] and quiet.metadata.tags == ["remove-input"]
    assert folded.metadata.tags == ["hide-input"] and folded.metadata.mystnb.code_prompt_show == "The long way"
    assert solution.metadata.tags == ["hide-cell"] and plain.source == "def f(): ..."
    (note,) = read(prose("> [!NOTE]\n> First.\n>\n> - a list\n\nafter"))
    assert "{note}\nFirst.\n\n- a list\n::::" in note.source and note.source.endswith("after")
    (details,) = read(prose("<details><summary>Solution 2</summary>\n\n$a$ and `b`\n\n</details>\n\nafter"))
    assert "{dropdown} Solution 2\n\n$a$ and `b`\n" in details.source and "<details" not in details.source
    (fenced,) = read(prose("```\n> [!NOTE]\n> stays\n```"))
    assert "[!NOTE]" in fenced.source
    (link,) = read(prose("see [Figure 1](05_transformer.ipynb#fig-layer)"))
    assert 'href="05_transformer.html#fig-layer"' in link.source


def test_a_changed_module_re_runs_only_the_chapters_that_import_it(tmp_path, monkeypatch):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    import shutil

    import annotated_book

    copy = shutil.copytree(PACKAGE, tmp_path / "annotated_detr")
    monkeypatch.setattr(annotated_book, "PACKAGE", copy)
    about_matcher = "from annotated_detr.loss import SetCriterion"
    about_backbone = "from annotated_detr import Backbone"
    assert annotated_book.named_modules("from annotated_detr import versions") == set(), "the first cell of every notebook"
    before = [annotated_book.digest_of_imports(text) for text in (about_matcher, about_backbone)]
    assert before == [annotated_book.digest_of_imports(text) for text in (about_matcher, about_backbone)]
    path = copy / "matcher.py"  # loss imports matcher: the change is felt through it
    path.write_text(path.read_text(encoding="utf8") + "\n# changed\n", encoding="utf8")
    after = [annotated_book.digest_of_imports(text) for text in (about_matcher, about_backbone)]
    assert before[0] != after[0] and before[1] == after[1]


def test_the_check_of_the_pages_bites(tmp_path):
    import check_book

    def problems(body: str) -> str:
        (tmp_path / "page.html").write_text(f"<html><body>{body}</body></html>", encoding="utf8")
        return " ".join(check_book.check(tmp_path, ROOT))

    assert problems("<h1 id='a'>Fine</h1><a href='#a'>here</a><a href='https://arxiv.org'>out</a>") == ""
    assert "directive" in problems("<p>#| hide</p>")
    assert "traceback" in problems("<pre>Traceback (most recent call last)</pre>")
    assert "a warning" in problems("<pre>x.py:1: UserWarning: too late</pre>")
    assert "machine" in problems(f"<p>{ROOT}/nbs</p>")
    assert "MyST role" in problems("<p>{ref}`there`</p>")
    assert "leads to no file" in problems("<a href='gone.html'>x</a>")
    assert "leads to no place" in problems("<a href='#gone'>x</a>")
    assert "from another host" in problems("<script src='https://cdn.example.org/x.js'></script>")
    assert "alternative text" in problems("<img src='data:,'>")
    assert "which is not there" in problems("<img src='gone.png' alt='x'>")


def test_a_page_is_mended_and_summed_up():
    pytest.importorskip("sphinx")
    import page_shell

    wrong = '<script src="x/fontawesome.js"></script><body data-default-mode=""><summary aria-label="Toggle hidden content">Solution'
    assert page_shell.mend(wrong) == '<body data-default-mode="auto"><summary>Solution'
    assert page_shell.summary("One sentence.  Two.") == "One sentence. Two."
    first = "A first sentence that is long enough to be told alone, since it is more than a third of what there is room for."
    assert page_shell.summary(f"{first} {'word ' * 60}") == first
    long = page_shell.summary("word, " * 100)
    assert len(long) <= 204 and long.endswith("word …")


def test_the_site_has_a_first_page_a_map_and_a_page_for_lost_addresses(tmp_path):
    pytest.importorskip("sphinx")
    import check_book
    import page_shell

    for name in ("nbs/index.html", "book/pages/api.html", "search.html", "_static/favicon.svg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("<html><body><h1>Page</h1></body></html>", encoding="utf8")
    page_shell.finish_folder(tmp_path)
    assert check_book.check(tmp_path, ROOT) == []
    site = page_shell.settings()["site"]
    assert site == "https://{}.github.io/{}".format(*repository().split("/"))
    assert f"<loc>{site}/nbs/index.html</loc>" in (tmp_path / "sitemap.xml").read_text(encoding="utf8")
    assert f'<base href="{site}/">' in (tmp_path / "404.html").read_text(encoding="utf8")


def test_only_the_icons_that_are_shown_are_shipped(tmp_path):
    theme = pytest.importorskip("pydata_sphinx_theme")
    import shutil

    import icons
    from fontTools.ttLib import TTFont

    static = Path(theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static"
    for name in ("styles/pydata-sphinx-theme.css", "vendor/fontawesome/webfonts"):
        target = tmp_path / "_static" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (static / name).is_dir() else shutil.copy)(static / name, target)
    (tmp_path / "_static" / "scripts").mkdir()
    (tmp_path / "page.html").write_text('<i class="fas fa-rocket"></i>', encoding="utf8")
    icons.keep_what_is_shown(tmp_path)
    style = (tmp_path / "_static" / "styles" / "pydata-sphinx-theme.css").read_text(encoding="utf8")
    assert ".fa-rocket:before" in style and ".fa-cow:before" not in style and ".woff2" not in style
    fonts = tmp_path / "_static" / "vendor" / "fontawesome" / "webfonts"
    shown = TTFont(fonts / "fa-solid-900.woff").getBestCmap()
    assert 0xF135 in shown and 0xF6C8 not in shown, "a rocket, and no cow"
    assert sum(path.stat().st_size for path in fonts.iterdir()) < 40_000


def test_the_book_is_served_compressed_and_lost_addresses_find_help(tmp_path):
    pytest.importorskip("sphinx")
    import gzip
    import threading
    import urllib.error
    import urllib.request

    import page_shell
    import serve

    (tmp_path / "index.html").write_text("<h1>Here</h1>", encoding="utf8")
    (tmp_path / "404.html").write_text(page_shell.missing_page(page_shell.settings()), encoding="utf8")
    with serve.server(tmp_path, 0) as book:
        threading.Thread(target=book.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{book.server_port}"
        with urllib.request.urlopen(urllib.request.Request(address + "/", headers={"Accept-Encoding": "gzip"})) as answer:
            assert gzip.decompress(answer.read()) == b"<h1>Here</h1>" and answer.headers["Content-Type"] == "text/html"
        with pytest.raises(urllib.error.HTTPError) as lost:
            urllib.request.urlopen(address + "/no/such/page")
        page = lost.value.read().decode()
        lost.value.close()
        assert lost.value.code == 404 and "No such page" in page and '<base href="/">' in page
        book.shutdown()


def test_the_pdf_has_page_numbers_and_links_that_lead_somewhere(tmp_path, monkeypatch):
    pypdf = pytest.importorskip("pypdf")
    pytest.importorskip("sphinx")
    import make_pdf
    import page_shell
    from pypdf.annotations import Link
    from pypdf.generic import DecodedStreamObject, NameObject

    monkeypatch.setattr(make_pdf, "HTML", tmp_path)
    writer = pypdf.PdfWriter()
    for _ in range(3):
        page = writer.add_blank_page(595, 842)
        page[NameObject("/Contents")] = writer._add_object(DecodedStreamObject())
    for name in ("nbs/07_matcher.html", "_modules/index.html"):
        link = Link(rect=(0, 0, 9, 9), url=f"{(tmp_path / name).as_uri()}#here")
        writer.add_annotation(page_number=1, annotation=link)
    make_pdf.mend_links(writer, {"nbs/07_matcher": 2})
    make_pdf.number(writer, 1)
    writer.write(tmp_path / "book.pdf")
    cover, first, second = pypdf.PdfReader(tmp_path / "book.pdf").pages
    assert [page.extract_text().strip() for page in (cover, first, second)] == ["", "2", "3"]
    inside, outside = (note.get_object() for note in first["/Annots"])
    assert inside["/Dest"][0].get_object() == second and "/A" not in inside
    assert outside["/A"]["/URI"] == f"{page_shell.settings()['site']}/_modules/index.html#here"


def test_the_pdf_has_every_page_of_the_book_in_order():
    pytest.importorskip("pypdf")
    pytest.importorskip("sphinx")
    import make_pdf

    parts = make_pdf.parts_of(ROOT / "_toc.yml")
    assert parts[0] == ("", ["nbs/index"])
    pages = [page for _, found in parts for page in found]
    assert [page[4:] for page in pages if page.startswith("nbs/")] == ["index", *CHAPTERS, *APPENDICES]
    assert ("Begin" in dict(parts)) and all(caption for caption, _ in parts[1:])


def test_without_a_browser_a_sentence_says_how_to_get_one(monkeypatch, tmp_path):
    import browser

    class Playwright:
        class chromium:
            executable_path = "nowhere"

    monkeypatch.setattr(browser, "MAC", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    with pytest.raises(SystemExit, match="apt-get install chromium"):
        browser.find_browser(Playwright)
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "gone"))
    with pytest.raises(SystemExit, match="gone, which is not there"):
        browser.find_browser(Playwright)


# --- files around the book --------------------------------------------------------------------------------------------


def test_the_repository_is_named_in_one_place():
    owner, name = repository().split("/")
    hosts = r"(?:github\.com|raw\.githubusercontent\.com|colab\.research\.google\.com/github)/([\w.-]+)/([\w.-]+?)(?:\.git)?(?=[/\\\"'\s)#@>\]}]|$)"
    ours = 0
    for path, text in texts():
        if path in ("tests/test_house.py",) or path.startswith("book/lock"):
            continue
        for match in re.finditer(r"([\w-]+)\.github\.io/([\w-]+)", text):
            if match[2] == name or match[1] == owner:
                assert (match[1], match[2]) == (owner, name), f"{path} names {match[0]}"
        for match in re.finditer(hosts, text):
            if match[2] == name or match[1] == owner or "annotated" in match[0].lower():
                assert (match[1], match[2]) == (owner, name), f"{path} names {match[0]}"
                ours += 1
    assert ours >= len(NOTEBOOKS)
    config = (ROOT / "_config.yml").read_text(encoding="utf8")
    assert f"url: https://github.com/{owner}/{name}\n" in config
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf8")
    assert f"branch: {settings['DEFAULT']['branch']}\n" in config


def test_versions_agree():
    import annotated_detr

    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf8")
    version = annotated_detr.__version__
    assert settings["DEFAULT"]["version"] == version
    assert f'version: "{version}"' in (ROOT / "CITATION.cff").read_text(encoding="utf8")
    assert set(re.findall(r"@v([\w.]+)", (ROOT / "README.md").read_text(encoding="utf8"))) == {version}
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf8")


def workflows() -> dict[str, dict]:
    """The workflows of the public repository, by the name of their file."""
    import yaml

    return {path.stem: yaml.safe_load(path.read_text(encoding="utf8")) for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}


def test_workflows_call_what_there_is_and_may_do_little():
    """What can be known without running them; `make lint-workflows` asks two linters as well."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf8"), flags=re.M))
    assert set(workflows()) == {"test", "book", "release", "notebooks"}
    for name, flow in workflows().items():
        assert flow["permissions"] == {}, f"{name}: a job asks for the rights that it needs, the workflow for none"
        for job in flow["jobs"].values():
            assert job["timeout-minutes"] <= 180
            for step in job["steps"]:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}|[\w-]+/[\w-]+@(v\d+|release/v1)", step.get("uses", "a/b@v1"))
                script = step.get("run", "")
                assert "${{" not in script, f"{name}: {script} — a script gets its values through the environment"
                for target in re.findall(r"\bmake ([\w-]+)", script):
                    assert target in targets, f"{name} calls `make {target}`"
                for path in re.findall(r"\b(?:book|tests)/[\w/]+\.\w+", script):
                    assert (ROOT / path).exists(), f"{name} calls {path}"


def test_workflows_cover_every_python_and_both_torches():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    matrix = workflows()["test"]["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"][0] == project["requires-python"].removeprefix(">=") == "3.11" and matrix["python"][-1] == "3.13"
    assert matrix["versions"] == ["newest", "oldest"]


def test_the_notes_of_a_release_are_its_part_of_the_changelog(tmp_path):
    import annotated_detr

    command = [sys.executable, "book/release_notes.py", f"v{annotated_detr.__version__}"]
    notes = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert notes.startswith("- ") and "## " not in notes and len(notes) > 200
    wrong = subprocess.run([*command[:2], "v99.0.0"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and "99.0.0" in wrong.stderr and "Traceback" not in wrong.stderr


def test_no_file_names_a_place_outside_the_repository():
    outside = re.compile(r"(?<![\w.$])(?:/work/|/home/\w|/root/|/Users/\w|/mnt/\w)|\.\./shared\b|(?<![\w./-])shared/(?:data|design|golden)")
    for path, text in texts():
        if path in (".ci/run", "tests/test_house.py", "book/check_book.py"):
            continue
        match = outside.search(text)
        assert match is None, f"{path} names {match[0]}, which other machines do not have"


def test_the_top_level_has_what_a_newcomer_looks_for():
    wanted = "nbs annotated_detr _toc.yml _config.yml settings.ini pyproject.toml tests README.md Makefile LICENSE LICENSE-prose CHANGELOG.md CITATION.cff book"
    assert [name for name in wanted.split() if not (ROOT / name).exists()] == []
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf8")
    assert "Attribution 4.0 International" in (ROOT / "LICENSE-prose").read_text(encoding="utf8")


def test_the_wheel_holds_the_package_alone(tmp_path):
    """Built from a copy, so that no build folder is left in the tree; nothing is downloaded."""
    import shutil

    source = tmp_path / "source"
    source.mkdir()
    for path in tracked():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    outside = [name for name in names if not name.startswith(("annotated_detr/", "annotated_detr-"))]
    assert outside == []
    assert "annotated_detr/py.typed" in names
    assert {f"annotated_detr/{path.name}" for path in PACKAGE.glob("*.py")} <= set(names)
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    requirements = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert requirements and not any(re.search(r"==|<|~=", line) for line in requirements), "lower bounds only"
    points = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "annotated-detr = annotated_detr.cli:main" in points


@pytest.mark.parametrize("lock", ["lock.txt", "lock-oldest.txt"])
def test_lock_files_fit_the_bounds(lock):
    """Every requirement of pyproject.toml is locked, with hashes; the oldest lock holds exactly the lower bounds."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    text = (ROOT / "book" / lock).read_text(encoding="utf8")
    locked = {}
    for match in re.finditer(r"^([\w.-]+)==([^\s;\\]+)", text, flags=re.M):
        locked.setdefault(match[1].lower(), []).append(match[2])
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["tensorboard"] + extras["notebooks"] + extras["test"]
    wanted += extras["book"] if lock == "lock.txt" else []
    for requirement in map(Requirement, wanted):
        versions = locked.get(requirement.name.lower(), [])
        assert versions, f"{lock} does not hold {requirement.name}: run `make lock`"
        assert all(requirement.specifier.contains(version, prereleases=True) for version in versions), requirement
    if lock == "lock-oldest.txt":
        assert locked["torch"] == ["2.11.0"] and locked["torchvision"] == ["0.26.0"]
    assert text.count("--hash=sha256:") > len(locked)


def test_make_says_what_it_needs_when_python_is_too_old(tmp_path):
    import os
    import shutil

    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    (tmp_path / "book").mkdir()
    for name in ("Makefile", "pyproject.toml", "book/lock.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python"):
        (tools / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.18\nexit 1\n', encoding="utf8")
        (tools / name).chmod(0o755)
    path = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PYTHON")}
    done = subprocess.run([make, "test"], cwd=tmp_path, capture_output=True, text=True, env={**path, "PATH": str(tools)})
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stdout and "Python 3.8.18" in done.stdout and "Traceback" not in done.stderr
