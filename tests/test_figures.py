"""Figures say what their tensors say, on any page, to any eye, and the same each time."""

import base64
import io
import itertools
import re
from xml.etree import ElementTree

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from annotated_detr import figures, scenes

H0, W0 = 76, 91


@pytest.fixture
def unchecked():
    """Without the run-time annotations, so that a user's mistake meets the module's own sentence."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def fresh_chapter():
    figures.chapter(5)


@pytest.fixture(scope="module")
def photograph():
    """A picture with as many colours as a photograph has."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:600, 0:900]
    smooth = np.stack([x / 900, y / 600, (x + y) / 1500], -1)
    return Image.fromarray(((smooth + 0.05 * generator.random((600, 900, 3))) * 240).astype(np.uint8))


def normalised(picture):
    """The picture as the model sees it."""
    plain = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    return (plain - torch.tensor(scenes.IMAGENET_MEAN)[:, None, None]) / torch.tensor(scenes.IMAGENET_STD)[:, None, None]


def padded_batch():
    """Two pictures, one padded in width and one in height, with their mask."""
    tensors, mask = torch.zeros(2, 3, H0, W0), torch.ones(2, H0, W0, dtype=torch.bool)
    mask[0, :, :51] = False
    mask[1, :60] = False
    return tensors, mask


def every_figure(photograph):
    """One figure of each drawer, by name, from real tensors."""
    torch.manual_seed(0)
    tensors, mask = padded_batch()
    features, tokens = torch.rand(2, 2048, 24, 29), torch.rand(2, 696, 256)
    hs, logits = torch.rand(6, 2, 100, 256), torch.rand(2, 100, 92)
    some = torch.tensor([[0.5, 0.5, 0.3, 0.4], [0.9, 0.05, 0.2, 0.1]])
    fig, axes = figures.subplots(1, 2)
    figures.boxes(figures.picture(axes[0], photograph), some, ["cat", "dog 0.93"], "cxcywh")
    figures.overlay(axes[1], normalised(photograph), torch.rand(24, 29), cell=(3, 4))
    flow_down = [
        ("pictures", tensors, "B 3 H0 W0"),
        "backbone",
        ("features", features, "B C H W"),
        ("decoder", ("memory", tokens, "B S d"), ("queries", hs[0], "B N d")),
        ("output", hs, "L B N d"),
        "class head",
        ("logits", logits, "B N K+1"),
    ]
    x = torch.linspace(0, 1, 20)
    return {
        "picture": fig,
        "map": figures.detr_map("backbone", {"batch": tensors, "position": features, "loss": x}),
        "batch": figures.batch(tensors, mask, [some, some[:0]]),
        "maps": figures.maps(torch.rand(5, 24, 29), [f"channel {i}" for i in range(5)], limits=(0, 1)),
        "down": figures.flow(flow_down),
        "across": figures.flow([("tokens", tokens, "B S d"), "mean", ("mean", tokens.mean((0, 1)), "d")]),
        "matrix": figures.matrix(torch.rand(4, 3), marked=[(0, 1), (2, 2)], xlabel="targets"),
        "ledger": figures.ledger({"loss_ce": 2, "loss_bbox": torch.tensor(0.5)}, {"loss_ce": 1, "loss_bbox": 5}),
        "curves": figures.curves({"a": (x, x**2), "b": ([0, 1], [1, 0])}, "step", "loss"),
        "steps": figures.curves({"AP": (x, 1 - x)}, "recall", "precision", step=True),
        "bars": figures.bars({"cat": 0.5, "dog": torch.tensor(0.25)}, "AP"),
        "histogram": figures.histogram(torch.randn(500), "offset"),
        "layers": figures.layers(photograph, [some + 0.01 * i for i in range(6)]),
        "sequence": figures.sequence(tensors[0], mask[0, ::32, ::32], row=1),
    }


@pytest.fixture(scope="module")
def shown(photograph):
    figures.chapter(5)
    return {
        name: figures.show(fig, name, "A caption & more.", 'Alt "text" < of a figure.')
        for name, fig in every_figure(photograph).items()
    }


