"""The page of the service: its files, and a real browser against a real server."""

import base64
import functools
import io
import json
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hotcoco import mask as coco_mask
from PIL import Image

from maskwright.inference.predictor import Predictor
from maskwright.results import draw
from tests import tiny

pytest.importorskip("fastapi", reason="the service needs the extra `serve`")
pytest.importorskip("httpx", reason="httpx waits for the service")
pytest.importorskip("psutil", reason="psutil finds the model process")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

from tests.service import Service, as_answer, encoded, wait_until  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "src/maskwright/serving/page"
SAMPLE = ROOT / "src/maskwright/data/sample/val/e2d22d3d283915df.png"  # fluorescence-1.png
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKEN = "a-token"
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 375, "height": 700}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a service with two models and a token."""
    models = (f"tiny={tiny.trained_model()}", "nuclei")
    environment = {"MASKWRIGHT_TOKEN": TOKEN}
    service = Service(tmp_path_factory.mktemp("page"), "--device", "cpu", models=models, environment=environment)
    yield service.url
    service.process.kill()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """Open the page; in the end, check that it asked no other host and reported no error but refused requests."""
    requests, errors, contexts = [], [], []

    def open_page(viewport=DESKTOP, token=TOKEN, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        context.on("request", lambda request: requests.append(request.url))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        context.on("console", lambda message: message.type == "error" and errors.append(message.text))
        if token:
            kept = f"sessionStorage.setItem('maskwright-token', '{token}')"
            context.add_init_script(f"if (location.protocol === 'http:') {kept}")
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(url)
        if token:
            page.locator("#model:enabled").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests
    assert not [request for request in requests if not request.startswith((url, f"blob:{url}"))]
    assert not [error for error in errors if not error.startswith("Failed to load resource")]


@functools.cache
def predictor():
    return Predictor(tiny.trained_model(), device="cpu")


def scene(number=3, size=(64, 64)):
    return encoded(tiny.scene_image(number, size))


def upload(page, *files, expect=None):
    """Choose files, given as (name, bytes), and wait until the last one is segmented."""
    payload = [{"name": name, "mimeType": "", "buffer": content} for name, content in files]
    page.set_input_files("#files", payload)
    page.locator("#status", has_text=expect or f"{files[-1][0]}: ").wait_for()


def choose_task(page, name):
    page.locator("#tasks label", has_text=name).click()
    page.locator("#gallery [aria-current=true] [data-state=done]").wait_for()


def canvas(page):
    """The overlay as (H, W, 4) uint8: RGB and opacity."""
    encoded = page.evaluate("""() => {
        const canvas = document.querySelector("#overlay");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const characters = Array.from(data, (value) => String.fromCharCode(value)).join("");
        return [canvas.height, canvas.width, btoa(characters)];
    }""")
    return np.frombuffer(base64.b64decode(encoded[2]), np.uint8).reshape(encoded[0], encoded[1], 4)


def visible_ids(result):
    return draw._visible_ids(result, min_score=0.3)


def is_drawn(page, result, ids=None, opacity=0.5):
    """Whether the pixels of the segments, and no others, have the colors that `predict` gives them."""
    drawn, ids = canvas(page), visible_ids(result) if ids is None else ids
    assert np.array_equal(drawn[..., 3] > 0, ids > 0)
    colors = np.concatenate([np.zeros((1, 3), np.uint8), draw.segment_colors(result)])
    off = np.abs(drawn[..., :3].astype(int) - colors[ids])
    assert off[ids > 0].max() <= 2  # canvases store colors times opacity
    outline = draw._outline(ids) & (result.task != "semantic")
    assert (drawn[outline, 3] == 255).all()
    assert (drawn[(ids > 0) & ~outline, 3] == round(255 * opacity)).all()
    return True


def place(page, x, y, pane="#result-pane"):
    """The point of the window at which the center of a pixel of the image is shown, once the page is laid out."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    box = page.locator(f"{pane} .layers").bounding_box()
    height, width = page.evaluate("() => [overlay.height, overlay.width]")
    return box["x"] + (x + 0.5) * box["width"] / width, box["y"] + (y + 0.5) * box["height"] / height


