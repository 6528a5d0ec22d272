"""Parts of the page in a real Chromium: what becomes of markdown, and whether everybody can use it."""

import importlib.util
import random
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("page_server", Path(__file__).with_name("page_server.py"))
page_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page_server)


scripted, browser, server = page_server.scripted, page_server.browser, page_server.server


@pytest.fixture(scope="module")
def shown(browser, scripted):
    """shown(text, *more) -> the HTML that markdown.js makes of it, after it has shown `more` before."""
    context = browser.new_context()
    page, complaints = page_server.watched(context, scripted.url)
    page.goto(scripted.url)

    def show(*texts):
        return page.evaluate(
            """async (texts) => {
                const { render } = await import("/page/markdown.js");
                const node = document.createElement("div");
                for (const text of texts) render(text, node);
                return node.innerHTML;
            }""",
            list(texts),
        )

    yield show
    context.close()
    assert complaints == []


WEB = 'rel="noopener noreferrer nofollow" target="_blank"'
GOLDEN = [
    ("plain", "<p>plain</p>"),
    ("a\nb\n\nc", "<p>a\nb</p><p>c</p>"),
    ("a  \nb", "<p>a<br>b</p>"),
    ("# One\n###### Six ##\n#none", "<h3>One</h3><h6>Six</h6><p>#none</p>"),
    (
        "**a** __b__ *c* _d_ ~~e~~",
        "<p><strong>a</strong> <strong>b</strong> <em>c</em> <em>d</em> <del>e</del></p>",
    ),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("2 * 3 * 4, snake_case_name, **open", "<p>2 * 3 * 4, snake_case_name, **open</p>"),
    (r"\*not\* \<b>", "<p>*not* &lt;b&gt;</p>"),
    ("`a *b* <i>` ``c`d``", "<p><code>a *b* &lt;i&gt;</code> <code>c`d</code></p>"),
    ("`open", "<p>`open</p>"),
    (
        "```py\nx = 1\n\n# no\n```\nafter",
        '<pre data-language="py" tabindex="0"><code>x = 1\n\n# no</code></pre><p>after</p>',
    ),
    ("```\nstill coming", '<pre tabindex="0"><code>still coming</code></pre>'),
    ("````\n```\n````", '<pre tabindex="0"><code>```</code></pre>'),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("1. a\n\n2. b\n\ntext", "<ol><li>a</li><li>b</li></ol><p>text</p>"),
    ("1. a\n   ```\n   x\n   ```", '<ol><li>a<pre tabindex="0"><code>x</code></pre></li></ol>'),
    ("- a\n1. b", "<ul><li>a</li></ul><ol><li>b</li></ol>"),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    (
        "| a | b |\n|---|:-:|\n| **1** | 2 | 3 |\n| 4 |",
        '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr>'
        "<td><strong>1</strong></td><td>2</td></tr><tr><td>4</td><td></td></tr></tbody></table></div>",
    ),
    ("a | b", "<p>a | b</p>"),
    ("[x](https://a.test/b)", f'<p><a href="https://a.test/b" {WEB}>x</a></p>'),
    (
        "see https://a.test/b_c_d.",
        f'<p>see <a href="https://a.test/b_c_d" {WEB}>https://a.test/b_c_d</a>.</p>',
    ),
    ("[x](javascript:y) [z](/path)", "<p>[x](javascript:y) [z](/path)</p>"),
    ("[x](https://)", "<p>[x](https://)</p>"),
    ("<b>a</b> &amp; &lt;", "<p>&lt;b&gt;a&lt;/b&gt; &amp;amp; &amp;lt;</p>"),
    ("a\r\n\r\nb", "<p>a</p><p>b</p>"),
    ("", ""),
]


@pytest.mark.parametrize("text, html", GOLDEN)
def test_markdown(shown, text, html):
    assert shown(text) == html


PIECES = [
    "*",
    "**",
    "_",
    "`",
    "```\n",
    "\n",
    "\n\n",
    "- ",
    "1. ",
    "> ",
    "| a |",
    "|---|\n",
    "# ",
    "[",
    "](",
    ")",
    "~~",
]
PIECES += [
    "https://a.test/",
    "javascript:",
    "<b>",
    "&",
    "\\",
    "word",
    " ",
    "  ",
    "\t",
    "é",
    "😀",
    "\u202e",
    "\0",
]
TAGS = "p h3 h4 h5 h6 strong em del code pre ul ol li blockquote hr br div table thead tbody tr th td a"


def test_any_text_shows_the_same_at_once_and_piece_by_piece(browser, server):
    """Text from the pieces that markdown is made of: only known elements, and streaming changes nothing."""
    rng = random.Random(5)
    texts = ["".join(rng.choices(PIECES, k=40)) for _ in range(200)]
    context = browser.new_context()
    page, complaints = page_server.watched(context, server.url)
    page.goto(server.url)
    different, tags = page.evaluate(
        """async (texts) => {
            const { render } = await import("/page/markdown.js");
            const different = [], tags = new Set();
            for (const text of texts) {
                const [once, grown] = [document.createElement("div"), document.createElement("div")];
                render(text, once);
                for (let n = 1; n <= text.length; n += 3) render(text.slice(0, n), grown);
                render(text, grown);
                if (!once.isEqualNode(grown)) different.push(text);
                for (const node of once.querySelectorAll("*")) tags.add(node.localName);
            }
            return [different, [...tags]];
        }""",
        texts,
    )
    context.close()
    assert different == complaints == []
    assert set(tags) <= set(TAGS.split())
    assert {"p", "code", "em", "ul", "a", "blockquote"} <= set(tags)


