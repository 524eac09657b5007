"""The common model tests of the transformers that is installed, as a package that can be imported.

They are in its source archive on PyPI, but some modules that they import are not, nor is the
package `parameterized`; small stand-ins take their places.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from moduli.data.fetching import fetch_package
from moduli.data.packages import Package, Source

SHA256 = {"5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"}
FILES = ("test_configuration_common.py", "test_modeling_common.py", "test_training_mixin.py")
NAME = "transformers_tests"
STAND_INS = {
    # What the tests of configurations call common, with values unlike the defaults.
    f"{NAME}/utils/test_configuration_utils.py": """
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["AModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
""",
    # Generation has tests of our own; export has none.
    f"{NAME}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{NAME}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    # The one thing that is used of it: methods made of one method and a list of arguments.
    "parameterized.py": """
import functools
import re
import sys


class parameterized:
    @staticmethod
    def expand(cases):
        def decorate(method):
            body = sys._getframe(1).f_locals
            for i, case in enumerate(cases):
                case = case if isinstance(case, tuple) else (case,)
                name = f"{method.__name__}_{i}_{re.sub('[^a-zA-Z0-9]+', '_', str(case[0]))}"
                body[name] = _bound(method, case)

        return decorate


def _bound(method, case):
    @functools.wraps(method)
    def test(self):
        return method(self, *case)

    del test.__wrapped__  # or pytest would ask for its arguments
    return test
""",
}


def lay_out(folder: Path) -> None:
    """Write the package `transformers_tests` into a folder."""
    found = fetch_package(_package(version("transformers")))
    (folder / NAME).mkdir()
    for name in FILES:
        shutil.copyfile(found / name, folder / NAME / name)
    (folder / NAME / "__init__.py").touch()
    for name, text in STAND_INS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _package(release: str) -> Package:
    source = Source(
        package="transformers",
        version=release,
        archive=f"transformers-{release}.tar.gz",
        archive_kind="sdist",
        sha256=SHA256.get(release) or _registered_sha256(release),
        megabytes=11,
        members=tuple((f"transformers-{release}/tests/{name}", name) for name in FILES),
    )
    return Package(
        name="transformers-tests",
        kind="data",
        summary="common model tests",
        sources=(source,),
        licence="Apache-2.0, as transformers",
    )


def _registered_sha256(release: str) -> str:
    """What pip says of a release that is not the pinned one."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--no-deps", "--no-binary", "transformers", "--report", "-"]
    done = subprocess.run(
        [*command, f"transformers=={release}"], capture_output=True, text=True, check=True
    )
    archive = json.loads(done.stdout)["install"][0]["download_info"]["archive_info"]
    sha256: str = archive["hashes"]["sha256"]
    return sha256
