"""What only an Ascend card can tell: `python -m tests.ascend` tries it and writes one file to send back."""
