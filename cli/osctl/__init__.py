"""The command line `osctl`: submits runs, tells how they are, and changes them."""
