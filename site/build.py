"""Builds the static site: validated rows in, pages out, byte-identical for identical input."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from attnbench.errors import AttnbenchError, UsageError
from attnbench.results.read import rows as read_rows
from attnbench.results.validate import validate
from attnbench.site.catalogue import Catalogue
from attnbench.site.page import Asset, Page, PageModule, SiteData, site_data
from attnbench.site.pages import MODULES
from attnbench.site.views import links

NAVIGATION = (
    ("index.html", "Answer"),
    ("leaderboard.html", "Leaderboard"),
    ("explore.html", "Explore"),
    ("compare.html", "Compare"),
    ("status.html", "Status"),
    ("hardware.html", "Hardware"),
    ("history.html", "Regressions"),
    ("method.html", "Method"),
    ("docs/index.html", "Docs"),
    ("data.html", "Data"),
)
"""Header of every page; an entry whose page is not built is left out."""

DEFINITIONS = "metrics.html"
"""The page with an anchor for every column of the schema."""

LISTING = "files.txt"
"""What a build wrote, so that the next one can remove it."""

SHOWN_PROBLEMS = 20


def build(
    paths: Iterable[str | Path],
    out: str | Path,
    catalogue: Callable[[], Mapping[str, Any]] = dict,
    url: str = "",
    repository: str = "",
    modules: Sequence[PageModule] = MODULES,
) -> int:
    """Write the site of all rows in ``paths`` into ``out`` and return the number of pages.

    ``catalogue`` gives what :func:`attnbench.harness.catalogue.catalogue` says of mechanisms, tasks and
    devices; it is called once the results are known to be valid. ``url`` is the address that the site will
    have, for links that must be absolute, ``repository`` that of the source.

    Raises UsageError, and writes nothing, when the results do not pass validation or a folder that is not a
    site would be overwritten.
    """
    sources, folder = list(paths), Path(out)
    errors = [p for p in validate(sources) if p.severity == "error"]
    if errors:
        listed = "\n".join(f"  {problem}" for problem in errors[:SHOWN_PROBLEMS])
        more = f"\n  and {len(errors) - SHOWN_PROBLEMS} more" if len(errors) > SHOWN_PROBLEMS else ""
        count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
        raise UsageError(f"the results have {count}, expected none:\n{listed}{more}")
    data = site_data(read_rows(sources), Catalogue(**catalogue()), url, repository)
    return write(data, folder, modules)


def write(data: SiteData, folder: Path, modules: Sequence[PageModule] = MODULES) -> int:
    """Render all pages of ``modules`` below ``folder`` and return their number.

    What an earlier build wrote there and this one does not is removed; nothing else is touched. Raises
    AttnbenchError when two modules write the same file, UsageError when the folder is not ours or cannot be
    written.
    """
    made: dict[str, Page | Asset] = {}
    taken: set[str] = set()
    for found in (*_static(), *(item for module in modules for item in module.pages(data))):
        if found.path.casefold() in taken:  # some file systems ignore case
            raise AttnbenchError(f"two files of the site would be {found.path}, expected one name for each")
        taken.add(found.path.casefold())
        made[found.path] = found
    environment = _environment()
    try:
        _clear(folder, made)
        for item in made.values():
            content = item.content if isinstance(item, Asset) else _render(environment, item, data, made)
            target = folder / item.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; choose another --out") from None
    return sum(isinstance(item, Page) for item in made.values())


def relative(page: str, target: str) -> str:
    """The URL of ``target``, a path below the root of the site, as seen from ``page``."""
    path, mark, anchor = target.partition("#")
    return (posixpath.relpath(path, posixpath.dirname(page) or ".") if path else "") + mark + anchor


# ---- inside --------------------------------------------------------------------------------------------


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("attnbench.site"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        impl_page=links.impl_page,
        task_page=links.task_page,
        device_page=links.device_page,
        run_page=links.run_page,
    )
    return environment


def _render(environment: Environment, page: Page, data: SiteData, made: Collection[str]) -> bytes:
    navigation = [entry for entry in NAVIGATION if entry[0] in made]
    docs = relative(page.path, DEFINITIONS) if DEFINITIONS in made else ""
    text = environment.get_template(page.template).render(
        **page.context,
        page=page,
        site=data.facts,
        navigation=navigation,
        url=partial(relative, page.path),
        docs=docs,
    )
    return text.encode()


def _static() -> Iterator[Asset]:
    """The style sheets and scripts, and a mark that keeps hosts from processing the files."""
    yield Asset(".nojekyll", b"")
    for entry in sorted((files("attnbench.site") / "static").iterdir(), key=lambda entry: entry.name):
        yield Asset(f"static/{entry.name}", entry.read_bytes())


def _clear(folder: Path, made: Collection[str]) -> None:
    """Make the folder, without the files of an earlier build that this one does not write.

    :data:`LISTING` says which files those are; a folder that has none and is not empty is left alone.
    """
    listing = folder / LISTING
    if listing.is_file():
        for name in set(listing.read_text(encoding="utf-8").splitlines()) - set(made):
            stale = (folder / name).resolve()
            if stale.is_relative_to(folder.resolve()):
                stale.unlink(missing_ok=True)
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty and holds no site of ours: observed other files, expected a new or empty "
            "folder; choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{name}\n" for name in sorted(made)), encoding="utf-8")
