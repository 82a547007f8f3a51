"""Text: Markdown as WeChat can show it, and cut into parts."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wechat import show
from wxgpt import (
    MARKDOWN,
    UNMARKED,
    PlainText,
    cut_markdown,
    excerpt,
    finished_sentences,
    open_block,
    plain_text,
    tap_link,
)

ROOM = 1500

PLAIN = {
    "heading": ("# 标题\n正文", "标题\n\n正文"),
    "heading with hashes behind": ("## 标题 ##\n正文", "标题\n\n正文"),
    "underlined heading": ("标题\n===\n正文", "标题\n\n正文"),
    "paragraphs": ("一\n\n\n\n二", "一\n\n二"),
    "line break": ("第一行\n第二行", "第一行\n第二行"),
    "hard line break": ("第一行  \n第二行", "第一行\n第二行"),
    "list": ("- 一\n- 二", "• 一\n• 二"),
    "nested list": (
        "- 一\n  - 一甲\n    - 深\n- 二",
        "• 一\n  • 一甲\n    • 深\n• 二",
    ),
    "text around a list": ("前\n- 一\n\n后", "前\n\n• 一\n\n后"),
    "ordered list": ("1. 一\n2. 二", "1. 一\n2. 二"),
    "ordered list from three": ("3. 三\n4. 四", "3. 三\n4. 四"),
    "list in an ordered list": ("1. 甲\n   - 内\n2. 乙", "1. 甲\n  • 内\n2. 乙"),
    "item of two paragraphs": ("- 甲\n\n  段\n- 乙", "• 甲\n\n  段\n\n• 乙"),
    "table": (
        "|名|价|\n|---|:-:|\n|苹果|3|\n|梨|**4**|",
        "名 | 价\n苹果 | 3\n梨 | 4",
    ),
    "fence": (
        "前\n```python\nprint('*a*')\n\n  x\n```\n后",
        "前\n\nprint('*a*')\n\n  x\n\n后",
    ),
    "fence of tildes": ("~~~\n```\n~~~", "```"),
    "open fence": ("```\n没关的 *码*", "没关的 *码*"),
    "quote": ("> 引\n> 文\n\n后", "> 引\n> 文\n\n后"),
    "list in a quote": ("> - 甲\n> - 乙", "> • 甲\n> • 乙"),
    "link": ("见[文档](https://e.com/a)。", "见文档 (https://e.com/a)。"),
    "link that is its own label": (
        "[https://e.com/a](https://e.com/a)",
        "https://e.com/a",
    ),
    "bare link": ("<https://e.com/a>", "https://e.com/a"),
    "link with a title": ('[文](https://e.com "题")', "文 (https://e.com)"),
    "link to Chinese": ("[文](https://e.com/%E4%B8%AD)", "文 (https://e.com/中)"),
    "emphasis in a link": ("[**粗**](https://e.com)", "粗 (https://e.com)"),
    "image": ("看![一张图](https://e.com/p.png)", "看一张图"),
    "strike": ("~~删~~留", "删留"),
    "rule": ("上\n\n---\n下", "上\n\n———\n\n下"),
    "emphasis": ("**粗** *斜* __粗__ _斜_ ***都***", "粗 斜 粗 斜 都"),
    "emphasis before Chinese": ("**注意：**请看", "注意：请看"),
    "emphasis in Chinese": ("这是**“重点”**内容", "这是“重点”内容"),
    "no emphasis": ("2 * 3 * 4 snake_case_name", "2 * 3 * 4 snake_case_name"),
    "escaped": (r"\*不斜\*", "*不斜*"),
    "code": ("用`a*b*c`吧", "用a*b*c吧"),
    "open emphasis": ("**没关", "**没关"),
    "open code": ("`没关", "`没关"),
    "open link": ("[没关](https://e", "[没关](https://e"),
    "indented text": ("    不是代码 **粗**", "不是代码 粗"),
    "HTML": ("<b>粗</b><br>行", "<b>粗</b><br>行"),
    "anchor": ('<a href="x">点</A>', '<\u200ba href="x">点<\u200b/A>'),
    "anchor in entities": ("&lt;a href=x&gt;", "<\u200ba href=x>"),
    "anchor in code": ("`<a>`", "<\u200ba>"),
    "nothing": ("", ""),
}


def parts_of(markdown: str, room: int = ROOM) -> list[tuple[str, str]]:
    """Cut a text to its end; return each slice with its plain text."""
    parts, start = [], 0
    while start < len(markdown):
        opener = open_block(markdown, start)
        cut = cut_markdown(markdown[start:], room, opener)
        assert cut > 0
        piece = markdown[start : start + cut]
        parts.append((piece, plain_text(piece, opener)))
        start += cut
    return parts


@pytest.mark.parametrize("name", PLAIN)
def test_markdown_is_shown_as_plain_text(name):
    """Each construct has one way to look in a bubble that knows no markup."""
    markdown, plain = PLAIN[name]
    assert plain_text(markdown) == plain


# Cutting

WORDS = st.text("一二三，。！？\n abc.🙂👨‍👩‍👧é*_`~[]()|<>#-1&\\", max_size=40)
FRAGMENTS = st.sampled_from(
    [
        "今天天气很好，我们去公园走走吧。",
        "Sentences in English follow. They have spaces! ",
        "没有标点也没有空格的一长串文字" * 20,
        "**重点**", "*斜*", "`code`", "~~删~~", "***", "**没关", "`没关", "[没关",
        "[文档](https://example.com/a/b?c=d)", "![图](https://example.com/p.png)",
        "\n\n", "\n", "\n# 标题\n", "\n- 项\n  - 内\n", "\n1. 甲\n2. 乙\n", "\n> 引文\n",
        "\n---\n", "\n```python\nprint('你好')\n\n", "\n```\n", "\n~~~\n", "\n`````\n",
        "\n|名|价|\n|---|---|\n|苹果|3|\n", "|梨|4|\n" * 30, "👨‍👩‍👧‍👦🇨🇳👍🏽" * 20, "é" * 50,
        "<a href='x'>点</a>", "&lt;a", "\r\n", "\\(x^2\\)", "$$\n\\frac{1}{2}\n$$",
    ]
)  # fmt: skip


def texts(most: int) -> st.SearchStrategy[str]:
    """Make Markdown of any constructs, some of it long enough for many parts."""
    pieces = st.lists(WORDS | FRAGMENTS, max_size=30).map("".join)
    return st.tuples(pieces, st.integers(1, most)).map(lambda made: made[0] * made[1])


@settings(deadline=None, max_examples=200)
@given(texts(8))
def test_the_slices_of_any_text_are_the_text_and_fit(markdown):
    """Cut again and again, nothing is lost, nothing is empty, and each part fits."""
    parts = parts_of(markdown)
    assert "".join(piece for piece, _ in parts) == markdown
    assert max([len(plain.encode()) for _, plain in parts], default=0) <= ROOM


@settings(deadline=None, max_examples=50)
@given(texts(1))
def test_a_small_room_is_kept_too(markdown):
    """Even where hardly a sentence fits, every part does."""
    parts = parts_of(markdown, 60)
    assert "".join(piece for piece, _ in parts) == markdown
    assert max([len(plain.encode()) for _, plain in parts], default=0) <= 60


def test_what_fits_is_not_cut():
    """A text that fits with its markup is one part."""
    text = "**粗**" * 100 + "字" * 300
    assert cut_markdown(text, ROOM) == len(text)


def test_parts_are_not_much_smaller_than_they_may_be():
    """Long prose is cut into few parts, however much markup is in it."""
    text = "**重点**在这里，[文档](https://example.com)也在这里。" * 100
    fair = len(plain_text(text).encode()) / ROOM
    assert len(parts_of(text)) <= fair * 1.5 + 1


def test_a_cut_falls_at_a_paragraph_if_one_is_near():
    """A paragraph's end is preferred to a later sentence's end."""
    text = "一句话。" * 100 + "\n\n" + "另一句。" * 100
    assert parts_of(text)[0][0] == "一句话。" * 100 + "\n\n"


def test_a_cut_falls_at_a_sentence_else():
    """Without a paragraph, every part but the last ends with a sentence."""
    parts = parts_of("这是一个不长也不短的句子。" * 200)
    assert {plain[-1] for _, plain in parts} == {"。"}


def test_a_cut_never_falls_inside_one_sign():
    """Emoji sequences and accents stay whole where there is no sentence."""
    parts = parts_of("👨‍👩‍👧‍👦" * 300, 400)
    assert {re.sub("👨‍👩‍👧‍👦", "", plain) for _, plain in parts} == {""}


@pytest.mark.parametrize(
    "span",
    [
        "[标签。题](https://example.com/a)",
        '[标签](https://example.com/a "题。目")',
        "![图。片](https://example.com/p.png)",
        "<https://example.com/abcdef>",
        "https://example.com/abcdef",
        "[维基](https://example.com/a_(b))",
        "**重点。内容**",
        "*斜体。文字*",
        "__重点。内容__",
        "_斜体。文字_",
        "***又粗。又斜***",
        "**外面 *里面* 外。面**",
        "**[链接](https://example.com/a)**",
        "**两\n行**",
        "`代码。片段`",
        "``代码 ` 片。段``",
        "~~删掉。了~~",
    ],
)
def test_a_cut_never_tears_a_short_span(span):
    """Wherever a link, emphasis or code lies, the cut falls before or behind it."""
    before = [f"{'字' * count} " for count in range(60, 101)]
    cuts = [cut_markdown(f"{text}{span} {'尾' * 200}", 300) for text in before]
    torn = [(c - len(t)) for t, c in zip(before, cuts) if 0 < c - len(t) < len(span)]
    assert torn == []


@pytest.mark.parametrize(
    ("opening", "indent"), [("", ""), ("1. 步骤\n\n", "   "), ("10. 步骤\n\n", "    ")]
)
@pytest.mark.parametrize("mark", ["```", "~~~~"])
def test_a_fence_goes_on_in_the_next_part(opening, indent, mark):
    """Code that is cut stays code: every line is shown once and as it is."""
    code = [f"**第{number}行** = a[{number}](b) * `c` * 2" for number in range(200)]
    lines = [f"{mark}python", *code, mark]
    parts = parts_of(
        opening + "".join(f"{indent}{line}\n" for line in lines) + "\n**完**"
    )
    shown = "\n".join(plain for _, plain in parts).split("\n")
    assert [line.strip() for line in shown if line.strip() in code] == code
    assert len(parts) > 3 and shown[-1] == "完"


def test_a_table_goes_on_in_the_next_part():
    """Every row is shown once as a row, wherever the table is cut."""
    rows = [f"|名字{number}|**价{number}**|" for number in range(300)]
    parts = parts_of("|名|价|\n|---|---|\n" + "\n".join(rows) + "\n\n完")
    shown = "\n".join(plain for _, plain in parts).split("\n")
    wanted = ["名 | 价", *(f"名字{n} | 价{n}" for n in range(300)), "完"]
    assert [line for line in shown if line] == wanted


def test_prose_is_shown_without_loss():
    """The plain texts of all parts together have every character once, in order."""
    text = "".join(f"第{number}句话在这里，请数一数。" for number in range(400))
    shown = "".join(plain for _, plain in parts_of(text))
    assert shown == text


@pytest.mark.parametrize(
    ("text", "opener"),
    [
        ("正文\n", ""),
        ("```python\nx\n", "```\n"),
        ("~~~~\n```\nx\n", "~~~~\n"),
        ("```\nx\n```\n正文\n", ""),
        ("```\n不关 ```\n", "```\n"),
        ("|a|b|\n|-|-|\n|1|2|\n", "| | |\n|-|-|\n"),
        ("a|b|c\n-|-|-\n1|2|3\n", "| | | |\n|-|-|-|\n"),
        ("|a|b|\n|-|-|\n|1|2|\n\n正文\n", ""),
        ("```\n|a|b|\n|-|-|\n", "```\n"),
    ],
)
def test_what_is_open_at_the_end_is_known(text, opener):
    """A fence or a table that goes on is opened again in the next part."""
    assert open_block(text, len(text)) == opener


# A growing text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("还没有一句完", ""),
        ("第一句。第二", "第一句。"),
        ("第一句。第二句！第三", "第一句。第二句！"),
        ("Hello there. And th", "Hello there. "),
        ("圆周率是3.14159", ""),
        ("「好！」他说", "「好！」"),
        ("**第一句。**第二", "**第一句。**"),
        ("**第一句。没关", ""),
        ("第一句。[文档。题](https://exam", "第一句。"),
        ("一行\n又一", "一行\n"),
        ("\n\n", ""),
    ],
)
def test_a_growing_text_is_shown_up_to_a_sentence_end(text, shown):
    """What is written so far goes out in finished sentences, or not yet."""
    assert text[: finished_sentences(text, ROOM)] == shown


def test_a_long_run_without_a_sentence_end_is_shown_all_the_same():
    """Somebody who waits is not kept waiting for a full stop that may not come."""
    text = "没有标点" * 100
    assert 0 < finished_sentences(text, ROOM) <= len(text)


@settings(deadline=None, max_examples=100)
@given(texts(4))
def test_what_is_shown_of_a_growing_text_fits(markdown):
    """Finished sentences never exceed the room."""
    end = finished_sentences(markdown, ROOM)
    assert 0 <= end <= len(markdown)
    assert len(plain_text(markdown[:end]).encode()) <= ROOM


# Small things


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("短问题", "短问题"),
        ("一二三四五六七八九十甲乙", "一二三四五六七八九十甲乙"),
        ("一二三四五六七八九十甲乙丙", "一二三四五六七八九十甲乙…"),
        ("  两行\n  问题 ", "两行 问题"),
        ("<a href=x>", "<\u200ba href=x>"),
    ],
)
def test_a_question_is_named_by_its_first_characters(text, short):
    """Twelve characters in one line, of which none can be a link."""
    assert excerpt(text) == short


def test_a_tap_sends_its_words():
    """The visible words are what may be typed instead."""
    tap = '<a href="weixin://bizmsgmenu?msgmenucontent=继续3&msgmenuid=1">继续3</a>'
    assert tap_link("继续3") == tap


@pytest.mark.parametrize(
    ("words", "content", "sent"),
    [
        ("/chatgpt", "", "/chatgpt"),
        ("重试", "重试12", "重试12"),
        ("折扣", "50%+1&2#3", "50123"),
    ],
)
def test_a_tap_survives_being_decoded_twice(words, content, sent):
    """No sign is sent that the Android client would stumble over."""
    [tap] = show(tap_link(words, content), b"").taps
    assert (tap.label, tap.content) == (words, sent)
    assert tap.menu_id


@settings(max_examples=300)
@given(
    st.text(
        alphabet="ab 你好，。！!()（）“”-=+#>:.\n\n1\u3000\u00a0/é\u0301", max_size=20
    )
)
def test_text_without_marks_comes_out_as_the_parser_would_have_it(text):
    """What is not parsed for want of anything to parse loses and gains nothing."""
    if UNMARKED.fullmatch(text):
        assert plain_text(text) == PlainText().write(MARKDOWN.parse(text))
