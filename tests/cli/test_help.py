"""Help comes at once, is complete, and errors of use say what was probably meant."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest

from moduli import __version__
from moduli.cli import COMMANDS, main
from moduli.cli.options import Data, Training
from moduli.data.task import DataOptions
from moduli.methods.registry import get_method, method_names
from moduli.training.settings import FinetuneSettings

METHOD_COMMANDS = ("tune", "compare", "convert")


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(argument: str) -> None:
    code = (
        "import sys; from moduli.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'rich', 'tyro'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, argument], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (__version__ if argument == "--version" else "usage: moduli") in done.stdout


def test_python_m_moduli_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moduli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"moduli {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: moduli {command}" in text
    assert "--json" in text
    if command not in ("demo", "doctor"):
        assert "examples:" in text
    if command in METHOD_COMMANDS:
        for name in method_names():
            assert get_method(name).summary[:20] in text


def test_every_setting_of_a_method_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--model", "m", "--data", "d", "emoe", "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(get_method("emoe")):
        assert f"-{field.name.replace('_', '-')}" in text


def test_every_option_of_data_and_training_is_on_the_command_line() -> None:
    offered = {field.name for field in dataclasses.fields(Data)}
    for field in dataclasses.fields(DataOptions):
        assert ("split_seed" if field.name == "seed" else field.name) in offered
    settings = next(f for f in dataclasses.fields(Training) if f.name == "settings")
    assert settings.default_factory is FinetuneSettings


def test_defaults_of_data_options_are_the_library_s() -> None:
    assert Data(data="sentiment").data_options() == {}
    changed = Data(data="x", domains=("a",), max_test=5, split_seed=3).data_options()
    assert changed == {"domains": ("a",), "max_test": 5, "seed": 3}


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["tunee"], "'tune'"),
        (["tune", "--model", "minilm", "--data", "sentiment", "emo"], "'emoe'"),
        (["compare", "--model", "m", "--data", "sentiment", "dense", "+", "emo"], "'emoe'"),
        (["fetch", "minilmm"], "'minilm'"),
        (["methods", "desne"], "'dense'"),
        (["tune", "--model", "minilm", "--data", "sentimnt", "dense"], "'sentiment'"),
    ],
)
def test_a_wrong_name_gets_the_nearest_one(
    argv: list[str], meant: str, fails: Callable[..., str]
) -> None:
    assert f"Did you mean {meant}" in fails(2, *argv)


@pytest.mark.parametrize(
    "argv", [["tune"], ["tune", "--model", "m", "--data", "d"], ["eval", "--modle", "m"]]
)
def test_wrong_use_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().out == ""


def test_settings_of_a_method_that_cannot_work_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    method = ["emoe", "--num-experts", "4", "--top-k", "8"]
    assert main(["tune", "--model", "minilm", "--data", "nothing", *method]) == 2
    assert "top_k is 8" in capsys.readouterr().err
