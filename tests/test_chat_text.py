"""What a model's Markdown becomes in the chat, how it grows, and how it is cut."""

import contextlib
import gc
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML

import wxgpt
from conftest import ROOT
from wxgpt import (
    ChatText,
    chat_text,
    cut_text,
    size_of,
    stable_text,
)

AS_WRITTEN = [
    "5*3*2=30",
    "2**3 得 8，3**2 得 9",
    "=A1*B1+A2*B2",
    "*.log、*.tmp",
    "ab**cd**ef",
    "__init__.py",
    "snake_case",
    "**kwargs",
    "销售额=单价*数量，利润=毛利率*销售额",
    "__x__",
    "_x_",
    "票价 10~~20 元，套票 30~~40 元",
    "原价 ~~999 元~~ 现价 799 元",
    "- 100 元（房租）\n+ 300 元（工资）",
    "+ 300 元\n- 100 元",
    "2024. 5. 1 发布",
    "https://a.cn/_static_/x?__biz=1&copy=2*3*4",
    "[注意]: 请先备份",
    "[1]: https://a.cn",
    "脚注[^1]\n\n[^1]: 说明",
    "D:\\资料\\_备份\\#1\\a.txt",
    "\\\\nas\\share",
    "^\\d+\\.\\d{2}$",
    "List<int>",
    "<stdio.h>",
    "<你的名字>",
    "价格从 $5 涨到 $10",
    "/*注释*/ 和 /**注释**/",
    "f(*args, **kwargs)",
    "（*必填）姓名*",
    "面积=边长**2，体积=边长**3",
    "138****1234",
    "___",
    "===",
    "a\n===",
    "int *a, *b;",
    "(*p)*(*q)",
    "长*宽*高",
    "５＊３＊２",
    "x = *p; y = *q;",
    "(a+b)**2 = x，(c+d)**2 = y",
    "1*2*3\n4*5*6",
    "SELECT *, a.* FROM t",
    "2**-1 和 3**-2",
    "src/**/*.py",
    "> 60 分为及格\n\n>=90 为优秀",
    "arr[0](x)",
    "f(**a,**b)",
    "US$100 或 HK$800",
    "正则 ^\\d+$ 和 C:\\Users\\_x\\#2",
    "- 5 ℃\n+ 3 ℃",
    "+ 优点\n- 缺点",
    "a_b_c 和 'x'",
    "#标题 #话题",
    "100~200",
    "`",
    "[x]",
    "![",
    "AT&T &foo; &#0;",
    "<b",
    "a < b > c",
    "\\",
    "$",
    "**",
    "| a | b |",
    "a | b\nc | d",
    "小数 3\\.14",
    "2 * 3 * 4 和 a * b",
    "正则 ^a$|^b$ 和 ${a}_${b}",
    "$HOME/bin:$PATH 买$AAPL、$TSLA",
    "[a](javascript:alert(1))",
    "``` 装好\n文",
    "**甲\n\n乙**",
    "人均 $$ 到 $$$",
    "H~2~O",
    "3.\n4.",
    "\\frac{1}{2}",
    "a&b=1&copy",
    "a\tb",
    "运行 $ ls -l 和 $ pwd，费用 $ 5 到 $ 6",
    "5 $ + 6 $ = 11 $",
    "正则 [^\\]]+ 和 \\[.*\\] 和 \\(\\d+\\)",
    "¯\\_(ツ)_/¯",
    "docker run \\\n  nginx",
    "在 C:\\Users\\张三\\\n和 D:\\备份\\\n里",
    "带*号为必填。*为必填项，**为选填项。",
    "*必填 姓名、*电话、*地址",
    ">>> a = 1\n>>> a * 2",
]

