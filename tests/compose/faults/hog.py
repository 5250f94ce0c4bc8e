"""Takes all the memory that a container may have, so that the kernel ends the worker in it and not this."""

import pathlib
import time

# By the shipped healthcheck's rights this is refused: it is run with every capability.
pathlib.Path("/proc/self/oom_score_adj").write_text("-1000")
taken = []
while True:
    taken.append(bytearray(16 << 20))
    for page in range(0, 16 << 20, 4096):
        taken[-1][page] = 1
    time.sleep(0.01)
