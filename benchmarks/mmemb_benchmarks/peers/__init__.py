"""The same inputs and weights through the ways in which others run them, each in an environment of its own."""
