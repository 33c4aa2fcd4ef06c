"""One command a file; `main.COMMANDS` lists them."""
