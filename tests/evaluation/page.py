"""A page as a browser would find it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and text by the id or name of the element around it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self._open: list[tuple[str, str]] = []
        self._seen: list[str] = []
        self.feed(self.html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes.get("id", tag)))
        if tag == "tr":
            self._table().append([])
        if tag in ("td", "th"):
            self._table()[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            for _, name in self._open:
                self.texts[name] = self.texts.get(name, "") + data
            if self._open[-1][0] not in ("script", "style", "title"):
                self._seen.append(data)
            if self._open[-1][0] in ("td", "th"):
                self._table()[-1][-1] += data

    def _table(self) -> list[list[str]]:
        return self.rows.setdefault(next(name for tag, name in reversed(self._open) if tag == "table"), [])

    def paths(self, mark: str) -> str:
        return "".join(attrs["d"] for tag, attrs in self.tags if tag == "path" and attrs.get("class") == mark)

    def images(self) -> list[str]:
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]

    @property
    def words(self) -> str:
        """The text that a reader sees, on one line."""
        return " ".join(" ".join(self._seen).split())
