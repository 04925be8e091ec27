"""The command `fastdpo`: `cli` chooses, and each command stands in the file of its name; `options` parses for them."""
