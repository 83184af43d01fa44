"""What makes the results, run by `python -m studies.<name>`. Nothing else imports it."""
