"""What a card is asked in one go: eight stages, `python -m benchmarks.gpu --help`."""