def inner_pixel(mask):
    """x, y of a pixel that is inside."""
    rows, columns = np.nonzero(mask & ~draw._outline(mask.astype(int)))
    middle = len(rows) // 2
    return int(columns[middle]), int(rows[middle])


# Files


def test_the_files_of_the_page_name_each_other_and_no_other_host():
    texts = {file.name: file.read_text(encoding="utf-8") for file in PAGE.iterdir()}
    samples = {"stained-1.jpg", "stained-2.jpg", "fluorescence-1.png", "fluorescence-2.png"}
    named = set(re.findall(r'"page/([^"]+)"', texts["index.html"]))
    for text in texts.values():
        named |= set(re.findall(r'from "\./([^"]+)"', text))
        assert not re.findall(r"(?:https?:)?//[\w-]+\.\w+", text.replace("http://www.w3.org/2000/svg", ""))
        assert " style=" not in text
        assert not re.search(r"\son\w+=", text)
    assert named == (set(texts) | samples) - {"index.html"}


def test_the_page_needs_no_token_and_has_a_policy_of_its_own(url):
    for path, kind in (("/", "text/html"), ("/page/main.js", "text/javascript"), ("/page/stained-1.jpg", "image/jpeg")):
        with urllib.request.urlopen(url + path) as answer:
            assert answer.headers["content-type"].startswith(kind)
            assert "script-src 'self'" in answer.headers["content-security-policy"]
    for path in ("/page/nothing.js", "/page/..%2fapp.py", "/page/__init__.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + path)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/v1/models")


# Results


def test_the_overlay_of_a_sample_has_the_pixels_and_colors_of_predict(open_page, tmp_path):
    page = open_page()
    page.select_option("#model", "nuclei")
    page.click("[data-sample='fluorescence-1.png']")
    page.locator("#status", has_text="fluorescence-1.png: ").wait_for()
    result = Predictor("nuclei", device="cpu")(SAMPLE)
    assert len(result) > 20
    assert is_drawn(page, result)
    with page.expect_download() as download:
        page.click("#save-png")
    saved = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    pixels = np.asarray(Image.open(SAMPLE).convert("RGB"))
    expected = draw._blend(pixels, visible_ids(result), draw.segment_colors(result), 0.5, True)
    assert np.abs(saved - expected).max() <= 3
    assert download.value.suggested_filename == "fluorescence-1_overlay.png"


def test_each_task_is_drawn_as_by_predict_and_saved_as_the_service_answers(open_page):
    page = open_page()
    image = scene()
    upload(page, ("scene.png", image))
    for name, task in (("Instances", "instance"), ("Semantic", "semantic"), ("Panoptic", "panoptic")):
        choose_task(page, name)
        result = predictor()(image, task=task)
        assert is_drawn(page, result)
        with page.expect_download() as download:
            page.click("#save-json")
        assert download.value.suggested_filename == "scene.json"
        saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
        assert saved == as_answer(result)
        assert task in page.locator("#curl").text_content()


def test_hover_names_the_segment_and_outlines_it(open_page):
    page = open_page()
    image = scene()
    upload(page, ("scene.png", image))
    result = predictor()(image)
    index = result.names.index("box")
    for pane in ("#result-pane", "#original-pane"):
        page.set_checked("#compare", pane == "#original-pane")
        page.mouse.move(*place(page, *inner_pixel(result.masks[index]), pane))
        text = page.locator("#tip").inner_text()
        assert "box" in text
        assert f"{result.scores[index]:.0%}".replace("%", " %") in text
        assert f"{result.areas[index]} px" in text
        outline = draw._outline(visible_ids(result)) & result.masks[index]
        assert (canvas(page)[outline] == 255).all()
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()
    assert is_drawn(page, result)