def texts(fig):
    """All text in a figure."""
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def ids(svg):
    return re.findall(r'\bid="([^"]+)"', svg)


def test_a_figure_is_html_with_number_caption_and_alternative_text(shown):
    for name, figure in shown.items():
        root = ElementTree.fromstring(figure._repr_html_())  # well-formed, so attributes are escaped
        svg, caption = root
        assert (root.tag, root.get("class"), root.get("id")) == ("figure", "annotated-figure", f"fig-{name}")
        assert svg.tag.endswith("}svg") and svg.get("role") == "img"
        assert svg.get("aria-label") == 'Alt "text" < of a figure.'
        assert "".join(caption.itertext()) == f"Figure {figure.number} A caption & more."
    assert [figure.number for figure in shown.values()] == [f"5.{i + 1}" for i in range(len(shown))]


def test_ids_are_unique_on_a_page_and_every_reference_has_its_target(shown):
    everywhere = [name for figure in shown.values() for name in ids(figure._repr_html_())]
    assert len(everywhere) == len(set(everywhere)) > 100
    for name, figure in shown.items():
        own = set(ids(figure.svg))
        referred = set(re.findall(r'(?:href="|url\()#([^")]+)', figure.svg))
        assert referred == own, name
        assert all(i.startswith(f"{name}-") for i in own)


def test_the_ink_is_the_pages_and_nothing_leaks_into_the_page(shown):
    for figure in shown.values():
        assert "currentColor" in figure.svg and "#000000" not in figure.svg
        assert "<style" not in figure.svg and "metadata" not in figure.svg
        assert ElementTree.fromstring(figure.svg).get("fill") == "currentColor"


def test_the_same_drawing_gives_the_same_bytes(shown, photograph):
    again = every_figure(photograph)
    for name in ("picture", "batch", "down", "maps"):
        assert figures.show(again[name], name, "A caption & more.", 'Alt "text" < of a figure.').svg == shown[name].svg


def rasters(svg):
    """The pictures embedded in an SVG text."""
    for kind, data in re.findall(r'href="data:image/(\w+);base64,([^"]+)"', svg):
        yield kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_figures_are_small_and_their_pixels_compressed(shown):
    for name, figure in shown.items():
        assert len(figure.svg) < 150_000, name
        assert all(max(image.size) <= 1300 for _, image in rasters(figure.svg)), name
    assert {kind for kind, _ in rasters(shown["picture"].svg)} == {"jpeg"}
    pictures = list(rasters(shown["maps"].svg))
    assert [image.size for kind, image in pictures if image.size != (1, 256)] == [(29, 24)] * 5
    assert {kind for kind, _ in pictures} == {"png"}


def test_the_embedded_map_has_the_colours_of_the_values():
    values = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    svg = figures.show(figures.maps(values), "map", "A caption.", "A text.").svg
    (image,) = [image.convert("RGB") for _, image in rasters(svg) if image.size == (2, 2)]
    from matplotlib import colormaps

    expected = colormaps[figures.MAP](values[0].numpy(), bytes=True)[..., :3]
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_numbers_stay_with_their_labels_and_start_again_with_a_chapter():
    def number(label):
        return figures.show(figures.subplots()[0], label, "A caption.", "A text.").number

    assert [number(label) for label in ("one", "two", "one", "three")] == ["5.1", "5.2", "5.1", "5.3"]
    figures.chapter("B")
    assert number("two") == "B.1"


@pytest.mark.parametrize("missing", ["caption", "alt"])
def test_caption_and_alternative_text_are_required(missing):
    given = {"caption": "A caption.", "alt": "A text."} | {missing: " \n"}
    with pytest.raises(ValueError, match="caption" if missing == "caption" else "alternative text"):
        figures.show(figures.subplots()[0], "label", **given)


@pytest.mark.parametrize("label", ["", "Two words", "x_y", "-x", 'a"b'])
def test_a_label_must_be_an_anchor(label):
    with pytest.raises(ValueError, match="cannot be an anchor"):
        figures.show(figures.subplots()[0], label, "A caption.", "A text.")


