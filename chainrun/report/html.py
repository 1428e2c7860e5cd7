"""HTML in which text is escaped unless it was made here."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from chainrun.report.endings import KINDS, Ending
from chainrun.report.look import clean, moment

STATES = {
    "done": "#2f9e5b",
    "running": "#3b82c4",
    "queued": "#8a6d3b",
    "failed": "#d64545",
    "stopped": "#c77b1a",
    "cancelled": "#7d8590",
}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Content: TypeAlias = "str | Iterable[Content] | None"


def text(content: Content) -> Html:
    """Return content as HTML: what is not `Html` is escaped."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        lines = content.splitlines() or [""]
        return Html("\n".join(html.escape(clean(line) if "\t" not in line else line) for line in lines))
    return Html("".join(text(part) for part in content))


def tag(name: str, content: Content = "", **attributes: str | None) -> Html:
    """Return an element; an attribute's trailing underscore is left out, one that is None too."""
    given = "".join(
        f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value is not None
    )
    return Html(f"<{name}{given}>{text(content)}</{name}>")


def table(heads: Sequence[str], rows: Iterable[Sequence[Content]], numbers: str = "") -> Html:
    """Return a table that scrolls by itself where the page is narrow.

    Args:
        numbers: of each column an ``r`` where it is set flush right, else a blank or an ``l``.
    """

    def cells(kind: str, row: Sequence[Content]) -> Html:
        made = [
            tag(kind, cell, class_="r" if numbers[index : index + 1] == "r" else None)
            for index, cell in enumerate(row)
        ]
        return tag("tr", made)

    body = [cells("td", row) for row in rows]
    return tag("div", tag("table", [tag("thead", cells("th", heads)), tag("tbody", body)]), class_="scroll")


def page(title: str, body: Content) -> str:
    """Return a whole page that needs nothing from elsewhere."""
    head = [
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        Html(f"<style>{_STYLE}</style>"),
    ]
    return f'<!DOCTYPE html>\n<html lang="en">{tag("head", head)}{tag("body", tag("main", body))}</html>\n'


def section(title: str, content: Content) -> Html:
    inner = text(content)
    return Html(tag("h2", title) + inner) if inner else Html("")


def badge(state: str) -> Html:
    return tag("span", state, class_="badge", style=f"background:{STATES.get(state, '#7d8590')}")


def ending(of: Ending) -> Html:
    return tag("span", of.label, class_="end", style=f"color:{KINDS[of.kind]}", title=of.more or None)


def card(number: str, words: str, more: str = "") -> Html:
    return tag(
        "div", [tag("b", number), tag("span", words), tag("span", more) if more else ""], class_="card"
    )


def foot(now: float) -> Html:
    zone = time.strftime("%Z", time.localtime(now))
    return tag("footer", f"chainrun report, made {moment(now)}; all times are {zone}.")


_STYLE = """
:root{--ink:#1f2731;--faint:#7b8794;--paper:#fefefd;--line:#e3e7eb;--soft:#f3f5f7;--link:#1f6fb2;
 --good:#2f9e5b;--bad:#c93c3c;--warn:#b36b00}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--faint:#93a0ad;--paper:#15191e;--line:#2c343d;
 --soft:#1d232a;--link:#6cb6f0;--good:#56c483;--bad:#ef7373;--warn:#e0a243}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:38px 0 10px}
p{margin:6px 0 10px}
a{color:var(--link)}
.faint{color:var(--faint)}
.path{color:var(--faint);font-size:13px;overflow-wrap:anywhere}
.badge{display:inline-block;border-radius:99px;padding:2px 11px;font-size:13px;font-weight:600;color:#fff;
 vertical-align:4px;margin-left:10px}
td .badge{margin-left:0;vertical-align:1px}
.end{font-weight:600;white-space:nowrap}
.end:before{content:"";display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:6px;
 background:currentColor}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:20px 0 6px}
.card{background:var(--soft);border-radius:10px;padding:11px 14px}
.card b{display:block;font-size:21px;line-height:1.3;font-weight:650}
.card span{color:var(--faint);font-size:12.5px;display:block;line-height:1.35}
.bar{display:flex;height:14px;border-radius:5px;overflow:hidden;margin:14px 0 6px;background:var(--soft)}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--faint)}
.key i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.figure{margin:0 -6px;overflow-x:auto}
.figure svg{width:100%;min-width:760px;height:auto;display:block}
.figure svg text{font-family:"DejaVu Sans",Verdana,Geneva,sans-serif!important}
.scroll{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-size:13.5px;width:100%;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--faint);font-size:12.5px;white-space:nowrap;vertical-align:bottom}
th,td{padding:5px 12px 5px 0;border-bottom:1px solid var(--line)}
td{vertical-align:top}
td:first-child .small{min-width:130px}
.r{text-align:right}
td.r{white-space:nowrap}
.whole{white-space:nowrap}
.small{color:var(--faint);font-size:12px;line-height:1.35}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
ul{margin:6px 0;padding-left:20px}
li{overflow-wrap:anywhere;margin:3px 0}
pre{background:var(--soft);border-radius:8px;padding:12px 14px;overflow-x:auto;font:12.5px/1.45 ui-monospace,
 SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
details{margin:10px 0}
summary{cursor:pointer;font-weight:600}
footer{margin-top:44px;color:var(--faint);font-size:12.5px;border-top:1px solid var(--line);padding-top:10px}
@media print{main{max-width:none;padding:0}details{display:none}}
"""
