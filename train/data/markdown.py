"""HTML, as shared conversations are often saved, to the Markdown that was shown."""

import re
from collections.abc import Callable
from html.parser import HTMLParser

_TAG = re.compile(
    r"</?(?:a|b|blockquote|br|code|div|em|h[1-6]|hr|i|img|li|ol|p|pre|span|strong|table|tbody|td|th|thead|tr|ul)"
    r"(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
# A code block of ChatGPT's page reads "python" "Copy code" and the code, in one run.
_COPY_CODE = re.compile(r"\s*([\w+#.-]*)\s*(?:Copy code)+\n?(.*)", re.DOTALL)
_NOISE = re.compile(r"\A\d+ / \d+|Copy\d+ chars / \d+ words")
_INLINE = {"b": "**", "strong": "**", "em": "*", "i": "*", "code": "`"}


def html_to_markdown(text: str) -> str:
    """`text` as Markdown. Without HTML tags it stays as it is, but for blanks at its ends and the page's own labels."""
    if _TAG.search(text):
        parser = _Markdown()
        parser.feed(text)
        parser.close()
        text = parser.written()
    text = _NOISE.sub("", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Markdown(HTMLParser):
    """Collects Markdown; `lists` holds the number of the item to come in each open list, None where unordered."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.lists: list[int | None] = []
        self.block: list[str] | None = None  # the text of an open <pre>
        self.links: list[str] = []
        self.cells = 0  # of the open table row
        self.columns = 0  # of the table row before

    def written(self) -> str:
        if self.block is not None:
            self._close_block()
        return "".join(self.parts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.block is not None:
            self.block.append("\n" if tag == "br" else "")
            return
        attributes = dict(attrs)
        opened: dict[str, Callable[[], str]] = {
            "br": lambda: "\n",
            "hr": lambda: "\n\n---\n\n",
            "li": self._item,
            "td": lambda: "| ",
            "th": lambda: "| ",
            "blockquote": lambda: "\n\n> ",
            "img": lambda: f"![{attributes.get('alt') or ''}]({attributes.get('src') or ''})",
        }
        if tag == "pre":
            self.block = []
        elif tag in ("ul", "ol"):
            self.parts.append("" if self.lists else "\n\n")
            self.lists.append(1 if tag == "ol" else None)
        elif tag == "a":
            self.links.append(attributes.get("href") or "")
            self.parts.append("[")
        elif re.fullmatch("h[1-6]", tag):
            self.parts.append(f"\n\n{'#' * int(tag[1])} ")
        elif tag in ("p", "table") and not self.lists:
            self.parts.append("\n\n")
        else:
            self.parts.append(opened[tag]() if tag in opened else _INLINE.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if self.block is not None:
            if tag == "pre":
                self._close_block()
        elif tag in ("ul", "ol") and self.lists:
            self.lists.pop()
            self.parts.append("" if self.lists else "\n\n")
        elif tag == "a" and self.links:
            self.parts.append(f"]({self.links.pop()})")
        elif tag in ("td", "th"):
            self.cells += 1
            self.parts.append(" ")
        elif tag == "tr":
            self.parts.append("|\n")
            self.columns, self.cells = self.cells, 0
        elif tag == "thead":
            self.parts.append("|" + " --- |" * self.columns + "\n")
        elif tag in ("p", "table", "blockquote") or re.fullmatch("h[1-6]", tag):
            self.parts.append("" if self.lists else "\n\n")
        else:
            self.parts.append(_INLINE.get(tag, ""))

    def handle_data(self, data: str) -> None:
        if self.block is not None:
            self.block.append(data)
        else:
            self.parts.append(data)

    def _item(self) -> str:
        depth = "    " * (len(self.lists) - 1)
        number = self.lists[-1] if self.lists else None
        if number is None:
            return f"\n{depth}- "
        self.lists[-1] = number + 1
        return f"\n{depth}{number}. "

    def _close_block(self) -> None:
        text = "".join(self.block or [])
        found = _COPY_CODE.fullmatch(text)
        language, code = found.groups() if found else ("", text)
        self.parts.append(f"\n\n```{language}\n{code.strip(chr(10))}\n```\n\n")
        self.block = None