def test_classes_scores_and_opacity_change_what_is_drawn(open_page):
    page = open_page()
    image = scene()
    upload(page, ("scene.png", image))
    result = predictor()(image)
    sky = result.names.index("sky")
    page.uncheck("#legend li:has-text('sky') input")
    page.mouse.move(2, 2)
    page.evaluate("() => document.activeElement.blur()")
    without = np.where(visible_ids(result) == sky + 1, 0, visible_ids(result))
    assert is_drawn(page, result, without)
    assert page.locator("#segments li", has_text="sky").count() == 0
    page.fill("#opacity", "20")
    assert is_drawn(page, result, without, opacity=0.2)
    page.fill("#min-score", "100")
    assert page.locator("#segments li").count() == (result.scores >= 1).sum()
    page.fill("#min-score", "0")
    page.check("#legend li:has-text('sky') input")
    assert page.locator("#segments-title").inner_text() == f"{len(result)} segments"


def test_the_original_is_shown_beside_the_segments_and_both_zoom(open_page):
    page = open_page()
    upload(page, ("scene.png", scene()))
    assert page.locator("#original-pane").is_hidden()
    page.check("#compare")
    wait_until(lambda: page.locator("#result-pane .layers").bounding_box()["width"] < DESKTOP["width"] / 2)
    panes = [page.locator(f"{pane} .layers") for pane in ("#result-pane", "#original-pane")]
    before = [pane.bounding_box() for pane in panes]
    assert before[0]["width"] == before[1]["width"]
    assert before[0]["x"] + before[0]["width"] <= before[1]["x"] + 1
    page.mouse.move(*place(page, 10, 10))
    page.mouse.wheel(0, -300)
    page.locator("#stage.zoomed").wait_for()
    after = [pane.bounding_box() for pane in panes]
    assert after[0]["width"] > 1.5 * before[0]["width"]
    assert after[0]["width"] == pytest.approx(after[1]["width"])
    page.click("#zoom-fit")
    assert panes[0].bounding_box() == before[0]


def test_thresholds_are_sent(open_page):
    page = open_page()
    image = scene()
    upload(page, ("scene.png", image))
    choose_task(page, "Instances")
    page.click("#thresholds summary")
    page.fill("[name=top_k]", "2")
    page.locator("[name=top_k]").blur()
    page.locator("#segments-title", has_text=re.compile(r"^[12] segments?$")).wait_for()
    assert is_drawn(page, predictor()(image, task="instance", top_k=2))
    assert "top_k=2" in page.locator("#curl").text_content()
    page.fill("[name=top_k]", "0")
    page.locator("[name=top_k]").blur()
    assert page.locator("#gallery [data-state=done]").is_visible()  # not sent


def test_several_images_are_segmented_and_can_be_removed(open_page):
    page = open_page()
    upload(page, *[(f"{i}.png", scene(i)) for i in range(3)])
    assert page.locator("#gallery li").count() == 3
    assert page.locator("#gallery [aria-current=true]").inner_text().startswith("0.png")
    page.click("#gallery >> text=2.png")
    assert is_drawn(page, predictor()(scene(2)))
    page.click("#segments li")
    assert page.locator("#tip").is_visible()
    page.click("[aria-label='Remove 2.png']")
    assert page.locator("#tip").is_hidden()
    assert page.locator("#gallery [aria-current=true]").inner_text().startswith("1.png")
    assert is_drawn(page, predictor()(scene(1)))
    for name in ("0", "1"):
        page.click(f"[aria-label='Remove {name}.png']")
    assert page.locator("#choose").is_visible()


