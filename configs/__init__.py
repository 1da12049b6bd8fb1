"""Experiments, one small file each. Imported by the command lines only."""
