"""The tests. `make fast` runs those that are done in seconds, `make test` all of them."""
