"""Auto classes know our architectures, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.moduleformer import small

FIRST = {
    "moduli": "import moduli",
    "transformers": "import transformers, moduli",
    "an auto class": "from transformers import AutoModel; import moduli",
    "the base of all models": "import transformers.modeling_utils, moduli",
    "our models": "from moduli.models.moduleformer import ModuleFormerForCausalLM",
}
THEN = """
import sys
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
)
path = sys.argv[1]
assert type(AutoConfig.from_pretrained(path)).__name__ == "ModuleFormerConfig"
for auto in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
    model, found = auto.from_pretrained(path, output_loading_info=True)
    assert type(model).__name__.startswith("ModuleFormer"), type(model)
    assert set(found["missing_keys"]) <= {"score.weight"}, found
    assert model.config._experts_implementation == "moduli"
print(type(AutoModelForCausalLM.from_config(model.config)).__name__)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small.build().save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_in_every_order_of_imports(first: str, directory: Path) -> None:
    command = [sys.executable, "-c", f"{FIRST[first]}\n{THEN}", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ModuleFormerForCausalLM"


def test_importing_moduli_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, moduli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_auto_classes_alone_do_not_import_our_models() -> None:
    script = """
import sys, moduli
from transformers import AutoConfig, AutoModelForCausalLM
print("moduli.models.moduleformer.modeling" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
