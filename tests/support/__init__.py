"""What works for which family and method: `checks` finds out, `table` writes it down."""