BECOMES = [
    ("**甲**/**乙**", "甲/乙"),
    (
        "1. 代码。如下：```py\n   # a*b\n   ```\n2. 乙",
        "1. 代码。如下：\n   # a*b\n2. 乙",
    ),
    ("```{r}\nx*y*z\n```", "x*y*z"),
    ("``` See the code\nx*y*z\n```", "See the code\nx*y*z"),
    ("```sh\na\n``` After that: **b**", "a\nAfter that: b"),
    ("- 甲\n  ```py\n    a\n  ```\n  乙", "• 甲\n  a\n  乙"),
    ("- > 甲\n- 乙", "• │ 甲\n• 乙"),
    ("1. >\n2. 乙", "1.\n2. 乙"),
    ("这是**重点**内容", "这是重点内容"),
    ("**注意：**请看", "注意：请看"),
    ("**价格：**100元", "价格：100元"),
    ("*斜体*", "斜体"),
    ("***都是***", "都是"),
    ("＊＊重点＊＊：先备份", "重点：先备份"),
    ("# 标题", "【标题】"),
    ("###### 标题 ##", "【标题】"),
    ("- 甲\n* 乙", "• 甲\n• 乙"),
    ("- 甲\n  - 乙\n    - 丙\n- 丁", "• 甲\n  • 乙\n    • 丙\n• 丁"),
    ("1. B\n3. C\n5. D", "1. B\n3. C\n5. D"),
    ("3. 铜\n2. 银\n1. 金", "3. 铜\n2. 银\n1. 金"),
    ("1. a\n1. b\n1. c", "1. a\n1. b\n1. c"),
    ("1) a\n2) b", "1) a\n2) b"),
    ("1. a\n\n2. b\n```\ncode\n```\n3. c", "1. a\n\n2. b\ncode\n3. c"),
    ("- 甲\n正文", "• 甲\n正文"),
    ("- [ ] 待办\n- [x] 完成\n- [X] 好", "☐ 待办\n☑ 完成\n☑ 好"),
    ("> 引文\n> 二", "│ 引文\n│ 二"),
    ("[说明](https://a.cn/b%20c?x=%2B)", "说明（https://a.cn/b%20c?x=%2B）"),
    ("<https://a.cn/水>", "https://a.cn/水"),
    ("<me@a.cn> [写信](mailto:me@a.cn)", "me@a.cn 写信（me@a.cn）"),
    (
        '[章](#x) [a](https://a.cn "题") ![图](https://a.cn/1.png "题") ![](https://a.cn/2.png)',
        "章 a（https://a.cn） [图片：图] https://a.cn/1.png [图片] https://a.cn/2.png",
    ),
    ("![x](data:image/png;base64,AAAA)", "[图片]"),
    ("\\*不是强调\\*", "*不是强调*"),
    ("\\# 不是标题", "# 不是标题"),
    ("\\$5", "$5"),
    ("```py\n    a = 1\n  b\n``` 装好以后：x", "    a = 1\n  b\n装好以后：x"),
    ("```markdown\n# 题\n```py\nx*y*z\n```\n**粗**\n```", "【题】\nx*y*z\n粗"),
    ("```mermaid\ngraph\n```\n好", "（流程图，在网页里看）\n好"),
    ("|甲|乙|\n|--|--|\n|1|2|\n|3|4|", "甲｜乙\n1｜2\n3｜4"),
    (
        "|名|甲|乙|丙|\n|-|-|-|-|\n|a|1||3|\n|b|4|5|6|",
        "【名：a】\n甲：1\n丙：3\n\n【名：b】\n甲：4\n乙：5\n丙：6",
    ),
    ("|a|b|\n|-|-|\n|`x\\|y`|`p|q`|z|", "a｜b\nx|y｜p|q｜z"),
    ("一<br>二", "一\n二"),
    ("|a|b|\n|-|-|\n|一<br>二|三|", "a｜b\n一 二｜三"),
    ("H<sub>2</sub>O x<sup>2</sup> V<sub>总</sub>", "H₂O x² V_总"),
    ("<b>粗</b><u>线</u><!-- 注 -->完", "粗线完"),
    ("<details>\n<summary>更多</summary>\n\n内容\n\n</details>", "更多\n\n内容"),
    ("一\\*b &lt;x&gt; &amp;", "一*b <x> &"),
    ("# 【重点】题", "【重点】题"),
    ("1\\. 不是列表", "1. 不是列表"),
    ("**C++** 是**`code`**语言", "C++ 是code语言"),
    ("**AI**技术，共**100**元，**价格**100元", "AI技术，共100元，价格100元"),
    ("a \\_b\\_ snake\\_case", "a _b_ snake_case"),
    ("**a\nb** c", "a\nb c"),
    ("- **甲**：乙\n  续行\n\n  段\n正文", "• 甲：乙\n  续行\n\n  段\n正文"),
    ("a\n\n\n\nb", "a\n\nb"),
    ("---\n文", "———\n文"),
    ("文\n---\n文", "文\n———\n文"),
    ("[https://a.cn](https://a.cn)", "https://a.cn"),
    ("> - 甲\n>   - 乙\n>\n> 丙\n丁", "│ • 甲\n│   • 乙\n\n│ 丙\n丁"),
    ("**[a](https://a.cn)**", "a（https://a.cn）"),
    ("[a\\]b](https://a.cn)", "a]b（https://a.cn）"),
    ("[`x[0]` 和 `]`](https://a.cn)", "x[0] 和 ]（https://a.cn）"),
    ("\\[不是链接\\]", "[不是链接]"),
    ("* 甲\n\t+ 乙\n\t+ 丙", "• 甲\n  • 乙\n  • 丙"),
    ("- ```py\n  x\n  ```\n- 乙", "• x\n• 乙"),
    ("*注：见 **下文** 说明*", "注：见 下文 说明"),
    ("1. **甲**\n   - 乙\n     丙\n2. 丁", "1. 甲\n  • 乙\n    丙\n2. 丁"),
    ("***都是***。***二***", "都是。二"),
    ("“**甲**”（**乙**）", "“甲”（乙）"),
    ("**“重点”**内容", "“重点”内容"),
    ("见https://a.cn/x。下", "见https://a.cn/x。下"),
    ("**https://a.cn/x_y_**", "https://a.cn/x_y_"),
    (
        "\\*\\*粗\\*\\* \\_\\_init\\_\\_ AT\\&T C\\# 5\\*3",
        "**粗** __init__ AT&T C# 5*3",
    ),
    ("**Q：**什么？**A：**这个", "Q：什么？A：这个"),
    ("价格**100元**和**200元**，**3 月**5 日", "价格100元和200元，3 月5 日"),
    (
        "[![图](https://a.cn/1.png)](https://a.cn)",
        "[图片：图] https://a.cn/1.png（https://a.cn）",
    ),
    ("甲 | 乙\n:-:|---\n**a** | b | c\n正文", "甲｜乙\na｜b｜c\n正文"),
    ("> ```py\n> a\n> ```\n> |a|b|\n> |-|-|\n> |c|d|", "│ a\n│ a｜b\n│ c｜d"),
    ("表：\n|a|b|c|d|\n|-|-|-|-|", "表：\na｜b｜c｜d"),
    ("见**《红楼梦》**一书、**C#**", "见《红楼梦》一书、C#"),
    ("- 单价 5 元\n- 3 元", "• 单价 5 元\n• 3 元"),
    ("\\- 甲\n\\+ 乙\n1\\) 丙", "- 甲\n+ 乙\n1) 丙"),
    ("- 甲：\n\n```py\nx\n```\n\n- 乙", "• 甲：\n\nx\n\n• 乙"),
    ("一\r\n二\r\n", "一\n二"),
    ("a\x00b\x08", "ab"),
    ("$\x00x^2$", "x²"),
    ("**%R（14日）**：", "%R（14日）："),
    ("*Note:* a\n*Tip*: b\n*提示：*请看", "Note: a\nTip: b\n提示：请看"),
    ("- *重点*说明，*她说，* 好", "• 重点说明，她说， 好"),
    ("*—— 鲁迅*", "—— 鲁迅"),
    ("甲，\\\n乙\\\n丙", "甲，\n乙\n丙"),
    ("red,\\\nblue", "red,\nblue"),
    ("> 1. 甲\n> 2. 乙", "│ 1. 甲\n│ 2. 乙"),
    ("> 一\n>> 二\n>>> 三", "│ 一\n│ │ 二\n│ │ │ 三"),
    ("令 $ a_n = 2n $，$ \\frac{1}{2} $", "令 aₙ = 2n，1/2"),
    ("每天 $\\$5$，共 $\\$5\\times3=\\$15$。", "每天 $5，共 $5×3=$15。"),
    (
        "解 \\begin{cases}x=1\\\\y=2\\end{cases} 得解；又$\\begin{cases}a\\\\b\\end{cases}$，",
        "解\n{ x=1\n{ y=2\n得解；又\n{ a\n{ b，",
    ),
    ("$\\text{\\$}5$，$x=$____", "$5，x=____"),
    ("设$f=\\begin{cases}1\\\\2\\end{cases}$", "设f=\n{ 1\n{ 2"),
    ("10<sup>-3</sup>，SO<sub>4</sub><sup>2-</sup>", "10⁻³，SO₄²⁻"),
    ("有效<sup>[1]</sup>", "有效[1]"),
    ('<font color="red"><b>重要</b></font>：看', "重要：看"),
    ("<details open><summary>题</summary>答</details>", "题答"),
    ("<div><p>甲</p>\n  </div>\n乙", "甲\n乙"),
    ("一</br>二<br> 三", "一\n二\n三"),
    (
        "# 长长长长长长长长长长长长长长长长长长长长长长长长长长长长长长长",
        "长长长长长长长长长长长长长长长长长长长长长长长长长长长长长长长",
    ),
]

