"""What the program costs, against a bare interpreter and against what people use instead: `make bench`."""
