"""Takes all the memory that a container may have, after offering the worker in it to the kernel first."""

import os
import pathlib
import time

for process in pathlib.Path("/proc").glob("[0-9]*"):
    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
    if parent == "1" and int(process.name) != os.getpid():
        (process / "oom_score_adj").write_text("1000")
taken = []
while True:
    taken.append(bytearray(16 << 20))
    for page in range(0, 16 << 20, 4096):
        taken[-1][page] = 1
    time.sleep(0.01)