# Short texts that Markdown, HTML, LaTeX or Unicode know; each is repeated.
SHAPES = [
    "*",
    "**",
    "a*",
    "*a",
    "**a",
    "a** ",
    "*a* ",
    "**a** ",
    "***a",
    "＊",
    "_",
    "__a",
    "`",
    "``",
    "`a`",
    "`a``b ",
    "~~",
    "~~a~~ ",
    "~~~\n",
    "```\n",
    "``` a\n",
    "[",
    "]",
    "![",
    "[a](",
    "[a](b",
    "[a](https://a.cn) ",
    "![a](https://a.cn)",
    "](",
    "[](",
    "<",
    "<b>",
    "</b>",
    "<b>x</b>",
    "<b ",
    '<div a="',
    "<!--",
    "<br>",
    "<sub>2</sub>",
    "<https://a.cn>",
    "<a@b.c",
    "https://a.cn/",
    "https://a.cn/))) ",
    "&",
    "&lt;",
    "&#",
    "\\",
    "\\*",
    "\\(",
    "\\)",
    "\\[",
    "\\(a\\)",
    "\\begin{a}",
    "\\begin{a}\n",
    "\\frac{",
    "$",
    "$$",
    "$a$ ",
    "$a",
    "$$a\n",
    "\\[\n",
    "\\[a\n",
    "\\(\n$$\n",
    "#",
    "# ",
    "# a\n",
    "## a\n\n",
    ">",
    "> ",
    "> a\n",
    ">> a\n",
    "-",
    "- ",
    "- a\n",
    " - a\n",
    "  - a\n",
    "+ 1\n",
    "- 1\n",
    "1. ",
    "1. a\n",
    "1) a\n\n",
    "2024. ",
    "- [ ] a\n",
    "|",
    "|a",
    "|a|b|\n",
    "|a|\n",
    "|a|b|\n|-|-|\n",
    "|-|-|\n",
    "|-|-|…x",
    "a|",
    "-|-",
    "---\n",
    "===\n",
    "\n",
    "\n\n",
    " ",
    "  \n",
    "\t",
    "\r\n",
    "a",
    "a ",
    "甲",
    "甲。",
    "。",
    "！**",
    "。[",
    "No. ",
    "1. 。",
    "é",
    "́",
    "👨\u200d👩",
    "🇨",
    "\u200d",
    "【a】\n",
    "【a】",
    "｜",
    "：",
    "D:\\a\\_b ",
    "\\n",
    "\\\\",
    "x\\_",
    "- a\n  `",
    "*a\n",
    "**a\nb",
    "(",
    "((",
    '"',
    "'",
    "[^1]: a\n",
    "[a]: b\n",
    "```markdown\n",
    "`` ` ",
    "$1 ",
    "a$b",
    "\\$",
    "|`a|",
    "|$a|",
    "| |\n",
    "&amp",
    "- > # a\n",
    "0\\.",
    "[a](<",
    '[a](b "c',
    "![a](data:",
    "![a](data:image/png;base64,AA)",
    "$ a ",
    "$ a $ ",
    "$\\$",
    "，\\\n",
    "\\a \\[ ",
    "<b><i>",
    "\n>>> ",
]

