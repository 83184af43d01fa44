"""Programs for people who have a model, run by `python -m tools.<name>`. Nothing imports them."""
