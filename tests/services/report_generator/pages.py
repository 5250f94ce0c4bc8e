"""Reads a page as a browser would: what it would ask for, its ids, its text."""

from __future__ import annotations

from html.parser import HTMLParser

ASKING = {"src", "href", "srcset", "action", "formaction", "data", "poster", "xlink:href", "background", "cite", "ping"}


class Page(HTMLParser):
    """`asked`: (element, attribute, value) of everything that names an address."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.asked: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name in ASKING:
                self.asked.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())