PIECES = r"""
* ** *** ＊＊ _ __ ~~ ` `` ``` ~~~ $ $$ \( \) \[ \] \begin{cases} \end{cases}
\frac{1}{2} [ ]( ) ![ [x](https://a.cn) ![图](https://a.cn/1.png) <https://a.cn/水>
https://a.cn/b_c_ <b> </b> <br> <sub> </sub> <div> <!-- --> List<int> &lt; &#x41;
\* \# \$ D:\资料\_x # ## > >> - + 1. 12) [x] 2024. | |-|-| |a|b|c|d| --- ===
```markdown ```py ```mermaid 。 ！ … . ! ? No. Dr. ： ， 5*3*2 2**3 单价*数量
**重点** **注意：** 甲 乙 100 abc 【题】 ｜ 👨‍👩‍👧 🇨🇳🇯🇵 é ㈠
""".split()
LINES = ["\n", "\n", "\n\n", "\n  ", "\n> ", "\n- ", "\n1. ", "\n## ", " ", "\r\n"]
WORDS = st.sampled_from(PIECES + LINES) | st.text(max_size=3)
MARKDOWN = st.lists(WORDS, max_size=60).map("".join)
MARKS = st.sampled_from([*"*_# 甲a1。(->\n", "**", "\n- ", "\n1. "])
MANY = settings(max_examples=500)


