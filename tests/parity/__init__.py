"""Stored cases: inputs and outputs of the published reference code, against ours.

    python -m tests.parity FOLDER...

walks the folders for `case.json` files; system and kind come from the file, never from names.
"""
