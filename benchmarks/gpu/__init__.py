"""What a card is asked in one go: eight stages, `python -m benchmarks.gpu --help`."""

#: Exit status where there is no card that could run what was asked for.
NO_CARD = 3