HOSTILE = [
    "*",
    "**a ",
    "_a",
    "`" * 3 + "a`",
    "[",
    "[a](",
    "> ",
    "- ",
    "|",
    "| - ",
    "~~a",
    "https://a",
    "1. a\n   ",
    "\\",
    " ",
]


def test_no_text_hangs_or_overflows_the_page(shown):
    for piece in HOSTILE:
        shown(piece * (60_000 // len(piece)))
        shown((piece * 50 + "\n") * 400)


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


CONTRAST = """() => {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (color, under) => {
        context.fillStyle = under;
        context.fillRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (parts) => {
        const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = parts.map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const low = [];
    let seen = 0;
    for (const node of document.querySelectorAll("body *")) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!own || !node.checkVisibility() || node.closest(".hidden, .skip, noscript, option")) continue;
        let back = null;
        for (let up = node; up && !back; up = up.parentElement) {
            const color = getComputedStyle(up).backgroundColor;
            if (color !== "rgba(0, 0, 0, 0)") back = color;
        }
        const under = rgb(back, "white");
        const [a, b] = [light(rgb(getComputedStyle(node).color, `rgb(${under})`)), light(under)];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        seen++;
        if (ratio < 4.5) low.push([node.outerHTML.slice(0, 80), ratio]);
    }
    return [seen, low];
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, a, [role]")]
    .filter((node) => !["alert", "status"].includes(node.role))
    .filter((node) => node.checkVisibility())
    .filter((node) => !(node.ariaLabel || node.labels?.length || node.textContent.trim() || node.title))
    .map((node) => node.outerHTML)"""


def test_everybody_can_read_and_use_it(browser, server, scheme):
    server.answer = lambda body: [
        "# Title\n\nText, `code`, [link](https://a.test/), **bold**\n\n> said\n\n```\nx\n```"
    ]
    context = browser.new_context(color_scheme=scheme)
    page, complaints = page_server.watched(context, server.url)
    page.goto(server.url)
    page.wait_for_selector("[data-model=three]")
    page.click("#compare")
    server.failures = [(400, {}, "no")]
    page.click("text=Write a haiku")  # an example asks itself
    page.wait_for_selector(".answer.b[data-status=done]")
    seen, low = page.evaluate(CONTRAST)
    assert seen > 40
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) > 128) == (scheme == "light")
    assert low == []
    assert page.evaluate(NAMELESS) == []
    # From the question backwards and forwards, Tab reaches every control that is shown.
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {
        "model-a",
        "model-b",
        "compare",
        "theme",
        "clear",
        "scroll",
        "question",
        "system",
        "seed",
    } <= reached
    assert {"Copy", "Regenerate", "Edit question", "Try again", "Skip to the question"} <= reached
    # The live region tells the end of an answer, once; the log itself is not read out token by token.
    assert "three: # Title" in page.inner_text("#announce")
    assert page.query_selector("#turns [aria-live]") is None
    page.click("#theme")
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == other
    assert page.evaluate(CONTRAST)[1] == []
    page.reload()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == other
    context.close()
    assert [line for line in complaints if "400" not in line] == []


@pytest.mark.parametrize("width", [320, 800])
def test_it_fits_a_phone(browser, server, width):
    server.answer = lambda body: [
        "A" * 300 + "\n\n```\n" + "x" * 300 + "\n```\n\n" + "|a" * 40 + "|\n" + "|-" * 40 + "|"
    ]
    context = browser.new_context(viewport={"width": width, "height": 640}, has_touch=True, is_mobile=True)
    page, complaints = page_server.watched(context, server.url)
    page.goto(server.url)
    page.wait_for_selector("#model-a option", state="attached")
    page.tap("#compare")
    page.fill("#question", "long")
    page.tap("#send")
    page.wait_for_selector(".answer.b[data-status=done]")
    wide = """() => [document.documentElement, document.querySelector("#scroll")]
        .map((node) => node.scrollWidth - node.clientWidth)"""
    assert page.evaluate(wide) == [0, 0]
    box = page.query_selector("#composer").bounding_box()
    assert box["y"] + box["height"] <= 640
    assert page.is_hidden("#settings")
    page.tap("#panel-button")
    assert page.is_visible("#state")
    assert page.get_attribute("#panel-button", "aria-expanded") == "true"
    page.fill("#seed", "3")
    assert page.evaluate(wide) == [0, 0]
    page.keyboard.press("Escape")
    assert page.is_hidden("#settings")
    context.close()
    assert complaints == []