def test_show_closes_a_pyplot_figure():
    plt = pytest.importorskip("matplotlib.pyplot")
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    assert "currentColor" in figures.show(fig, "plain", "A caption.", "A text.").svg
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize(
    ("shape", "letters", "complaint"),
    [
        ((2, 3, 4), "B H", "has 3 axes"),
        ((2, 3, 4), "B H W d", "names 4"),
        ((2, 5, 4), "B 3 H", "is written as 3 but its size is 5"),
        ((7, 8), "H W", "H is 24 earlier in this figure but 7"),
        ((92, 93), "K+1 K", "K is 91 earlier in this figure but 93"),
    ],
)
def test_letters_that_are_not_true_are_refused(shape, letters, complaint):
    first = ("first", torch.zeros(24), "H")
    with pytest.raises(ValueError, match=re.escape(complaint)):
        figures.flow([first, "layer", ("second", torch.zeros(shape), letters)])


@pytest.mark.parametrize("across", [True, False])
def test_the_printed_sizes_are_the_tensors(across):
    steps = [("pictures", torch.zeros(2, 3, 77, 91), "B 3 H0 W0"), "layer", ("rows", torch.zeros(2, 13), "B K+1")]
    printed = texts(figures.flow(steps, across))
    assert [word for word in printed if word in ("B", "3", "H₀", "W₀", "K+1", "2", "77", "91", "13")] == [
        *("B", "2", "3", "3", "H₀", "77", "W₀", "91"),
        *("B", "2", "K+1", "13"),
    ]


def test_tensors_from_the_side_are_printed_too():
    printed = texts(figures.flow([("a", torch.zeros(5), "S"), ("add", ("side", torch.zeros(5, 17), "S d")), ("b", torch.zeros(5, 17), "S d")]))
    assert printed.count("17") == 2 and printed.count("5") == 3 and "side" in printed


def test_a_residual_connection_goes_around_what_lies_between():
    x = torch.rand(2, 696, 256)
    steps = [("tokens", x, "B S d"), "attention", ("answers", x, "B S d"), ("add", "tokens"), ("sum", x, "B S d")]
    plain = figures.flow([*steps[:3], "add", steps[-1]], across=False)
    assert len(figures.flow(steps).axes[0].lines) == len(plain.axes[0].lines) + 1
    with pytest.raises(ValueError, match="takes 'sum' again, but further up there is only tokens, answers"):
        figures.flow([*steps[:3], ("add", "sum"), steps[-1]])


def test_a_share_of_channels_is_checked_like_any_letter():
    tokens, heads = torch.rand(2, 696, 256), torch.rand(2, 8, 696, 32)
    known = {}
    figures.letters_of("tokens", tokens, "B S d", known)
    assert figures.letters_of("queries", heads, "B M S d/M", known)[-1] == ("d/M", 32)
    with pytest.raises(ValueError, match="d is 256 earlier"):
        figures.letters_of("queries", heads[..., :16], "B M S d/M", known)


def test_a_sequence_follows_a_row_and_greys_the_padding():
    tensors, mask = padded_batch()
    cells = mask[0, ::32, ::32]
    fig = figures.sequence(tensors[0], cells, row=1)
    assert "row 1: tokens 3 to 5" in texts(fig) and "token 8" in texts(fig)
    grey = (fig.axes[0].images[-1].get_array()[0, :, 3] < 1).nonzero()[0]
    assert grey.tolist() == cells.flatten().nonzero().flatten().tolist() != []
    with pytest.raises(ValueError, match="give the stride of the map"):
        figures.sequence(tensors[0], cells, row=1, stride=16)


def test_the_batch_figure_prints_true_sizes_and_hatches_the_padding():
    fig = figures.batch(*padded_batch())
    assert [ax.get_title() for ax in fig.axes] == ["picture 0: h = 76, w = 51", "picture 1: h = 60, w = 91"]
    assert f"H₀ = {H0}" in texts(fig) and f"W₀ = {W0}" in texts(fig)
    hatched = [[p.get_bbox().bounds for p in ax.patches if p.get_hatch()] for ax in fig.axes]
    assert hatched == [[(51, 0, 40, 76)], [(0, 60, 91, 16)]]