def test_the_same_answer_has_the_same_chat_text_in_every_version():
    """Offsets of parts that were sent count in it: a change here moves them."""
    markdown = (ROOT / "tests" / "sim" / "long_answer.md").read_text("utf-8")
    text = (ROOT / "tests" / "long_answer.txt").read_text("utf-8")
    assert chat_text(markdown) + "\n" == text


@pytest.mark.parametrize(
    ("markdown", "length", "kept"),
    [
        ("一句。**二**句。", 3, "一句。"),
        ("一句。**二**句。", 6, "一句。**二**句。"),
        ("# 标题\n\n一句。二句。\n", 9, "# 标题\n\n一句。"),
        ("一句。二句。", 0, ""),
        ("一句。二句说来话长，", 3, "一句。"),
        ("一句。\n\n二句。\n\n三句。", 8, "一句。\n\n二句。\n\n"),
        ("一句", 99, "一句"),
    ],
)
def test_of_the_markdown_only_what_was_sent_is_kept(markdown, length, kept):
    turn = wxgpt.Turn(1, 1, "o", "o 1", "key", "问", None, 0.0, 1, "chatgpt")
    turn.stops = {0: length}
    assert turn.as_sent(markdown) == kept


@pytest.mark.parametrize("markdown", AS_WRITTEN)
def test_what_may_be_text_stays_as_written(markdown):
    assert chat_text(markdown) == markdown


@pytest.mark.parametrize(("markdown", "text"), BECOMES)
def test_sure_markup_becomes_chat_text(markdown, text):
    assert chat_text(markdown) == text


def test_a_picture_in_the_text_may_be_large():
    picture = "data:image/png;base64," + "A" * 3_000_000
    assert chat_text(f"看![x]({picture})**好**") == "看[图片]好"


def test_an_early_reply_ends_with_a_sentence_that_no_mark_is_open_in():
    assert stable_text("甲。**乙。丙") == "甲。"
    assert stable_text("甲。乙，丙") == "甲。"
    assert stable_text("甲。\n\n# 题\n").strip() == "甲。"
    assert stable_text("1. 甲。乙") == "1. 甲。"
    assert stable_text("```\na\nb") == "a"
    assert stable_text("甲 | 乙。\n") == ""
    assert stable_text("甲。乙 | 丙\n") == "甲。乙 | 丙"


@pytest.mark.parametrize(
    ("markdown", "is_more"),
    [
        ("**甲**[a](https://a.cn)", False),
        ("# 一\n文", False),
        ("# 一\n# 二", True),
        ("|a|b|\n|-|-|", True),
        ("```\na\n```", True),
        ("\\(x\\)", True),
        ("![](https://a.cn/1.png)", True),
        ("https://a.cn https://b.cn https://c.cn", True),
    ],
)
def test_the_page_is_offered_where_it_shows_more(markdown, is_more):
    chat = ChatText(markdown)
    chat.text(has_ended=True)
    assert chat.has_more_on_page() == is_more


