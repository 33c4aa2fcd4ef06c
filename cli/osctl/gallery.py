"""A page with clips, for a browser: a folder that can be moved and sent as it is."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from osctl.clips import PICTURE, Clip, captions
from osctl.downloads import Copy

PAGE = "index.html"
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 1.5rem; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); }
figure { margin: 0; }
video, img { width: 100%; background: #181818; border-radius: 4px; }
figcaption { overflow-wrap: anywhere; }
small { opacity: 0.7; }
"""


def write_page(folder: Path, *, title: str, clips: Sequence[Clip], copies: Sequence[Copy]) -> Path:
    """Write the page that shows the copies of clips, and return where it is. Everything of others is escaped."""
    figures = [
        _figure(folder, clip, copy.path, caption)
        for clip, copy, caption in zip(clips, copies, captions(clips), strict=True)
        if copy.state != "gone"
    ]
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<main>\n" + "\n".join(figures) + "\n</main>\n</body>\n</html>\n"
    )
    page = folder / PAGE
    part = folder / f".{PAGE}.part"
    part.write_text(text, encoding="utf-8")
    os.replace(part, page)
    return page


def _figure(folder: Path, clip: Clip, path: Path, caption: str) -> str:
    source = quote(path.relative_to(folder).as_posix())
    if clip.info.path.endswith(PICTURE):
        shown = f'<img src="{source}" alt="{html.escape(caption)}" loading="lazy">'
    else:
        shown = f'<video src="{source}" controls loop muted autoplay playsinline></video>'
    size = f"{clip.width}×{clip.height}" if clip.width and clip.height else ""
    length = f"{clip.num_frames} frames" if clip.num_frames else ""
    seed = f"seed {clip.seed}" if clip.seed is not None else ""
    facts = html.escape(", ".join(part for part in (size, length, seed) if part))
    return f"<figure>{shown}<figcaption>{html.escape(caption)}<br><small>{facts}</small></figcaption></figure>"
