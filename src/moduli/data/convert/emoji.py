"""Emoji of several vendors as pictures: the same concepts in different styles.

The packages hold drawings (SVG) under names. Some say which Unicode code points a name stands for;
for the others the names that those give to the same code points are looked up, with and without
hyphens. Class and set of concepts are Noto's: every emoji of one of Unicode's groups other than
flags, without skin tones and without joined sequences.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moduli.data.convert.tables import write_table
from moduli.errors import FetchError

SIZE = 64
"""Side of the pictures in pixels. Models take more; they see what was measured with 64."""

REFERENCE = "noto"
_JOINER = 0x200D
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_OTHER_GROUP = "Flags"


def emoji_to_tables(source: Path, out: Path) -> None:
    """Render every vendor's emoji to `VENDOR.parquet`.

    Columns: `image` (PNG of 64 x 64 pixels on white), `name` (the same for all vendors: Noto's),
    `codepoint` ("1f600", several joined by "-"; what tells concepts apart), `group` (the class: one
    of Unicode's eight groups) and `vendor` (the domain). Rows are in order of code points. A
    vendor has only the concepts that it draws. Hold out concepts, not pictures: the same concept
    is in every vendor's file.

    Args:
        source: one directory per vendor with `icons.json`, `chars.json` and `metadata.json` of
            its package (where it has them), and `info.json`, whose author and licence go into
            `licences.json` beside the tables.
        out: an existing directory.

    Raises:
        FetchError: a picture cannot be rendered, or Noto's lists are not there.
    """
    vendors = sorted(path.name for path in source.iterdir() if path.is_dir())
    known = {vendor: _json(source / vendor / "chars.json") for vendor in vendors}
    concepts = concepts_of(known[REFERENCE], _json(source / REFERENCE / "metadata.json"))
    # the reference's own names are tried first
    others = [known[REFERENCE], *known.values()]
    for vendor in vendors:
        icons = _json(source / vendor / "icons.json")
        found = icons_of(icons, known[vendor], list(concepts), others)
        order = sorted(found, key=lambda point: [int(part, 16) for part in point.split("-")])
        columns: dict[str, list[Any]] = {
            "image": [_render(svg(icons, found[point]), vendor, found[point]) for point in order],
            "name": [concepts[point][0] for point in order],
            "codepoint": order,
            "group": [concepts[point][1] for point in order],
            "vendor": [vendor] * len(order),
        }
        write_table(out / f"{vendor}.parquet", columns)
    licences = {vendor: _json(source / vendor / "info.json") for vendor in vendors}
    kept = {v: {key: info[key] for key in ("author", "license")} for v, info in licences.items()}
    (out / "licences.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def concepts_of(names: dict[str, str], metadata: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Code points -> (name, group), of the reference vendor's plain emoji.

    Args:
        names: code points -> icon name (`chars.json`).
        metadata: `metadata.json` with its `categories`.
    """
    groups = {n: group for group, members in metadata["categories"].items() for n in members}
    return {
        point: (name, groups[name])
        for point, name in names.items()
        if groups.get(name, _OTHER_GROUP) != _OTHER_GROUP and _plain(point)
    }


def icons_of(
    icons: dict[str, Any],
    names: dict[str, str],
    points: list[str],
    others: list[dict[str, str]],
) -> dict[str, str]:
    """Code points -> name of the vendor's icon, for those that it draws.

    Args:
        icons: the vendor's `icons.json`.
        names: its `chars.json`; if that is empty, icons are found by the names of `others`.
        points: the code points that are wanted.
        others: the `chars.json` of all vendors, in the order in which their names are tried.
    """
    if names:
        return {point: names[point] for point in points if point in names}
    drawn = [*icons["icons"], *icons.get("aliases", {})]
    exact = set(drawn)
    joined: dict[str, str] = {}
    for name in drawn:
        joined.setdefault(name.replace("-", ""), name)
    found = {}
    for point in points:
        candidates = dict.fromkeys(other[point] for other in others if point in other)
        for name in candidates:
            if name in exact:
                found[point] = name
                break
        else:
            for name in candidates:
                if name.replace("-", "") in joined:
                    found[point] = joined[name.replace("-", "")]
                    break
    return found


def svg(icons: dict[str, Any], name: str) -> str:
    """The drawing of an icon, in the middle of a square; an alias may be another icon mirrored.

    Args:
        icons: the vendor's `icons.json`.
        name: of an icon or an alias.
    """
    mirrored = False
    while name in icons.get("aliases", {}):
        alias = icons["aliases"][name]
        if extra := alias.keys() - {"parent", "hFlip"}:
            raise FetchError(f"The alias {name!r} changes {', '.join(extra)}, which is not drawn.")
        name, mirrored = alias["parent"], mirrored != alias.get("hFlip", False)
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    side = max(width, height)
    box = f"{(width - side) / 2:g} {(height - side) / 2:g} {side} {side}"
    body = icon["body"]
    if mirrored:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side}" height="{side}">{body}</svg>'
    )


def _plain(point: str) -> bool:
    parts = [int(part, 16) for part in point.split("-")]
    return _JOINER not in parts and not any(part in _SKIN_TONES for part in parts)


def _json(path: Path) -> dict[str, Any]:
    """The file's content; a vendor that has no such file, or an empty list there, knows nothing."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _render(drawing: str, vendor: str, name: str) -> bytes:
    import resvg_py

    try:
        # the system's fonts would make the result depend on the machine
        picture = resvg_py.svg_to_bytes(
            svg_string=drawing, width=SIZE, height=SIZE, background="white", skip_system_fonts=True
        )
    except ValueError as error:
        raise FetchError(f"The icon {name!r} of {vendor} cannot be rendered: {error}") from error
    return bytes(picture)