@MANY
@given(MARKDOWN, st.data())
def test_what_is_shown_of_a_growing_answer_never_changes(markdown, data):
    chat, shown, at = ChatText(), "", 0
    while at < len(markdown):
        step = data.draw(st.integers(1, 30))
        chat.feed(markdown[at : at + step])
        at += step
        text = chat.text(False)
        assert text.startswith(shown)
        shown = text
    assert chat.text(True).startswith(shown)
    assert chat.text(True) == chat_text(markdown)


@pytest.mark.parametrize(
    "markdown", ["【题】。【题】\n", "【【题】】\n", "【题】【题】\n后", "【题】【\n"]
)
def test_a_line_that_the_model_put_in_brackets_stays(markdown):
    """It may look like a heading, which goes with what follows, when it ends."""
    chat, shown = ChatText(), ""
    for char in markdown:
        chat.feed(char)
        assert chat.text(False).startswith(shown)
        shown = chat.text(False)
    assert chat.text(True).startswith(shown)


@MANY
@given(MARKDOWN, MARKDOWN)
def test_what_may_be_shown_is_a_prefix_of_every_continuation(markdown, more):
    early = stable_text(markdown)
    assert chat_text(markdown).startswith(early)
    assert chat_text(markdown + more).startswith(early)


@MANY
@given(MARKDOWN, st.integers(40, 400))
def test_parts_joined_are_the_text_and_each_fits(markdown, room):
    rest = text = chat_text(markdown)
    parts = []
    while rest:
        end = cut_text(rest, room)
        parts.append(rest[:end])
        rest = rest[end:]
    assert "".join(parts) == text
    assert all(0 < size_of(part) <= room for part in parts)
    assert all(part.strip() for part in parts)


@MANY
@given(st.lists(MARKS, max_size=60).map("".join))
def test_no_letter_or_digit_is_lost(markdown):
    assert re.findall(r"\w", chat_text(markdown)) == re.findall(r"\w", markdown)


def check_pairs(tokens):
    """Every opening token has its closing one, in order."""
    stack = []
    for token in tokens:
        if token.type == "inline":
            check_pairs(token.children)
        elif token.nesting == 1:
            stack.append(token.type.removesuffix("_open"))
        elif token.nesting == -1:
            assert stack.pop() == token.type.removesuffix("_close")
    assert not stack


@MANY
@given(MARKDOWN)
def test_the_page_can_write_the_same_tokens(markdown):
    reader = wxgpt.MarkdownReader()
    reader.read(markdown, has_ended=True)
    check_pairs(reader.tokens)
    RendererHTML().render(reader.tokens, MarkdownIt().options, {})


CUTS = [
    ("一二。三四五。六七八", "一二。"),  # a sentence
    ("一\n\n【题】\n二二二二二二", "一\n\n"),  # a heading goes with what follows
    ("见 No. 一二三四五六七八", "见 No. 一二三四"),
    ("abc https://a.cn/1234567", "abc "),
    ("👨‍👩‍👧👨‍👩‍👧", "👨‍👩‍👧"),
    ("🇨🇳🇯🇵🇨🇳", "🇨🇳🇯🇵"),
    ("1️⃣2️⃣3️⃣", "1️⃣2️⃣"),
    ("甲｜乙\n丙丙丙丙｜丁", "甲｜乙\n"),
    ("    a\n    b\n    c\n    d", "    a\n    b\n    c\n"),
]
INTRO = "先说结论。" + "这里是一句说明。" * 3
TORN = [  # a heading goes with what follows, even if that must be torn
    "【价格对比】\n" + "甲｜乙\n" * 588,
    *(
        f"{INTRO * n}\n\n【方案】\n\n【步骤】\n甲：乙\n" + "丙：丁\n" * 300
        for n in range(6)
    ),
]


@pytest.mark.parametrize("text", TORN)
@pytest.mark.parametrize("room", [750, 760, 1640, 1700])
def test_no_part_ends_in_a_heading_or_behind_one(text, room):
    rest = text
    while rest:
        part, rest = rest[: cut_text(rest, room)], rest[cut_text(rest, room) :]
        last = part.rstrip("\n").rpartition("\n")[2]
        assert not rest or "【" not in last, part[-40:]


