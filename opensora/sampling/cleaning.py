"""Caption cleaning as Open-Sora's text encoders expect it: a prompt in plain lower-case words.

The rules, in their order, are those of the cleaning that came with DeepFloyd's T5 (github.com/deep-floyd/IF), written
as a table, with the standard library in place of BeautifulSoup and ftfy.
"""

from __future__ import annotations

import contextlib
import html
import re
import unicodedata
from html.parser import HTMLParser
from urllib.parse import unquote_plus

_DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)\b[\w/-]*(?!@)"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"

_BEFORE_MARKUP = [
    (r"<person>", "person"),
    (r"https?:/{1,3}\S+", ""),
    (r"\bwww:\S*", ""),
    (r"\b" + _DOMAIN, ""),
]
_BEFORE_REPAIR = [
    (r"@\w+\b", ""),
    (f"[{_CJK}]+", ""),
    (f"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # an IP address
    (r"\d:\d\d\s+$", ""),  # the end of an article id
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_TYPES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_AFTER_REPAIR = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 1920x1080
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_ENDS = [
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})


def text_preprocessing(text: str, use_text_preprocessing: bool = True) -> str:
    """A cleaned caption; without cleaning, the caption in lower case."""
    if not use_text_preprocessing:
        return text.lower().strip()
    return clean_caption(clean_caption(text))  # the second pass sees what the first has laid bare


def clean_caption(caption: str) -> str:
    """One pass of the cleaning."""
    caption = _substitute(unquote_plus(str(caption)).strip().lower(), _BEFORE_MARKUP)
    caption = _substitute(_without_markup(caption), _BEFORE_REPAIR)
    if len(re.findall(r"[-_]", caption)) > 3:  # words joined by them, not a compound
        caption = re.sub(r"[-_]", " ", caption)
    caption = html.unescape(html.unescape(_repair(caption))).strip()
    return _substitute(_substitute(caption, _AFTER_REPAIR).strip(), _ENDS).strip()


def _substitute(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class _TextOnly(HTMLParser):
    """Collects what a browser would show."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:  # not within <script> or <style>
            self.parts.append(data)


def _without_markup(text: str) -> str:
    parser = _TextOnly()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


def _repair(text: str) -> str:
    """Undo UTF-8 that was read as Latin-1, ligatures and full-width letters; drop control characters."""
    with contextlib.suppress(UnicodeError):  # then it was not read so
        text = text.encode("latin-1").decode("utf-8")
    text = "".join(
        unicodedata.normalize("NFKC", c) if unicodedata.east_asian_width(c) in "FH" else c
        for c in text.translate(_LIGATURES)
    )
    text = "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cs"))
    return unicodedata.normalize("NFC", text)