def test_relative_boxes_are_scaled_by_the_picture_they_are_drawn_on(photograph):
    _, ax = figures.subplots()
    figures.boxes(figures.picture(ax, photograph), torch.tensor([[0.5, 0.25, 0.2, 0.1]]), format="cxcywh")
    assert ax.patches[0].get_bbox().bounds == pytest.approx((360, 120, 180, 60))


def test_a_box_that_sticks_out_keeps_its_label(photograph):
    _, ax = figures.subplots()
    figures.picture(ax, photograph)
    figures.boxes(ax, torch.tensor([[700.0, 100, 1000, 300], [-50, -40, 200, 300]]), ["right", "left"])
    assert [tag.xy for tag in ax.texts] == [(900, 100), (0, 0)]


def test_with_a_stride_a_cell_lies_over_the_pixels_it_was_made_from(photograph):
    weights = torch.zeros(20, 30)
    weights[3, 28] = 1
    _, (stretched, strided) = figures.subplots(1, 2)
    figures.overlay(stretched, photograph, weights)
    figures.overlay(strided, photograph, weights, cell=(3, 28), stride=32)
    lit = [np.argwhere(np.ptp(ax.images[0].get_array(), -1) > 60) for ax in (stretched, strided)]
    assert lit[0].min(0).tolist() == [90, 840] and lit[0].max(0).tolist() == [119, 869]
    assert lit[1].min(0).tolist() == [96, 896] and lit[1].max(0).tolist() == [127, 899]
    assert strided.patches[0].get_bbox().bounds == (896, 96, 32, 32)


def test_a_picture_looks_the_same_in_every_form(photograph):
    array = np.asarray(photograph)
    assert (figures.pixels(array) == array).all() and (figures.pixels(torch.tensor(array)) == array).all()
    assert np.abs(figures.pixels(normalised(photograph)).astype(int) - array).max() <= 1


def test_a_name_keeps_its_colour_in_a_chapter(photograph):
    box = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
    _, (one, two) = figures.subplots(1, 2)
    figures.boxes(figures.picture(one, photograph), box.repeat(2, 1), ["cat 0.9", "big dog"])
    figures.boxes(figures.picture(two, photograph), box, ["big dog 0.51"])
    assert two.patches[0].get_ec() == one.patches[1].get_ec() != one.patches[0].get_ec()


def test_the_ledger_adds_up():
    fig = figures.ledger({"loss_ce": 2.0, "loss_bbox": 0.5, "class_error": 9.0}, {"loss_ce": 1, "loss_bbox": 5})
    assert texts(fig) == ["2.000", "2.500"] and "4.500" in fig.axes[0].get_xlabel()


def test_the_matrix_prints_its_values_and_outlines_the_marked_cells():
    fig = figures.matrix(torch.tensor([[0.25, -1.0], [2.0, 3.5]]), marked=[(1, 0)])
    assert texts(fig) == ["0.25", "-1.00", "2.00", "3.50"]
    assert [patch.get_xy() for patch in fig.axes[0].patches] == [pytest.approx((-0.47, 0.55))]


def test_the_map_names_every_part_and_prints_the_sizes_of_tensors():
    printed = texts(figures.detr_map(["matcher", "loss"], {"heads": torch.zeros(2, 100, 92)}))
    assert set(figures.PARTS) <= set(printed) and "2×100×92" in printed
    for unlit in (None, "neck"):
        if unlit:
            with pytest.raises(ValueError, match="'neck' is not on the map of DETR; it shows data, batch"):
                figures.detr_map(unlit)


