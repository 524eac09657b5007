"""What experts do: records made from a model and data, tables and figures made from records."""
