"""Rows of files -> examples -> token trees. Nothing here imports torch, and `datasets` only where it is used."""
