"""Until when a certificate is good: the first thing to look at when a login is refused.

Python's own library reads certificates of the other side alone, and this is no reason for a package more.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime

_VERSION, _SHORT_TIME = 0xA0, 0x17


def ends_at(pem: str) -> float | None:
    """When a certificate ends, in seconds since 1970; None where it cannot be read."""
    try:
        _, certificate, _ = _element(ssl.PEM_cert_to_DER_cert(pem[: pem.index(ssl.PEM_FOOTER)] + ssl.PEM_FOOTER))
        _, rest, _ = _element(certificate)
        tag, _, after = _element(rest)
        if tag == _VERSION:
            rest = after
        for _ in ("serial number", "algorithm", "issuer"):
            _, _, rest = _element(rest)
        _, validity, _ = _element(rest)
        _, _, end = _element(validity)
        tag, text, _ = _element(end)
        pattern = "%y%m%d%H%M%SZ" if tag == _SHORT_TIME else "%Y%m%d%H%M%SZ"
        return datetime.strptime(text.decode("ascii"), pattern).replace(tzinfo=UTC).timestamp()
    except (ValueError, IndexError):
        return None


def _element(data: bytes) -> tuple[int, bytes, bytes]:
    """The first element of DER: its tag, its content, and what follows it."""
    tag, length, start = data[0], data[1], 2
    if length & 0x80:  # so many bytes tell the length
        start += length & 0x7F
        length = int.from_bytes(data[2:start], "big")
    if len(data) < start + length:
        raise ValueError("the element is cut off")
    return tag, data[start : start + length], data[start + length :]