def test_files_are_dropped(open_page):
    page = open_page()
    transfer = page.evaluate_handle(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(bytes)], "dropped.png"));
            return transfer;
        }""",
        list(scene()),
    )
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})
    page.locator("#status", has_text="dropped.png: ").wait_for()
    assert is_drawn(page, predictor()(scene()))


def test_an_image_that_the_browser_cannot_show_is_drawn_without_it(open_page):
    page = open_page()
    file = io.BytesIO()
    Image.fromarray(tiny.scene_image(3)).save(file, "tiff")
    upload(page, ("scene.tif", file.getvalue()))
    page.locator("#note", has_text="cannot display").wait_for()
    assert is_drawn(page, predictor()(scene()))


def test_a_photo_that_was_taken_sideways_fits_its_segments(open_page):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn it clockwise
    Image.fromarray(tiny.scene_image(3, (40, 96))).save(file, "jpeg", exif=exif)
    page = open_page()
    upload(page, ("photo.jpg", file.getvalue()))
    assert is_drawn(page, predictor()(file.getvalue()))
    assert page.locator(".picture").first.evaluate("(node) => [node.naturalHeight, node.naturalWidth]") == [96, 40]
    assert page.locator("#note").is_hidden()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_masks_are_decoded_as_by_the_coco_api_also_at_lower_resolution(open_page, step):
    rng = np.random.default_rng(step)
    masks = [rng.random((37, 53)) < density for density in (0.02, 0.5, 0.98)]
    masks += [np.ones((37, 53), bool), np.zeros((37, 53), bool), np.arange(53) + np.zeros((37, 1)) > 30]
    texts = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"] for mask in masks]
    texts = [text.decode() if isinstance(text, bytes) else text for text in texts]
    decoded = open_page().evaluate(
        """async ([texts, step]) => {
            const { decodeCounts, mapIds } = await import("/page/decode_rle.js");
            const map = (text) => mapIds([{ score: null }], [decodeCounts(text)], [37, 53], step, () => true);
            return texts.map((text) => Array.from(map(text)));
        }""",
        [texts, step],
    )
    for mask, ids in zip(masks, decoded, strict=True):
        wanted = mask[::step, ::step]
        assert np.array_equal(np.reshape(ids, wanted.shape), wanted)


# Access, errors


def test_the_token_is_asked_for_and_kept_in_this_tab_only(open_page):
    page = open_page(token=None)
    dialog = page.locator("#token-dialog")
    dialog.wait_for()
    page.set_input_files("#files", [{"name": "early.png", "mimeType": "", "buffer": scene()}])
    assert page.locator("#gallery [data-state=waiting]").is_visible()
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    page.locator("#token-problem", has_text="refused").wait_for()
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    page.locator("#model:enabled").wait_for()
    page.locator("#status", has_text="early.png: ").wait_for()
    assert is_drawn(page, predictor()(scene()))
    stores = page.evaluate("() => [sessionStorage.length, localStorage.length, document.cookie, location.href]")
    assert stores[:3] == [1, 0, ""]
    assert TOKEN not in stores[3]


def test_errors_are_shown_in_the_words_of_the_service_and_results_are_kept(open_page, url):
    page = open_page()
    upload(page, ("scene.png", scene()))
    page.set_input_files("#files", [{"name": "text.png", "mimeType": "", "buffer": b"no image"}])
    problem = page.locator("#problem")
    problem.wait_for()
    request = urllib.request.Request(f"{url}/v1/models/tiny/segment", b"no image")
    request.add_header("Authorization", f"Bearer {TOKEN}")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    answer = json.loads(error.value.read())
    text = problem.inner_text()
    assert all(answer[key] in text for key in ("found", "where", "remedy"))
    assert "Request id" in text
    page.click("#gallery >> text=scene.png")
    problem.wait_for(state="hidden")
    page.route("**/segment", lambda route: route.abort())
    page.locator("#tasks label", has_text="Semantic").click()
    problem.wait_for()
    assert "did not answer" in problem.inner_text()
    assert is_drawn(page, predictor()(scene()))
    page.unroute("**/segment")
    problem.get_by_role("button").click()
    problem.wait_for(state="hidden")
    page.locator("#progress").wait_for(state="hidden")
    assert is_drawn(page, predictor()(scene(), task="semantic"))


def test_a_request_can_be_cancelled_and_a_busy_service_is_asked_again(open_page):
    page = open_page()
    held = []
    page.route("**/segment", lambda route: held.append(route))
    page.set_input_files("#files", [{"name": "scene.png", "mimeType": "", "buffer": scene()}])
    page.locator("#progress", has_text="Segmenting scene.png").wait_for()
    page.click("#cancel")
    page.locator("#problem", has_text="Cancelled").wait_for()
    page.unroute("**/segment")
    busy = {"status": 503, "headers": {"Retry-After": "1"}, "content_type": "application/problem+json", "body": "{}"}
    page.route("**/segment", lambda route: route.fulfill(**busy), times=1)
    page.click("#problem button")
    page.locator("#progress", has_text="busy").wait_for()
    page.locator("#status", has_text="scene.png: ").wait_for()
    assert is_drawn(page, predictor()(scene()))


# Keyboard, sizes, colors


def tab_to(page, selector, presses=60):
    for _ in range(presses):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            style = "(node) => getComputedStyle(node).outlineStyle"
            outlined = page.locator(":focus").evaluate(style), page.locator(":focus + span").count()
            assert outlined[0] != "none" or outlined[1], f"the focus on {selector} cannot be seen"
            return
    raise AssertionError(f"{selector} is not reached by Tab")


def test_everything_works_by_keyboard(open_page):
    page = open_page()
    result = predictor()(SAMPLE)
    tab_to(page, "#model")
    tab_to(page, "[name=task]")
    tab_to(page, "#add")
    tab_to(page, "[data-sample='fluorescence-1.png']")
    page.keyboard.press("Enter")
    page.locator("#status", has_text="fluorescence-1.png: ").wait_for()
    tab_to(page, "#opacity")
    page.keyboard.press("End")
    tab_to(page, "#compare")
    page.keyboard.press("Space")
    assert page.locator("#original-pane").is_visible()
    tab_to(page, "#stage")
    page.keyboard.press("ArrowRight")
    tip = page.locator("#tip").inner_text()
    assert tip.split()[0] == result.names[0]
    assert page.locator("#status").text_content() == page.locator("#tip").text_content()  # announced
    page.keyboard.press("+")
    page.locator("#stage.zoomed").wait_for()
    tab_to(page, "#legend input")
    page.keyboard.press("Space")
    assert not page.locator("#legend input").first.is_checked()
    page.keyboard.press("Space")
    tab_to(page, "#segments")
    page.keyboard.press("End")
    active = page.get_attribute("#segments", "aria-activedescendant")
    assert active == f"segment-{len(result) - 1}"
    assert page.get_attribute(f"#{active}", "aria-selected") == "true"
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    tab_to(page, "#thresholds summary")
    assert page.get_attribute("#status", "role") == "status"


def is_inside(page, inner, outer):
    """Whether an element is inside another one, or inside the window for "html"."""
    found = page.locator(inner).bounding_box()
    box = page.locator(outer).bounding_box() if outer != "html" else {"x": 0, "y": 0, **page.viewport_size}
    return all(
        box[start] - 1 <= found[start] and found[start] + found[size] <= box[start] + box[size] + 1
        for start, size in (("x", "width"), ("y", "height"))
    )


def test_a_phone_shows_everything_without_horizontal_scrolling(open_page):
    page = open_page(PHONE, has_touch=True)
    fits = "() => document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    name = "a name that is much longer than a phone is wide " * 3
    upload(page, (f"{name}.png", scene(3, (40, 96))), expect="segments in")
    for selector in ("#thresholds summary", "details:last-of-type summary"):
        page.click(selector)
    page.check("#compare")
    assert page.evaluate(fits)
    result = predictor()(scene(3, (40, 96)))
    page.locator("#stage").scroll_into_view_if_needed()
    page.touchscreen.tap(*place(page, *inner_pixel(result.masks[0])))
    assert page.locator("#tip").is_visible()
    assert is_inside(page, "#tip", "#stage")
    assert page.evaluate(fits)
    page.set_input_files("#files", [{"name": f"{name}.jpg", "mimeType": "", "buffer": b"no image"}])
    page.locator("#problem").wait_for()
    assert page.evaluate(fits)
    assert is_inside(page, "#problem", "html"), "the page has scrolled there"


def luminance(color):
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_follow_the_system_and_have_contrast(open_page, scheme):
    page = open_page(color_scheme=scheme)
    style = "([node, name]) => getComputedStyle(document.querySelector(node))[name]"
    panel = luminance(page.evaluate(style, ["#panel", "backgroundColor"]))
    assert (panel > 0.5) == (scheme == "light")
    pairs = [
        (luminance(page.evaluate(style, [node, "color"])), panel) for node in ("#images-title", "#status", "#nothing")
    ]
    pairs.append(tuple(luminance(page.evaluate(style, ["#add", name])) for name in ("color", "backgroundColor")))
    for text, background in pairs:
        assert (max(text, background) + 0.05) / (min(text, background) + 0.05) >= 4.5
