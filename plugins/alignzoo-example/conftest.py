"""It is here so that pytest finds alignzoo_example.py beside it, installed or not."""
