"""This package's methods in PEFT's own comparison: experiments in its layout, and a driver of its scripts."""