def test_wrong_shapes_and_counts_end_in_a_sentence(unchecked, photograph):
    _, ax = figures.subplots()
    figures.picture(ax, photograph)
    tensors, mask = padded_batch()
    mistakes = {
        "is written as 4 but its size is 5": lambda: figures.boxes(ax, torch.zeros(3, 5)),
        "3 boxes but 2 labels": lambda: figures.boxes(ax, torch.zeros(3, 4), ["a", "b"]),
        "not from 'xywh'": lambda: figures.boxes(ax, torch.zeros(3, 4), format="xywh"),
        "call picture": lambda: figures.boxes(figures.subplots()[1], torch.zeros(1, 4), format="cxcywh"),
        "'maps' has 2 axes": lambda: figures.maps(torch.zeros(3, 4)),
        "3 maps but 1 titles": lambda: figures.maps(torch.zeros(3, 4, 5), ["one"]),
        "'weights' has 1 axes": lambda: figures.overlay(ax, photograph, torch.zeros(3)),
        "cover [48, 64] of a picture": lambda: figures.overlay(ax, photograph, torch.zeros(3, 4), stride=16),
        "H0 is 76 earlier": lambda: figures.batch(tensors, mask.mT),
        "13 columns": lambda: figures.matrix(torch.zeros(2, 13)),
        "has a weight": lambda: figures.ledger({"loss": 1.0}, {"other": 1.0}),
        "this is float32 [4, 5, 6]": lambda: figures.pixels(torch.zeros(4, 5, 6)),
        "2 boxes but 1 scores": lambda: figures.draw_boxes(photograph, torch.zeros(2, 4), scores=[0.5]),
    }
    for complaint, mistake in mistakes.items():
        with pytest.raises(ValueError, match=re.escape(complaint)):
            mistake()


def test_boxes_are_painted_on_a_copy_of_the_picture_at_full_size(photograph):
    before = photograph.tobytes()
    corners = torch.tensor([[100.0, 200.0, 400.0, 500.0], [-5.0, -5.0, 30.0, 30.0], [880.0, 590.0, 905.0, 610.0]])
    painted = figures.draw_boxes(photograph, corners, ["cat", "dog", "cat"], torch.tensor([0.9, 0.8, 0.7]))
    assert painted.size == photograph.size and photograph.tobytes() == before
    colour = tuple(int(figures.PALETTE["blue"][i : i + 2], 16) for i in (1, 3, 5))
    assert painted.getpixel((250, 200)) == painted.getpixel((100, 350)) == colour
    assert painted.getpixel((250, 350)) == photograph.getpixel((250, 350))
    assert figures.draw_boxes(photograph, corners, color="#ff0000").getpixel((250, 200)) == (255, 0, 0)
    assert figures.draw_boxes(photograph, torch.zeros(0, 4)).tobytes() == photograph.convert("RGB").tobytes()


def test_the_palette_survives_grey_colour_blindness_and_both_pages():
    for color in [*figures.PALETTE.values(), figures.QUIET]:
        assert min(figures.contrast(color, "#ffffff"), figures.contrast(color, "#121212")) >= 3
    for one, other in itertools.combinations(figures.PALETTE.values(), 2):
        assert abs(figures.luminance(one) - figures.luminance(other)) >= 0.02  # greyscale
        for sight in ("protanopia", "deuteranopia", "tritanopia"):
            seen = [np.array(lab(figures.seen(color, sight))) for color in (one, other)]
            assert np.linalg.norm(seen[0] - seen[1]) >= 20, (one, other, sight)


def lab(color):
    """CIE L*a*b* of a colour, D65."""
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(matrix) @ figures.linear(color) / (0.9505, 1, 1.089))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_tints_leave_the_ink_readable_in_both_modes():
    for color, (page, ink) in itertools.product(figures.PALETTE.values(), [("#ffffff", "#222222"), ("#121212", "#dddddd")]):
        for alpha in (0.22, 0.30, 0.5):
            blend = [alpha * int(color[i : i + 2], 16) + (1 - alpha) * int(page[i : i + 2], 16) for i in (1, 3, 5)]
            filled = "#" + "".join(f"{round(value):02x}" for value in blend)
            assert figures.contrast(filled, ink) >= 4.5, (color, page, alpha)
