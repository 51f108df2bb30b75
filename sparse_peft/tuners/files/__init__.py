"""Adapter files: checks, field types, model cards and the layout of positions."""
