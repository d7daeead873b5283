"""The frame of the page: head, table of contents, sections; styles inside, nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple, final

from densectx.report.markup import Child, Html, tag

# the page has no scripts and asks nobody for anything: a browser that knows the rule enforces it
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@final
class Section(NamedTuple):
    """A part of the page.

    Attributes:
        identity: its anchor.
        title: its heading.
        body: what is below the heading.
        short: its name in the table of contents, the title if empty.
    """

    identity: str
    title: str
    body: Child
    short: str = ""


def page(title: str, header: Child, sections: Sequence[Section]) -> str:
    """The whole document.

    Args:
        title: of the page.
        header: what is above the table of contents.
        sections: in order.
    """
    links = [tag("li", tag("a", section.short or section.title, href=f"#{section.identity}")) for section in sections]
    body = [
        tag(
            "section",
            tag("h2", section.title, id=f"{section.identity}-h"),
            section.body,
            id=section.identity,
            aria_labelledby=f"{section.identity}-h",
        )
        for section in sections
    ]
    style = Html(files("densectx.report").joinpath("report.css").read_text(encoding="utf-8"))
    document = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name_="color-scheme", content="light dark"),
            tag("title", title),
            tag("link", rel="icon", href="data:,"),
            tag("style", style),
        ),
        tag(
            "body",
            tag("a", "To the content", href="#content", class_="skip"),
            tag("header", header),
            tag("nav", tag("ul", links), aria_label="Sections"),
            tag("main", body, id="content", tabindex="-1"),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{document}\n"


def scrolled(content: Html, label: str) -> Html:
    """Something wide in a box of its own that scrolls, by keyboard too."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def note(*words: Child, kind: str = "note") -> Html:
    """A remark; ``kind`` warning for what is missing."""
    return tag("p", words, class_=kind)
