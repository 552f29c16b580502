"""The part that runs inside the box, copied there with a bare Python. It imports the standard library only."""
