"""The beginning of programs that measure their own memory: run in a process of its own, with `python -c`."""

WATCH = """
import re, threading, time
from pathlib import Path

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

"""
"""anonymous(): MiB of the process that are no file's. watch(), in a thread: the most that was seen of it is
`peak`, until `done`; both are the program's to set."""
