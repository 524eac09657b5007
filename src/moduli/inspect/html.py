"""Pages: one self-contained HTML file from a template, with every text from data escaped."""

from __future__ import annotations

from typing import Any

from moduli.inspect.text import visible


def render(package: str, template: str, **values: Any) -> str:
    """The text of a page.

    Args:
        package: whose `templates` folder holds the template; it may extend `page.html.j2` of this
            package, which has the look that all pages share.
        template: name of its file.
        values: what it shows. Strings are escaped and their hidden characters made visible; what a
            template marks as safe (figures) is not.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("moduli.inspect")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**values) + "\n"


def percent(share: float) -> str:
    """0.853 as 85.3."""
    return f"{100 * share:.1f}"


def _finalize(value: Any) -> Any:
    # Exactly str: Markup is a str that a template has called safe.
    return visible(value) if type(value) is str else value
