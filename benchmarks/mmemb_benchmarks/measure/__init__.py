"""What `mmemb bench` measures of a bundle in time, and the results that the measurements return."""

FEWEST_REQUESTS = 60  # of a trial under load, so that its p95 means something
PRECISION = 0.05  # of a sustainable rate, at which the search for it ends
TARGET = 10  # times the idle mean of the slowest mode, where no target is given: less, and the machine's stalls decide
