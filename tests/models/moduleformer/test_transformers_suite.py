"""transformers' own common tests of models, run on ModuleFormer.

They come from the source archive of the version that is installed. Those of generation are not in
it; ours are in `test_generation`. What they skip by themselves does not apply: other attention
implementations, rotary embeddings, tensor parallelism, several configurations in one, and what
needs a GPU or a package that is not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from tests.models.moduleformer.common_tests import lay_out

pytestmark = [pytest.mark.slow, pytest.mark.network]
ROOT = Path(__file__).parents[3]
SUITE = Path(__file__).with_name("transformers_suite.py")
SUBJECTS = (  # a test of each that must have run: the suite does not become empty unnoticed
    *("save_load", "reverse_loading_mapping", "tied_weights_keys", "can_init_all_missing_weights"),
    *("batching_equivalence", "attention_outputs", "hidden_states_output", "inputs_embeds"),
    *("retain_grad_hidden_states_attentions", "training", "output_router_logits_from_config"),
    *("training_gradient_checkpointing_use_reentrant_true", "resize_tokens_embeddings"),
    *("training_gradient_checkpointing_use_reentrant_false", "causal_lm_loss_honors_shift_labels"),
)


def test_everything_that_applies_passes(tmp_path: Path) -> None:
    lay_out(tmp_path)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-W", "ignore", "-m", "pytest", str(SUITE), "--noconftest", "-q"]
    command += ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    search = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Some of the suite's tests read warnings, which our command line turns off.
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run(
        [*command, f"--junitxml={report}"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": search, "RUN_SLOW": "1", "RUN_TRAINING_TESTS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases = ElementTree.parse(report).getroot().iter("testcase")
    passed = Counter(case.get("name") for case in cases if case.find("skipped") is None)
    assert {name: passed[f"test_{name}"] for name in SUBJECTS} == dict.fromkeys(SUBJECTS, 2)