@pytest.mark.parametrize(("text", "part"), CUTS)
def test_a_part_ends_where_nothing_is_torn(text, part):
    assert text[: cut_text(text, 20)] == part


def seconds(function, *arguments):
    """Return the processor time of a call: what else runs does not count."""
    with undisturbed():
        begin = time.process_time()
        function(*arguments)
        return time.process_time() - begin


@contextlib.contextmanager
def undisturbed():
    """Keep the collector from looking through all that other tests have left."""
    gc.collect(0)
    gc.disable()
    yield
    gc.enable()


def grow(text):
    """Return how long an answer takes that grows to this, and how long a late reply."""
    chat, replies = ChatText(), []
    taken = seconds(chat.feed, text[:-400])
    for at in (len(text) - 400, len(text) - 200):
        chat.feed(text[at : at + 200])
        replies.append(seconds(lambda: cut_text(chat.text(False) or "-", 1640)))
    return taken + sum(replies) + seconds(chat.text, True), max(replies)


@pytest.fixture(scope="session")
def unit():
    """A time for how fast this machine is now: about a millisecond."""
    return min(seconds(lambda: [str(i) for i in range(20_000)]) for _ in range(20))


@pytest.mark.system  # a minute of processor time
@pytest.mark.parametrize("shape", SHAPES)
def test_the_time_grows_with_the_text(shape, unit, pytestconfig):
    """Twice an answer takes twice as long, and a late reply of it no time at all."""
    size = pytestconfig.getoption("shape_chars")
    text, ratios, replies = (shape * size)[:size], [], []
    while len(ratios) < 5 and min(ratios, default=9) > 3:  # something else may run
        half, _ = grow(text[: size // 2])
        whole, reply = grow(text)
        ratios.append(whole / max(half, unit))
        replies.append(reply)
    assert min(ratios) <= 3
    assert min(replies) < 50 * unit


def cut_whole(text):
    """Cut a chat text into its parts."""
    while text:
        text = text[cut_text(text, 1640) :]


BLOCKED = wxgpt.BlockedWords("")
BLOCKED.words, BLOCKED.lengths, BLOCKED.longest = {"坏词"}, {"坏": {2}}, 2
TEXTS = wxgpt.read_texts({})
MESSAGE = wxgpt.Message("o_1", "gh_1", "text", 1)
PURE = {
    "chat_text": chat_text,
    "stable_text": stable_text,
    "cut_text": cut_whole,
    "BlockRenderer": lambda text: wxgpt.BlockRenderer(TEXTS, BLOCKED).render(
        text, has_ended=True
    ),
    "preview": lambda text: wxgpt.preview(text, BLOCKED),
    "excerpt": wxgpt.excerpt,
    "outgoing": wxgpt.outgoing,
    "stream_safe": wxgpt.stream_safe,
    "comparison_form": wxgpt.comparison_form,
    "are_in": BLOCKED.are_in,
    "formula_text": lambda text: wxgpt.formula_text(text[:1500]),
    "find_command": lambda text: wxgpt.find_command(text, ["chatgpt"]),
    "render_text_reply": lambda text: wxgpt.render_text_reply(MESSAGE, text, 1),
    "with_taps": lambda text: wxgpt.with_taps(text, "chatgpt", "help"),
}


@pytest.mark.system  # a minute of processor time
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pure_function_is_linear(shape, unit):
    """Twice the text never takes over three times as long."""
    text = (shape * 20_000)[:20_000]
    slow = {}
    for name, function in PURE.items():
        ratios = []
        while len(ratios) < 5 and min(ratios, default=9) > 3:  # something else may run
            half = max(seconds(function, text[:10_000]), unit)
            ratios.append(seconds(function, text) / half)
        if min(ratios) > 3:
            slow[name] = ratios
    assert slow == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_line_grows_like_a_short_one(shape):
    text = (shape * 9000)[:9000] + "。完\n"
    whole = chat_text(text)
    chat = ChatText()
    for at in range(0, len(text), 700):
        chat.feed(text[at : at + 700])
        assert whole.startswith(chat.text(False))
    assert chat.text(True) == whole


def test_a_token_costs_next_to_nothing(unit):
    chat = ChatText()
    taken = seconds(lambda: [chat.feed("字") for _ in range(10_000)])
    assert taken < 10 * unit
