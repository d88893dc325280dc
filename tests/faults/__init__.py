"""Faults that are made on purpose, and what became of each: one trial, one verdict.

`python -m tests.faults --tier quick|full` runs every family and writes the report; the default tests run the quick
tier family by family. Nothing of the product knows of it: faults are injected in forked children, by patching there.
"""
