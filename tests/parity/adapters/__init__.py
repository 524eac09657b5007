"""One module per system, with `KINDS`: kind of case -> function(case, check) that runs ours."""
