"""Published systems, one folder each; `registry` finds them, `api` applies them."""
